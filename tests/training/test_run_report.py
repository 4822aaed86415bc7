"""The report on a run: its figures are there, what is missing is said, nothing from files becomes markup."""

import json
import re
import shutil
import subprocess
from html import escape

import pyarrow as pa
import pytest

from recgpt import storage
from recgpt.config import RecallSettings
from recgpt.errors import UserError
from recgpt.retrieval.candidates import MadeFrom, finish, manifest_of, read_manifest, write_part
from recgpt.training.run_candidates import TitleFile, example_users
from recgpt.training.run_report import Sources, html_report, read_quality
from tests.data.test_report import Page
from tests.evaluation.test_report import example
from tests.training.test_run_curves import train
from tests.training.test_runs import validation, write_run

HOSTILE = "<script>alert(1)</script>" + 90 * "x"  # markup, and longer than any line
HISTORIES = {f"u{number}{HOSTILE}": [f"i{number}", "i0", f"i9{HOSTILE}"] for number in range(4)}
LINES = [
    train(20, seconds=160.0, loss=7.0, learning_rate=0.001, waiting_share=0.1, gradient_norm=2.0),
    validation(1, 0.125),
    train(40, "prompt_tune", seconds=200.0, loss=6.0, targets_per_second=1000.0),
    validation(2, 0.25, "prompt_tune"),
]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# The page in a frame of some width, with all opened that is folded, and how wide what it holds is.
MEASURING_PAGE = """<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{html}"></iframe>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach(details => details.open = true);
  document.title = `${{page.documentElement.clientWidth}} ${{page.documentElement.scrollWidth}}`;
}}</script>"""


@pytest.fixture(scope="module")
def folder(write_dataset, tmp_path_factory):
    """A finished run with its dataset, candidates, evaluation and titles, none of which means well."""
    place = tmp_path_factory.mktemp("report")
    (place / "dataset").mkdir()
    dataset = write_dataset(place / "dataset", HISTORIES)
    vocabulary = dataset.manifest.vocabulary_fingerprint
    told = {"seed": 3, "workers": 2, "deepspeed": HOSTILE, "data": {"tokens_per_batch": 9000}}
    run = write_run(place / "run", LINES, **told)
    settings = storage.read_json(f"{run}/settings.json")
    storage.write_json(f"{run}/settings.json", {**settings, "dataset_fingerprint": dataset.fingerprint})
    about = {"dataset": dataset.url, "vocabulary_fingerprint": vocabulary}
    storage.write_json(f"{run}/manifest.json", about)
    machine = {"device": HOSTILE, "memory_bytes": 8_000_000_000, "cpus": 2, "commit": None}
    storage.write_json(f"{run}/environment.json", machine)

    users = dataset.read_row_group(dataset.row_groups[0])["user_id"]
    columns = {
        "user_id": users,
        "item_ids": [["i0", f"i9{HOSTILE}"], ["i0", "i1"], ["i0"], ["i0"]],
        "scores": pa.array([[1.5, 0.25], [2, 1], [1], [1]], pa.list_(pa.float32())),
        "steps": pa.array([[1, 2], [1, 2], [1], [1]], pa.list_(pa.int8())),
    }
    files = [write_part(str(place / "candidates"), 0, pa.table(columns))]
    made_from = MadeFrom("model", "m", dataset.url, dataset.fingerprint, vocabulary)
    finish(str(place / "candidates"), manifest_of(files, RecallSettings(2, (1, 1)), made_from))
    result = {**example([18, 2]), "model": HOSTILE, "vocabulary_fingerprint": vocabulary}
    (place / "metrics.json").write_text(json.dumps(result))
    (place / "items.csv").write_text(f'item_id,title\ni0,"{HOSTILE}, the title"\n')
    return place


def everything(folder, **changed):
    sources = {
        "evaluation": str(folder / "metrics.json"),
        "candidates": str(folder / "candidates"),
        "titles": TitleFile(str(folder / "items.csv"), "item_id", "title"),
        "num_examples": 2,
        "price_per_hour": 10.0,
    }
    return Sources(**{**sources, **changed})


@pytest.fixture(scope="module")
def html(folder):
    return html_report(str(folder / "run"), everything(folder))


def test_the_figures_stand_there(html):
    page = Page(html)
    for words in (
        "state finished 40 steps",
        "best ndcg@10, pre-training 0.1250 validation, epoch 1 of 1",
        "best ndcg@10, prompt-tuning 0.2500 validation, epoch 2 of 2",
        "training steps took 6.0 min 2 workers",
        "cost of the training steps 2.00 0.1 h × 2 workers × 10 an hour",
        "test split, leave_one_out, 1,234 users, lists of 20, seen items: mask; served with quotas 18, 2.",
        "RecGPT, one step 0.3000",
        "Served list against one step, hit_rate@20: +0.0012 (95 % interval -0.0003 to +0.0021).",
        "More curves of the training steps: 1 Gradient norm",
        "users 4 items 5 interactions 12 median history 3 mean 3.0, longest 3",
        "seed 3 workers 2 deepspeed",
        "memory_bytes 8.0 GB cpus 2 commit not set",
    ):
        assert words in page.text
    assert page.text.index("Told otherwise") < page.text.index("data.tokens_per_batch 9000")
    assert page.text.count("model.width 128") == 1  # a default: among all settings alone
    assert page.tags["svg"] == 7  # five, for no hit rate was validated; the further one, and the candidates'


