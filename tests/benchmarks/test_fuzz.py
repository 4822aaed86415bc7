"""Fuzzing: the same input for the same seed, and whatever a reader does wrong is noticed."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass

import pytest

from benchmarks import fuzz
from benchmarks.fuzzing.hostile import code
from benchmarks.fuzzing.mutators import spoiled_bytes, spoiled_json
from benchmarks.fuzzing.readers import Input, Place, Reader, spoiled_folder
from benchmarks.fuzzing.watch import WatchedPool, limit_memory
from recgpt.errors import UserError
from tests.conftest import REPOSITORY


@dataclass
class Stub(Reader):
    """A reader that does what it is told."""

    does: object = None

    def make_good(self, place):
        """It reads no file."""

    def read(self, place, given):
        return self.does()


def fails_with(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("does", "kind", "detail"),
    [
        (lambda: "good", fuzz.RIGHT, ""),
        (lambda: "other", fuzz.DEFECT, "another value was taken for right"),
        (fails_with(UserError("file: damaged; make it again")), fuzz.REFUSED, "file: damaged; make it again"),
        (fails_with(UserError("")), fuzz.DEFECT, "the message has 0 characters"),
        (fails_with(KeyError("rows")), fuzz.DEFECT, "KeyError at test_fuzz.py"),
        (fails_with(RecursionError()), fuzz.DEFECT, "RecursionError at"),
    ],
)
def test_an_answer_is_judged(tmp_path, does, kind, detail):
    found = fuzz.judged(Stub("stub", does=does), Place(tmp_path), Input({}, "spoilt"), "good")
    assert found[0] == kind
    assert detail in found[1]


def test_a_good_value_from_elsewhere_is_no_good_value(tmp_path):
    given = Input({}, "a name that leads out of the folder", must_be_refused=True)
    assert fuzz.judged(Stub("stub", does=lambda: "good"), Place(tmp_path), given, "good")[0] == fuzz.DEFECT


@pytest.mark.parametrize(
    "spoil", [spoiled_bytes, lambda data, chance: spoiled_json(json.loads(data), chance)]
)
def test_the_same_seed_spoils_in_the_same_way(spoil):
    data = b'{"files": [{"path": "part", "rows": 3}], "name": "x"}'
    spoilt = [spoil(data, random.Random(f"{seed}")) for seed in range(50)]
    assert [repr(some) for some in spoilt] == [
        repr(spoil(data, random.Random(f"{seed}"))) for seed in range(50)
    ]
    assert len({repr(some) for some in spoilt}) > 25


def test_names_lead_elsewhere_often_enough(tmp_path):
    files = {"manifest.json": b'{"files": [{"path": "part.parquet", "rows": 3}]}', "part.parquet": b"PAR1"}
    made = [spoiled_folder(files, random.Random(number), Place(tmp_path)) for number in range(200)]
    assert sum(given.must_be_refused for given in made) > 10


def works_on(task):
    while task == "hangs":
        pass
    if task == "dies":
        os._exit(7)
    if task == "is greedy":
        try:
            return len(bytearray(2 << 30))
        except MemoryError:
            return "no memory"
    return task.upper()


def make_work():
    limit_memory(1 << 30)
    return works_on


def test_who_hangs_or_dies_is_named_and_the_rest_goes_on():
    tasks = ["a", "hangs", "b", "dies", "is greedy", "c"]
    pool = WatchedPool(2, make_work, seconds=2)
    results = list(pool.run(iter(tasks), lambda task, reason: f"{task}: {reason}"))
    assert sorted(results) == [
        "A",
        "B",
        "C",
        "dies: the process died (exit code 7)",
        "hangs: no end within 2 seconds",
        "no memory",
    ]


def test_code_that_ran_and_files_from_outside_are_seen(tmp_path):
    """In a process of its own: what watches a process cannot be taken away again."""
    script = f"""
import pickle
from pathlib import Path
from benchmarks.fuzzing.watch import watch
witness = watch()
witness.forbidden_folder = {str(tmp_path / "outside")!r}
Path({str(tmp_path)!r}, "outside").mkdir()
Path({str(tmp_path)!r}, "outside", "file").touch()
pickle.loads({code(str(tmp_path / "marker"))["pickle"]!r})
print([line.split()[0] for line in witness.seen])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.strip() == "['open', 'pickle.find_class']", result.stderr
    assert (tmp_path / "marker").is_dir()
