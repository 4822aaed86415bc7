"""`recgpt plan`: memory, time and cost of a training before it is started. Needs no Ray."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.command_line import ConfigOption, DatasetOption, JsonOption, SetOption, WorkersOption, verb_app
from ray_jobs.runtime import run_command
from recgpt import progress, storage
from recgpt.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from recgpt.config import TrainSettings
    from recgpt.machines import Machine
    from recgpt.scaling.plan import Plan

MEASURED = "cpu"
_GIB = 2**30


def make_plan(dataset: str, settings: "TrainSettings", machine: "Machine") -> tuple["Plan", str | None]:
    """The plan, and, if it does not fit the memory, the smallest change with which it would (None: no such).

    Raises ``UserError`` for what the user can put right.
    """
    from recgpt.data.dataset import HistoryDataset
    from recgpt.scaling.plan import plan, smallest_change
    from recgpt.scaling.workload import measure_workload
    from recgpt.training.engine import read_deepspeed_config, zero_stage

    stage = zero_stage(read_deepspeed_config(settings.deepspeed))
    work = measure_workload(HistoryDataset.open(dataset), settings)
    planned = plan(settings, work, stage, machine)
    return planned, None if planned.fits else smallest_change(settings, work, stage, machine)


def command(
    dataset: DatasetOption,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="What each worker has: a shipped name (h100, h200), a YAML file of constants, or "
            f"{MEASURED}, which measures this machine for about a minute. Example: --device h100",
        ),
    ],
    config: ConfigOption = None,
    workers: WorkersOption = None,
    set_: SetOption = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            metavar="USD",
            min=0,
            show_default="the device's list price",
            help="Of one worker. Example: --price-per-hour 2.5",
        ),
    ] = None,
    save_device: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="not kept",
            help="Keep the constants of the device as YAML, for --device. Example: --save-device mine.yaml",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what a training will take: memory, time, exchanged bytes, checkpoints, candidates, cost.

    Works out a model of costs (docs/scaling.md) on the first steps of the dataset; nothing is trained.
    Ends with status 2 if a worker's memory is too small, and names the smallest change that helps.

    Example: `recgpt plan --dataset data/beauty --workers 4 --device h100`
    """
    from recgpt.settings_reading import load_train_settings

    overrides = [*(set_ or []), *([f"workers={workers}"] if workers is not None else [])]
    settings = load_train_settings(config, overrides)
    machine = machine_for(device, settings.threads_per_worker)
    if save_device is not None:
        _save(machine, save_device)
    if price_per_hour is not None:
        machine = dataclasses.replace(machine, price_per_hour=price_per_hour)
    planned, change = make_plan(dataset, settings, machine)
    show(planned, settings)
    if json_file is not None:
        storage.write_json(json_file, to_json(planned))
    if not planned.fits:
        helps = f"try {change}" if change else "no change of settings or up to 4,096 workers helps"
        raise UserError(
            f"a worker needs {planned.memory.total / _GIB:.1f} GiB, "
            f"and may use {planned.memory_available / _GIB:.1f}; {helps}"
        )


def machine_for(device: str, threads: int) -> "Machine":
    """Constants by name or file, or measured now. Raises ``UserError`` if there are none."""
    from recgpt.machines import load_machine
    from recgpt.scaling.calibration import calibrate

    if device != MEASURED:
        return load_machine(device)
    progress.note("recgpt: measuring this machine for about a minute; keep it with --save-device")
    return calibrate(threads, also_loaded=("ray.train", "ray.data"))


def _save(machine: "Machine", file: str) -> None:
    import yaml

    text = yaml.safe_dump(dataclasses.asdict(machine), sort_keys=False)
    storage.write_bytes(storage.absolute(file), text.encode())


def to_json(planned: "Plan") -> dict[str, Any]:
    """The plan with its sums."""
    result = dataclasses.asdict(planned)
    result["memory"]["total"], result["step"]["total"] = planned.memory.total, planned.step.total
    return result | {"fits": planned.fits}


def show(planned: "Plan", settings: "TrainSettings") -> None:
    """Print tables of a plan."""
    from rich.table import Table

    from recgpt.tables import print_tables

    memory = Table("memory of a worker", "GiB")
    for part in dataclasses.fields(planned.memory):
        memory.add_row(part.name, f"{getattr(planned.memory, part.name) / _GIB:.2f}")
    memory.add_section()
    memory.add_row("together", f"{planned.memory.total / _GIB:.2f}")
    memory.add_row("may be used", f"{planned.memory_available / _GIB:.2f}")
    step = Table("a step of pre-training", "ms", "%")
    for part in dataclasses.fields(planned.step):
        seconds = getattr(planned.step, part.name)
        step.add_row(part.name, f"{1e3 * seconds:.2f}", f"{100 * seconds / planned.step.total:.0f}")
    step.add_section()
    step.add_row("together", f"{1e3 * planned.step.total:.2f}", "")
    print_tables(memory, step, _whole(planned, settings))


def _whole(planned: "Plan", settings: "TrainSettings") -> "Table":
    from rich.table import Table

    table = Table("the run", "")
    table.add_row("steps of an epoch", f"{planned.steps_per_epoch:,.0f}")
    for stage, seconds in planned.epoch_seconds.items():
        most = getattr(settings, stage).max_epochs
        table.add_row(f"an epoch of {stage}, up to {most} of them", _duration(seconds))
    table.add_row("all epochs", _duration(planned.run_seconds))
    table.add_row("sent by a worker in a step", f"{planned.exchanged_bytes / 2**20:,.2f} MiB")
    size = f"{planned.checkpoint_bytes / _GIB:,.2f} GiB"
    table.add_row("a checkpoint", f"{size}, {_duration(planned.checkpoint_seconds)}")
    lasts = f"{100 * planned.goodput:.2f} % of the time lasts"
    table.add_row("best checkpoint interval", f"{_duration(planned.checkpoint_every_seconds)}; then {lasts}")
    table.add_row("candidate lists per hour and actor", f"{planned.candidates_per_hour:,.0f}")
    cost = "no price known; give --price-per-hour" if planned.cost is None else f"{planned.cost:,.2f} USD"
    table.add_row("cost of all epochs", cost)
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
