"""The report on a run as HTML: how it went, how good it is, what it recommends, what it was told."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from recgpt import storage
from recgpt.data.arrow import list_arrays
from recgpt.data.dataset import HistoryDataset
from recgpt.data.report import length_headline
from recgpt.errors import UserError
from recgpt.evaluation.metrics import metric_names
from recgpt.evaluation.report import caption, metric_rows
from recgpt.pages import Headline, render
from recgpt.schema import ITEM_INDICES, MANIFEST_FILE
from recgpt.training.environment import ENVIRONMENT_FILE
from recgpt.training.recorder import LOG_EVERY_STEPS
from recgpt.training.run_candidates import Recommended, TitleFile, read_recommended
from recgpt.training.run_curves import STAGE_TITLES, Lines, further_curves, main_curves, training_seconds
from recgpt.training.run_folder import SETTINGS_FILE, read_metrics
from recgpt.training.runs import Run, read_run


@dataclass(frozen=True)
class Sources:
    """What the report tells of besides the run itself; None: nothing."""

    dataset: str | None = None
    """The run's dataset. None: where it lay, if it is still there."""
    evaluation: str | None = None
    """File of `recgpt evaluate --json`."""
    candidates: str | None = None
    """Folder of `recgpt generate`."""
    titles: TitleFile | None = None
    num_examples: int = 5
    """Users of ``candidates`` who are shown."""
    price_per_hour: float | None = None
    """Of one worker."""


class Row(NamedTuple):
    """One row of the table of quality."""

    name: str
    cells: list[tuple[str, bool]]
    """The figure, and whether it is the best of its column."""


class Change(NamedTuple):
    """By how much the served lists are better than those of one step, with the 95 % interval."""

    metric: str
    mean: str
    low: str
    high: str


@dataclass(frozen=True)
class Quality:
    """What an evaluation has measured."""

    caption: str
    model: str
    """Where it lay."""
    vocabulary_fingerprint: str
    quotas: list[int]
    """As served."""
    metrics: tuple[str, ...]
    rows: list[Row]
    changes: list[Change]
    """Empty if one step is what is served."""


def html_report(url: str, sources: Sources) -> str:
    """One HTML file that needs nothing beside it; the same files give the same text.

    Raises ``UserError`` if there is no run, or if a source cannot be read or does not belong to it.
    """
    run = read_run(url)
    about = storage.read_json_object(storage.join(run.url, MANIFEST_FILE)) if run.finished else {}
    written = read_metrics(run.url, max((line["step"] for line in run.last.values()), default=0))
    lines = [line for line in written if isinstance(line.get("epoch"), int)]
    dataset = _find_dataset(run, about, sources.dataset)
    quality = None if sources.evaluation is None else read_quality(sources.evaluation)
    recommended = None
    if sources.candidates is not None:
        recommended = read_recommended(
            sources.candidates, sources.dataset, sources.titles, sources.num_examples
        )
    _check_same_items(about, sources, quality, recommended)
    return render(
        "training/run_report.html.jinja",
        run=run,
        sources=sources,
        headlines=_headlines(run, lines, sources.price_per_hour),
        log_every_steps=LOG_EVERY_STEPS,
        curves=main_curves(lines),
        further=further_curves(lines),
        quality=quality,
        recommended=recommended,
        dataset=dataset,
        dataset_url=dataset.url if dataset else about.get("dataset", "DATASET"),
        data=_data_headlines(dataset) if dataset else [],
        told=run.told(),
        environment=_environment(run),
        environment_file=ENVIRONMENT_FILE,
    )


def read_quality(url: str) -> Quality:
    """Raises ``UserError`` if the file is no result of an evaluation."""
    result = storage.read_json_object(url)
    try:
        metrics = metric_names(result["k"])
        values = {
            name: [float(row[metric]) for metric in metrics] for name, row in metric_rows(result).items()
        }
        best = [max(column) for column in zip(*values.values(), strict=True)]
        rows = [
            Row(name, [(f"{value:.4f}", value == most) for value, most in zip(row, best, strict=True)])
            for name, row in values.items()
        ]
        changes = [
            Change(metric, *(f"{interval[name]:+.4f}" for name in ("mean", "low", "high")))
            for metric, interval in result.get("difference", {}).items()
            if len(result["quotas"]) > 1
        ]
        return Quality(
            caption(result),
            str(result["model"]),
            str(result["vocabulary_fingerprint"]),
            list(result["quotas"]),
            metrics,
            rows,
            changes,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{url}: not a result of `recgpt evaluate`; give the file that its --json wrote"
        ) from None


