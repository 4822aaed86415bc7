"""The Ray pipeline of `recgpt prepare`: Ray Data reads the logs, tasks build the histories of each part."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from recgpt.data import preparation
from recgpt.data.dataset import DatasetManifest, history_columns
from recgpt.data.formats import interaction_schema, read_source
from recgpt.data.histories import time_quantile
from recgpt.data.interactions import final_type, type_as_read
from recgpt.data.sources import Source
from recgpt.data.vocabulary import Vocabulary, vocabulary_order
from recgpt.errors import UserError
from recgpt.progress import progress_bar
from recgpt.schema import DATASET_SCHEMA_VERSION, ITEM_ID, USER_ID

Counts: TypeAlias = npt.NDArray[np.int64]  # interactions of each item, [num_items]

# Of interactions as read. The number of parts follows from the log alone, so that the same log gives
# the same files on any cluster; a part has to fit into the memory of one task several times.
INTERACTIONS_PER_PART = 2_000_000


class Preparation:
    """The steps of one run. What is large stays in Ray's object store; here are references and counts."""

    def __init__(self, sources: list[Source], settings: dict[str, Any], folder: str):
        self.sources = sources
        self.settings = settings
        self.folder = folder
        self.has_timestamps = all(source.time_type != "position" for source in sources)
        self.dropped: dict[str, int] = {}

    def run(self) -> DatasetManifest:
        blocks, num_interactions = self._read()
        self._check_not_empty(num_interactions, "the log holds no interaction")
        num_parts = -(-num_interactions // INTERACTIONS_PER_PART)
        with progress_bar("prepare: histories", 2 * len(blocks) + 3 * num_parts, "task") as self.bar:
            schema = self._decide_types(blocks)
            pieces = self._divide(blocks, schema, num_parts)
            del blocks  # the object store frees what nothing refers to
            self._check_not_empty(
                num_interactions - self.dropped["missing_values"], "every row lacks a value"
            )
            parts, item_ids, counts = self._build(pieces)
            del pieces
            parts, counts = self._remove_rare(parts, counts)
            num_left = int(counts.sum())
            self.dropped["rare_users_or_items"] = num_interactions - sum(self.dropped.values()) - num_left
            self._check_not_empty(
                num_left,
                "no user is left after filtering; lower --min-user-interactions or --min-item-interactions",
            )
            return self._write(parts, item_ids, counts, schema)

    def _check_not_empty(self, num_interactions: int, problem: str) -> None:
        if num_interactions == 0:
            others = len(self.sources) - 1
            more = f" and {others} more file{'s' * (others > 1)}" if others else ""
            raise UserError(f"{self.sources[0].url}{more}: {problem}")

    def _read(self) -> tuple[list[Any], int]:
        """References to blocks of interactions as read, and the number of interactions."""
        sources = self.sources
        schema = interaction_schema(
            type_as_read(source.user_type for source in sources),
            type_as_read(source.item_type for source in sources),
        )

        def read(numbers: pa.Table) -> Iterator[pa.Table]:
            for number in numbers["id"].to_pylist():
                yield from read_source(sources[number], schema)

        files = ray.data.range(len(sources), override_num_blocks=len(sources))
        blocks = files.map_batches(read, batch_size=None, batch_format="pyarrow")
        references: list[Any] = []
        total = 0
        expected = sum(source.approximate_rows for source in sources)
        with progress_bar("prepare: read", expected, "interaction") as bar:
            for bundle in blocks.iter_internal_ref_bundles():
                references += bundle.block_refs
                total += bundle.num_rows()
                bar.update(bundle.num_rows())
        return references, total

    def _decide_types(self, blocks: list[Any]) -> pa.Schema:
        """The types of the ids in the dataset, over all files together."""
        user_types = [source.user_type for source in self.sources]
        item_types = [source.item_type for source in self.sources]
        undecided = blocks if "text" in {*user_types, *item_types} else []
        surveys = [survey for survey, *_ in self._run(preparation.survey, [(block,) for block in undecided])]
        return interaction_schema(
            final_type(user_types, all(users for users, _ in surveys)),
            final_type(item_types, all(items for _, items in surveys)),
        )

    def _divide(self, blocks: list[Any], schema: pa.Schema, num_parts: int) -> list[list[Any]]:
        """References to the pieces of each part: one piece per block."""
        rows = self._run(preparation.divide, [(block, schema, num_parts) for block in blocks], 1 + num_parts)
        self.dropped["missing_values"] = sum(missing for missing, *_ in rows)
        return [list(pieces) for pieces in zip(*(pieces for _, *pieces in rows), strict=True)]

    def _build(self, pieces: list[list[Any]]) -> tuple[list[Any], pa.Array, Counts]:
        """References to the histories of each part; all item ids in vocabulary order; their interactions."""
        built = self._run(preparation.build, [(self.has_timestamps, *of_part) for of_part in pieces], 3)
        self.dropped["duplicates"] = sum(duplicates for duplicates, *_ in built)
        item_ids = vocabulary_order(pc.unique(pa.chunked_array([ray.get(ids) for _, ids, _ in built])))
        shared = ray.put(item_ids)
        min_user = self.settings["min_user_interactions"]
        numbered = self._run(
            preparation.number_items, [(ids, part, shared, min_user) for _, ids, part in built], 2
        )
        return [part for _, part in numbered], item_ids, sum(counts for counts, _ in numbered)

    def _remove_rare(self, parts: list[Any], counts: Counts) -> tuple[list[Any], Counts]:
        """Remove rare items, then users who became rare by that, and so on until none is left."""
        while (rare := (counts > 0) & (counts < self.settings["min_item_interactions"])).any():
            removed = ray.put(rare)
            self.bar.total += len(parts)
            min_user = self.settings["min_user_interactions"]
            filtered = self._run(preparation.remove_items, [(part, removed, min_user) for part in parts], 2)
            parts, counts = [part for _, part in filtered], sum(counts for counts, _ in filtered)
        return parts, counts

    def _write(
        self, parts: list[Any], item_ids: pa.Array, counts: Counts, schema: pa.Schema
    ) -> DatasetManifest:
        """Write vocabulary and part files, and give the manifest that describes them."""
        left = counts > 0
        vocabulary = Vocabulary(item_ids.filter(pa.array(left)), counts[left])
        vocabulary.save(self.folder)
        new_index = ray.put(np.concatenate([[0], np.where(left, np.cumsum(left), 0)]).astype(np.int32))
        columns = history_columns(self.has_timestamps)
        written = self._run(
            preparation.write_part,
            [(part, new_index, columns, self.folder, n) for n, part in enumerate(parts)],
        )
        files = [file for ((file, _),) in written if file.rows]
        times = [summary for ((_, summary),) in written]
        quantiles = {str(share): time_quantile(times, share) for share in (0.8, 0.9)}
        units = {"number": "unstated", "instant": "microseconds", "position": None}
        return DatasetManifest(
            schema_version=DATASET_SCHEMA_VERSION,
            num_users=sum(file.rows for file in files),
            num_items=vocabulary.num_items,
            num_interactions=int(counts.sum()),
            has_timestamps=self.has_timestamps,
            time_unit=units[self.sources[0].time_type],
            user_id_type=str(schema.field(USER_ID).type),
            item_id_type=str(schema.field(ITEM_ID).type),
            vocabulary_fingerprint=vocabulary.fingerprint,
            time_quantiles=quantiles if self.has_timestamps else None,
            sources=[
                {"path": source.url, "format": source.format, "bytes": source.size} for source in self.sources
            ],
            settings=self.settings,
            dropped=self.dropped,
            files=files,
        )

    def _run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], num_returns: int = 1
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
