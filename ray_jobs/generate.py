"""`recgpt generate`: Ray actors recall candidates, one part file per row group of the dataset."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ray_jobs.actor_pool import ONE_ACTOR, ActorRange, run_on_actors
from ray_jobs.command_line import (
    ActorsOption,
    DatasetOption,
    IndexShardsOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    UsersOption,
    verb_app,
)
from ray_jobs.job_index import job_index
from ray_jobs.recall_worker import RecallWorker
from ray_jobs.runtime import run_command, start_ray
from recgpt import progress, storage
from recgpt.errors import UserError
from recgpt.progress import progress_bar

if TYPE_CHECKING:
    from recgpt.retrieval.candidate_job import Run
    from recgpt.retrieval.candidate_plan import CandidatePlan, RecallWishes
    from recgpt.retrieval.candidates import AskedFor, CandidateFile


def run_generate(
    model: str,
    dataset: str,
    output: str,
    *,
    wishes: "RecallWishes | None" = None,
    asked_for: "AskedFor | None" = None,
    actors: ActorRange = ONE_ACTOR,
    index: str | None = None,
    index_shards: int = 0,
    price_per_hour: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write candidates for the users that are asked for, all by default; returns the manifest.

    A run that was killed is gone on with by running the same again, and an output that the same job has
    finished stays as it is. Each actor takes one CPU. ``index``: folder of an approximate index;
    ``index_shards``: further actors that hold the item table between them (0: each actor has it all).
    What the user can put right raises ``UserError``, nearly always before Ray is started, and leaves what
    was in ``output`` before as it was.
    """
    from recgpt.retrieval import candidate_job
    from recgpt.retrieval.candidate_plan import RecallWishes, plan_candidates
    from recgpt.retrieval.candidates import AskedFor, part_name

    asked_for = asked_for or AskedFor()
    output = storage.absolute(output)
    storage.check_output_apart(output, dataset, model, *([index] if index else []), *asked_for.sources)
    plan = plan_candidates(model, dataset, wishes or RecallWishes(), asked_for, index)
    finished = candidate_job.finished_manifest(output, plan.job, check=overwrite)
    if finished is not None:
        candidate_job.clear_after(output, plan.job)
        typer.echo(f"{output} is finished already, by the same command; nothing is done")
        return asdict(finished)
    run = candidate_job.begin(output, plan.job, {part_name(unit.part) for unit in plan.units}, overwrite)
    for warning in plan.warnings:
        progress.warn(warning)
    if run.done:
        progress.note(f"{len(run.done)} of {len(plan.units)} parts are finished already; going on")
    manifest = plan.manifest([*run.done, *_recall(plan, run, actors, index_shards, price_per_hour)])
    plan.check_unchanged()
    candidate_job.finish_job(run, output, manifest)
    return asdict(manifest)


def _recall(
    plan: "CandidatePlan", run: "Run", actors: ActorRange, index_shards: int, price_per_hour: float | None
) -> "list[CandidateFile]":
    """Write the parts that no earlier run has written."""
    from recgpt.retrieval.candidates import part_name

    done = {file.path for file in run.done}
    units = [unit for unit in plan.units if part_name(unit.part) not in done]
    if not units:
        return []
    started = time.monotonic()
    start_ray(min_cpus=min(actors.least, len(units)) + index_shards + 1)
    model_url = plan.made_from.model
    files = []
    total, before = sum(unit.num_users for unit in plan.units), sum(file.rows for file in run.done)
    with (
        job_index(model_url, plan.recall.block_items, index_shards, plan.index, plan.allowed) as index,
        progress_bar("generate", total, "users", initial=before) as bar,
    ):
        arguments = (model_url, plan.dataset, run, plan.recall, plan.allowed, index)
        for _, value in run_on_actors(RecallWorker, arguments, "write_candidates", units, actors):
            if isinstance(value, int):
                bar.update(value)
            else:
                files.append(value)
            if price_per_hour is not None:
                bar.set_postfix_str(f"cost {_cost(started, price_per_hour)}", refresh=False)
    if price_per_hour is not None:
        hours = (time.monotonic() - started) / 3600
        typer.echo(f"This run took {hours:.2f} hours and cost {_cost(started, price_per_hour)}")
    return files


def _cost(started: float, price_per_hour: float) -> str:
    """What the machines have cost since an instant of the monotonic clock."""
    return f"{(time.monotonic() - started) / 3600 * price_per_hour:,.2f}"


