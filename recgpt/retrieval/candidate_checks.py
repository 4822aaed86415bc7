"""Whether candidates are what was asked for: everything that a list promises, checked against the dataset.

Shapes: B users of a part, E candidates of these users together.
"""

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recgpt.data.arrow import combine, list_arrays
from recgpt.data.dataset import HistoryDataset
from recgpt.data.hashing import stable_hash
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.retrieval.candidates import CandidatesManifest, find_strangers, part_name, read_part
from recgpt.retrieval.id_files import allowed_items
from recgpt.retrieval.user_selection import WorkUnit
from recgpt.schema import (
    ITEM_IDS,
    ITEM_INDICES,
    PADDING_INDEX,
    POPULARITY_STEP,
    SCORES,
    STEPS,
    USER_ID,
)

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def dataset_of(manifest: CandidatesManifest, url: str | None) -> HistoryDataset:
    """The dataset that candidates were made from: where it lay then, or at ``url``.

    Raises ``UserError`` if there is none, or another one.
    """
    dataset = HistoryDataset.open(url or manifest.made_from.dataset)
    if dataset.fingerprint != manifest.made_from.dataset_fingerprint:
        raise UserError(
            f"{dataset.url}: not the dataset that the candidates were made from; give that one with --dataset"
        )
    return dataset


def check_candidates(
    url: str, manifest: CandidatesManifest, dataset: HistoryDataset, units: Collection[WorkUnit]
) -> Iterator[list[str]]:
    """The problems of the folder, and then of each file of the manifest in turn, one line each.

    ``units``: the users that were asked for. Memory is that of one part.
    """
    asked_for = {part_name(unit.part): unit for unit in units}
    yield list(_folder_problems(url, manifest, asked_for))
    checks = ListChecks(manifest, dataset.vocabulary())
    for file in manifest.files:
        try:
            table = read_part(url, file)
        except UserError as error:
            yield [str(error)]
            continue
        unit = asked_for.get(file.path)
        histories = None if unit is None else unit.histories(dataset)
        problems = [] if histories is None else list(checks.problems(table, histories))
        yield [f"{file.path}: {problem}" for problem in problems]


def _folder_problems(url: str, manifest: CandidatesManifest, asked_for: dict[str, WorkUnit]) -> Iterator[str]:
    for name in find_strangers(url, manifest):
        yield f"{name}: not in the manifest"
    paths = [file.path for file in manifest.files]
    for path in sorted(set(paths) - set(asked_for)):
        yield f"{path}: none of its users was asked for"
    for path in sorted(set(asked_for) - set(paths)):
        yield f"{path}: missing, and with it {asked_for[path].num_users} users that were asked for"
    for name, value, total in (
        ("num_users", manifest.num_users, sum(file.rows for file in manifest.files)),
        ("num_candidates", manifest.num_candidates, sum(file.candidates for file in manifest.files)),
    ):
        if value != total:
            yield f"the manifest says {name} {value}, its files have {total}"


