"""The data report: its figures stand there, nothing of the data becomes markup, nothing is fetched."""

import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from recgpt.data import histories, interactions
from recgpt.data.dataset import Ancestor, BadFile, DatasetManifest
from recgpt.data.report import REASONS, html_report, terminal_report
from recgpt.data.summary import BadRow, DataSummary

HOSTILE = "<script>alert(1)</script>.csv"
# Elements without an end tag.
VOID = {"meta"}

MANIFEST = DatasetManifest(
    schema_version=1,
    num_users=1_000,
    num_items=60,
    num_interactions=9_000,
    has_timestamps=True,
    time_unit="seconds",
    user_id_type="int64",
    item_id_type="string",
    vocabulary_fingerprint="ab" * 32,
    time_quantiles={"0.8": 1, "0.9": 2},
    sources=[{"path": "logs/a.csv", "format": "csv", "bytes": 2_000_000}],
    settings={"format": "auto", "events": ["view", "buy"], "since": None},
    dropped={"missing_values": 0, "bad_values": 1, "duplicates": 2_999, "cosmic_rays": 6_000},
    files=[],
)
SUMMARY = DataSummary(
    interactions_per_day={"2024-02-28": 4_000, "2024-03-01": 5_000},
    users_by_length={4: 500, 9: 400, 34: 100},
    item_counts=[(1, 3_000), (10, 300), (60, 2)],
    cold_item_share=0.25,
    cold_interaction_share=0.0004,
    new_item_share=0.125,
)


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, html):
        super().__init__()
        self.tags = Counter()
        self.ids = []
        self.resources = []
        self.words = []
        self.open = []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.ids += [value for name, value in attributes if name == "id"]
        self.resources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.open += [tag] * (tag not in VOID)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page(manifest, summary=SUMMARY, bad_rows=()):
    return Page(html_report(manifest, summary, bad_rows))


def terminal(manifest=MANIFEST, summary=SUMMARY):
    console = Console(file=io.StringIO(), width=120)
    console.print(terminal_report(manifest, summary))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def html():
    return html_report(MANIFEST, SUMMARY, [])


def test_page_shows_the_figures(html):
    report = Page(html)
    for words in (
        "users 1,000",
        "items 60",
        "interactions 9,000 50.0% of 18,000 rows read",
        "median history 6.5 mean 9.0, longest 34",
        "time span 3 days 2024-02-28 to 2024-03-01",
        "cold items 25.0% have fewer than 5 interactions; <0.1% of interactions are with them",
        "new items 12.5%",
        "the same user, item and time as another row duplicates 2,999 16.7%",
        "cosmic rays cosmic_rays 6,000 33.3%",
        "broken value bad_values 1 <0.1%",
        "logs/a.csv csv 2.0 MB",
        "events view, buy since not set",
    ):
        assert words in report.text
    assert report.text.index("cosmic rays") < report.text.index("another row")  # the largest first
    assert "missing" not in report.text  # no row was dropped for this reason
    assert report.tags["svg"] == 3
    for label in ("2024-02-28", "interactions per day", "interactions in the history", "rank of the item"):
        assert label in report.words  # text in a plot is text


def test_terminal_shows_the_figures():
    lines = [" ".join(line.replace("│", " ").split()) for line in terminal().splitlines()]
    for line in (
        "users 1,000",
        "interactions 9,000 50.0% of 18,000 rows read",
        "median history 6.5 mean 9.0, longest 34",
        "time span 3 days 2024-02-28 to 2024-03-01",
        "cosmic rays 6,000 33.3%",
        "broken value 1 <0.1%",
    ):
        assert line in lines


def test_page_needs_nothing_beside_it(html):
    report = Page(html)
    assert report.resources  # tick marks in the plots
    assert all(target.startswith("#") for target in report.resources)
    assert not report.tags.keys() & {"script", "link", "img", "iframe"}
    assert not re.search(r"@import|url\((?!#)", html)


def test_ids_are_unique_and_there(html):
    report = Page(html)
    assert len(report.ids) == len(set(report.ids))
    assert {target[1:] for target in report.resources} <= set(report.ids)


def test_same_dataset_gives_the_same_page(html, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31)  # a user's own matplotlibrc
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert html_report(MANIFEST, SUMMARY, []) == html
    assert matplotlib.rcParams["font.size"] == 31


