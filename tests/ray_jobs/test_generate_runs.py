"""A job of candidates over several runs whose processes are killed, and what verify-candidates says of it."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.generate import run_generate
from ray_jobs.recall_worker import RecallWorker
from ray_jobs.verify_candidates import run_verify
from recgpt import storage
from recgpt.errors import UserError
from recgpt.retrieval.candidate_job import RECEIPTS_FOLDER
from recgpt.retrieval.candidate_plan import RecallWishes
from recgpt.retrieval.candidates import AskedFor, read_candidates, read_manifest
from tests.ray_jobs.random_model import save_random_model

USERS, ITEMS = 200, [f"item-{number}" for number in range(40)]


@pytest.fixture(scope="module")
def dataset(write_dataset, tmp_path_factory):
    """Two hundred users in row groups of eight. Every tenth user has no history."""
    histories = {f"u{n}": [ITEMS[(7 * n + i * i) % 40] for i in range(n % 10)] for n in range(USERS)}
    return write_dataset(
        tmp_path_factory.mktemp("dataset"), {**histories, "all": ITEMS[:30]}, row_group_users=8
    )


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("run"), dataset)


def staging_of(output):
    return Path(storage.staging_folder(str(output)))


def finished_parts(folder):
    """The bytes and the time of writing of each part with a receipt."""
    names = [receipt.name.removesuffix(".json") for receipt in (folder / RECEIPTS_FOLDER).glob("*.json")]
    return {name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in names}


def users_of(output):
    return [row["user_id"] for table in read_candidates(str(output)) for row in table.to_pylist()]


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.slow
def test_a_driver_that_is_killed_again_and_again(model, dataset, tmp_path):
    output = tmp_path / "out"
    call = [sys.executable, "-m", "ray_jobs.cli", "generate", "--model", str(model), "--dataset", dataset.url]
    call += ["--output", str(output), "--actors", "1:2"]
    draw, kept = random.Random(0), {}
    for _ in range(2):
        enough = len(kept) + draw.randrange(1, 6)
        driver = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(finished_parts(staging_of(output))) < enough:
            assert driver.poll() is None, "the run ended too soon to be killed"
            time.sleep(draw.random() * 0.02)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        now = finished_parts(staging_of(output))
        assert now.items() >= kept.items(), "a finished part was touched"
        assert not output.exists()
        kept = now
    finished = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    going_on = re.search(r"(\d+) of 26 parts are finished already; going on", finished.stderr)
    assert int(going_on[1]) >= len(kept)  # an actor may outlive its driver for a moment
    for name, (content, written) in kept.items():
        assert (output / name).read_bytes() == content
        assert (output / name).stat().st_mtime_ns == written
    assert not staging_of(output).exists()
    assert "201 users in 26 files" in run_verify(str(output))


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.slow
def test_an_object_store_an_actor_that_is_killed_and_an_error_that_ends_the_run(
    local_ray, model, dataset, s3_bucket, tmp_path, monkeypatch
):
    output = storage.join(s3_bucket, "out")
    killed, done = tmp_path / "killed", tmp_path / "done"

    class Unlucky(RecallWorker):
        def write_candidates(self, unit):
            with done.open("a") as file:
                file.write(f"{unit.part}\n")
            if unit.part == 10 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if unit.part == 20 and killed.read_text() == "":
                killed.write_text("again")
                raise UserError("out of luck")
            yield from super().write_candidates(unit)

    monkeypatch.setattr("ray_jobs.generate.RecallWorker", Unlucky)
    with pytest.raises(Exception, match="out of luck"):
        run_generate(str(model), dataset.url, output)
    assert not storage.exists(output)
    run_generate(str(model), dataset.url, output)
    parts = done.read_text().split()
    assert sorted({part for part in parts if parts.count(part) > 1}) == ["10", "20"]
    assert sorted(users_of(output)) == sorted([*(f"u{n}" for n in range(USERS)), "all"])
    run_verify(output)


@pytest.mark.ray
def test_the_same_command_on_a_finished_output_does_nothing(local_ray, model, dataset, tmp_path, capsys):
    output, users = tmp_path / "out", tmp_path / "users"
    users.write_text("u1\nu10\nstranger\nu199\n")
    asked_for = AskedFor(users=str(users))
    first = run_generate(str(model), dataset.url, str(output), asked_for=asked_for, price_per_hour=36.0)
    printed = capsys.readouterr()
    assert "1 users are not in" in printed.err
    assert "the first is 'stranger'; they get the most popular items" in printed.err
    assert "hours and cost 0." in printed.out
    assert users_of(output)[-1] == "stranger"
    assert first["num_by_popularity"] == 2
    assert first["files"][-1]["path"] == "part-00026.parquet"
    written = (output / "_SUCCESS").stat().st_mtime_ns
    for overwrite in (False, True):
        again = run_generate(str(model), dataset.url, str(output), asked_for=asked_for, overwrite=overwrite)
        assert again == first
        assert "is finished already, by the same command; nothing is done" in capsys.readouterr().out
    assert (output / "_SUCCESS").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="already holds something"):
        run_generate(str(model), dataset.url, str(output))
    assert "4 users in" in run_verify(str(output))
    users.write_text("u1\nu10\nu2\nstranger\n")
    with pytest.raises(UserError, match="out: 2 problems; run `recgpt generate` again with --overwrite"):
        run_verify(str(output), users=str(users))


@pytest.mark.ray
def test_items_that_are_filtered_are_nobodys(local_ray, model, dataset, tmp_path, capsys):
    output, only, exclude = (str(tmp_path / name) for name in ("out", "only", "exclude"))
    Path(only).write_text("\n".join([*ITEMS[:20], "unknown"]))
    Path(exclude).write_text("\n".join(ITEMS[15:]))
    manifest = run_generate(
        str(model),
        dataset.url,
        output,
        wishes=RecallWishes(continuation="beam", beam_width=2),
        asked_for=AskedFor(only_items=only, exclude_items=exclude),
    )
    assert f"warning: {only}: 1 items are not in" in capsys.readouterr().err
    assert (manifest["num_allowed_items"], manifest["continuation"]) == (15, "beam")
    rows = {row["user_id"]: row for table in read_candidates(output) for row in table.to_pylist()}
    assert {item for row in rows.values() for item in row["item_ids"]} <= set(ITEMS[:15])
    assert rows["all"]["item_ids"] == []  # has seen them all
    assert rows["u10"]["steps"] == [0] * 6
    run_verify(output)


@pytest.mark.ray
def test_only_those_who_changed(local_ray, model, write_dataset, dataset, tmp_path, capsys):
    from ray_jobs.generate import command

    histories = {"u1": [*ITEMS[:3]], "new": ITEMS[:2], "all": ITEMS[:30]}
    (tmp_path / "newer").mkdir()
    newer = write_dataset(tmp_path / "newer", {**histories, "x": ITEMS}, grown_from=dataset)
    output = tmp_path / "out"
    command(str(model), newer.url, str(output), only_changed_since=dataset.url)
    assert sorted(users_of(output)) == ["new", "u1", "x"]
    run_verify(str(output))
    nobody = tmp_path / "nobody"
    command(str(model), newer.url, str(nobody), only_changed_since=newer.url)
    assert "Nobody that was asked for has changed since" in capsys.readouterr().out
    assert read_manifest(str(nobody)).num_users == 0
    assert sorted(file.name for file in nobody.iterdir()) == ["_SUCCESS", "_manifest.json"]
    run_verify(str(nobody))


@pytest.mark.ray
def test_problems_are_lines_and_a_damaged_output_is_made_again(local_ray, model, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    run_generate(str(model), dataset.url, str(output))
    for number in range(25):
        (output / f"part-{number:05d}.parquet").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match="out: 25 problems, the first 20 are shown; run `recgpt generate` again"
    ):
        run_verify(str(output))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "not the file that was written" in line]) == len(lines) == 20
    run_generate(str(model), dataset.url, str(output), overwrite=True)
    run_verify(str(output))


def test_users_are_counted_for_the_metrics(model, dataset, tmp_path, monkeypatch):
    from recgpt.retrieval.candidate_job import JOB_FILE, Run
    from recgpt.retrieval.user_selection import all_users

    (tmp_path / JOB_FILE).write_text('{"run": "this one"}')
    worker = RecallWorker(
        str(model / "model"), dataset, Run(str(tmp_path), "job", "this one", []), read_recall(model)
    )
    worker.load()
    counted = []
    monkeypatch.setattr(worker.meters, "count", lambda **values: counted.append(values))
    *_, file = worker.write_candidates(all_users(dataset)[0])
    assert sum(values["users"] for values in counted) == file.rows == 8
    assert sum(values["candidates"] for values in counted) == file.candidates
    assert all(values["seconds"] > 0 for values in counted)


def read_recall(model):
    from recgpt.model.export import read_info

    return read_info(str(model / "model")).recall
