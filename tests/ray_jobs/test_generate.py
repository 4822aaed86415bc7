"""`recgpt generate`: candidates of a small random model, row by row against the slow twin."""

import json
import os
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs.generate import RecallWorker, command, run_generate
from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.data.hashing import stable_hash
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, load_model, save_model
from recgpt.model.gpt import GPT
from recgpt.retrieval.autoregressive import recommend_reference
from recgpt.retrieval.candidates import read_candidates, verify_candidates

NUM_ITEMS = 30
RECALL = RecallSettings(6, (4, 2), batch_users=3, block_items=7)


@pytest.fixture(scope="module")
def dataset(write_dataset, tmp_path_factory):
    """Forty users u0 to u39 in row groups of eight; user n has n % 9 + 1 of the items 1000 to 1029."""
    histories = {f"u{n}": [1000 + (7 * n + i * i) % NUM_ITEMS for i in range(n % 9 + 1)] for n in range(40)}
    histories["u39"] += list(range(1000, 1000 + NUM_ITEMS - 3))  # nearly everything is seen
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=8)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> Path:
    """A run folder with the export of a random model."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    settings = ModelSettings(
        width=8, layers=1, heads=2, max_history=6, user=UserSettings(kind="hashed", buckets=5)
    )
    gpt = GPT(settings)
    for parameter in gpt.parameters():
        parameter.data.normal_(std=0.3)
    fingerprint = dataset.manifest.vocabulary_fingerprint
    info = ModelInfo(NUM_ITEMS, fingerprint, settings, SplitSettings(), RECALL)
    save_model(str(run / "model"), info, gpt.state_dict(), [torch.randn(NUM_ITEMS + 1, 8)])
    return run


def expected_rows(run: Path, dataset, recall: RecallSettings) -> dict[str, dict]:
    """What each user's row must hold, from the twin that encodes everything again, one user at a time."""
    _, gpt, table = load_model(str(run / "model"))
    item_ids = dataset.vocabulary().item_ids.to_pylist()
    rows = {}
    for row_group in dataset.row_groups:
        histories = dataset.read_row_group(row_group)
        for user_id, items in zip(histories["user_id"], histories["item_indices"].to_pylist(), strict=True):
            recalled = recommend_reference(
                gpt,
                table,
                recall,
                torch.tensor(items),
                torch.tensor([0, len(items)]),
                torch.from_numpy(stable_hash(histories["user_id"].slice(len(rows) % 8, 1)).copy()),
            )
            found = [
                (item_ids[item - 1], score, step)
                for item, score, step in zip(
                    recalled.item_index_BK[0].tolist(),
                    recalled.score_BK[0].tolist(),
                    recalled.step_BK[0].tolist(),
                    strict=True,
                )
                if item
            ]
            rows[user_id.as_py()] = {
                "item_ids": [item for item, _, _ in found],
                "scores": [pytest.approx(score, rel=1e-4, abs=1e-5) for _, score, _ in found],
                "steps": [step for _, _, step in found],
            }
    return rows


def rows_of(output: Path) -> dict[str, dict]:
    rows = [row for table in read_candidates(str(output)) for row in table.to_pylist()]
    assert len({row["user_id"] for row in rows}) == len(rows), "a user has two rows"
    return {row.pop("user_id"): row for row in rows}


@pytest.mark.ray
def test_every_user_gets_the_candidates_of_the_slow_twin(local_ray, run, dataset, tmp_path):
    manifest = run_generate(str(run), dataset.url, str(tmp_path / "out"), actors=2)
    assert manifest == json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert (manifest["num_users"], manifest["k"], manifest["quotas"]) == (40, 6, [4, 2])
    rows = rows_of(tmp_path / "out")
    assert rows == expected_rows(run, dataset, RECALL)
    assert len(rows["u39"]["item_ids"]) < 6  # fewer items than asked for are left
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_SUCCESS",
        "_manifest.json",
        *(f"part-{part:05d}.parquet" for part in range(5)),
    ]
    assert pq.read_table(tmp_path / "out").num_rows == 40


