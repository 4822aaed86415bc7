"""The folder of a training run, and its checkpoints, read as a run that goes on reads them."""

import json
import random
from typing import Any

import torch

from benchmarks.fuzzing.mutators import json_bytes, spoiled_json
from benchmarks.fuzzing.readers import Input, Place, Reader, problem_of_message, spoiled_folder
from recgpt.config import TrainSettings
from recgpt.errors import UserError
from recgpt.training import checkpoint, run_folder
from recgpt.training.checkpoint import Snapshot, TableRows
from recgpt.training.state import needed_checkpoints, read_state

DATASET = "d" * 64
LANES, ROWS, WIDTH = 2, 6, 4
NAMES = [checkpoint.checkpoint_name(step, 1) for step in (10, 20)]
SETTINGS = TrainSettings()


def _write_checkpoint(run: str, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    dense = {"gpt.a": torch.randn(3, 2, generator=generator), "gpt.b": torch.randn(4, generator=generator)}
    moments = {
        f"{moment}/{key}": value * 0.1 for moment in checkpoint.MOMENTS for key, value in dense.items()
    }
    table = {
        "rows": torch.randn(ROWS, WIDTH, generator=generator),
        "mean": torch.randn(ROWS, WIDTH, generator=generator),
        "steps": torch.arange(ROWS),
    }
    state = {
        "stage": "pretrain", "epoch": 1, "step": step, "stage_step": step, "consumed": [step, 3],
        "best_value": 0.5, "best_checkpoint": NAMES[0], "validations_without_best": 0,
        "results": {"pretrain": {"ndcg@10": 0.5, "checkpoint": NAMES[0], "epochs": 1, "step": 10}},
    }  # fmt: skip
    about = {"dataset_fingerprint": DATASET, "settings": {}}
    tables = {"item_table": TableRows(ROWS, 0, table)}
    name = checkpoint.checkpoint_name(step, 1)
    checkpoint.write(
        run, Snapshot(name, state, dense, {**moments, "step": torch.tensor(step)}, tables, about)
    )


class Checkpoints(Reader):
    """Two checkpoints: where the newest is damaged, the other is as good, if the user is told."""

    def make_good(self, place: Place) -> None:
        for step in (10, 20):
            _write_checkpoint(str(place.folder), step)
        self.contents = {name: self._content(str(place.folder), name) for name in NAMES}

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        run, warnings = str(place.folder), []
        name = checkpoint.newest_whole(run, warnings.append)
        if name is None:
            raise UserError("there is no checkpoint")
        needed_checkpoints(run, 2)
        content = self._content(run, name)
        for best in {result["checkpoint"] for result in content["results"].values()}:
            content[best] = sorted(checkpoint.load_dense(run, best).items())  # what is exported in the end
        return {"name": name, "content": content, "warnings": warnings}

    def _content(self, run: str, name: str) -> dict[str, Any]:
        dense = {"gpt.a": torch.empty(3, 2), "gpt.b": torch.empty(4)}
        table = {
            "rows": torch.zeros(4, WIDTH), "mean": torch.zeros(4, WIDTH),
            "steps": torch.zeros(4, dtype=torch.int64),
        }  # fmt: skip
        state = read_state(run, name, DATASET, LANES)
        checkpoint.load_table_into(run, name, "item_table", 1, table)
        return {
            "state": repr(state),
            "results": state.results,
            "dense": sorted(checkpoint.load_dense(run, name, dense).items()),
            "optimizer": sorted(checkpoint.load_dense_optimizer(run, name, dense).items()),
            "table": table,
            "ranges": [piece.tolist() for piece in checkpoint.table_row_ranges(run, name, "item_table")],
        }

    def objection(self, value: dict[str, Any], truth: Any, given: Input) -> str | None:
        """What a manifest says of how a checkpoint was made is its own word."""
        problems = list(filter(None, map(problem_of_message, value["warnings"])))
        if problems or (value["name"] != NAMES[-1] and not value["warnings"]):
            return f"an older checkpoint was taken without a word {problems}"
        good = {key: repr(some) for key, some in self.contents[value["name"]].items()}
        same = good.items() <= {key: repr(some) for key, some in value["content"].items()}.items()
        return None if same or given.sealed else "another state of training was taken for right"

    def is_quarantined(self, value: dict[str, Any]) -> bool:
        return bool(value["warnings"])


class RunFolder(Reader):
    """What a run writes of itself: settings, the mark of the process, metrics, at the end the manifest."""

    def make_good(self, place: Place) -> None:
        run = str(place.folder)
        run_folder.open_run(run, SETTINGS, DATASET, overwrite=False)
        (place.folder / run_folder.ATTEMPT_FILE).write_text(json.dumps({"attempt": "a" * 16}))
        lines = [
            {"stage": "pretrain", "epoch": 1, "step": step, "kind": "train", "loss": 1.5} for step in (20, 40)
        ]
        run_folder.write_metrics(run, lines)
        _write_checkpoint(run, 20)
        summary = {"dataset": "/dataset", "num_items": 3, "stages": {"pretrain": {"ndcg@10": 0.5}}}
        run_folder.finish_run(run, run, summary)

    def spoil(self, chance: random.Random, place: Place) -> Input:
        own = {name: data for name, data in self.good.items() if "checkpoints" not in name}
        if chance.random() < 0.4:
            own.pop("manifest.json")  # of a run that is under way
        given = spoiled_folder(own, chance, place)
        if chance.random() < 0.2:
            lines = given.files["metrics.jsonl"].splitlines()[:1] if "metrics.jsonl" in given.files else []
            spoilt = json_bytes(spoiled_json({"step": 40, "kind": "train"}, chance))
            given.files["metrics.jsonl"] = b"\n".join([*lines, spoilt])
        given.files |= {name: data for name, data in self.good.items() if "checkpoints" in name}
        given.must_be_refused = False  # nothing in these files names another file
        return given

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        run = str(place.folder)
        opened = run_folder.open_run(run, SETTINGS, DATASET, overwrite=False)
        run_folder.check_attempt(run, "a" * 16)
        return {
            "opened": opened,
            "metrics": run_folder.read_metrics(run, 30),
            "stages": run_folder.finished_stages(run),
        }

    def objection(self, value: dict[str, Any], truth: Any, given: Input) -> str | None:
        """A run is gone on with if its own settings are those asked for."""
        written = [
            json.loads(line) for line in given.files.get("metrics.jsonl", b"").splitlines() if line.strip()
        ]
        if value["metrics"] != [line for line in written if line["step"] <= 30]:
            return "metrics are not those of the file"
        return None


def run_readers() -> list[Reader]:
    return [RunFolder("run: its own files"), Checkpoints("run: checkpoints")]
