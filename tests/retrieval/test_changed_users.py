"""Which users have changed: since an instant, and since an older dataset, against plain Python."""

import dataclasses
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from recgpt.retrieval import changed_users
from recgpt.retrieval.changed_users import changed_since, resolve_since
from recgpt.retrieval.user_selection import select_users
from recgpt.storage import checksum

ITEMS = list(range(500, 512))


def changed(dataset, since):
    units = select_users(dataset, None, changed_since(dataset, resolve_since(since, dataset)))
    return {user for unit in units for user in unit.histories(dataset)["user_id"].to_pylist()}


@pytest.fixture
def make(write_dataset, tmp_path):
    """Writes histories as a dataset of its own folder."""

    def make_dataset(name, histories, row_group_users=8, grown_from=None):
        (tmp_path / name).mkdir()
        return write_dataset(tmp_path / name, histories, row_group_users, grown_from)

    return make_dataset


def with_times(dataset, unit, time_of):
    """The same dataset with times: ``time_of(user, place in the history)``."""
    path = f"{dataset.url}/histories/part-00000.parquet"
    table = pq.read_table(path)
    rows = zip(table["user_id"].to_pylist(), table["item_indices"].to_pylist(), strict=True)
    times = [[time_of(user, place) for place in range(len(items))] for user, items in rows]
    column = pa.array(times, pa.list_(pa.int64()))
    pq.write_table(table.append_column("timestamps", column), path, row_group_size=8)
    (file,) = dataset.manifest.files
    files = [dataclasses.replace(file, sha256=checksum(path))]
    manifest = dataclasses.replace(dataset.manifest, has_timestamps=True, time_unit=unit, files=files)
    with open(f"{dataset.url}/manifest.json", "w") as file:
        json.dump(dataclasses.asdict(manifest), file)
    return HistoryDataset.open(dataset.url)


def test_since_an_instant(make):
    histories = {user: ITEMS[: user % 4] for user in range(40)}  # every fourth is empty
    dataset = with_times(
        make("dataset", {**histories, 99: ITEMS}), "seconds", lambda user, place: 86_400 * (user + place)
    )
    for day in (0, 17, 38, 60, 200):
        expected = {user for user in range(40) if user % 4 and user + user % 4 - 1 >= day}
        expected |= {99} if 99 + len(ITEMS) - 1 >= day else set()
        assert changed(dataset, str(86_400 * day)) == expected
    assert changed(dataset, "1970-01-18T00:00:00Z") == changed(dataset, str(86_400 * 17))


def test_since_an_older_dataset(make):
    draw = random.Random(0)
    before = {user: draw.choices(ITEMS, k=draw.randrange(1, 6)) for user in range(60)}
    before[60] = ITEMS
    after, expected = dict(before), set()
    for user in draw.sample(range(60), 20):
        change = draw.randrange(4)
        if change == 0:
            after[user] = [*before[user], draw.choice([*ITEMS, 900])]
        elif change == 1:
            after[user] = [900, *before[user][1:]]
        elif change == 2:
            after[user + 1000] = after.pop(user)  # the one is new, the other gone
        else:
            after[user] = before[user][:-1] or [900]
        expected.add(user + 1000 if change == 2 else user)
    older = make("older", before, row_group_users=7)
    newer = make("newer", after, row_group_users=10, grown_from=older)
    assert changed(newer, older.url) == expected
    assert changed(newer, newer.url) == set()


def test_an_older_dataset_is_compared_one_row_group_at_a_time(make, monkeypatch):
    before = {user: ITEMS[: 1 + user % 9] for user in range(60)}
    older = make("older", before, row_group_users=4)
    newer = make("newer", before | {17: ITEMS, 60: ITEMS}, row_group_users=61, grown_from=older)
    compared, original = [], changed_users.differing

    def differing(histories, older_histories):
        compared.append(len(older_histories))
        return original(histories, older_histories)

    monkeypatch.setattr(changed_users, "differing", differing)
    assert changed(newer, older.url) == {17, 60}
    assert (sum(compared), max(compared)) == (60, 4)


def test_everyone_is_new_where_nobody_was(make):
    older = make("older", {1: ITEMS})
    newer = make("newer", dict.fromkeys(range(2, 30), ITEMS), grown_from=older)
    assert changed(newer, older.url) == set(range(2, 30))


def test_what_cannot_be_compared(make, tmp_path):
    dataset = make("dataset", dict.fromkeys(range(3), ITEMS))
    other = make("other", {1: [7, 8, 9]})
    strings = make("strings", {"u": ITEMS})
    with pytest.raises(UserError, match="its item indices mean other items"):
        resolve_since(other.url, dataset)
    with pytest.raises(UserError, match="its user ids are of another type"):
        resolve_since(strings.url, dataset)
    with pytest.raises(UserError, match="dataset has no times; give the older dataset"):
        resolve_since("2026-01-31", dataset)
    with pytest.raises(UserError, match="absent: no prepared dataset"):
        resolve_since(str(tmp_path / "absent"), dataset)
    timed = with_times(dataset, "unstated", lambda user, place: place)
    assert resolve_since("17", timed) == 17
    with pytest.raises(UserError, match="the log's times are plain numbers"):
        resolve_since("2026-01-31", timed)
    with pytest.raises(
        UserError, match="tomorrow: expected an ISO date.*; or the folder of an older dataset"
    ):
        resolve_since("tomorrow", timed)
