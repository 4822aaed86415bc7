"""`recgpt show`: one user's history and candidates, with times and titles where there are any."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ray_jobs.show import app
from recgpt.config import RecallSettings
from recgpt.errors import UserError
from recgpt.retrieval import one_user
from recgpt.retrieval.candidates import MadeFrom, finish, manifest_of, write_part
from recgpt.retrieval.user_selection import WorkUnit, all_users
from recgpt.storage import checksum

HISTORIES = {user: [100 + (user + day) % 50 for day in range(25)] for user in range(1, 20)}


@pytest.fixture(scope="module")
def folder(write_dataset, tmp_path_factory):
    """Candidates of all users, and in a part of their own of two that the dataset does not know."""
    place = tmp_path_factory.mktemp("show")
    (place / "dataset").mkdir()
    dataset = write_dataset(place / "dataset", HISTORIES, row_group_users=4)
    unknown = WorkUnit(len(dataset.row_groups), 2, None, unknown_users=pa.array([501, 502]))
    files = []
    for unit in [*all_users(dataset), unknown]:
        users = unit.histories(dataset)["user_id"].to_pylist()
        columns = {
            "user_id": users,
            "item_ids": [[user + 1000, 7] for user in users],
            "scores": pa.array([[1.5, 0.25]] * len(users), pa.list_(pa.float32())),
            "steps": pa.array([[1, 2]] * len(users), pa.list_(pa.int8())),
        }
        files.append(write_part(str(place / "candidates"), unit.part, pa.table(columns)))
    made_from = MadeFrom("model", "m", dataset.url, dataset.fingerprint, "v")
    finish(str(place / "candidates"), manifest_of(files, RecallSettings(2, (1, 1)), made_from))
    return place


def show(folder, user, *options):
    call = ["--candidates", str(folder / "candidates"), "--user", str(user), *map(str, options)]
    result = CliRunner().invoke(app, call)
    if result.exception:
        raise result.exception
    return result.output.splitlines()


def test_the_last_items_and_the_candidates(folder):
    for user, items in HISTORIES.items():
        lines = show(folder, user)
        assert lines[0] == "history: 25 items, the last 20"
        assert [int(line) for line in lines[1:21]] == items[-20:]
        assert lines[21:] == ["candidates: 2", f"  step 1  1.5000  {user + 1000}", "  step 2  0.2500  7"]


def test_only_the_part_of_the_user_is_read(folder, monkeypatch):
    read = []
    original = one_user.read_part
    monkeypatch.setattr(
        one_user, "read_part", lambda url, file: read.append(file.path) or original(url, file)
    )
    show(folder, 17)
    show(folder, 502)
    assert len(read) == 2


def test_users_that_the_dataset_does_not_know(folder):
    assert show(folder, 502)[0] == "history: 0 items"
    with pytest.raises(UserError, match="candidates: no candidates for user 77; were they asked for?"):
        show(folder, 77)
    with pytest.raises(UserError, match="--user u1: the user ids of .* are integers"):
        show(folder, "u1")


def test_titles(folder, tmp_path):
    items = tmp_path / "items.csv"
    items.write_text('item_id,title,other\n7,"Seven, or so",x\n1003,Thousand and three,y\n')
    lines = show(folder, 3, "--items", items)
    assert lines[-2:] == [
        "  step 1  1.5000  1003  Thousand and three",
        "  step 2  0.2500  7     Seven, or so",
    ]
    pq.write_table(pa.table({"sku": [7], "name": ["Seven"]}), tmp_path / "items.parquet")
    options = ["--items", tmp_path / "items.parquet", "--item-column", "sku", "--title-column", "name"]
    assert show(folder, 3, *options)[-1] == "  step 2  0.2500  7     Seven"


@pytest.mark.parametrize("content", [b"id,title\n7,x\n", b"\xff\xfe", b"item_id,title\nseven,x\n"])
def test_titles_that_cannot_be_read(folder, tmp_path, content):
    items = tmp_path / "items"
    with pytest.raises(UserError, match="items: no such file; --items takes"):
        show(folder, 3, "--items", items)
    items.write_bytes(content)
    with pytest.raises(UserError, match="items: not a readable file of items"):
        show(folder, 3, "--items", items)


@pytest.mark.parametrize(
    ("time", "unit", "text"),
    [
        (1_700_000_000, "seconds", "2023-11-14 22:13:20"),
        (1_700_000_000_123, "milliseconds", "2023-11-14 22:13:20"),
        (-86_400 * 10**9, "nanoseconds", "1969-12-31 00:00:00"),
        (17, "unstated", "17"),
    ],
)
def test_times(time, unit, text):
    assert one_user._text(time, unit) == text


def test_a_history_with_times(write_dataset, tmp_path):
    dataset = write_dataset(tmp_path, {1: [5, 6]})
    path = tmp_path / "histories" / "part-00000.parquet"
    times = pa.array([[86_400, 2 * 86_400]], pa.list_(pa.int64()))
    pq.write_table(pq.read_table(path).append_column("timestamps", times), path)
    files = [dataclasses.replace(dataset.manifest.files[0], sha256=checksum(str(path)))]
    manifest = dataclasses.replace(dataset.manifest, has_timestamps=True, time_unit="seconds", files=files)
    history = one_user._history(dataclasses.replace(dataset, manifest=manifest), 0, 0)
    assert history == [(5, "1970-01-02 00:00:00"), (6, "1970-01-03 00:00:00")]