class ListChecks:
    """Checks the lists of some users against their histories."""

    def __init__(self, manifest: CandidatesManifest, vocabulary: Vocabulary):
        self._manifest = manifest
        self._items = ItemIndices(vocabulary)
        self._num_rows = vocabulary.num_items + 1
        self._allowed_R = np.ones(self._num_rows, np.bool_)
        only, exclude = manifest.asked_for.only_items, manifest.asked_for.exclude_items
        if only is not None or exclude is not None:
            allowed, _ = allowed_items(vocabulary, exclude, only)
            self._allowed_R[:] = False
            self._allowed_R[allowed] = True
        self._allowed_R[PADDING_INDEX] = False

    def problems(self, table: pa.Table, histories: pa.Table) -> Iterator[str]:
        """One line for each user and kind of problem; ``histories`` are those of the users asked for."""
        types = {USER_ID: histories[USER_ID].type, ITEM_IDS: pa.list_(self._items.id_type)}
        for name, expected in types.items():
            if table[name].type != expected:
                yield f"column {name} is {table[name].type}, not {expected}"
                return
        users, wanted = combine(table[USER_ID]), combine(histories[USER_ID])
        yield from _user_problems(users, wanted)
        place = pc.index_in(users, value_set=wanted)
        lengths = [pc.list_value_length(table[name]) for name in (ITEM_IDS, SCORES, STEPS)]
        even = pc.and_(pc.equal(lengths[0], lengths[1]), pc.equal(lengths[0], lengths[2]))
        yield from (f"user {user!r}: lists of different lengths" for user in _of(users, ~_bools(even)))
        kept = pc.and_(combine(even), place.is_valid())
        table, histories = table.filter(kept), histories.take(place.filter(kept))
        users = combine(table[USER_ID])
        for problem, row_B in self._list_problems(table, histories):
            yield from (f"user {user!r}: {problem}" for user in _of(users, row_B))

    def _list_problems(self, table: pa.Table, histories: pa.Table) -> Iterator[tuple[str, BoolArray]]:
        """Each kind of problem, and which users have it, bool [B]."""
        ids = combine(table[ITEM_IDS])
        item_E = self._items.encode(ids.flatten())
        step_E, offsets = list_arrays(table[STEPS])
        score_E, _ = list_arrays(table[SCORES])
        num_users = len(table)
        row_E = np.repeat(np.arange(num_users), np.diff(offsets))
        seen_T, seen_offsets = list_arrays(histories[ITEM_INDICES])
        seen = np.unique(np.repeat(np.arange(num_users), np.diff(seen_offsets)) * self._num_rows + seen_T)
        key_E = row_E * self._num_rows + item_E

        def rows(bad_E: BoolArray) -> BoolArray:
            return np.bincount(row_E[bad_E], minlength=num_users) > 0

        yield "an item that the dataset does not know", rows(item_E == 0)
        _, first, count = np.unique(key_E, return_index=True, return_counts=True)
        repeated_E = np.zeros(len(key_E), np.bool_)
        repeated_E[first[count > 1]] = True
        yield "an item twice", rows(repeated_E & (item_E != 0))
        yield "an item that was not to be recommended", rows(~self._allowed_R[item_E] & (item_E != 0))
        if not self._manifest.keep_seen:
            yield "an item of the user's own history", rows(np.isin(key_E, seen))
        yield "scores that do not descend within a step", rows(_rising(row_E, step_E, score_E))
        yield from self._length_problems(row_E, step_E, np.diff(offsets), seen, np.diff(seen_offsets))

    def _length_problems(
        self,
        row_E: IntArray,
        step_E: npt.NDArray[np.int8],
        length_B: IntArray,
        seen: IntArray,
        history_B: IntArray,
    ) -> Iterator[tuple[str, BoolArray]]:
        """Steps and numbers of candidates; ``seen``: user x rows + item, each once."""
        num_users, quotas = len(length_B), self._manifest.quotas
        no_history_E = history_B[row_E] == 0
        wrong_E = np.where(no_history_E, step_E != POPULARITY_STEP, (step_E < 1) | (step_E > len(quotas)))
        down_E = np.zeros(len(row_E), np.bool_)
        down_E[1:] = (row_E[1:] == row_E[:-1]) & (step_E[1:] < step_E[:-1])
        yield (
            "steps that are none, or in the wrong order",
            np.bincount(row_E[wrong_E | down_E], minlength=num_users) > 0,
        )
        for step, quota in enumerate(quotas, start=1):
            count_B = np.bincount(row_E[step_E == step], minlength=num_users)
            yield f"more than {quota} candidates of step {step}", count_B > quota
        k = self._manifest.k
        seen = seen[self._allowed_R[seen % self._num_rows]]
        seen_B = 0 if self._manifest.keep_seen else np.bincount(seen // self._num_rows, minlength=num_users)
        left_B = np.minimum(int(self._allowed_R.sum()) - seen_B, k)
        yield f"fewer than {k} candidates, though more items are left", length_B < left_B
        yield f"more than {k} candidates", length_B > k


def _user_problems(users: pa.Array, wanted: pa.Array) -> Iterator[str]:
    if users.equals(wanted):
        return
    counts = pc.value_counts(users)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    yield from (f"user {user.as_py()!r}: more than one row" for user in repeated)
    missing = wanted.filter(pc.invert(pc.is_in(wanted, value_set=users)))
    yield from (f"user {user.as_py()!r}: asked for, and has no row" for user in missing)
    others = users.filter(pc.invert(pc.is_in(users, value_set=wanted)))
    yield from (f"user {user.as_py()!r}: not asked for" for user in others)


def _rising(row_E: IntArray, step_E: npt.NDArray[np.int8], score_E: npt.NDArray[np.float32]) -> BoolArray:
    """Whether a score is above that before it in its step, or is no number."""
    bad_E = np.isnan(score_E)
    same_step = (row_E[1:] == row_E[:-1]) & (step_E[1:] == step_E[:-1])
    bad_E[1:] |= same_step & (score_E[1:] > score_E[:-1])
    return bad_E


def _of(users: pa.Array, chosen_B: BoolArray) -> list[int | str]:
    return users.filter(pa.array(chosen_B)).to_pylist()


def _bools(column: pa.ChunkedArray) -> BoolArray:
    return combine(column).to_numpy(zero_copy_only=False)


class ItemIndices:
    """``Vocabulary.encode`` for many small arrays of ids: what it searches in is built once."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        hashes = stable_hash(vocabulary.item_ids)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    @property
    def id_type(self) -> pa.DataType:
        return self._vocabulary.item_ids.type

    def encode(self, ids: pa.Array) -> IntArray:
        """Item indices, int64 [n]; 0 for ids that are unknown or null."""
        if ids.null_count or not len(ids):
            return self._vocabulary.encode(ids).astype(np.int64)
        place = np.searchsorted(self._hashes, stable_hash(ids)).clip(max=len(self._hashes) - 1)
        index = self._order[place] + 1
        other = ~_bools(pc.equal(self._vocabulary.decode(index), ids))
        if other.any():  # unknown, or of the same hash as another item
            index[other] = self._vocabulary.encode(ids.filter(pa.array(other)))
        return index