def test_names_from_the_data_are_no_markup():
    manifest = replace(
        MANIFEST,
        sources=[{"path": HOSTILE, "format": "csv", "bytes": 1}],
        settings={HOSTILE: HOSTILE},
        dropped={HOSTILE: 1},
        bad_files=[BadFile(HOSTILE, HOSTILE, 1)],
        lineage=[Ancestor(HOSTILE, HOSTILE, HOSTILE, 1, 1)],
    )
    html = html_report(manifest, SUMMARY, [BadRow(HOSTILE, 1, HOSTILE)])
    assert HOSTILE not in html
    report = Page(html)
    assert report.tags["script"] == 0
    assert report.text.count(HOSTILE) == 10  # the reason stands there as key and in words


def test_terminal_takes_nothing_from_the_data_as_command():
    text = terminal(replace(MANIFEST, bad_files=[BadFile("[red]a[/b].csv", "\x1b[2J\udcff", 1)]))
    assert "[red]a[/b].csv" in text
    assert "\x1b" not in text
    assert "\udcff" not in text


def test_file_name_that_is_not_utf8():
    manifest = replace(MANIFEST, sources=[{"path": "a\udcff.csv", "format": "csv", "bytes": 1}])
    assert b"a?.csv" in html_report(manifest, SUMMARY, []).encode()


def test_long_lists_are_cut():
    bad_files = [BadFile(f"bad-{number}.parquet", "no footer", number) for number in range(130)]
    sources = [{"path": f"good-{n}.csv", "format": "csv", "bytes": 1} for n in range(1_060)]
    report = page(replace(MANIFEST, bad_files=bad_files, sources=sources))
    assert "bad-99.parquet 99 Bytes no footer and 30 more" in report.text
    assert "good-49.csv csv 1 Byte and 1,010 more" in report.text
    text = terminal(replace(MANIFEST, bad_files=bad_files))
    assert "bad-4.parquet" in text
    assert "bad-5.parquet" not in text
    assert "and 125 more" in text


def test_bad_rows_and_lineage():
    manifest = replace(MANIFEST, lineage=[Ancestor("data/monday", "12ab34cd56ef78", "", 50, 4_000)])
    report = page(manifest, SUMMARY, [BadRow("logs/a.csv", 90_211, "timestamp: no number")])
    assert "logs/a.csv 90,211 timestamp: no number" in report.text
    assert "data/monday 50 4,000 12ab34cd56ef" in report.text
    assert report.text.count("18,000 rows read, the older dataset's included") == 2
    assert "18,000 rows read, the older dataset's included" in terminal(manifest)


@pytest.mark.parametrize(
    ("has_timestamps", "why"),
    [
        (False, "the log gives an order but no times"),
        (True, "the log's times are plain numbers, which belong to no day"),
    ],
)
def test_log_without_days(has_timestamps, why):
    manifest = replace(MANIFEST, has_timestamps=has_timestamps)
    new_item_share = 0.5 if has_timestamps else None
    summary = replace(SUMMARY, interactions_per_day={}, new_item_share=new_item_share)
    report = page(manifest, summary)
    assert f"Interactions per day Not shown: {why}." in report.text
    assert report.tags["svg"] == 2
    assert ("new items" in report.text) == has_timestamps
    assert why in terminal(manifest, summary)


def test_smallest_dataset():
    manifest = replace(MANIFEST, num_users=1, num_items=1, num_interactions=1, dropped={"duplicates": 0})
    summary = DataSummary({"2024-01-01": 1}, {1: 1}, [(1, 1)], 1.0, 1.0, 1.0)
    report = page(manifest, summary)
    assert "time span 1 day 2024-01-01" in report.text
    assert "median history 1 mean 1.0, longest 1" in report.text
    assert "100.0% of 1 rows read" in report.text
    assert "Nothing: every row read is in the dataset." in report.text
    assert "left out" not in terminal(manifest, summary)


def test_long_spans_and_long_histories_are_summed_up():
    first = np.datetime64("2020-01-01")
    days = {str(first + 7 * week): 700 for week in range(200)}
    lengths = dict.fromkeys(range(1, 10_001), 1)
    report = page(MANIFEST, replace(SUMMARY, interactions_per_day=days, users_by_length=lengths))
    assert "Means of 7 days each." in report.text
    assert "In steps of 159. Not shown: 4.6% of users, with histories of up to 10,000." in report.text
    assert "2023-10-25" in report.words  # the last day


def test_every_reason_of_the_preparation_has_its_words():
    known = {
        *(interactions.MISSING_VALUES, interactions.BAD_VALUES),
        *(interactions.OTHER_EVENTS, interactions.OUTSIDE_TIME_WINDOW),
        *(histories.DUPLICATES, histories.REPEATS, histories.OVER_MAX_HISTORY),
    }
    assert known < REASONS.keys()
