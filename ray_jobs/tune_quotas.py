"""`recgpt tune-quotas`: which step quotas find most held-out items of the validation split."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.actor_pool import ONE_ACTOR, ActorRange
from ray_jobs.command_line import (
    ActorsOption,
    DatasetOption,
    IndexShardsOption,
    JsonOption,
    ModelOption,
    verb_app,
)
from ray_jobs.evaluate import open_for_evaluation, recall_ranks
from ray_jobs.job_index import job_index
from ray_jobs.runtime import run_command, start_ray
from recgpt.errors import UserError

if TYPE_CHECKING:
    from recgpt.evaluation.protocol import HeldOutPart

SPLIT: "HeldOutPart" = "valid"  # never test: what is chosen on it cannot be measured on it


def command(
    model: ModelOption,
    dataset: DatasetOption,
    k: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Length of the lists. Example: --k 20", show_default="the model's own"
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            max=3,
            help="Try lists made in up to so many steps, 2 or 3: 11 or 27 quotas. Example: --steps 3",
        ),
    ] = 2,
    max_users: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Measure on about so many users, the same each time. Example: --max-users 20000",
            show_default="all users of the dataset",
        ),
    ] = None,
    actors: ActorsOption = "1",
    index_shards: IndexShardsOption = 0,
    json_file: JsonOption = None,
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Write the chosen quotas into the model, which then serves them unless told otherwise. "
            "An index of the model has to be built again.",
        ),
    ] = False,
) -> None:
    """Choose how many candidates each step of recall adds, on the validation split.

    Lists of the same length, made in one step and in several with various quotas, are measured as they would
    be served. Chosen is what finds the most held-out items.

    Example: `recgpt tune-quotas --model runs/beauty --dataset data/beauty --save`
    """
    from recgpt.evaluation.quotas import print_quotas
    from recgpt.model.export import save_quotas

    result = run_tune_quotas(
        model,
        dataset,
        k=k,
        steps=steps,
        max_users=max_users,
        actors=ActorRange.parse(actors),
        index_shards=index_shards,
        json_file=json_file,
    )
    print_quotas(result)  # before saving, so that a model that cannot be written costs no measurement
    if save:
        save_quotas(result["model"], result["chosen"])
    typer.echo(conclusion(result, save))


def run_tune_quotas(
    model: str,
    dataset: str,
    *,
    k: int | None = None,
    steps: int = 2,
    max_users: int | None = None,
    actors: ActorRange = ONE_ACTOR,
    index_shards: int = 0,
    json_file: str | None = None,
) -> dict[str, Any]:
    """Measure the quotas of ``recgpt.evaluation.quotas.quota_grid``; the model stays as it is.

    Returns, and with ``json_file`` also writes: under ``chosen`` the best quotas; under ``tried`` for all of
    them ``quotas``, ``hit_rate@k``, ``ndcg@k`` (k in figures), ``ndcg@10``, and the ``difference`` of the hit
    rate to that of one step with ``mean``, ``low`` and ``high`` (95 %); further ``num_users``, ``split``,
    ``protocol``, ``k``, ``keep_seen``, ``vocabulary_fingerprint``, ``model`` and ``dataset``.

    Without ``k`` lists are as long as the model's own; none is longer than there are items.

    Raises ``UserError`` if model and dataset do not belong together, if the steps do not fit the model, or if
    nobody has a held-out item.
    """
    from recgpt import storage
    from recgpt.evaluation.quotas import choose, draw_users, measure, quota_grid, quotas_text
    from recgpt.retrieval.autoregressive import check_steps_fit

    histories, model_url, info = open_for_evaluation(model, dataset, json_file)
    check_steps_fit(info.model, steps)
    k = min(info.recall.k if k is None else k, info.num_items)
    variants = {
        quotas_text(quotas): replace(info.recall, k=k, quotas=quotas) for quotas in quota_grid(k, steps)
    }
    start_ray(min_cpus=actors.least + index_shards + 1)
    with job_index(model_url, info.recall.block_items, index_shards) as index:
        evaluator = (model_url, draw_users(histories, max_users), info.split, SPLIT, variants, index)
        ranks = recall_ranks(evaluator, histories.row_groups, actors)
    num_users = len(next(iter(ranks.values())))
    if not num_users:
        raise UserError(
            f"{histories.url}: no user that was looked at has an item held out in the {SPLIT} split, "
            f"protocol {info.split.protocol}; give a log with longer histories, or more --max-users"
        )
    measured = measure({settings.quotas: ranks[name] for name, settings in variants.items()})
    result = {
        "chosen": list(choose(measured).quotas),
        "tried": [one.as_dict() for one in measured],
        "num_users": num_users,
        "split": SPLIT,
        "protocol": info.split.protocol,
        "k": k,
        "keep_seen": info.recall.keep_seen,
        "vocabulary_fingerprint": info.vocabulary_fingerprint,
        "model": model_url,
        "dataset": histories.url,
    }
    if json_file is not None:
        storage.write_json(storage.absolute(json_file), result)
    return result


def conclusion(result: dict[str, Any], saved: bool) -> str:
    """The line after the table."""
    from recgpt.evaluation.quotas import quotas_text

    chosen = quotas_text(result["chosen"])
    if len(result["chosen"]) == 1:
        chosen += ", as no quotas of more steps are better than one step"
    return f"chosen: {chosen}; {'saved in ' + result['model'] if saved else 'save with --save'}"


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name, as the other verbs do it.
    from ray_jobs import tune_quotas

    tune_quotas.main()
