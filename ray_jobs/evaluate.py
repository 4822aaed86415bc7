"""`recgpt evaluate`: how well a trained model finds held-out items, beside two baselines."""

from collections.abc import Iterator
from dataclasses import asdict, astuple, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ray_jobs.actor_pool import ONE_ACTOR, ActorRange, run_on_actors
from ray_jobs.command_line import (
    ActorsOption,
    DatasetOption,
    IndexShardsOption,
    JsonOption,
    ModelOption,
    verb_app,
)
from ray_jobs.job_index import job_index
from ray_jobs.runtime import run_command, start_ray
from recgpt.errors import UserError
from recgpt.progress import progress_bar

if TYPE_CHECKING:
    from ray_jobs.job_index import JobIndex
    from recgpt.config import RecallSettings, SplitSettings
    from recgpt.data.dataset import HistoryDataset, RowGroup
    from recgpt.evaluation.metrics import Ranks
    from recgpt.evaluation.protocol import HeldOutPart, SeenItems
    from recgpt.model.export import ModelInfo
    from recgpt.retrieval.autoregressive import AutoregressiveRecall

USERS_PER_STEP = 1024  # ranked between two reports of progress


def command(
    model: ModelOption,
    dataset: DatasetOption,
    split: Annotated[
        Literal["test", "valid"],
        typer.Option(
            help="Held-out items to find. Choose settings on `valid`; read `test` once. "
            "Example: --split valid"
        ),
    ] = "test",
    k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Length of the lists; scales the model's own quotas (18,2 becomes 90,10 for 100). "
            "Example: --k 100",
            show_default="the model's own, 20 unless trained otherwise",
        ),
    ] = None,
    seen: Annotated[
        Literal["mask", "zero", "keep"] | None,
        typer.Option(
            help="Items that the user has already seen are never served (`mask`), compete with score 0 as in "
            "the code of the RecGPT authors (`zero`), or compete like all others (`keep`). "
            "Example: --seen keep",
            show_default="mask, or keep for a model with recall.keep_seen",
        ),
    ] = None,
    json_file: JsonOption = None,
    actors: ActorsOption = "1",
    index_shards: IndexShardsOption = 0,
    baselines: Annotated[
        bool,
        typer.Option(
            help="Also measure popularity and an item-to-item Markov chain on the same split. "
            "Example: --no-baselines"
        ),
    ] = True,
) -> None:
    """Measure hit rate, NDCG and MRR of a trained model on held-out items, as it serves them.

    Each user's held-out item is looked for in the list that autoregressive recall makes of the
    items before it. All items compete, except those that the user has already seen (see `--seen`).
    The split is the one that the model was trained with. A line says how far the list is better than
    that of one step, with a bootstrap interval over users.

    Example: `recgpt evaluate --model runs/beauty --dataset data/beauty --json metrics.json`
    """
    from recgpt.evaluation.report import print_result

    print_result(
        run_evaluate(
            model,
            dataset,
            split=split,
            k=k,
            seen=seen,
            json_file=json_file,
            actors=ActorRange.parse(actors),
            index_shards=index_shards,
            baselines=baselines,
        )
    )


