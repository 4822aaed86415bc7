"""`recgpt prepare --append`: a dataset grows, and its items keep their indices."""

import dataclasses

import pytest

from ray_jobs.prepare import run_prepare
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from tests.ray_jobs.logs import csv_of, histories_by_user, random_log, reference

pytestmark = pytest.mark.ray

FIRST = 1_700_000_000


def dated_log(seed):
    return [(u, i, FIRST + t) for u, i, t in random_log(seed) if None not in (u, i, t)]


def write(path, log):
    path.write_text(csv_of(log))
    return [str(path)]


def items_of(url):
    return HistoryDataset.open(str(url)).vocabulary().item_ids.to_pylist()


def test_old_days_and_new_ones_together_are_the_whole_log(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.prepare_pipeline.INTERACTIONS_PER_PART", 250)
    log = dated_log(seed=5)
    late = FIRST + 20
    old = run_prepare(
        write(tmp_path / "old.csv", [row for row in log if row[2] < late]), str(tmp_path / "old")
    )
    overlap = [row for row in log if row[2] >= late - 3]
    grown = run_prepare(
        write(tmp_path / "new.csv", overlap), str(tmp_path / "grown"), append=str(tmp_path / "old")
    )
    whole = run_prepare(write(tmp_path / "all.csv", log), str(tmp_path / "whole"))
    assert histories_by_user(tmp_path / "grown") == histories_by_user(tmp_path / "whole") == reference(log)
    assert items_of(tmp_path / "grown")[: old.num_items] == items_of(tmp_path / "old")
    assert sorted(items_of(tmp_path / "grown")) == sorted(items_of(tmp_path / "whole"))
    assert (grown.num_users, grown.num_interactions) == (whole.num_users, whole.num_interactions)
    assert grown.time_quantiles == whole.time_quantiles
    (ancestor,) = grown.lineage
    assert dataclasses.asdict(ancestor) == {
        "url": str(tmp_path / "old"),
        "dataset_fingerprint": HistoryDataset.open(str(tmp_path / "old")).fingerprint,
        "vocabulary_fingerprint": old.vocabulary_fingerprint,
        "num_items": old.num_items,
        "num_interactions": old.num_interactions,
    }


def test_growing_in_place_twice(local_ray, tmp_path):
    place = str(tmp_path / "dataset")
    run_prepare(write(tmp_path / "1.csv", [("u", "a", FIRST), ("v", "b", FIRST)]), place)
    first = items_of(place)
    for number, item in ((2, "c"), (3, "d")):
        log = write(tmp_path / f"{number}.csv", [("u", item, (FIRST + number) * 1000)])  # milliseconds
        run_prepare(log, place, append=place, overwrite=True)
    manifest = HistoryDataset.open(place).manifest
    assert items_of(place) == [*first, "c", "d"]
    assert [ancestor.num_items for ancestor in manifest.lineage] == [2, 3]
    assert manifest.time_unit == "milliseconds"
    assert histories_by_user(place) == {
        "u": [("a", FIRST * 1000), ("c", (FIRST + 2) * 1000), ("d", (FIRST + 3) * 1000)],
        "v": [("b", FIRST * 1000)],
    }


def test_known_items_stay_when_they_become_rare_and_new_ones_do_not_come_in(local_ray, tmp_path):
    old = [(f"u{n}", item, FIRST + n) for n in range(3) for item in ("a", "b")] + [("u0", "rare", FIRST + 9)]
    run_prepare(write(tmp_path / "old.csv", old), str(tmp_path / "old"))
    new = [(f"u{n}", "c", FIRST + 20 + n) for n in range(3)] + [("u0", "once", FIRST + 30)]
    manifest = run_prepare(
        write(tmp_path / "new.csv", new),
        str(tmp_path / "grown"),
        append=str(tmp_path / "old"),
        min_item_interactions=2,
        max_history=2,
    )
    assert items_of(tmp_path / "grown") == [*items_of(tmp_path / "old"), "c"]
    vocabulary = HistoryDataset.open(str(tmp_path / "grown")).vocabulary()
    counts = dict(zip(vocabulary.item_ids.to_pylist(), vocabulary.counts.tolist(), strict=True))
    assert counts == {"a": 0, "b": 2, "rare": 0, "c": 3}  # of each user the newest two; then `once` went
    assert manifest.num_interactions == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sequences", "1 2\n", "the dataset has no times"),
        (csv_of([(1, 2, FIRST)]), csv_of([(1, "x", FIRST)]), "its item ids are int64, together .* be string"),
        (csv_of([(1, 2, FIRST)]), csv_of([(1, 2, 7)]), "differ in kind"),
    ],
)
def test_what_cannot_be_appended(local_ray, tmp_path, old, new, message):
    (tmp_path / "old.txt").write_text("1 2 3\n" if old == "sequences" else old)
    run_prepare([str(tmp_path / "old.txt")], str(tmp_path / "old"))
    (tmp_path / "new.txt").write_text(new)
    with pytest.raises(UserError, match=message):
        run_prepare([str(tmp_path / "new.txt")], str(tmp_path / "grown"), append=str(tmp_path / "old"))
    assert not (tmp_path / "grown").exists()


def test_a_damaged_part_of_the_older_dataset_stops_everything(local_ray, tmp_path):
    run_prepare(write(tmp_path / "old.csv", dated_log(1)), str(tmp_path / "old"))
    part = tmp_path / "old" / "histories" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    log = write(tmp_path / "new.csv", dated_log(2))
    with pytest.raises(UserError, match=r"part-00000.parquet: damaged \(.*prepare the older dataset again"):
        run_prepare(log, str(tmp_path / "grown"), append=str(tmp_path / "old"), max_bad_fraction=1.0)
