"""What verify-candidates finds: nothing in right lists, and each thing that is wrong."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from recgpt.config import RecallSettings
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.retrieval import candidate_checks
from recgpt.retrieval.candidate_checks import ListChecks, check_candidates, dataset_of
from recgpt.retrieval.candidates import AskedFor, MadeFrom, finish, manifest_of, read_manifest, write_part
from recgpt.retrieval.user_selection import all_users

ITEMS = [*"abcdefgh"]
SEEN = {"u1": "ab", "u2": "c", "u3": ""}
RIGHT = {
    "u1": ("cdef", [3.0, 2.0, 2.0, 9.0], [1, 1, 1, 2]),
    "u2": ("abfe", [3.0, 2.0, 1.0, -1.0], [1, 1, 1, 2]),
    "u3": ("habc", [9.0, 8.0, 7.0, 7.0], [0, 0, 0, 0]),
}
MADE_FROM = MadeFrom("model", "m" * 64, "dataset", "d" * 64, "v" * 64)
MANIFEST = manifest_of([], RecallSettings(4, (3, 1)), MADE_FROM)


def candidates_of(lists):
    columns = {
        "item_ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "steps": pa.list_(pa.int8()),
    }
    return pa.table(
        {
            "user_id": pa.array([*lists], pa.string()),
            **{
                name: pa.array([list(row[place]) for row in lists.values()], kind)
                for place, (name, kind) in enumerate(columns.items())
            },
        }
    )


def histories_of(seen):
    lists = [[ITEMS.index(item) + 1 for item in items] for items in seen.values()]
    return pa.table({"user_id": pa.array([*seen]), "item_indices": pa.array(lists, pa.list_(pa.int32()))})


def problems(lists, seen=SEEN, **manifest):
    checks = ListChecks(
        dataclasses.replace(MANIFEST, **manifest), Vocabulary(pa.array(ITEMS), np.ones(8, np.int64))
    )
    return list(checks.problems(candidates_of(lists), histories_of(seen)))


def test_items_that_were_not_to_be_recommended(tmp_path):
    (tmp_path / "only").write_text("g\nh\n")
    asked_for = AskedFor(only_items=str(tmp_path / "only"))
    seen = {"u1": "abc"}
    assert problems({"u1": ("gh", [2.0, 1.0], [1, 1])}, seen, asked_for=asked_for) == []
    assert problems({"u1": ("de", [2.0, 1.0], [1, 1])}, seen, asked_for=asked_for) == [
        "user 'u1': an item that was not to be recommended"
    ]
    assert problems({"u1": ("g", [2.0], [1])}, seen, asked_for=asked_for) == [
        "user 'u1': fewer than 4 candidates, though more items are left"
    ]


def test_right_lists_have_no_problem():
    assert problems(RIGHT) == []
    assert problems({user: RIGHT[user] for user in ("u3", "u1", "u2")}) == []  # in any order
    assert problems({"u1": ("ab", [2.0, 1.0], [1, 1])}, {"u1": "cdefgh"}) == []  # nothing else is left
    assert problems({"u1": ("abcd", [4.0, 3.0, 2.0, 1.0], [1, 1, 1, 2])}, {"u1": "ab"}, keep_seen=True) == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("cdxe", [3, 2, 2, 9], [1, 1, 1, 2]), "an item that the dataset does not know"),
        (("cdec", [3, 2, 2, 9], [1, 1, 1, 2]), "an item twice"),
        (("cdbe", [3, 2, 2, 9], [1, 1, 1, 2]), "an item of the user's own history"),
        (("cdef", [3, 2, 2.5, 9], [1, 1, 1, 2]), "scores that do not descend within a step"),
        (("cdef", [3, 2, float("nan"), 9], [1, 1, 1, 2]), "scores that do not descend within a step"),
        (("cdef", [3, 2, 2, 9], [2, 1, 1, 1]), "steps that are none, or in the wrong order"),
        (("cdef", [3, 2, 2, 9], [1, 1, 1, 3]), "steps that are none, or in the wrong order"),
        (("cdef", [3, 2, 2, 1], [0, 0, 0, 0]), "steps that are none, or in the wrong order"),
        (("cdef", [3, 2, 2, 1], [1, 1, 1, 1]), "more than 3 candidates of step 1"),
        (("cde", [3, 2, 2], [1, 1, 1]), "fewer than 4 candidates, though more items are left"),
        (("cdefg", [3, 2, 2, 1, 0], [1, 1, 1, 2, 2]), "more than 4 candidates"),
        (("cdef", [3, 2, 2], [1, 1, 1, 2]), "lists of different lengths"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(row, problem):
    assert f"user 'u1': {problem}" in problems({**RIGHT, "u1": row})
    assert not [line for line in problems({**RIGHT, "u1": row}) if "'u1'" not in line]


def test_a_user_without_a_history_has_popular_items_only():
    wrong = problems({**RIGHT, "u3": ("habc", [9, 8, 7, 7], [1, 1, 1, 2])})
    assert wrong == ["user 'u3': steps that are none, or in the wrong order"]


def test_users_are_those_that_were_asked_for_once_each():
    lists = {"u1": RIGHT["u1"], "u4": RIGHT["u2"], "u3": RIGHT["u3"]}
    assert problems(lists) == ["user 'u2': asked for, and has no row", "user 'u4': not asked for"]
    table = pa.concat_tables([candidates_of(RIGHT), candidates_of({"u2": RIGHT["u2"]})])
    checks = ListChecks(MANIFEST, Vocabulary(pa.array(ITEMS), np.ones(8, np.int64)))
    assert list(checks.problems(table, histories_of(SEEN))) == ["user 'u2': more than one row"]


def test_ids_of_another_type():
    table = candidates_of(RIGHT)
    numbers = pa.array([[1, 2, 3, 4]] * 3, pa.list_(pa.int64()))
    checks = ListChecks(MANIFEST, Vocabulary(pa.array(ITEMS), np.ones(8, np.int64)))
    wrong = table.set_column(1, "item_ids", numbers)
    assert list(checks.problems(wrong, histories_of(SEEN))) == [
        "column item_ids is list<item: int64>, not list<item: string>"
    ]


def test_items_are_looked_up_as_the_vocabulary_does(monkeypatch):
    ids = pa.array([*ITEMS, "x", "a", "y"])
    vocabulary = Vocabulary(pa.array(ITEMS), np.ones(8, np.int64))
    expected = vocabulary.encode(ids).tolist()
    assert candidate_checks.ItemIndices(vocabulary).encode(ids).tolist() == expected
    same = lambda ids: np.zeros(len(ids), np.int64)  # noqa: E731
    monkeypatch.setattr(candidate_checks, "stable_hash", same)
    assert candidate_checks.ItemIndices(vocabulary).encode(ids).tolist() == expected


@pytest.fixture
def written(write_dataset, tmp_path):
    """A dataset of two row groups and right candidates for it: (folder, dataset)."""
    (tmp_path / "dataset").mkdir()
    everything = [*ITEMS, "z"]
    dataset = write_dataset(
        tmp_path / "dataset",
        {user: [*everything[:5], everything[5 + user]] for user in range(4)},
        row_group_users=2,
    )
    folder = tmp_path / "candidates"
    files = []
    for unit in all_users(dataset):
        users = unit.histories(dataset)["user_id"].to_pylist()
        left = [[item for item in everything[5:] if item != everything[5 + user]] for user in users]
        lists = {"item_ids": left, "scores": [[2.0, 1.0, 0.0]] * 2, "steps": [[1, 1, 1]] * 2}
        types = {"scores": pa.list_(pa.float32()), "steps": pa.list_(pa.int8())}
        columns = {name: pa.array(rows, types.get(name)) for name, rows in lists.items()}
        files.append(write_part(str(folder), unit.part, pa.table({"user_id": users, **columns})))
    made_from = dataclasses.replace(MADE_FROM, dataset=dataset.url, dataset_fingerprint=dataset.fingerprint)
    finish(str(folder), manifest_of(files, RecallSettings(3, (3,)), made_from))
    return folder, dataset


def lines(folder, dataset, units):
    found = list(check_candidates(str(folder), read_manifest(str(folder)), dataset, units))
    assert len(found) == 3  # the folder and two files
    return [line for some in found for line in some]


def test_a_whole_folder(written):
    folder, dataset = written
    assert dataset_of(read_manifest(str(folder)), None).url == dataset.url
    assert lines(folder, dataset, all_users(dataset)) == []


def test_files_that_are_wrong(written):
    folder, dataset = written
    units = all_users(dataset)
    (folder / "part-00007.parquet").write_bytes((folder / "part-00001.parquet").read_bytes())
    (folder / "part-00001.parquet").write_bytes(b"damaged")
    stranger, damaged = lines(folder, dataset, units)
    assert stranger == "part-00007.parquet: not in the manifest"
    assert "part-00001.parquet: not the file that was written" in damaged
    (folder / "part-00007.parquet").unlink()
    not_asked, missing = lines(folder, dataset, [units[0], dataclasses.replace(units[1], part=9)])[:2]
    assert not_asked == "part-00001.parquet: none of its users was asked for"
    assert missing == "part-00009.parquet: missing, and with it 2 users that were asked for"


def test_another_dataset_is_refused(written, write_dataset, tmp_path):
    folder, _ = written
    (tmp_path / "other").mkdir()
    other = write_dataset(tmp_path / "other", {1: ["a"]})
    with pytest.raises(UserError, match="other: not the dataset that the candidates were made from"):
        dataset_of(read_manifest(str(folder)), other.url)