def _parse_quotas(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--quotas {text}: expected numbers with commas between them, for example 18,2"
        ) from None


def command(
    model: ModelOption,
    dataset: DatasetOption,
    output: OutputOption,
    k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Candidates per user. Alone, it scales the model's own quotas (18,2 becomes 90,10 for 100). "
            "Example: --k 100",
            show_default="the model's own, 20 unless trained otherwise",
        ),
    ] = None,
    quotas: Annotated[
        str | None,
        typer.Option(
            metavar="M,N,...",
            help="Candidates per user that each recall step adds, one number per step; they sum to --k. "
            "Example: --quotas 15,5",
            show_default="the model's own, 18,2 unless trained otherwise",
        ),
    ] = None,
    continuation: Annotated[
        Literal["mean", "best", "sampled", "beam"] | None,
        typer.Option(
            help="What a step goes on from: the mean of its items weighted by --temperature, its best item, "
            "one drawn with these weights, or the --beam-width best, each in a continuation of its own. "
            "Example: --continuation beam",
            show_default="the model's own, mean unless trained otherwise",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="With --continuation mean or sampled: the higher, the more even are the weights. "
            "Example: --temperature 0.5",
            show_default="the model's own, 0.5 unless trained otherwise",
        ),
    ] = None,
    beam_width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --continuation beam: continuations of each user. Example: --beam-width 8",
            show_default="the model's own, 4 unless trained otherwise",
        ),
    ] = None,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Items of the user's history may be candidates again.")
    ] = False,
    users: UsersOption = None,
    only_changed_since: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET|TIME",
            help="Only users with an interaction at or after a time (ISO text, or a number in the dataset's "
            "unit), or whose items are not those in an older dataset that this one was appended to. "
            "Example: --only-changed-since 2026-01-31",
            show_default="whether they changed or not",
        ),
    ] = None,
    exclude_items: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Items that nobody gets (path or s3:// URL): text with one id per line, or Parquet with a "
            "column item_id. Example: --exclude-items sold-out.txt",
            show_default="none",
        ),
    ] = None,
    only_items: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The only items that users get, in a file as for --exclude-items. "
            "Example: --only-items in-stock.parquet",
            show_default="all items of the dataset",
        ),
    ] = None,
    actors: ActorsOption = "1",
    index: Annotated[
        str | None,
        typer.Option(
            metavar="INDEX",
            help="Search this approximate index, made by `recgpt index` from the same model (path or s3:// "
            "URL). Example: --index indexes/beauty",
            show_default="exact search",
        ),
    ] = None,
    index_shards: IndexShardsOption = 0,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            metavar="PRICE",
            min=0,
            help="What all machines together cost in an hour: shows the cost so far, and at the end. "
            "Example: --price-per-hour 3.20",
            show_default="no cost is shown",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write candidate items for every user of a dataset, by autoregressive recall.

    The output folder holds Parquet files (`user_id`, `item_ids`, `scores`, `steps`; one row per user, with
    the log's own ids), a manifest with row counts and checksums, and `_SUCCESS` once it is whole.
    Users come in the order of the dataset; those it does not know come last, and get the most popular items.

    If it was interrupted, the same command goes on where it was, with every finished part kept.

    Example: `recgpt generate --model runs/beauty --dataset data/beauty --output candidates --actors 2`
    """
    from recgpt.retrieval.candidate_plan import RecallWishes
    from recgpt.retrieval.candidates import AskedFor

    manifest = run_generate(
        model,
        dataset,
        output,
        wishes=RecallWishes(
            k=k,
            quotas=None if quotas is None else _parse_quotas(quotas),
            keep_seen=keep_seen,
            continuation=continuation,
            temperature=temperature,
            beam_width=beam_width,
        ),
        asked_for=AskedFor(users, only_changed_since, exclude_items, only_items),
        actors=ActorRange.parse(actors),
        index=index,
        index_shards=index_shards,
        price_per_hour=price_per_hour,
        overwrite=overwrite,
    )
    typer.echo(_summary(manifest, output))


def _summary(manifest: dict[str, Any], output: str) -> str:
    since = manifest["asked_for"]["changed_since"]
    if not manifest["num_users"] and since is not None:
        return f"Nobody that was asked for has changed since {since}; {output} is finished, and empty"
    line = f"{manifest['num_candidates']} candidates for {manifest['num_users']} users are in {output}"
    if popular := manifest["num_by_popularity"]:
        line += f"; {popular} of them have no history and got the most popular items"
    return line


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import generate

    generate.main()