@pytest.mark.ray
def test_wishes_for_listed_users_and_an_output_that_is_there(local_ray, run, dataset, tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("u3\nu39\nu3\n")
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("precious")
    wishes = {"quotas": (2, 1, 2), "users": str(users), "keep_seen": True}
    with pytest.raises(UserError, match="already holds something"):
        run_generate(str(run / "model"), dataset.url, str(output), **wishes)
    assert (output / "old").read_text() == "precious"

    run_generate(str(run / "model"), dataset.url, str(output), **wishes, actors=3, overwrite=True)
    expected = expected_rows(run, dataset, RecallSettings(5, (2, 1, 2), keep_seen=True))
    assert rows_of(output) == {user: expected[user] for user in ("u3", "u39")}
    assert not (output / "old").exists()


@pytest.mark.ray
def test_an_error_in_an_actor_leaves_the_old_output_whole(local_ray, run, dataset, tmp_path):
    output = tmp_path / "out"
    run_generate(str(run), dataset.url, str(output))
    before = verify_candidates(str(output))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (run / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "gpt.safetensors").write_bytes(b"no weights")
    with pytest.raises(Exception, match="gpt.safetensors: not a readable safetensors file"):
        run_generate(str(broken), dataset.url, str(output), overwrite=True)
    assert verify_candidates(str(output)) == before


@pytest.mark.ray
@pytest.mark.chaos
def test_an_actor_that_is_killed_is_replaced(local_ray, run, dataset, tmp_path, monkeypatch):
    killed = tmp_path / "killed"

    class KilledOnce(RecallWorker):
        def write_candidates(self, unit):
            if unit.part == 2 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().write_candidates(unit)

    monkeypatch.setattr("ray_jobs.generate.RecallWorker", KilledOnce)
    run_generate(str(run), dataset.url, str(tmp_path / "out"))
    assert killed.exists()
    assert rows_of(tmp_path / "out") == expected_rows(run, dataset, RECALL)


def test_the_worker_can_be_sent_from_a_main_module():
    """`python -m ray_jobs.generate` makes the class part of __main__, which is sent as code, not by name."""
    from ray import cloudpickle

    module = sys.modules["ray_jobs.generate"]
    cloudpickle.register_pickle_by_value(module)
    try:
        assert cloudpickle.dumps(RecallWorker)
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_a_part_does_not_depend_on_who_writes_it_or_when(run, dataset, tmp_path):
    from recgpt.retrieval.user_selection import all_users

    worker = RecallWorker(str(run / "model"), dataset, str(tmp_path), RECALL)
    first, second = all_users(dataset)[:2]
    *_, written = worker.write_candidates(first)
    list(worker.write_candidates(second))
    *_, again = worker.write_candidates(first)
    assert again == written


def test_progress_comes_in_steps_and_the_steps_make_one_file(run, dataset, tmp_path, monkeypatch):
    from recgpt.retrieval.user_selection import all_users

    monkeypatch.setattr("ray_jobs.generate.USERS_PER_STEP", 3)
    worker = RecallWorker(str(run / "model"), dataset, str(tmp_path), RECALL)
    *steps, file = worker.write_candidates(all_users(dataset)[0])
    assert steps == [3, 3, 2]
    written = pq.read_table(tmp_path / file.path).to_pylist()
    assert file.candidates == sum(len(row["item_ids"]) for row in written)
    expected = list(expected_rows(run, dataset, RECALL).items())[:8]
    assert [row["user_id"] for row in written] == [user for user, _ in expected]
    assert [row["item_ids"] for row in written] == [row["item_ids"] for _, row in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "absent"}, "absent: no trained model here"),
        ({"dataset": "absent"}, "absent: no prepared dataset"),
        ({"k": 6, "quotas": (4, 1)}, "--quotas 4,1 sum to 5, not to --k 6"),
        ({"quotas": (1,) * 7}, "7 recall steps do not fit a model with max_history=6"),
        ({"users": "absent"}, "absent: no such file"),
    ],
)
def test_mistakes_are_told_before_anything_starts(run, dataset, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("ray_jobs.generate.start_ray", lambda min_cpus: pytest.fail("Ray was started"))
    arguments = {"model": str(run), "dataset": dataset.url, "output": str(tmp_path / "out"), **change}
    with pytest.raises(UserError, match=message):
        run_generate(**arguments)
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused(run, write_dataset, tmp_path):
    other = write_dataset(tmp_path, {"u1": [1, 2, 3]})
    with pytest.raises(
        UserError, match="the model was trained on another vocabulary .30 items. than that of .* .3 items"
    ):
        run_generate(str(run), other.url, str(tmp_path / "out"))


def test_what_is_read_from_is_never_overwritten(run, dataset, tmp_path):
    users = tmp_path / "out" / "users.txt"
    for output in (dataset.url, str(run), str(run / "model"), str(Path(dataset.url).parent), users.parent):
        with pytest.raises(UserError, match="which is read from"):
            run_generate(str(run), dataset.url, str(output), users=str(users), overwrite=True)


def test_quotas_on_the_command_line():
    with pytest.raises(UserError, match="--quotas 18,x: expected numbers with commas between them"):
        command("run", "dataset", "out", quotas="18,x")
