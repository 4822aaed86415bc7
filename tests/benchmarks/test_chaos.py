"""The chaos benchmark: its plans, its look at what is left, and a short run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import RoundResult, fault_rows
from benchmarks.chaos_checks import COMPARED, Leftovers, Outcome, find_leftovers
from benchmarks.chaos_faults import DAMAGE, GENERATE, KINDS, TRAIN, VERBS, plan
from benchmarks.chaos_processes import below
from benchmarks.chaos_rounds import Injected, says_why
from recgpt import storage

REPOSITORY = Path(__file__).parent.parent.parent
SEED = 89  # a worker is killed, the driver gets SIGTERM; an actor is killed


# Plans


def test_a_plan_follows_from_seed_round_and_verb():
    first = plan(0, 1, TRAIN, with_store=True, faults=5)
    assert first == plan(0, 1, TRAIN, with_store=True, faults=5)
    others = [plan(1, 1, TRAIN, True, 5), plan(0, 2, TRAIN, True, 5), plan(0, 1, GENERATE, True, 5)]
    assert first not in others


@pytest.mark.parametrize("with_store", [False, True])
def test_all_kinds_come_and_none_twice_in_a_round(with_store):
    for verb in VERBS:
        plans = [plan(0, number, verb, with_store, faults=3) for number in range(30)]
        for faults in plans:
            assert len({fault.kind for fault in faults}) == 3
            shares = [fault.share for fault in faults if fault.share is not None]
            assert shares == sorted(shares)
        expected = {
            name for name, kind in KINDS.items() if verb in kind.verbs and kind.needs_store <= with_store
        }
        assert {fault.kind for faults in plans for fault in faults} == expected


# Checks


def outcome(**changes):
    values = {
        "model": {"a": "1"},
        "training": {},
        "candidates": {"part-00000.parquet": "2"},
        "evaluation": {},
    }
    return Outcome(**values | changes, steps=10)


def test_a_model_that_differs_is_told():
    assert all(outcome().compare(outcome()).values())
    same = outcome(model={"a": "2"}).compare(outcome())
    assert [name for name, value in same.items() if not value] == ["model"]


def test_what_the_cleaner_takes_is_told_from_what_nobody_removes(tmp_path):
    for name in (
        "run/manifest.json",
        "run/metrics.jsonl",
        "run/model/model.json",
        "run/checkpoints/step-0000000010-epoch-00000/state.json",
        "run/.metrics.jsonl.0123abcd.partial",
        "run/ray_train/left.json",
        ".candidates.partial/_job.json",
        "candidates/part-00000.parquet",
        "candidates/_SUCCESS",
        "evaluation.json",
    ):
        storage.write_bytes(str(tmp_path / name), b"")
    unexpected = [".candidates.partial/_job.json", "run/ray_train/left.json"]
    assert find_leftovers(str(tmp_path)) == Leftovers(1, 1, unexpected)
    assert find_leftovers(str(tmp_path)) == Leftovers(0, 1, unexpected)


@pytest.mark.parametrize(
    ("status", "text", "enough"),
    [
        (-9, "", True),
        (2, "bar\rrecgpt: error: workers were lost 4 times\n", True),
        (2, "Killed\n", False),
        (143, "recgpt: stopped at step 7; the same command goes on from there\n", True),
        (143, "", False),
        (143, "recgpt: stopped; the same command goes on\n(raylet) Task failed.\n", True),
    ],
)
def test_whether_the_last_line_says_why_a_command_ended(status, text, enough):
    assert says_why(status, text) == enough


def test_rows_count_what_became_of_faults():
    def injected(kind, **more):
        return Injected(0, "disk", TRAIN, kind, "", 0.0, 0, **more)

    rows = fault_rows(
        [
            injected("kill the driver", by_itself=False, seconds=30.0),
            injected(DAMAGE, by_itself=False),
            injected("kill a training worker", seconds=10.0),
        ]
    )
    assert [(row["by_itself"], row["by_the_same_command"], row["lost"]) for row in rows] == [
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 1),
    ]
    assert rows[-1]["median_seconds"] == 20


# Processes

ORPHANS = """
import os, signal, subprocess, sys, time
from benchmarks.chaos_processes import below, reap_orphans
from benchmarks.process_tree import adopt_orphans
adopt_orphans()
code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child = int(parent.stdout.readline())
assert below(parent.pid, "sleep") == [child]
parent.kill()
parent.wait()
os.kill(child, signal.SIGKILL)
deadline = time.monotonic() + 20
while os.path.exists(f"/proc/{child}"):
    assert time.monotonic() < deadline, "the orphan stays a zombie"
    reap_orphans(set())
"""


def test_orphans_are_found_and_their_ends_are_noticed():
    # In a process of its own: this one must not adopt what other tests have started.
    subprocess.run([sys.executable, "-c", ORPHANS], cwd=REPOSITORY, check=True, timeout=60)


def test_a_process_of_others_is_not_found():
    other = subprocess.Popen(["sleep", "60"])
    try:
        assert below(other.pid, "sleep") == [other.pid]
        assert below(1, "no such process") == []
    finally:
        other.kill()
        other.wait()


# The whole


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_short_round_loses_nothing(tmp_path):
    code = f"""
import json
from pathlib import Path
from benchmarks.chaos import DISK, Size, figures, run_chaos, show
size = Size(
    users=4000, items=200, tokens_per_batch=192, epochs=1, evaluates=False, places=(DISK,),
    training_faults=2, recall_faults=1,
)
chaos = run_chaos(minutes=0, seed={SEED}, size=size)
show(chaos)
Path({str(tmp_path)!r}, "figures.json").write_text(json.dumps(figures(chaos)))
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["problems"] == []
    (row,) = [RoundResult(**row) for row in result["rounds"]]
    assert list(row.same.values()) == [True] * COMPARED
    assert row.processes_left == []
    *_, every = result["faults"]
    assert every["injected"] >= 2
    assert every["lost"] == 0
