"""What is trained for a law of quality, on which part of a dataset, and how its loss is measured.

Some users are held out: no model is trained on them, and all are measured on their whole histories. Of the
others each training has a share; a smaller share lies inside a larger one.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pyarrow as pa
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from recgpt import storage
from recgpt.config import Positive, TrainSettings
from recgpt.data.dataset import HistoryDataset, HistoryFile
from recgpt.data.hashing import uniform
from recgpt.data.histories import USERS_PER_ROW_GROUP, histories_file
from recgpt.data.packing import Histories, pack
from recgpt.data.sequences import history_lists, resolve_time_bounds, split_columns, split_histories
from recgpt.data.synthetic import SyntheticSettings
from recgpt.errors import UserError
from recgpt.model.attention import Layout
from recgpt.model.export import find_model, load_model
from recgpt.model.flops import scored_items, training_flops
from recgpt.model.losses import softmax_loss_sum
from recgpt.scaling.costs import dense_weights
from recgpt.scaling.laws import Fit, Run
from recgpt.schema import ITEM_INDICES, MANIFEST_FILE, USER_HASH
from recgpt.settings_reading import from_dict, read_yaml, shipped_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHIPPED = "configs/scaling"
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_DRAW_USERS = 4  # no other choice of users has this key
_BATCH_USERS = 256

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=_STRICT)
class Size:
    """Of a model. The item table is as wide as the model."""

    width: Positive
    layers: Positive


@dataclass(frozen=True, config=_STRICT)
class LawExperiment:
    """A grid of trainings: every size on every share of the users."""

    sizes: Annotated[tuple[Size, ...], Field(min_length=2)]
    shares: Annotated[tuple[Share, ...], Field(min_length=2)]
    """Of the users that are not held out."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the users on whom no model is trained and all are measured."""
    budgets: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Operations for which the best size and amount of data are worked out."""
    log: SyntheticSettings = Field(default_factory=SyntheticSettings)
    """Made up where no dataset is given."""
    settings: TrainSettings = Field(default_factory=TrainSettings)
    """Of every training. Only pre-training is done; its epochs are those on all users, and a smaller share
    has as many more of them as make up for it, with as many steps between validations."""

    def __post_init__(self) -> None:
        for name, values in (("sizes", self.sizes), ("shares", self.shares)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice")


@plain_dataclass(frozen=True)
class LawTraining:
    """One training of the grid."""

    name: str
    size: Size
    share: float
    settings: TrainSettings


def load_experiment(name: str) -> LawExperiment:
    """By the name of a shipped file or by path.

    Raises ``UserError`` for a missing file, an unknown key or a wrong value.
    """
    return from_dict(LawExperiment, read_yaml(shipped_file(SHIPPED, name, ".yaml")), name)


def trainings(experiment: LawExperiment) -> list[LawTraining]:
    """The grid, the quickest first."""
    sizes = sorted(experiment.sizes, key=lambda size: (size.width, size.layers))
    return [
        LawTraining(
            f"width-{size.width}-layers-{size.layers}-share-{share:g}",
            size,
            share,
            _settings(experiment.settings, size, share),
        )
        for size in sizes
        for share in sorted(experiment.shares)
    ]


def _settings(settings: TrainSettings, size: Size, share: float) -> TrainSettings:
    model = from_dict(
        type(settings.model),
        {**dataclasses.asdict(settings.model), "width": size.width, "layers": size.layers},
        f"width {size.width}",
    )
    validation, pretrain = settings.validation, settings.pretrain
    return dataclasses.replace(
        settings,
        stages=("pretrain",),
        model=model,
        pretrain=dataclasses.replace(pretrain, max_epochs=round(pretrain.max_epochs / share)),
        validation=dataclasses.replace(validation, every_epochs=round(validation.every_epochs / share)),
    )


def write_share(dataset: HistoryDataset, folder: str, share: float, held_out: float) -> HistoryDataset:
    """The dataset of a share of its users, none of them held out, under the same vocabulary.

    One that is there already is opened. Raises ``UserError`` if no user is left.
    """
    if not storage.exists(storage.join(folder, MANIFEST_FILE)):
        with storage.staged_output(folder, overwrite=False) as staging:
            vocabulary_sha256 = dataset.vocabulary().save(staging)
            files = list(_write_files(dataset, staging, share * (1 - held_out)))
            if not files:
                raise UserError(
                    f"{dataset.url}: no user falls into a share of {share:g}; choose a larger one"
                )
            manifest = dataclasses.replace(
                dataset.manifest,
                files=files,
                num_users=sum(file.rows for file in files),
                num_interactions=sum(file.interactions for file in files),
                vocabulary_sha256=vocabulary_sha256,
                lineage=[],
            )
            storage.write_json(storage.join(staging, MANIFEST_FILE), dataclasses.asdict(manifest))
    return HistoryDataset.open(folder)


def _write_files(dataset: HistoryDataset, folder: str, share: float) -> Iterator[HistoryFile]:
    """A part file for each of the dataset's that has such users."""
    for part in dataset.manifest.files:
        groups = [group for group in dataset.row_groups if group.file == part.path]
        tables = [_drawn(dataset.read_row_group(group), 0.0, share) for group in groups]
        table = pa.concat_tables(tables).combine_chunks()
        if not len(table):
            continue
        url = storage.join(folder, part.path)
        storage.write_bytes(url, histories_file(table, dataset.columns))
        sizes = [
            min(USERS_PER_ROW_GROUP, len(table) - at) for at in range(0, len(table), USERS_PER_ROW_GROUP)
        ]
        items, _ = history_lists(table)
        yield HistoryFile(part.path, len(table), len(items), storage.checksum(url), sizes)


