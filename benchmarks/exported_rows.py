"""Compares the rows of an exported item table with their initial values.

    python -m benchmarks.exported_rows --run RUN --dataset DATASET --json FILE

Rows of items in the training part must have moved. Others move only if they are drawn as a negative, and
how many are never drawn follows from the sampler's rates: so many, about, must be as they began, bit for
bit. Fit for a pre-trained model with a sampled loss (prompt-tuning uses rows in further ways).

Shapes: V items, R = V + 1 rows (row 0 is padding), D width.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import typer
from torch import Tensor

from recgpt import storage
from recgpt.config import LossSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.vocabulary import Vocabulary
from recgpt.evaluation.protocol import training_histories
from recgpt.model.export import INFO_FILE, find_model
from recgpt.model.item_table import initial_rows
from recgpt.schema import MANIFEST_FILE, PADDING_INDEX
from recgpt.settings_reading import from_dict
from recgpt.training.run_folder import SETTINGS_FILE

STANDARD_DEVIATIONS = 6.0  # that the number of untouched rows may differ from the expected one


def compare_rows(
    ranges: Iterable[Tensor],
    settings: TrainSettings,
    trained_R: npt.NDArray[np.bool_],
    count_R: npt.NDArray[np.int64],
    steps: int,
) -> dict[str, Any]:
    """Numbers of rows, by what became of them; see ``problems`` for what they must be.

    Args:
        ranges: the exported table, float32 [rows, D] at a time, in order.
        trained_R: which rows are an input or a target of training.
        count_R: interactions of each row in the log.
        steps: optimizer steps of the run.
    """
    moved = [np.empty(0, np.bool_)]
    all_finite, first = True, 0
    for rows_ND in ranges:
        end = first + len(rows_ND)
        initial_ND = initial_rows(settings.seed, first, end, settings.model.vector_width)
        all_finite = all_finite and bool(rows_ND.isfinite().all())
        moved.append((rows_ND != initial_ND).any(1).numpy())
        first = end
    moved_R = np.concatenate(moved)
    assert len(moved_R) == len(trained_R), f"{len(moved_R)} rows in the export, {len(trained_R)} expected"
    others_R = ~trained_R
    others_R[PADDING_INDEX] = False
    return {
        "rows": len(moved_R),
        "all_finite": all_finite,
        "padding_moved": bool(moved_R[PADDING_INDEX]),
        "trained": int(trained_R.sum()),
        "trained_and_moved": int((trained_R & moved_R).sum()),
        "not_trained": int(others_R.sum()),
        "not_trained_and_as_they_began": int((others_R & ~moved_R).sum()),
        "expected_as_they_began": float(
            probability_of_no_draw(settings.loss, count_R, steps)[others_R].sum()
        ),
    }


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong with the numbers that ``compare_rows`` found; empty if nothing is."""
    untouched, expected = found["not_trained_and_as_they_began"], found["expected_as_they_began"]
    allowed = STANDARD_DEVIATIONS * max(expected, 1.0) ** 0.5
    unmoved = found["trained"] - found["trained_and_moved"]
    is_wrong = {
        "some rows are not finite": not found["all_finite"],
        "the row of padding has moved": found["padding_moved"],
        f"{unmoved:,} rows in training have not moved": unmoved > 0,
        f"{untouched:,} rows are as they began, not about {expected:,.0f}": abs(untouched - expected)
        > allowed,
    }
    return [problem for problem, holds in is_wrong.items() if holds]


def exported_ranges(model: str) -> Iterator[Tensor]:
    """The exported item table, float32 [rows, D] at a time, in order."""
    for part in storage.read_json(storage.join(model, INFO_FILE))["item_table"]:
        yield safetensors.torch.load(storage.read_bytes(storage.join(model, part["file"])))["rows"]


def rows_in_training(dataset: HistoryDataset, settings: TrainSettings) -> npt.NDArray[np.bool_]:
    """Which rows are an input or a target of training, bool [R]: items of histories that have a target."""
    trained_R = np.zeros(dataset.num_items + 1, np.bool_)
    for item_T, offsets in training_histories(dataset, settings.data.split):
        lengths = np.diff(offsets)
        assert lengths.max(initial=0) <= settings.model.max_history + 1, "histories are cut off in training"
        trained_R[item_T[np.repeat(lengths > 1, lengths)]] = True
    return trained_R


def probability_of_no_draw(
    loss: LossSettings, count_R: npt.NDArray[np.int64], steps: int
) -> npt.NDArray[np.float64]:
    """How likely it is that no step draws a row as a negative, float64 [R]; see ``LossSettings``."""
    by_popularity = round(loss.negatives * loss.popularity_share)
    popularity_R = count_R.astype(np.float64) ** loss.popularity_power
    uniform_log = np.log1p(-1 / (len(count_R) - 1)) * (loss.negatives - by_popularity)
    return np.exp(steps * (uniform_log + by_popularity * np.log1p(-popularity_R / popularity_R.sum())))


def main(
    run: Annotated[str, typer.Option(help="Folder of a finished run.")],
    dataset: Annotated[str, typer.Option(help="Dataset it was trained on.")],
    json: Annotated[Path, typer.Option(help="File to write the counts to.")],
) -> None:
    """Check an exported item table against its initial rows; exit status 1 if something is wrong."""
    histories = HistoryDataset.open(dataset)
    identity = storage.read_json(storage.join(run, SETTINGS_FILE))
    settings = from_dict(TrainSettings, identity["settings"], run)
    steps = storage.read_json(storage.join(run, MANIFEST_FILE))["stages"]["pretrain"]["step"]
    count_R = np.concatenate([[0], Vocabulary.load_counts(histories.url)])
    trained_R = rows_in_training(histories, settings)
    found = compare_rows(exported_ranges(find_model(run)), settings, trained_R, count_R, steps)
    storage.write_json(str(json), found)
    wrong = problems(found)
    for problem in wrong:
        typer.echo(problem, err=True)
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
