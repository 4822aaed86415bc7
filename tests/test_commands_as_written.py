"""Every command of the documents that needs no cluster, as it is written, in a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_docs import DOCS, README, commands_in_blocks, fences

RECGPT = Path(sys.executable).parent / "recgpt"
GUIDES = "training evaluation recall indexes item-table report serving watching scaling projection"
DOCUMENTS = [README, *(DOCS / f"{name}.md" for name in [*GUIDES.split(), "scaling-laws", "quality"])]
OF_A_CLUSTER = ("BUCKET", "mlflow")  # needs a store or a server, and has tests of its own
COPIES = {
    "runs/a": "runs/mine",
    "runs/b": "runs/mine",
    "runs/monday": "ablations/mine/runs/full-seed-0",  # of the settings as they are
    "candidates/a": "candidates/mine",
    "sweeps/before": "sweeps/weak",
    "sweeps/after": "sweeps/weak",
    "sweeps/strong": "sweeps/weak",
    "sweeps/table_rows": "sweeps/weak",
    "sweeps/zero_stages": "sweeps/weak",
    "metrics.json": "valid.json",
    "data/monday": "data/mine",
    "data/large": "data/mine",
}
USERS, ITEMS_OF_EACH, ITEMS = 80, 8, 60


def commands():
    for path in DOCUMENTS:
        for command in commands_in_blocks(path):
            if not any(word in " ".join(command) for word in OF_A_CLUSTER):
                yield pytest.param(command, id=f"{path.name}: {' '.join(command)}")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with small logs under the names that the documents use."""
    folder = tmp_path_factory.mktemp("workplace")
    draw = np.random.default_rng(0)
    items = [(draw.integers(ITEMS) + np.arange(ITEMS_OF_EACH)) % ITEMS for _ in range(USERS)]
    users = np.repeat(np.arange(USERS), ITEMS_OF_EACH)
    times = 1_700_000_000 + draw.integers(0, 10**7, len(users))
    log = pa.table({"uid": [f"u{user}" for user in users], "sku": np.concatenate(items), "ts": times})
    tuesday = pa.table([log["uid"], log["sku"], pa.array(times + 10**7)], ["user_id", "item_id", "timestamp"])
    for day, table in {"logs": log, "logs/tuesday": tuesday}.items():
        (folder / day).mkdir()
        pq.write_table(table, folder / day / "part.parquet")
    (folder / "data").mkdir()
    (folder / "data" / "Beauty.txt").write_text(
        "".join(
            f"{user} {' '.join(str(item + 1) for item in history)}\n" for user, history in enumerate(items)
        )
    )
    ratings = zip(users, log["sku"].to_pylist(), times, strict=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in ratings)]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    (folder / "mine.yaml").write_text(fences(DOCS / "training.md", "yaml")[0])
    (folder / "items.csv").write_text("item_id,title\n7,seven\n")
    return folder


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", commands())
def test_a_command_as_it_is_written(command, workplace):
    for copy, original in COPIES.items():  # what a guide takes as given
        if (workplace / original).exists() and not (workplace / copy).exists():
            subprocess.run(["cp", "-r", original, copy], cwd=workplace, check=True)
    if "--output" in command:  # the documents' examples are in each other's place
        output = workplace / command[command.index("--output") + 1]
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    result = subprocess.run([RECGPT, *command], cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
