"""What the processes of the benchmark of recall do.

Shapes: U users, T tokens of their histories laid end to end, B users in a batch, R = V + 1 table rows,
D width, K candidates.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.made_up_model import MODEL, RECALL, made_up_gpt, made_up_table
from benchmarks.yardsticks.exact_search import BlockSearch, random_rows
from benchmarks.yardsticks.published_recall import IntArray, PublishedRecall
from ray_jobs.actor_pool import ActorRange, run_on_actors
from ray_jobs.recall_worker import RecallWorker
from ray_jobs.runtime import start_ray
from recgpt.data.arrow import list_arrays
from recgpt.data.dataset import HistoryDataset
from recgpt.retrieval.autoregressive import AutoregressiveRecall
from recgpt.retrieval.candidate_job import begin
from recgpt.retrieval.candidate_plan import RecallWishes, plan_candidates
from recgpt.retrieval.candidates import AskedFor, part_name
from recgpt.retrieval.index import ExactIndex
from recgpt.retrieval.user_selection import WorkUnit
from recgpt.schema import ITEM_INDICES, USER_HASH

RECGPT = "RecGPT"
PUBLISHED = "published"
LAST_POSITION = "published, scores of the last position only"
QUOTAS = (18, 2)  # the authors', and our default

Event = tuple[float, int, int]
"""When candidates came (by the system's monotonic clock), the number of their unit, and of how many users."""


def published(dataset: str, users: int, turns: int) -> dict[str, Any]:
    """Recall by the authors' algorithm and by ours, of the same users in turns, ``users`` at a time.

    Returns the seconds of each turn by side, and the share of our candidates that theirs has as well.
    """
    whole = HistoryDataset.open(dataset)
    columns = [USER_HASH, ITEM_INDICES]
    histories = pa.concat_tables(whole.read_row_group(group, columns) for group in whole.row_groups)
    settings = RECALL
    gpt = made_up_gpt(MODEL)
    table_RD = made_up_table(whole.num_items, gpt.settings.vector_width)
    ours = AutoregressiveRecall(gpt, ExactIndex(table_RD, settings.block_items), settings)
    sides: dict[str, Callable[[pa.Table], IntArray]] = {RECGPT: partial(_recommend, ours)}
    for side, all_positions in ((PUBLISHED, True), (LAST_POSITION, False)):
        theirs = PublishedRecall(gpt, table_RD, QUOTAS, all_positions)
        sides[side] = partial(_recommend_published, theirs, settings.batch_users)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    same = []
    for turn in range(1 + turns):
        some = histories.slice(turn * users % (len(histories) - users + 1), users)
        found = _take_turns({side: partial(call, some) for side, call in sides.items()}, seconds)
        same.append(_share_of_same(found[RECGPT], found[PUBLISHED]))
    return {"seconds": _without_warm_up(seconds), "same_items": float(np.mean(same))}


def _recommend(recall: AutoregressiveRecall, users: pa.Table) -> IntArray:
    item_T, offsets = list_arrays(users[ITEM_INDICES])
    user_hash = torch.from_numpy(users[USER_HASH].to_numpy().copy())
    found = recall.recommend(torch.from_numpy(item_T.astype(np.int64)), torch.from_numpy(offsets), user_hash)
    return found.item_index_BK.numpy()


def _recommend_published(recall: PublishedRecall, batch_users: int, users: pa.Table) -> IntArray:
    item_T, offsets = list_arrays(users[ITEM_INDICES])
    histories = np.split(item_T.astype(np.int64), offsets[1:-1])
    batches = [histories[start : start + batch_users] for start in range(0, len(users), batch_users)]
    return np.concatenate([recall.recommend(batch) for batch in batches])


def _share_of_same(one_UK: IntArray, other_UK: IntArray) -> float:
    pairs = zip(one_UK.tolist(), other_UK.tolist(), strict=True)
    return sum(len({*one} & {*other}) for one, other in pairs) / one_UK.size


def recall_and_products(
    num_items: int,
    quotas: list[int],
    batch_users: int,
    history: int,
    blocks: list[int],
    batches: int,
    turns: int,
) -> dict[str, list[float]]:
    """Seconds of each turn: recall of ``batches`` of users, and the products and top-k in it by themselves.

    Args:
        history: items of each history.
        blocks: items that the products take at a time; each is a side of its own.
    """
    settings = replace(RECALL, k=sum(quotas), quotas=tuple(quotas), batch_users=batch_users)
    gpt = made_up_gpt(MODEL)
    table_RD = torch.from_numpy(random_rows(num_items + 1, gpt.settings.vector_width, seed=0))
    recall = AutoregressiveRecall(gpt, ExactIndex(table_RD, settings.block_items), settings)
    users = batch_users * batches
    item_T = torch.from_numpy(np.random.default_rng(0).integers(1, num_items + 1, users * history))
    offsets = torch.arange(0, len(item_T) + 1, history)
    interest_BD = torch.from_numpy(random_rows(batch_users, gpt.settings.vector_width, seed=1))

    def products(search: BlockSearch) -> None:
        for quota in quotas * batches:
            search.search(interest_BD, quota)

    sides: dict[str, Callable[[], Any]] = {
        RECGPT: lambda: recall.recommend(item_T, offsets, torch.zeros(users, dtype=torch.int64))
    }
    for block_items in blocks:
        search = BlockSearch(table_RD[1:], batch_users, block_items)
        sides[f"torch, {search.block_items:,} items at a time"] = partial(products, search)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(1 + turns):
        _take_turns(sides, seconds)
    return _without_warm_up(seconds)


def _take_turns(sides: Mapping[str, Callable[[], Any]], seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """What each side returns; what it took is added to ``seconds``."""
    found = {}
    for side, call in sides.items():
        begun = time.perf_counter()
        found[side] = call()
        seconds[side].append(time.perf_counter() - begun)
    return found


def _without_warm_up(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {side: taken[1:] for side, taken in seconds.items()}


def job_rate(model: str, dataset: str, output: str, actors: int) -> float:
    """Users per second of the candidates for a whole dataset: by actors, or by one worker in a plain loop.

    Args:
        output: the staging folder of the parts is made beside it.
        actors: as `recgpt generate` drives them; 0: the loop, without Ray.
    """
    plan = plan_candidates(model, dataset, RecallWishes(), AskedFor())
    run = begin(output, plan.job, [part_name(unit.part) for unit in plan.units], overwrite=False)
    arguments = (plan.made_from.model, plan.dataset, run, plan.recall, plan.allowed)
    if not actors:
        return steady_rate(_events(_loop(RecallWorker(*arguments), plan.units)), workers=1)
    start_ray(min_cpus=actors + 1)
    import ray  # not before: what guards a local Ray must be set when it is imported

    pool = ActorRange(actors, actors)
    try:
        values = run_on_actors(RecallWorker, arguments, "write_candidates", plan.units, pool)
        return steady_rate(_events(values), workers=actors)
    finally:
        ray.shutdown()


def _loop(worker: RecallWorker, units: Sequence[WorkUnit]) -> Iterator[tuple[int, Any]]:
    for number, unit in enumerate(units):
        for value in worker.write_candidates(unit):
            yield number, value


def _events(values: Iterable[tuple[int, Any]]) -> list[Event]:
    """The values of a ``RecallWorker`` as they come: numbers of users, and the file of a unit at its end."""
    return [(time.monotonic(), number, value if isinstance(value, int) else 0) for number, value in values]


def steady_rate(events: Sequence[Event], workers: int) -> float:
    """Users per second from when each of the workers has given something, to the end."""
    first_of_unit: dict[int, int] = {}
    for place, (_, unit, _) in enumerate(events):
        first_of_unit.setdefault(unit, place)
    begin_at = sorted(first_of_unit.values())[workers - 1]
    users = sum(number for _, _, number in events[begin_at + 1 :])
    return users / (events[-1][0] - events[begin_at][0])
