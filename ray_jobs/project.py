"""`recgpt project`: what a training would take on up to 1,024 GPUs, of up to a billion items. No Ray."""

from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.command_line import ConfigOption, OutputOption, OverwriteOption, SetOption, verb_app
from ray_jobs.runtime import run_command
from recgpt import storage
from recgpt.errors import UserError

if TYPE_CHECKING:
    from recgpt.scaling.projection import Projection

TABLES_FILE = "projection.md"
JSON_FILE = "projection.json"


def write_projection(projection: "Projection", output: str, overwrite: bool = False) -> None:
    """Tables, JSON and plots in a folder that appears whole.

    Raises ``UserError`` if the folder holds something and ``overwrite`` is not given.
    """
    from recgpt.scaling import projection_plots
    from recgpt.scaling.projection import markdown, to_json

    with storage.staged_output(output, overwrite) as folder:
        storage.write_bytes(storage.join(folder, TABLES_FILE), markdown(projection).encode())
        for name in ("curves", "choices"):
            for kind, data in getattr(projection_plots, name)(projection).items():
                storage.write_bytes(storage.join(folder, f"{name}.{kind}"), data)
        storage.write_json(storage.join(folder, JSON_FILE), to_json(projection))


def command(
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="What each worker has: a shipped name (h100, h200) or a YAML file of constants. "
            "Example: --device h100",
        ),
    ],
    output: OutputOption,
    config: ConfigOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Project a training to 8 to 1,024 GPUs and 10 million to 1 billion items; nothing is measured.

    Works out the model of costs (docs/scaling.md) on a made-up workload (docs/projection.md): throughput,
    time and cost with ranges, memory, the largest table, and which ZeRO stage and table optimizer fit.
    Of the settings, each worker's share of `data.tokens_per_batch` stays as GPUs are added.

    Example: `recgpt project --device h100 --output projections/h100`
    """
    from recgpt.machines import load_machine
    from recgpt.scaling.projection import NOTE, project
    from recgpt.settings_reading import load_train_settings

    storage.check_output_is_free(storage.absolute(output), overwrite)
    projection = project(load_train_settings(config, set_ or []), load_machine(device))
    if not projection.points:
        raise UserError(
            f"--device {device}: no table fits on any number of GPUs; try a smaller "
            "--set data.tokens_per_batch or model.width"
        )
    write_projection(projection, output, overwrite)
    typer.echo(NOTE)
    typer.echo(f"{output}: {TABLES_FILE}, {JSON_FILE}, curves and choices (.png, .svg)")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