def _find_dataset(run: Run, about: dict[str, Any], url: str | None) -> HistoryDataset | None:
    """The dataset that the run was trained on; None if none was named and it is not where it lay.

    Raises ``UserError`` if the one that was named is not that.
    """
    wanted = storage.read_json_object(storage.join(run.url, SETTINGS_FILE)).get("dataset_fingerprint")
    if url is not None:
        dataset = HistoryDataset.open(url)
        if dataset.fingerprint != wanted:
            raise UserError(f"{dataset.url}: not the dataset of {run.url}; give that one with --dataset")
        return dataset
    try:
        dataset = HistoryDataset.open(str(about["dataset"]))
    except (KeyError, UserError):
        return None
    return dataset if dataset.fingerprint == wanted else None


def _check_same_items(
    about: dict[str, Any], sources: Sources, quality: Quality | None, recommended: Recommended | None
) -> None:
    """Raises ``UserError`` for an evaluation or candidates of another vocabulary than the run's."""
    fingerprints = {
        sources.evaluation: quality and quality.vocabulary_fingerprint,
        sources.candidates: recommended and recommended.manifest.made_from.vocabulary_fingerprint,
    }
    for url, fingerprint in fingerprints.items():
        if url is not None and fingerprint != about.get("vocabulary_fingerprint", fingerprint):
            raise UserError(
                f"{url}: of another vocabulary than the run; give what was made with the run's model"
            )


def _headlines(run: Run, lines: Lines, price_per_hour: float | None) -> list[Headline]:
    steps = max((line["step"] for line in lines), default=0)
    headlines = [Headline("state", "finished" if run.finished else "unfinished", f"{steps:,} steps")]
    for stage, (value, epoch) in run.best.items():
        last = max(line["epoch"] for line in lines if line.get("stage") == stage)
        name = f"best {run.metric}, {STAGE_TITLES.get(stage, stage)}"
        headlines.append(Headline(name, f"{value:.4f}", f"validation, epoch {epoch} of {last}"))
    seconds = training_seconds(lines)
    workers = _count(run, "workers")
    if seconds is not None:
        note = f"{workers} worker" + "s" * (workers > 1)
        headlines.append(Headline("training steps took", _duration(seconds), note))
    if seconds is not None and price_per_hour is not None:
        hours = seconds / 3600
        note = f"{hours:.3g} h × {note} × {price_per_hour:g} an hour"
        headlines.append(
            Headline("cost of the training steps", f"{hours * workers * price_per_hour:,.2f}", note)
        )
    return headlines


def _count(run: Run, key: str) -> int:
    """A setting. Raises ``UserError`` if it is no whole number."""
    value = run.settings.get(key)
    if not isinstance(value, int):
        raise UserError(f"{storage.join(run.url, SETTINGS_FILE)}: {key} is {value!r}; the file is damaged")
    return value


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _data_headlines(dataset: HistoryDataset) -> list[Headline]:
    users_by_length: Counter[int] = Counter()
    for row_group in dataset.row_groups:
        _, offsets = list_arrays(dataset.read_row_group(row_group, [ITEM_INDICES])[ITEM_INDICES])
        lengths, users = np.unique(np.diff(offsets), return_counts=True)
        users_by_length.update(dict(zip(lengths.tolist(), users.tolist(), strict=True)))
    return [
        Headline("users", f"{dataset.num_users:,}"),
        Headline("items", f"{dataset.num_items:,}"),
        Headline("interactions", f"{dataset.manifest.num_interactions:,}"),
        *([length_headline(users_by_length)] if users_by_length else []),
    ]


def _environment(run: Run) -> dict[str, Any]:
    """What training noted of its machine; empty if it noted nothing. Raises ``UserError`` if damaged."""
    file = storage.join(run.url, ENVIRONMENT_FILE)
    values = storage.read_json_object(file) if storage.exists(file) else {}
    return {
        name: f"{value / 1e9:,.1f} GB" if name.endswith("_bytes") and isinstance(value, int) else value
        for name, value in values.items()
    }
