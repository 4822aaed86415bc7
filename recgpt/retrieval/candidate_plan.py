"""What a command asks for, resolved against model and dataset: settings, users, items, and their job."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from recgpt import storage
from recgpt.config import Continuation, RecallSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from recgpt.model.export import ModelInfo, model_fingerprint
from recgpt.retrieval.approximate_index import StoredIndex
from recgpt.retrieval.candidate_job import CandidateJob
from recgpt.retrieval.candidates import AskedFor, CandidateFile, CandidatesManifest, MadeFrom, manifest_of
from recgpt.retrieval.changed_users import changed_since, resolve_since
from recgpt.retrieval.id_files import allowed_items
from recgpt.retrieval.recall_model import model_for_dataset, resolve_recall
from recgpt.retrieval.user_selection import WorkUnit, checksum_of_units, select_users
from recgpt.schema import MANIFEST_FILE
from recgpt.settings_reading import to_dict


@dataclass(frozen=True)
class RecallWishes:
    """What the user wants otherwise than in the model's own recall settings; None: as there."""

    k: int | None = None
    quotas: Sequence[int] | None = None
    keep_seen: bool = False
    continuation: Continuation | None = None
    temperature: float | None = None
    beam_width: int | None = None

    def resolve(self, info: ModelInfo) -> RecallSettings:
        """The settings that recall has.

        Raises ``UserError`` for wishes that contradict each other, or do not fit the model.
        """
        recall = resolve_recall(info, self.k, self.quotas, self.keep_seen)
        continuation = self.continuation or recall.continuation
        weighted = continuation in ("mean", "sampled")
        if self.temperature is not None and not (weighted and self.temperature > 0):
            raise UserError(
                f"--temperature {self.temperature}: give a number above 0, with --continuation mean "
                "or sampled"
            )
        if self.beam_width is not None and continuation != "beam":
            raise UserError(f"--beam-width {self.beam_width}: give it with --continuation beam")
        return replace(
            recall,
            continuation=continuation,
            temperature=self.temperature or recall.temperature,
            beam_width=self.beam_width or recall.beam_width,
        )


@dataclass(frozen=True)
class CandidatePlan:
    """All that a job is, before the first user has candidates."""

    dataset: HistoryDataset
    recall: RecallSettings
    units: list[WorkUnit]
    allowed: npt.NDArray[np.int64] | None
    """Ascending indices of the items that may be candidates; None: all."""
    made_from: MadeFrom
    asked_for: AskedFor
    warnings: list[str]
    """What the user should know before it starts, one line each."""
    index: StoredIndex | None = None
    """Approximate; None: exact search."""

    @property
    def job(self) -> CandidateJob:
        return CandidateJob(
            model_fingerprint=self.made_from.model_fingerprint,
            dataset_fingerprint=self.made_from.dataset_fingerprint,
            recall=to_dict(self.recall),
            allowed_items=None
            if self.allowed is None
            else hashlib.sha256(self.allowed.astype("<i8").tobytes()).hexdigest(),
            index=self.made_from.index,
            units=checksum_of_units(self.units),
        )

    def check_unchanged(self) -> None:
        """Raises ``UserError`` if model or dataset are no longer those that the job began with."""
        made_from = self.made_from
        dataset_file = storage.join(made_from.dataset, MANIFEST_FILE)
        now = {
            made_from.model: (made_from.model_fingerprint, model_fingerprint(made_from.model)),
            made_from.dataset: (made_from.dataset_fingerprint, storage.checksum(dataset_file)),
        }
        for url, (then, current) in now.items():
            if then != current:
                raise UserError(
                    f"{url}: was replaced while candidates were made from it; run the same command again, "
                    "which begins anew"
                )

    def manifest(self, files: list[CandidateFile]) -> CandidatesManifest:
        """The manifest of the finished job."""
        return replace(
            manifest_of(files, self.recall, self.made_from),
            asked_for=self.asked_for,
            num_allowed_items=None if self.allowed is None else len(self.allowed),
            job=self.job.fingerprint,
        )


def plan_candidates(
    model: str, dataset: str, wishes: RecallWishes, asked_for: AskedFor, index: str | None = None
) -> CandidatePlan:
    """Read what is needed to know the whole job: lists and checksums, but no weights.

    ``index``: folder of an approximate index.
    Raises ``UserError`` for whatever of it cannot be done.
    """
    histories = HistoryDataset.open(dataset)
    model_url, info = model_for_dataset(model, histories)
    recall = wishes.resolve(info)
    allowed, warnings = _allowed_items(histories, asked_for)
    asked_for = resolve_paths(asked_for, histories)
    units = selected_units(histories, asked_for)
    unknown = [unit.unknown_users for unit in units if unit.unknown_users is not None]
    if unknown:
        warnings.append(
            f"{asked_for.users}: {sum(map(len, unknown))} users are not in {histories.url}, the first is "
            f"{unknown[0][0].as_py()!r}; they get the most popular items"
        )
    fingerprint = model_fingerprint(model_url)
    stored = None if index is None else StoredIndex.open(index, fingerprint)
    made_from = MadeFrom(
        model=model_url,
        model_fingerprint=fingerprint,
        dataset=histories.url,
        dataset_fingerprint=histories.fingerprint,
        vocabulary_fingerprint=info.vocabulary_fingerprint,
        index=None if stored is None else f"{stored.manifest.sha256} {stored.manifest.effort}",
    )
    return CandidatePlan(histories, recall, units, allowed, made_from, asked_for, warnings, stored)


def selected_units(dataset: HistoryDataset, asked_for: AskedFor) -> list[WorkUnit]:
    """The users that were asked for. Raises ``UserError`` if a list or an older dataset cannot be read."""
    changed = None
    if asked_for.changed_since is not None:
        changed = changed_since(dataset, resolve_since(asked_for.changed_since, dataset))
    return select_users(dataset, asked_for.users, changed)


def resolve_paths(asked_for: AskedFor, dataset: HistoryDataset) -> AskedFor:
    """The same with absolute paths, and an instant as number, to be understood elsewhere and later.

    Raises ``UserError`` for a ``changed_since`` that is neither an instant nor a fitting dataset.
    """
    paths = {
        name: path if path is None else storage.absolute(path)
        for name, path in (
            ("users", asked_for.users),
            ("exclude_items", asked_for.exclude_items),
            ("only_items", asked_for.only_items),
        )
    }
    if asked_for.changed_since is None:
        return replace(asked_for, **paths)
    since = resolve_since(asked_for.changed_since, dataset)
    return replace(asked_for, **paths, changed_since=str(since) if isinstance(since, int) else since.url)


def _allowed_items(
    dataset: HistoryDataset, asked_for: AskedFor
) -> tuple[npt.NDArray[np.int64] | None, list[str]]:
    if asked_for.exclude_items is None and asked_for.only_items is None:
        return None, []
    allowed, unknown = allowed_items(dataset.vocabulary(), asked_for.exclude_items, asked_for.only_items)
    return allowed, [
        f"{path}: {count} items are not in {dataset.url}; they make no difference"
        for path, count in unknown.items()
        if count
    ]
