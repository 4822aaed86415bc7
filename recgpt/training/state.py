"""Where training stands, as a checkpoint holds it beside weights and moments."""

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from pydantic import TypeAdapter, ValidationError

from recgpt.config import STAGES, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.distributed import collectives
from recgpt.errors import UserError
from recgpt.settings_reading import to_dict
from recgpt.training import checkpoint


@dataclass
class TrainingState:
    """With the weights and moments, all that a checkpoint needs."""

    stage: str
    epoch: int = 0  # of the stage
    step: int = 0  # optimizer steps of the run
    stage_step: int = 0  # optimizer steps of the stage
    consumed: list[int] = field(default_factory=list)  # users read in this epoch, by lane
    best_value: float | None = None
    best_checkpoint: str | None = None
    validations_without_best: int = 0
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each stage has reached


def read_state(run: str, name: str, dataset_fingerprint: str, lanes: int) -> TrainingState:
    """The state in checkpoint ``name``. Raises ``UserError`` if it is damaged or of something else."""
    about = checkpoint.read_manifest(run, name).about
    if about.get("dataset_fingerprint") != dataset_fingerprint:
        raise UserError(f"{run}: checkpoint {name} is of another dataset; begin again with --restart")
    state = _state_of(checkpoint.load_state(run, name))
    if state is None or state.stage not in STAGES or len(state.consumed) != lanes:
        raise UserError(
            f"{run}: the state in checkpoint {name} is not of this run; begin again with --restart"
        )
    return state


def needed_checkpoints(run: str, keep: int) -> set[str]:
    """The ``keep`` newest ones, and the best ones that a resume from any of them comes back to."""
    needed = set(checkpoint.finished(run)[-keep:])
    for name in list(needed):
        try:
            state = _state_of(checkpoint.load_state(run, name))
        except UserError:
            continue  # damaged since it was written: whoever resumes will hear of it
        if state is not None:
            needed |= {result["checkpoint"] for result in state.results.values()}
    return needed


def _state_of(value: Any) -> TrainingState | None:
    """The state as JSON holds it, or None if it is none."""
    try:
        state = TypeAdapter(TrainingState).validate_python(value)
    except ValidationError:
        return None
    whole = all(isinstance(result.get("checkpoint"), str) for result in state.results.values())
    return state if whole else None


def origin(settings: TrainSettings, dataset: HistoryDataset) -> dict[str, Any]:
    """What a checkpoint says of how it was made."""
    return {
        "settings": to_dict(settings),
        "dataset_fingerprint": dataset.fingerprint,
        "vocabulary_fingerprint": dataset.manifest.vocabulary_fingerprint,
        "workers": collectives.world_size(),
        "versions": {name: metadata.version(name) for name in ("recgpt", "torch", "deepspeed")},
    }
