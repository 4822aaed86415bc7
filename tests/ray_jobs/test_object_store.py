"""Every verb with its data on an object store: an S3 server over HTTP."""

import io
import json
import socket
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pytest

from ray_jobs import cli
from recgpt import storage
from recgpt.object_store import PatientS3FileSystem
from recgpt.retrieval.candidates import read_candidates
from tests.ray_jobs.logs import histories_by_user

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

USERS, DAYS, ITEMS = 24, 6, 10
CHOSEN = [3, 5, 8]
WALKS = {user: [f"item-{(user + day) % ITEMS}" for day in range(DAYS)] for user in range(USERS)}
TINY = """
model: {width: 8, members: 1, layers: 1, heads: 1, max_history: 8, user: {kind: none}}
data: {tokens_per_batch: 64, lanes: 1}
pretrain: {max_epochs: 1}
prompt_tune: {max_epochs: 1}
recall: {k: 4, quotas: [3, 1]}
"""


def write_log(url):
    """A file per day, with the date in the name of its folder alone; what is no log beside them."""
    for day in range(DAYS):
        rows = [f"{user},{walk[day]}\n" for user, walk in WALKS.items()]
        file = storage.join(url, f"date=2026-01-0{day + 1}", "rows.csv")
        storage.write_bytes(file, ("user_id,item_id\n" + "".join(rows)).encode())
    storage.write_bytes(storage.join(url, "_SUCCESS"), b"")


def files(url):
    """The bytes of all files of a folder, by name."""
    filesystem, path = storage.filesystem_and_path(str(url))
    names = [name for name in filesystem.find(path) if not name.endswith("/")]
    return {name[len(path) + 1 :]: filesystem.cat_file(name) for name in names}


def copy(source, target):
    """Copy a file or a folder."""
    for name, data in files(source).items():
        storage.write_bytes(storage.join(str(target), name).rstrip("/"), data)


def start(*arguments, printed=None):
    """Run a verb as its command line does, in this process with its Ray; returns what it printed."""
    printed = printed or io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr("sys.argv", ["recgpt", *map(str, arguments)])
        cli.main()
    return printed.getvalue()


class Paths:
    """Where the data of these tests lie, and all that the verbs printed."""

    def __init__(self, bucket):
        self.bucket = bucket
        for name in ("log", "dataset", "run", "users", "candidates", "metrics"):
            setattr(self, name, storage.join(bucket, "tests", name))
        self.printed = []


@pytest.fixture(scope="module")
def paths(make_bucket, local_ray):
    """A dataset that was prepared from the store into the store."""
    paths = Paths(make_bucket())
    write_log(paths.log)
    options = ["--input", paths.log, "--output", paths.dataset, "--time-column", "date"]
    paths.printed.append(start("prepare", *options))
    return paths


@pytest.fixture(scope="module")
def trained(paths, tmp_path_factory):
    """A model that was trained on it."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(TINY)
    options = ["--dataset", paths.dataset, "--output", paths.run, "--config", config]
    paths.printed.append(start("train", *options))
    return paths


@pytest.fixture(scope="module")
def served(trained):
    """Metrics of that model, and its candidates for some users, in the place of older ones for others."""
    storage.write_bytes(trained.users, "".join(f"{user}\n" for user in CHOSEN).encode())
    storage.write_bytes(storage.join(trained.candidates, "part-00007.parquet"), b"older")
    storage.write_bytes(storage.join(trained.candidates, "_SUCCESS"), b"")
    inputs = ["--model", trained.run, "--dataset", trained.dataset]
    outputs = ["--users", trained.users, "--output", trained.candidates, "--overwrite"]
    trained.printed.append(start("generate", *inputs, *outputs))
    trained.printed.append(start("evaluate", *inputs, "--json", trained.metrics))
    return trained


def test_the_histories_are_those_of_the_log(paths):
    items = {
        user: [item for item, _ in history] for user, history in histories_by_user(paths.dataset).items()
    }
    assert items == WALKS


@pytest.mark.parametrize("place", ["s3 to local", "local to s3", "glob to s3"])
def test_a_dataset_is_the_same_wherever_log_and_output_lie(paths, s3_bucket, tmp_path, place):
    output = tmp_path / "dataset" if place == "s3 to local" else storage.join(s3_bucket, "dataset")
    log = tmp_path / "log" if place == "local to s3" else paths.log
    if place == "local to s3":
        write_log(str(log))
    pattern = storage.join(paths.log, "date=*", "*.csv") if place == "glob to s3" else log
    start("prepare", "--input", pattern, "--output", output, "--time-column", "date")
    expected, made = files(paths.dataset), files(output)
    assert set(made) == set(expected)
    assert {name for name in made if made[name] != expected[name]} <= {"manifest.json", "report.html"}
    first, second = (json.loads(some["manifest.json"]) for some in (made, expected))
    sources = [source["path"] for source in first.pop("sources")]
    assert sources == [source["path"].replace(paths.log, str(log)) for source in second.pop("sources")]
    assert first == second


@pytest.mark.slow
def test_a_run_leaves_what_a_local_one_leaves_but_for_tensorboard(trained):
    left = ["attempt.json", "checkpoints", "environment.json", "logs", "manifest.json", "metrics.jsonl"]
    left += ["model", "settings.json"]
    assert storage.list_names(trained.run) == left
    manifest = storage.read_json(storage.join(trained.run, "manifest.json"))
    assert list(manifest["stages"]) == ["pretrain", "prompt_tune"]
    checkpoints = storage.list_names(storage.join(trained.run, "checkpoints"))
    assert {stage["checkpoint"] for stage in manifest["stages"].values()} <= set(checkpoints)


@pytest.mark.slow
def test_candidates_are_those_of_local_copies(served, tmp_path):
    for name in ("dataset", "run", "users"):
        copy(getattr(served, name), tmp_path / name)
    inputs = ["--model", tmp_path / "run", "--dataset", tmp_path / "dataset", "--users", tmp_path / "users"]
    start("generate", *inputs, "--output", tmp_path / "candidates")
    table = pa.concat_tables(read_candidates(served.candidates))
    assert sorted(table["user_id"].to_pylist()) == CHOSEN
    stored, local = files(served.candidates), files(tmp_path / "candidates")
    assert set(stored) == set(local)
    assert [name for name in stored if stored[name] != local[name]] == ["_manifest.json"]


@pytest.mark.slow
def test_nothing_is_left_beside_what_was_finished(served):
    names = ["candidates", "dataset", "log", "metrics", "run", "users"]
    assert storage.list_names(storage.join(served.bucket, "tests")) == names
    metrics = storage.read_json(served.metrics)
    assert (metrics["num_users"], metrics["model"]) == (USERS, storage.join(served.run, "model"))


@pytest.mark.slow
def test_credentials_are_in_nothing_that_was_written_or_printed(served):
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = {str(file): file.read_bytes() for file in logs.rglob("*") if file.is_file()}
    assert len(texts) > 5
    texts |= files(served.bucket)
    texts |= {f"printed {number}": text.encode() for number, text in enumerate(served.printed)}
    assert [name for name, text in texts.items() if b"planted" in text.lower()] == []


@pytest.fixture
def denied(object_store):
    """Within the test, the store lets nobody in whom it does not know, and it knows nobody."""
    _let_in(object_store, first_requests="0")
    yield
    _let_in(object_store, first_requests="inf")


def _let_in(object_store, first_requests):
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(
        f"{object_store}/moto-api/reset-auth", first_requests.encode(), headers, method="POST"
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


@pytest.fixture
def nobody_listens(monkeypatch):
    """Within the test, the environment names a store at a port where nothing listens."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port.getsockname()[1]}")
        monkeypatch.setenv("RECGPT_STORE_PATIENCE_SECONDS", "0")
        PatientS3FileSystem.clear_instance_cache()
        yield
        PatientS3FileSystem.clear_instance_cache()


