"""The Ray pipeline of `recgpt prepare`, from the divided log to the dataset.

What is large stays in Ray's object store, which puts on disk what does not fit into its memory, and hands it
to whichever machine needs it; here are references and counts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from ray_jobs.prepare_reading import DividedLog
from recgpt.data import preparation
from recgpt.data.dataset import HistoryFile, history_columns
from recgpt.data.histories import time_quantile
from recgpt.data.interactions import Wanted
from recgpt.data.preparation import BuiltPart, PartFiles, PrepareSettings, WrittenFile
from recgpt.data.summary import DataSummary, summarise
from recgpt.data.vocabulary import Vocabulary, grown_order
from recgpt.errors import UserError
from recgpt.progress import progress_bar

Counts: TypeAlias = npt.NDArray[np.int64]  # interactions of each item, [items]

# Of clean interactions. The number of parts follows from the log alone, so that the same log gives
# the same files on any cluster; a part has to fit into the memory of one task several times.
INTERACTIONS_PER_PART = 2_000_000

OLD_SHARE = 0.9  # of interactions; the report says how many of the others are with items not seen before


class Prepared(NamedTuple):
    """What was written."""

    vocabulary: Vocabulary
    vocabulary_sha256: str
    files: list[HistoryFile]
    time_quantiles: dict[str, int]
    dropped: Counter[str]
    summary: DataSummary


class Catalogue(NamedTuple):
    """The items of all buckets. Places are those of the vocabulary before rare items are removed."""

    item_ids: pa.Array
    places: list[npt.NDArray[np.int64]]
    """For each bucket, the places of its items."""
    num_known: int
    """The first items stay, however rare: another dataset has them already."""

    def gather(self, of_buckets: Sequence[Counts], start: int, combine: np.ufunc) -> Counts:
        """One number per item from those of the buckets."""
        result = np.full(len(self.item_ids), start, np.int64)
        for places, numbers in zip(self.places, of_buckets, strict=True):
            result[places] = combine(result[places], numbers)
        return result


def num_buckets(approximate_rows: int) -> int:
    """Into how many buckets a log is divided while its exact size is not known."""
    return _power_of_two(approximate_rows / INTERACTIONS_PER_PART)


def _power_of_two(least: float) -> int:
    """The smallest one that is not below ``least``: the bounds of 2 n ranges include those of n."""
    power = 1
    while power < least:
        power *= 2
    return power


class HistoryBuilder:
    """Builds the histories of a divided log, filters them, and writes them into a dataset folder."""

    def __init__(
        self, log: DividedLog, wanted: Wanted, settings: PrepareSettings, folder: str, has_timestamps: bool
    ):
        self.wanted = wanted
        self.settings = settings
        self.folder = folder
        self.has_timestamps = has_timestamps
        self.dropped = Counter(log.dropped)
        self.num_interactions = log.num_rows - log.dropped.total()
        self.num_files = _power_of_two(self.num_interactions / INTERACTIONS_PER_PART)
        # The estimate may have been too high: buckets that are small are joined.
        joined = max(1, len(log.buckets) // self.num_files)
        self.buckets = [
            [piece for bucket in log.buckets[first : first + joined] for piece in bucket]
            for first in range(0, len(log.buckets), joined)
        ]
        log.buckets = []  # nothing else refers to the pieces then, and the store frees what is used up

    def run(self, known_items: pa.Array | None) -> Prepared:
        """Do it all. Items of ``known_items`` come first in the vocabulary, in their order.

        Raises ``UserError`` if filtering leaves nothing.
        """
        with progress_bar("prepare: histories", 2 * len(self.buckets), "task") as self.bar:
            built, histories = self._build()
            catalogue = self._number_items([part.item_ids for part in built], known_items)
            first_times = catalogue.gather(
                [part.first_times for part in built], np.iinfo(np.int64).max, np.minimum
            )
            late_from = time_quantile([part.times for part in built], OLD_SHARE)
            counts = catalogue.gather([part.counts for part in built], 0, np.add)
            del built
            counts, histories = self._remove_rare(catalogue, counts, histories)
            left = int(counts.sum())
            self.dropped["rare_users_or_items"] = self.num_interactions - left - self._dropped_by_building
            if not left:
                raise UserError(
                    "no user is left after filtering; lower --min-user-interactions or "
                    "--min-item-interactions"
                )
            return self._write(catalogue, counts, histories, late_from, first_times >= late_from)

    def _build(self) -> tuple[list[BuiltPart], list[Any]]:
        """What is known of each bucket's histories, and references to them."""
        results = self._run(
            preparation.build,
            [(self.settings, self.has_timestamps, *pieces) for pieces in self.buckets],
        )
        self.buckets = []
        by_building: Counter[str] = Counter()
        for part, _ in results:
            by_building.update(part.dropped)
        self.dropped.update(by_building)
        self._dropped_by_building = by_building.total()
        return [part for part, _ in results], [histories for _, histories in results]

    def _number_items(self, of_buckets: list[pa.Array], known_items: pa.Array | None) -> Catalogue:
        known = of_buckets[0][:0] if known_items is None else known_items
        joined = pa.chunked_array([known, *of_buckets])
        if pa.types.is_string(known.type):  # all of them together may be more than 2 GiB
            joined = joined.cast(pa.large_string())
        encoded = joined.combine_chunks().dictionary_encode()
        order = grown_order(encoded.dictionary, len(known))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        all_places = place[encoded.indices.to_numpy(zero_copy_only=False)]
        ends = np.cumsum([len(ids) for ids in of_buckets])
        places = np.split(all_places[len(known) :], ends[:-1])
        item_ids = encoded.dictionary.take(pa.array(order)).cast(known.type)
        return Catalogue(item_ids, places, len(known))

    def _remove_rare(
        self, catalogue: Catalogue, counts: Counts, histories: list[Any]
    ) -> tuple[Counts, list[Any]]:
        """Remove rare items, then users who became rare by that, and so on until none is left."""
        while True:
            rare = (counts > 0) & (counts < self.settings.min_item_interactions)
            rare[: catalogue.num_known] = False
            if not rare.any():
                return counts, histories
            self.bar.total += len(histories)
            minimum = self.settings.min_user_interactions
            filtered = self._run(
                preparation.remove_items,
                [
                    (part, rare[places], minimum)
                    for part, places in zip(histories, catalogue.places, strict=True)
                ],
            )
            counts = catalogue.gather([of_bucket for of_bucket, _ in filtered], 0, np.add)
            histories = [part for _, part in filtered]

    def _write(
        self,
        catalogue: Catalogue,
        counts: Counts,
        histories: list[Any],
        late_from: int,
        is_new: npt.NDArray[np.bool_],
    ) -> Prepared:
        """Write vocabulary and part files."""
        left = counts > 0
        left[: catalogue.num_known] = True
        vocabulary = Vocabulary(catalogue.item_ids.filter(pa.array(left)), counts[left])
        vocabulary_sha256 = vocabulary.save(self.folder)
        index = np.where(left, np.cumsum(left), 0)
        padding = [0]
        is_new_by_index = ray.put(np.concatenate([padding, is_new[left]]).astype(np.bool_))
        columns = history_columns(self.has_timestamps)
        files_each = self.num_files // len(histories)
        arguments = []
        for number, (part, places) in enumerate(zip(histories, catalogue.places, strict=True)):
            files = PartFiles(self.folder, columns, number * files_each, files_each, self.num_files)
            new_index = np.concatenate([padding, index[places]]).astype(np.int32)
            arguments.append((part, new_index, files, self.wanted.time_unit, late_from, is_new_by_index))
        results = self._run(preparation.write_parts, arguments, num_returns=1)
        written: list[WrittenFile] = [file for ((files_of_bucket, _),) in results for file in files_of_bucket]
        times = [file.times for file in written]
        return Prepared(
            vocabulary,
            vocabulary_sha256,
            [file.file for file in written],
            {str(share): time_quantile(times, share) for share in (0.8, 0.9)},
            self.dropped,
            summarise([summary for ((_, summary),) in results], vocabulary.counts, self.has_timestamps),
        )

    def _run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], num_returns: int = 2
    ) -> list[tuple[Any, ...]]:
        """Run one Ray task for each tuple of arguments; each result is (first value, reference, ...)."""
        task = ray.remote(function).options(num_returns=num_returns)
        results = [task.remote(*given) for given in arguments]
        references = [[result] if num_returns == 1 else result for result in results]
        waiting = [first for first, *_ in references]
        while waiting:
            done, waiting = ray.wait(waiting)
            self.bar.update(len(done))
        return [(ray.get(first), *rest) for first, *rest in references]