def _drawn(table: pa.Table, low: float, high: float) -> pa.Table:
    """The users whose own draw, which never changes, lies in [low, high)."""
    draws = uniform(table[USER_HASH].to_numpy(), _DRAW_USERS)
    return table.filter(pa.array((draws >= low) & (draws < high)))


def held_out_loss(model: str, dataset: HistoryDataset, held_out: float) -> float:
    """Mean cross-entropy over all items, in nats, of every next item in the histories of the users held out.

    ``model``: a run or an exported model. Raises ``UserError`` if there is none, or nothing to measure.
    """
    info, gpt, item_RD = load_model(find_model(model))
    total, targets = 0.0, 0
    for histories in _held_out_histories(dataset, held_out):
        batch = pack(histories, info.model.max_history)
        if not len(batch.target_T):
            continue
        layout = Layout.from_offsets(batch.offsets)
        with torch.no_grad():
            users = gpt.user_rows(batch.user_hash_B)
            interest_TD = gpt(item_RD[batch.item_index_T], layout, users)
            total += float(softmax_loss_sum(interest_TD, item_RD, batch.target_T, len(item_RD), first=1))
        targets += len(batch.target_T)
    if not targets:
        raise UserError(
            f"{dataset.url}: the {held_out:g} of users held out have nothing to predict; raise it"
        )
    return total / targets


def _held_out_histories(dataset: HistoryDataset, held_out: float) -> Iterator[Histories]:
    for group in dataset.row_groups:
        table = _drawn(dataset.read_row_group(group, [USER_HASH, ITEM_INDICES]), 1 - held_out, 1.0)
        histories = Histories.from_table(table)
        for start in range(0, len(histories), _BATCH_USERS):
            yield histories.slice(start, min(start + _BATCH_USERS, len(histories)))


def measured(training: LawTraining, dataset: HistoryDataset, epochs: int, loss: float) -> Run:
    """What a finished training is in a law. ``dataset``: its share of the users; ``epochs``: trained."""
    settings, num_items = training.settings, dataset.num_items
    bounds = resolve_time_bounds(settings.data.split, dataset.manifest)
    targets, pairs = 0, 0.0
    for group in dataset.row_groups:
        table = dataset.read_row_group(group, split_columns(settings.data.split))
        train = split_histories(table, settings.data.split, "train", bounds)
        tokens = Histories.from_table(train).num_tokens(settings.model.max_history)
        targets += int(tokens.sum())
        pairs += float((tokens * (tokens + 1) / 2).sum())
    scored = scored_items(settings.loss, num_items, settings.data.tokens_per_batch)
    replicated = dataclasses.replace(settings.item_table, placement="replicated")
    return Run(
        width=training.size.width,
        layers=training.size.layers,
        share=training.share,
        weights=dense_weights(dataclasses.replace(settings, item_table=replicated), num_items),
        targets=targets,
        flops=epochs * training_flops(settings.model, targets, pairs, targets, scored),
        loss=loss,
    )


def plot(fitted: Fit, title: str) -> dict[str, bytes]:
    """Loss over size and over data, measured (points) and as the law has it (lines), by kind of file."""
    from recgpt.plots import COLOURS
    from recgpt.scaling.projection_plots import figure_files, log_axis

    panels = (
        ("weights", "targets", "N, weights", lambda x, other: fitted.law.loss(x, other)),
        ("targets", "weights", "D, targets", lambda x, other: fitted.law.loss(other, x)),
    )

    def draw(figure: "Figure") -> None:
        for axes, (along, fixed, label, law) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            lines = sorted({getattr(run, fixed) for run in fitted.runs})
            for place, value in enumerate(lines):
                runs = [run for run in fitted.runs if getattr(run, fixed) == value]
                x = np.array([getattr(run, along) for run in runs], float)
                curve = np.geomspace(x.min(), x.max(), 50)
                colour, mark = COLOURS[place % len(COLOURS)], "o^sv"[place // len(COLOURS) % 4]
                axes.plot(x, [run.loss for run in runs], mark, color=colour, label=f"{value:,} {fixed}")
                axes.plot(curve, law(curve, value), color=colour, linewidth=1)
            axes.set_xscale("log")
            log_axis(axes.xaxis)
            axes.set_xlabel(label)
            axes.set_ylabel("L, nats")
            axes.legend(frameon=False)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)

    return figure_files(title, (11, 4.5), draw)