def run_evaluate(
    model: str,
    dataset: str,
    *,
    split: "HeldOutPart" = "test",
    k: int | None = None,
    seen: "SeenItems | None" = None,
    json_file: str | None = None,
    actors: ActorRange = ONE_ACTOR,
    index_shards: int = 0,
    baselines: bool = True,
) -> dict[str, Any]:
    """Evaluate a model; returns, and with ``json_file`` also writes, the metrics and what they belong to.

    Without ``k`` lists are as long as the model's own; without ``seen`` the model's settings say whether
    seen items are masked or kept.

    At the top level stand ``num_users`` and the metrics (see ``recgpt.evaluation.metrics``) of the
    model as served, with its own ``quotas``; under ``one_step`` and ``two_step`` the same for these quotas,
    and, if the model has vectors of users, under ``unknown_users`` for users whom it does not know;
    under ``difference`` by how much the served lists are better than those of one step, each metric
    with ``mean``, ``low`` and ``high`` (95 %); under ``baselines`` the metrics of ``popularity`` and
    ``markov`` (none without ``baselines``); further ``split``, ``protocol``, ``k``, ``seen``, ``keep_seen``,
    ``vocabulary_fingerprint``, ``model`` and ``dataset``.

    Raises ``UserError`` if model and dataset do not belong together, if ``k`` cannot be served, or if nobody
    has a held-out item.
    """
    from recgpt import storage
    from recgpt.evaluation.protocol import recall_variants
    from recgpt.retrieval.recall_model import resolve_recall

    histories, model_url, info = open_for_evaluation(model, dataset, json_file)
    seen = seen or ("keep" if info.recall.keep_seen else "mask")
    recall = replace(resolve_recall(info, k, None, False), keep_seen=seen == "keep")
    variants = recall_variants(recall, personal=info.model.user.kind != "none")
    start_ray(min_cpus=actors.least + index_shards + 1)
    baseline_job = _start_baselines(histories, info.split, split, recall) if baselines else None
    with job_index(model_url, recall.block_items, index_shards) as index:
        evaluator = (model_url, histories, info.split, split, variants, index, seen == "zero")
        ranks = recall_ranks(evaluator, histories.row_groups, actors)
    if not len(next(iter(ranks.values()))):
        raise UserError(
            f"{histories.url}: no user has an item held out in the {split} split, "
            f"protocol {info.split.protocol}; evaluate on a log with longer histories"
        )
    result = {
        **_measured(ranks, variants),
        "baselines": _finish_baselines(baseline_job),
        "split": split,
        "protocol": info.split.protocol,
        "k": recall.k,
        "seen": seen,
        "keep_seen": recall.keep_seen,
        "vocabulary_fingerprint": info.vocabulary_fingerprint,
        "model": model_url,
        "dataset": histories.url,
    }
    if json_file is not None:
        storage.write_json(storage.absolute(json_file), result)
    return result


def open_for_evaluation(
    model: str, dataset: str, json_file: str | None
) -> "tuple[HistoryDataset, str, ModelInfo]":
    """The dataset, the exported model's own folder and its description.

    What can be refused without Ray is refused here, before it starts: ``UserError`` for a model that is not
    whole or does not belong to the dataset, a split that cannot be made, or a result file that can be none.
    """
    from recgpt import progress, storage
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.sequences import resolve_time_bounds
    from recgpt.model.export import model_fingerprint
    from recgpt.retrieval.recall_model import model_for_dataset

    if json_file is not None:
        storage.filesystem_and_path(json_file)
    histories = HistoryDataset.open(dataset)
    model_url, info = model_for_dataset(model, histories)
    resolve_time_bounds(info.split, histories.manifest)
    model_fingerprint(model_url)
    if info.dataset_fingerprint not in ("", histories.fingerprint):
        progress.warn(
            f"{histories.url}: another preparation of the log than the one the model was "
            "trained on; held-out items may have been in its training"
        )
    return histories, model_url, info


def _measured(ranks: "dict[str, Ranks]", variants: "dict[str, RecallSettings]") -> dict[str, Any]:
    """The metrics of all variants, those as served at the top level, and their difference from one step."""
    from recgpt.evaluation.metrics import difference, rank_metrics
    from recgpt.evaluation.protocol import ONE_STEP, SERVED

    k = variants[SERVED].k
    measured: dict[str, Any] = {
        name: {
            **rank_metrics(ranks[name], k),
            "num_users": len(ranks[name]),
            "quotas": list(settings.quotas),
        }
        for name, settings in variants.items()
    }
    compared = difference(ranks[SERVED], ranks[ONE_STEP], k)
    intervals = {metric: asdict(interval) for metric, interval in compared.items()}
    return {**measured.pop(SERVED), **measured, "difference": intervals}


