"""What is shown of a sweep: tables, two sweeps side by side, plots and the page."""

from html.parser import HTMLParser

import pytest
from rich.console import Console

from recgpt.scaling.experiment import Experiment, MadeUpDataset, points_of
from recgpt.scaling.parts import PARTS
from recgpt.scaling.results import FIGURES, Outcome, all_rows, summarize
from recgpt.scaling.sweep_plots import drawings
from recgpt.scaling.sweep_report import sweep_report
from recgpt.scaling.sweep_tables import comparison, markdown, rich_table, sweep_tables

DATASET = MadeUpDataset(10, 20, (3,))
EXPERIMENT = Experiment(dataset=DATASET, grid={"deepspeed": ["zero1", "<i>zero</i>"], "workers": [1, 2]})


def measured(step, tokens):
    figures = dict.fromkeys(FIGURES)
    figures |= {f"{part}_seconds": 0.0 for part in PARTS}
    figures |= {"forward_seconds": step / 4, "rest_seconds": 3 * step / 4, "step_seconds": step}
    figures |= {"tokens_per_second": tokens, "flops_per_second": 2e9, "matrix_rate_share": 0.125}
    return Outcome(None, {**figures, "sent_bytes_per_step": 2**19, "memory_bytes": 300 * 2**20})


def rows_of(outcomes, experiment=EXPERIMENT):
    points = points_of(experiment, "mine")
    return all_rows(points, ["data"] * len(points), outcomes)


OUTCOMES = {
    (0, 0): measured(0.010, 1000.0),
    (0, 1): measured(0.012, 1200.0),
    (1, 0): measured(0.008, 1650.0),
    (2, 0): Outcome("rank 0 of 1: <b>broken</b> | pipe", {}),
}


@pytest.fixture
def summaries():
    keys, rows = rows_of(OUTCOMES)
    return summarize(rows, keys)


def test_a_table_of_what_was_measured(summaries):
    table, parts, failed = sweep_tables(summaries)
    header = ["deepspeed", "workers", "ms a step", "tokens/s", "GFLOP/s", "of the matrix rate"]
    assert table.header == [*header, "MiB a rank sends", "MiB of a rank", "efficiency"]
    assert table.rows == [
        ["zero1", "1", "11.00 (10.00 to 12.00)", "1,100", "2.00", "12.5%", "0.50", "300", "100%"],
        ["zero1", "2", "8.00", "1,650", "2.00", "12.5%", "0.50", "300", "75%"],
    ]
    assert parts.header == ["deepspeed, workers", "zero1 1", "zero1 2"]
    assert parts.rows == [
        ["forward", "2.75", "2.00"],
        ["rest", "8.25", "6.00"],
        ["together", "11.00", "8.00"],
    ]
    assert failed.rows == [["deepspeed=<i>zero</i> workers=1", "rank 0 of 1: <b>broken</b> | pipe"]]


def test_the_same_in_markdown_and_for_the_terminal(summaries, capsys):
    tables = sweep_tables(summaries)
    text = markdown(tables)
    assert "| zero1 | 2 | 8.00 | 1,650 | 2.00 | 12.5% | 0.50 | 300 | 75% |" in text
    assert "| --- | --- | ---: |" in text
    assert r"<b>broken</b> \| pipe" in text
    console = Console(width=150)
    for table in tables:
        console.print(rich_table(table))
    assert "8.00" in capsys.readouterr().out


def test_two_sweeps_side_by_side():
    _, before = rows_of({(0, 0): measured(0.010, 1000.0), (1, 0): measured(0.020, 500.0)})
    after_outcomes = {(0, 0): measured(0.008, 1250.0), (0, 1): measured(0.006, 1600.0)}
    _, after = rows_of(after_outcomes | {(2, 0): measured(1.0, 1.0), (1, 0): Outcome("lost", {})})
    both, alone = comparison(("old", "new"), before, after)
    (row,) = both.rows
    assert row[:7] == ["deepspeed=zero1 workers=1", "10.00", "7.00", "0.70", "1,000", "1,425", "1.43"]
    assert row[7:] == ["0.50", "0.50", "1.00", "300", "300", "1.00"]
    assert alone.rows == [["deepspeed=zero1 workers=2", "old"], ["deepspeed=<i>zero</i> workers=1", "new"]]
    assert "A: old. B: new." in both.note


def test_plots_on_the_page_and_as_files(summaries):
    plots = drawings(summaries)
    assert [plot.name for plot in plots] == ["step_time", "tokens_per_second", "efficiency", "parts"]
    for plot in plots:
        files = plot.files()
        assert files[f"{plot.name}.png"].startswith(b"\x89PNG")
        assert b"<svg" in files[f"{plot.name}.svg"]
        assert plot.files() == files, "the same figures give the same files"
        assert "<svg" in plot.for_page().svg


def test_points_are_drawn_along_a_key_of_numbers_in_their_order():
    experiment = Experiment(dataset=DATASET, grid={"deepspeed": ["zero1"], "items": [1000, 30, 200]})
    keys, rows = rows_of({(number, 0): measured(0.01, 1000.0) for number in range(3)}, experiment)
    svg = str(drawings(summarize(rows, keys))[0].for_page().svg)
    places = [svg.index(f">{text}<") for text in ("30", "200", "1,000")]
    assert places == sorted(places)


def test_a_key_that_goes_with_the_swept_one_makes_no_line_of_its_own():
    told = [{"lengths": [4], "model.max_history": 4}, {"lengths": [8], "model.max_history": 8}]
    keys, rows = rows_of(
        {(0, 0): measured(0.01, 1.0), (1, 0): measured(0.02, 1.0)}, Experiment(dataset=DATASET, points=told)
    )
    svg = str(drawings(summarize(rows, keys))[0].for_page().svg)
    assert ">model.max_history<" in svg, "of two that go together the one with numbers is the axis"
    assert "lengths" not in svg


def test_one_point_is_not_drawn(summaries):
    assert drawings(summaries[:1]) == []


def test_the_page_holds_everything_and_no_markup_from_the_data(summaries):
    tables, plots = sweep_tables(summaries), drawings(summaries)
    page = sweep_report("weak & co", EXPERIMENT, {"cpus": 2}, summaries, tables, plots)
    assert page == sweep_report("weak & co", EXPERIMENT, {"cpus": 2}, summaries, tables, plots)
    assert "Scaling experiment weak &amp; co" in page
    assert "<i>zero" not in page
    assert "&lt;b&gt;broken&lt;/b&gt; | pipe" in page
    assert page.count("<svg") == 4
    assert "<script" not in page
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert not [tag for tag, attributes in tags if tag in ("link", "img") or "src" in attributes]