def test_candidates_and_users(html):
    text = Page(html).text
    # Of 5 items 3 occur; each item of the log counts once, so that all have the place in the middle.
    assert "items that occur, of the catalogue 60.0% 100.0%" in text
    assert "share of the 1% of items that occur most 66.7% 20.0%" in text
    assert "mean popularity rank (1 to 5) 3.0 3.0" in text
    assert f"step score item 1 2.0000 i0 {HOSTILE}, the title 2 1.0000 i1" in text
    assert "History, the newest last item" in text  # the log has no times


def test_nothing_from_files_is_markup(html):
    assert HOSTILE not in html
    page = Page(html)
    assert page.tags["script"] == 0
    for words in (f"i9{HOSTILE}", f"{HOSTILE}, the title", f"device {HOSTILE}", f"Model: {HOSTILE}"):
        assert words in page.text
    assert any(f"User {user}" in page.text for user in HISTORIES)


def test_the_page_needs_nothing_beside_it(html):
    page = Page(html)
    assert page.resources
    assert all(target.startswith("#") for target in page.resources)
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.resources} <= set(page.ids)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is here")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_its_window(html, tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text(MEASURING_PAGE.format(width=width, html=escape(html)))
    call = [BROWSER, *HEADLESS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(call, check=True, capture_output=True, text=True, timeout=120).stdout
    window, content = map(int, re.search(r"<title>(\d+) (\d+)</title>", shown).groups())
    assert width - 20 <= window <= width  # but for a scroll bar
    assert content == window


def test_the_same_files_give_the_same_page(folder, html):
    assert html_report(str(folder / "run"), everything(folder)) == html


def test_a_run_alone(tmp_path):
    run = write_run(tmp_path / "begun")
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    page = Page(html_report(run, Sources()))
    assert "state unfinished 0 steps" in page.text
    assert f"recgpt evaluate --model {run} --dataset DATASET --json FILE" in page.text
    assert f"recgpt generate --model {run} --dataset DATASET --output FOLDER" in page.text
    for option in ("--evaluation", "--candidates", "--dataset", "--price-per-hour"):
        assert option in page.text
    assert "All are the defaults." in page.text
    assert "this run has no environment.json" in page.text
    assert page.tags["svg"] == 0


def test_example_users_are_spread_over_the_folder(folder):
    url = str(folder / "candidates")
    manifest = read_manifest(url)
    every = example_users(url, manifest, 9)
    assert sorted(every) == sorted(HISTORIES)
    assert example_users(url, manifest, 2) == [every[1], every[3]]
    assert example_users(url, manifest, 0) == []


def test_another_dataset_is_refused(folder, write_dataset, tmp_path):
    other = write_dataset(tmp_path, {"u": ["i0"]})
    with pytest.raises(UserError, match="not the dataset of .*run; give that one with --dataset"):
        html_report(str(folder / "run"), Sources(dataset=other.url))


def test_a_dataset_that_has_moved(folder, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(folder / "run", run)
    shutil.copytree(folder / "dataset", moved)
    (run / "metrics.jsonl").write_text("")
    about = storage.read_json(str(run / "manifest.json"))
    storage.write_json(str(run / "manifest.json"), {**about, "dataset": str(tmp_path / "gone")})
    assert "it has changed or moved. Give it with --dataset" in Page(html_report(str(run), Sources())).text
    found = Page(html_report(str(run), Sources(dataset=str(moved))))
    assert "users 4 items 5 interactions 12" in found.text


def test_what_was_made_with_another_vocabulary_is_refused(folder, tmp_path):
    result = storage.read_json(str(folder / "metrics.json"))
    storage.write_json(str(tmp_path / "other.json"), {**result, "vocabulary_fingerprint": "other"})
    with pytest.raises(UserError, match="other.json: of another vocabulary than the run"):
        html_report(str(folder / "run"), Sources(evaluation=str(tmp_path / "other.json")))


@pytest.mark.parametrize(
    "changed", [{"k": "x"}, {"one_step": 3}, {"baselines": {"markov": {}}}, {"quotas": None}]
)
def test_a_file_that_is_no_evaluation(folder, tmp_path, changed):
    result = storage.read_json(str(folder / "metrics.json"))
    storage.write_json(str(tmp_path / "x.json"), {**result, **changed})
    with pytest.raises(UserError, match="x.json: not a result of `recgpt evaluate`"):
        read_quality(str(tmp_path / "x.json"))