class RecallEvaluator:
    """What runs in an actor: holds the model once and ranks the held-out items of row groups of users.

    Args:
        variants: recall settings by name; to the variant ``unknown_users`` every user is an unknown one.
        seen_at_zero: ranks are those of seen items with score 0; no variant may keep them then.
    """

    def __init__(
        self,
        model_url: str,
        dataset: "HistoryDataset",
        split: "SplitSettings",
        part: "HeldOutPart",
        variants: "dict[str, RecallSettings]",
        index: "JobIndex",
        seen_at_zero: bool = False,
    ):
        self.model_url = model_url
        self.dataset = dataset
        self.split = split
        self.part = part
        self.variants = variants
        self.index = index
        self.seen_at_zero = seen_at_zero

    @cached_property
    def recalls(self) -> "dict[tuple[Any, ...], AutoregressiveRecall]":
        """The model with the settings of each variant; variants that serve the same lists share it."""
        import torch

        from recgpt.evaluation.protocol import UNKNOWN_USERS, without_users
        from recgpt.retrieval.autoregressive import AutoregressiveRecall
        from recgpt.retrieval.recall_model import load_recall

        torch.set_num_threads(1)
        first = next(iter(self.variants.values()))
        loaded = load_recall(self.model_url, first, index=self.index.load())
        recalls = {}
        for name, settings in self.variants.items():
            gpt = without_users(loaded.gpt) if name == UNKNOWN_USERS else loaded.gpt
            recalls[self._lists_of(name)] = AutoregressiveRecall(gpt, loaded.index, settings)
        return recalls

    def _lists_of(self, name: str) -> tuple[Any, ...]:
        """The same for variants that serve the same lists."""
        from recgpt.evaluation.protocol import UNKNOWN_USERS

        return name == UNKNOWN_USERS, *astuple(self.variants[name])

    def load(self) -> None:
        _ = self.recalls

    def ranks(self, row_group: "RowGroup") -> "Iterator[tuple[int, dict[str, Any]]]":
        """Step by step: the users looked at, and the ranks of held-out items by variant, float64 [B]."""
        from recgpt.evaluation.protocol import ranks_of_recall, read_held_out

        steps = read_held_out(self.dataset, row_group, self.split, self.part, USERS_PER_STEP)
        for num_users, held_out in steps:
            ranks = {
                lists: ranks_of_recall(recall, held_out, self.seen_at_zero)
                for lists, recall in self.recalls.items()
            }
            yield num_users, {name: ranks[self._lists_of(name)] for name in self.variants}


def recall_ranks(
    evaluator: tuple[Any, ...], row_groups: "list[RowGroup]", actors: ActorRange
) -> "dict[str, Ranks]":
    """Ranks of all users, float64 [U], by variant. ``evaluator``: the arguments of ``RecallEvaluator``."""
    import numpy as np

    pieces: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(row_groups))}
    with progress_bar("evaluate", sum(row_group.rows for row_group in row_groups), "users") as bar:
        for number, (num_users, ranks) in run_on_actors(
            RecallEvaluator, evaluator, "ranks", row_groups, actors
        ):
            pieces[number].append(ranks)
            bar.update(num_users)
    # In the order of the dataset, so that the same model gives the same sums to the last bit.
    in_order = [ranks for of_row_group in pieces.values() for ranks in of_row_group]
    return {name: np.concatenate([ranks[name] for ranks in in_order]) for name in in_order[0]}


def measure_baselines(
    dataset: "HistoryDataset", split: "SplitSettings", part: "HeldOutPart", recall: "RecallSettings"
) -> dict[str, dict[str, float]]:
    """Metrics of popularity and the Markov chain, in lists as long as the model's; empty without users."""
    import numpy as np

    from recgpt.evaluation.baselines import count_training, markov_ranks, popularity_ranks
    from recgpt.evaluation.metrics import rank_metrics
    from recgpt.evaluation.protocol import read_held_out, training_histories

    counts = count_training(training_histories(dataset, split), dataset.num_items)
    held_out = (
        users
        for row_group in dataset.row_groups
        for _, users in read_held_out(dataset, row_group, split, part, USERS_PER_STEP)
    )
    pieces = [
        (
            popularity_ranks(counts, users, recall.k, recall.keep_seen),
            markov_ranks(counts, users, recall.k, recall.keep_seen),
        )
        for users in held_out
    ]
    ranks = {"popularity": [first for first, _ in pieces], "markov": [second for _, second in pieces]}
    joined = {name: np.concatenate([np.empty(0), *parts]) for name, parts in ranks.items()}
    return {name: rank_metrics(values, recall.k) for name, values in joined.items() if len(values)}


def _start_baselines(
    dataset: "HistoryDataset", split: "SplitSettings", part: "HeldOutPart", recall: "RecallSettings"
) -> Any:
    """Start measuring the baselines in a process of its own, beside the actors."""
    import ray

    return ray.remote(num_cpus=1)(measure_baselines).remote(dataset, split, part, recall)


def _finish_baselines(job: Any) -> dict[str, dict[str, float]]:
    import ray

    return ray.get(job) if job is not None else {}


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import evaluate

    evaluate.main()
