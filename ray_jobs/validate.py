"""`recgpt validate`: settings, dataset and model, looked at before anything is started. Needs no Ray."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ray_jobs.command_line import ConfigOption, SetOption, verb_app
from ray_jobs.runtime import run_command
from recgpt.errors import UserError

if TYPE_CHECKING:
    from recgpt.config import TrainSettings

Check = tuple[str, Callable[[], str]]
"""What is looked at, and a call that says what was seen or raises ``UserError``."""


def command(
    config: ConfigOption = None,
    set_: SetOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Also read a dataset, all of it (path or s3:// URL). Example: --dataset data/beauty",
            show_default="no dataset is looked at",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Also read a trained model (path or s3:// URL), and whether it belongs to --dataset. "
            "Example: --model runs/beauty",
            show_default="no model is looked at",
        ),
    ] = None,
) -> None:
    """Check settings, a dataset and a model, without starting anything.

    Every check says what it saw. Ends with status 2 if one of them failed.

    Example: `recgpt validate --config mine.yaml --dataset data/beauty`
    """
    failed = []
    for what, check in checks(config, set_ or [], dataset, model):
        try:
            typer.echo(f"ok       {what}: {check()}")
        except UserError as error:
            typer.echo(f"problem  {what}: {error}")
            failed.append(what)
    if failed:
        raise UserError(f"{', '.join(failed)}: not as it has to be; see above")


def checks(
    config: str | None, overrides: list[str], dataset: str | None, model: str | None
) -> Iterator[Check]:
    """What there is to look at, in order; a later check does not need an earlier one to have gone well."""
    yield "settings", lambda: check_settings(config, overrides)
    if dataset is not None:
        yield "dataset", lambda: check_dataset(dataset, settings_of(config, overrides))
    if model is not None:
        yield "model", lambda: check_model(model, dataset)


def check_settings(config: str | None, overrides: list[str]) -> str:
    from recgpt.settings_reading import load_train_settings
    from recgpt.training.engine import read_deepspeed_config

    settings = load_train_settings(config, overrides)
    read_deepspeed_config(settings.deepspeed)
    return f"{config or 'built-in'}, stages {', '.join(settings.stages)}, {settings.workers} workers"


def settings_of(config: str | None, overrides: list[str]) -> "TrainSettings":
    """The settings; the built-in ones if they are wrong, which their own check tells."""
    from recgpt.config import TrainSettings
    from recgpt.settings_reading import load_train_settings

    try:
        return load_train_settings(config, overrides)
    except UserError:
        return TrainSettings()


def check_dataset(url: str, settings: "TrainSettings") -> str:
    """Reads all histories, each page of them against its checksum, and divides them."""
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.sequences import resolve_time_bounds, split_histories
    from recgpt.training.model import check_item_table

    histories, split = HistoryDataset.open(url), settings.data.split
    check_item_table(settings.item_table, histories.num_items, settings.fewest_workers)
    bounds = resolve_time_bounds(split, histories.manifest)
    held_out = 0
    for row_group in histories.row_groups:
        held_out += split_histories(histories.read_row_group(row_group), split, "valid", bounds).num_rows
    if not held_out:
        raise UserError(f"{url}: no user has an item held out for validation, protocol {split.protocol}")
    return (
        f"{histories.url}, {histories.num_users:,} users, {histories.num_items:,} items; "
        f"{held_out:,} users have an item held out for validation"
    )


def check_model(url: str, dataset: str | None) -> str:
    """Reads all files of the model, each against its checksum."""
    from recgpt.data.dataset import HistoryDataset
    from recgpt.model.export import check_finite, find_model, load_without_items, model_fingerprint
    from recgpt.retrieval.recall_model import model_for_dataset

    folder = find_model(url) if dataset is None else model_for_dataset(url, HistoryDataset.open(dataset))[0]
    fingerprint = model_fingerprint(folder)
    info, gpt = load_without_items(folder)
    check_finite(folder, gpt.parameters())
    return f"{folder}, {info.num_items:,} items of width {info.model.vector_width}, {fingerprint[:12]}"


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
