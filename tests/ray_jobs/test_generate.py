"""`recgpt generate`: candidates of a small random model, row by row against the slow twin."""

import json
import os
import re
import signal
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs.actor_pool import ActorRange
from ray_jobs.generate import command, run_generate
from ray_jobs.recall_worker import Meters, RecallWorker
from recgpt.config import RecallSettings
from recgpt.data.hashing import stable_hash
from recgpt.errors import UserError
from recgpt.model.export import load_model
from recgpt.retrieval.autoregressive import recommend_reference
from recgpt.retrieval.candidate_job import JOB_FILE, Run
from recgpt.retrieval.candidate_plan import RecallWishes
from recgpt.retrieval.candidates import AskedFor, read_candidates
from tests.ray_jobs.random_model import RECALL, save_random_model

NUM_ITEMS = 30


@pytest.fixture(scope="module")
def dataset(write_dataset, tmp_path_factory):
    """Forty users u0 to u39 in row groups of eight; user n has n % 9 + 1 of the items 1000 to 1029."""
    histories = {f"u{n}": [1000 + (7 * n + i * i) % NUM_ITEMS for i in range(n % 9 + 1)] for n in range(40)}
    histories["u39"] += list(range(1000, 1000 + NUM_ITEMS - 3))  # nearly everything is seen
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=8)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> Path:
    """A run folder with the export of a random model."""
    return save_random_model(tmp_path_factory.mktemp("run"), dataset)


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


def run_in(folder: Path) -> Run:
    """A run that may write into a folder."""
    (folder / JOB_FILE).write_text('{"run": "this one"}')
    return Run(str(folder), "job", "this one", [])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows_of(output: Path) -> dict[str, dict]:
    rows = [row for table in read_candidates(str(output)) for row in table.to_pylist()]
    assert len({row["user_id"] for row in rows}) == len(rows), "a user has two rows"
    return {row.pop("user_id"): row for row in rows}


@pytest.mark.ray
def test_every_user_gets_the_candidates_of_the_slow_twin(local_ray, run, dataset, tmp_path):
    manifest = run_generate(str(run), dataset.url, str(tmp_path / "out"), actors=ActorRange(2, 2))
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
    wishes = {
        "wishes": RecallWishes(quotas=(2, 1, 2), keep_seen=True),
        "asked_for": AskedFor(users=str(users)),
    }
    with pytest.raises(UserError, match="already holds something"):
        run_generate(str(run / "model"), dataset.url, str(output), **wishes)
    assert (output / "old").read_text() == "precious"

    run_generate(
        str(run / "model"), dataset.url, str(output), **wishes, actors=ActorRange(3, 3), overwrite=True
    )
    expected = expected_rows(run, dataset, RecallSettings(5, (2, 1, 2), keep_seen=True))
    assert rows_of(output) == {user: expected[user] for user in ("u3", "u39")}
    assert not (output / "old").exists()


@pytest.mark.ray
def test_an_error_in_an_actor_leaves_the_old_output_whole(local_ray, run, dataset, tmp_path):
    output = tmp_path / "out"
    run_generate(str(run), dataset.url, str(output))
    before = files_of(output)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (run / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "gpt.safetensors").write_bytes(b"no weights")
    description = json.loads((broken / "model.json").read_text())
    del description["sha256"]  # or the damage would be seen before there are actors
    (broken / "model.json").write_text(json.dumps(description))
    with pytest.raises(Exception, match="gpt.safetensors: not a readable safetensors file"):
        run_generate(str(broken), dataset.url, str(output), overwrite=True)
    assert files_of(output) == before


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

    module = sys.modules["ray_jobs.recall_worker"]
    cloudpickle.register_pickle_by_value(module)
    try:
        assert cloudpickle.dumps(RecallWorker)
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_a_part_does_not_depend_on_who_writes_it_or_when(run, dataset, tmp_path):
    from recgpt.retrieval.user_selection import all_users

    worker = RecallWorker(str(run / "model"), dataset, run_in(tmp_path), RECALL)
    first, second = all_users(dataset)[:2]
    *_, written = worker.write_candidates(first)
    list(worker.write_candidates(second))
    *_, again = worker.write_candidates(first)
    assert again == written


def test_progress_comes_in_steps_and_the_steps_make_one_file(run, dataset, tmp_path, monkeypatch):
    from recgpt.retrieval.user_selection import all_users

    monkeypatch.setattr("ray_jobs.recall_worker.USERS_PER_STEP", 3)
    worker = RecallWorker(str(run / "model"), dataset, run_in(tmp_path), RECALL)
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
        ({"wishes": RecallWishes(k=6, quotas=(4, 1))}, "--quotas 4,1 sum to 5, not to --k 6"),
        ({"wishes": RecallWishes(quotas=(1,) * 7)}, "7 recall steps do not fit a model with max_history=6"),
        (
            {"wishes": RecallWishes(continuation="best", temperature=2.0)},
            "--temperature 2.0: .* mean or sampled",
        ),
        ({"wishes": RecallWishes(beam_width=2)}, "--beam-width 2: give it with --continuation beam"),
        ({"asked_for": AskedFor(users="absent")}, "absent: no such file"),
        ({"asked_for": AskedFor(exclude_items="absent")}, "absent: no such file; --exclude-items takes"),
        ({"asked_for": AskedFor(changed_since="tomorrow")}, "--only-changed-since tomorrow: .* has no times"),
    ],
)
def test_mistakes_are_told_before_anything_starts(run, dataset, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("ray_jobs.generate.start_ray", lambda min_cpus: pytest.fail("Ray was started"))
    arguments = {"model": str(run), "dataset": dataset.url, "output": str(tmp_path / "out"), **change}
    with pytest.raises(UserError, match=message):
        run_generate(**arguments)
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused(run, write_dataset, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_dataset(tmp_path / "other", {"u1": [1, 2, 3]})
    with pytest.raises(
        UserError, match="the model was trained on another vocabulary .30 items. than that of .* .3 items"
    ):
        run_generate(str(run), other.url, str(tmp_path / "out"))


def test_what_is_read_from_is_never_overwritten(run, dataset, tmp_path):
    users = tmp_path / "out" / "users.txt"
    asked_for = AskedFor(users=str(users))
    for output in (dataset.url, str(run), str(run / "model"), str(Path(dataset.url).parent), users.parent):
        with pytest.raises(UserError, match="which is read from"):
            run_generate(str(run), dataset.url, str(output), asked_for=asked_for, overwrite=True)


def test_quotas_on_the_command_line():
    with pytest.raises(UserError, match="--quotas 18,x: expected numbers with commas between them"):
        command("run", "dataset", "out", quotas="18,x")


class Counting:
    def count(self) -> None:
        self.meters = Meters()
        self.meters.count(users=12_345, seconds=0.5, candidates=0)


@pytest.mark.ray
def test_what_actors_have_done_stands_at_rays_metrics_endpoint(local_ray):
    import ray

    actor = ray.remote(Counting).remote()
    ray.get(actor.count.remote())
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ours = re.compile(r"^ray_recgpt_recall_users_total\{.*\} 12345(\.0)?$", re.MULTILINE)
    deadline = time.monotonic() + 60
    while not ours.search(metrics := urllib.request.urlopen(url, timeout=10).read().decode()):
        assert time.monotonic() < deadline, metrics
        time.sleep(0.2)  # workers report every few seconds
    ray.kill(actor)
