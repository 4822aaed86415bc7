"""Credentials, in the environment or by mistake in a URL, are in nothing that any verb writes or prints."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from ray_jobs import cli

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

# `tests/conftest.py` plants credentials in the environment; these come in a URL. A secret may hold a slash.
SECRET_URL = "s3://PLANTEDACCESSKEY:planted/secret+key=@bucket/folder"
TINY = """
model: {width: 8, members: 1, layers: 1, heads: 1, max_history: 8}
data: {tokens_per_batch: 64, lanes: 1}
pretrain: {max_epochs: 1}
prompt_tune: {max_epochs: 1}
recall: {k: 4, quotas: [3, 1]}
"""
LOG = "user_id,item_id,timestamp\n" + "".join(
    f"u{user},i{(user + day) % 10},{1_700_000_000 + 86_400 * day}\n" for user in range(24) for day in range(6)
)
VERBS = {
    "prepare": "--input {log} --output {new}",
    "train": "--dataset {dataset} --output {new} --config {config}",
    "evaluate": "--model {run} --dataset {dataset} --json {new}",
    "index": "--model {run} --dataset {dataset} --output {new} --kind hnsw",
    "generate": "--model {run} --dataset {dataset} --output {new} --index {index}",
    "verify-candidates": "{candidates}",
    "show": "--candidates {candidates} --user u3 --items {items}",
}


def run(verb, options, expected_status=0):
    """Run a verb in this process, with its traceback if it fails; returns all that it prints."""
    printed = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr("sys.argv", ["recgpt", verb, *options, "--debug"])
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code
    assert status == expected_status, printed.getvalue()
    return printed.getvalue()


class Paths:
    def __init__(self, folder):
        for name in ("log", "dataset", "run", "index", "candidates", "config", "items", "new"):
            setattr(self, name, str(folder / name))

    def options(self, verb, **others):
        return [option.format(**{**vars(self), **others}) for option in VERBS[verb].split()]


@pytest.fixture(scope="module")
def made(tmp_path_factory, local_ray):
    """What all verbs leave, one after the other; and what they printed."""
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("made")
    paths = Paths(folder)
    Path(paths.log).write_text(LOG + "u1,,1700000000\n")
    Path(paths.config).write_text(TINY)
    Path(paths.items).write_text("item_id,title\n" + "".join(f"i{item},title {item}\n" for item in range(10)))
    results = {
        "prepare": paths.dataset,
        "train": paths.run,
        "index": paths.index,
        "generate": paths.candidates,
    }
    printed = [
        run(verb, paths.options(verb, new=results.get(verb, f"{folder}/{verb}")))
        for verb in ("prepare", "train", "evaluate", "index", "generate", "verify-candidates", "show")
    ]
    append = ["--append", paths.dataset, "--output", f"{folder}/grown"]
    printed.append(run("prepare", ["--input", paths.log, *append]))
    return folder, printed


@pytest.mark.slow
def test_no_verb_writes_or_prints_credentials_of_the_environment(made):
    import ray

    folder, printed = made
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for place in (folder, logs) for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"report.html", "settings.json", "metrics.jsonl", "_manifest.json", "index.faiss"} <= names
    assert [str(path) for path in files if b"planted" in path.read_bytes().lower()] == []
    assert [text for text in printed if "planted" in text.lower()] == []


def positions():
    """Every option of every verb that takes a path, by the name it has in ``VERBS``."""
    for verb, options in VERBS.items():
        for option in options.split():
            if option.startswith("{"):
                yield verb, option[1:-1]


@pytest.mark.parametrize(("verb", "name"), positions())
def test_a_url_with_credentials_is_refused_and_not_shown(tmp_path, request, verb, name):
    """The other paths need not be there: such a URL is refused before anything is read from it."""
    folder = tmp_path
    paths = Paths(folder)
    if name not in ("log", "dataset", "candidates", "model", "run"):
        paths = Paths(request.getfixturevalue("made")[0])
    paths.new = str(folder / "new")
    printed = run(verb, paths.options(verb, **{name: SECRET_URL}), expected_status=2)
    assert "planted" not in printed.lower()
    assert not (folder / "new").exists()
    last = printed.strip().splitlines()[-1]
    assert last.startswith("recgpt: error: ")


@pytest.mark.parametrize(
    "option",
    [["--set", f"deepspeed={SECRET_URL}"], ["--set", f"seed={SECRET_URL}"], ["--start-from", SECRET_URL]],
)
def test_settings_with_credentials_are_refused_and_not_shown(made, tmp_path, option):
    paths = Paths(made[0])
    options = paths.options("train", new=str(tmp_path / "new"))
    assert "planted" not in run("train", [*options, *option], expected_status=2).lower()
    assert not (tmp_path / "new").exists()