def error_of(*arguments):
    """The one line that a verb prints when it fails with status 2; no credentials are in it."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stopped:
        start(*arguments, printed=printed)
    assert stopped.value.code == 2
    assert "planted" not in printed.getvalue().lower()
    lines = [line for line in printed.getvalue().splitlines() if "/s]" not in line]  # without bars
    assert len(lines) == 1, lines
    return lines[0]


VERBS = {
    "prepare": ["--input", "{log}", "--output", "{output}"],
    "train": ["--dataset", "{dataset}", "--output", "{output}"],
    "generate": ["--model", "{run}", "--dataset", "{dataset}", "--output", "{output}"],
    "evaluate": ["--model", "{run}", "--dataset", "{dataset}", "--json", "{output}"],
}


def filled(verb, paths, output, **others):
    return [verb, *(option.format(output=output, **{**vars(paths), **others}) for option in VERBS[verb])]


@pytest.mark.parametrize("verb", VERBS)
def test_a_store_that_is_not_there_is_one_line(paths, nobody_listens, verb):
    line = error_of(*filled(verb, paths, storage.join(paths.bucket, "out")))
    assert "Could not connect to the endpoint URL" in line
    assert line.endswith("check the network and AWS_ENDPOINT_URL")


@pytest.mark.parametrize("verb", VERBS)
def test_a_store_that_refuses_is_one_line(paths, denied, verb):
    line = error_of(*filled(verb, paths, storage.join(paths.bucket, "out")))
    assert "was refused with" in line
    assert line.endswith("check that the bucket exists and what the credentials may do there")


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_missing_bucket_is_one_line_and_is_not_made(paths, verb):
    missing = f"{paths.bucket}-2"
    line = error_of(*filled(verb, paths, storage.join(missing, "out"), log=storage.join(paths.log, "date=*")))
    assert "was refused with NoSuchBucket; check that the bucket exists" in line
    assert storage.join(missing, "out") in line
    assert not storage.exists(missing)


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("prepare", "no such file or folder; give --input"),
        ("train", "no prepared dataset (manifest.json is missing)"),
        ("generate", "no prepared dataset (manifest.json is missing)"),
        ("evaluate", "no prepared dataset (manifest.json is missing)"),
    ],
)
@pytest.mark.parametrize("place", ["missing key", "missing bucket"])
def test_an_input_that_is_not_there_is_one_line(paths, verb, message, place):
    bucket = paths.bucket if place == "missing key" else f"{paths.bucket}-2"
    missing = storage.join(bucket, "nothing")
    line = error_of(*filled(verb, paths, storage.join(paths.bucket, "out"), log=missing, dataset=missing))
    assert line.startswith(f"recgpt: error: {missing}: {message}")


@pytest.mark.slow
def test_a_file_that_is_gone_is_one_line_also_from_a_worker(served, s3_bucket):
    dataset, output = storage.join(s3_bucket, "dataset"), storage.join(s3_bucket, "out")
    copy(served.dataset, dataset)
    storage.remove(storage.join(dataset, "histories"))
    line = error_of(*filled("generate", served, output, dataset=dataset))
    gone = f"{dataset}/histories/part-00000.parquet"
    assert line == f"recgpt: error: {gone}: no such file; run `recgpt prepare` again"
    assert storage.is_empty(output)


def test_credentials_in_a_url_are_refused_and_not_shown(paths):
    line = error_of(*filled("prepare", paths, "s3://name:planted@bucket/out"))
    assert line == (
        "recgpt: error: s3://bucket/out: write s3://BUCKET/FOLDER; credentials come from the environment"
    )
