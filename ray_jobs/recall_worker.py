"""What an actor of `recgpt generate` does: it turns units of work into part files."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from recgpt.schema import ITEM_IDS, ITEM_INDICES, USER_HASH, USER_ID

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from ray_jobs.job_index import JobIndex
    from recgpt.config import RecallSettings
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.vocabulary import Vocabulary
    from recgpt.retrieval.autoregressive import AutoregressiveRecall
    from recgpt.retrieval.candidate_job import Run
    from recgpt.retrieval.candidates import CandidateFile
    from recgpt.retrieval.user_selection import WorkUnit

USERS_PER_STEP = 1024  # recalled between two reports of progress


class RecallWorker:
    """Loads the model once, then recalls candidates for the users of one unit after the other.

    Args:
        run: whose staging folder is written into, as long as no later run has taken it over.
        allowed: ascending indices of the items that may be candidates; None: all.
        index: None: the exact index of the whole table.
    """

    def __init__(
        self,
        model_url: str,
        dataset: "HistoryDataset",
        run: "Run",
        recall: "RecallSettings",
        allowed: "npt.NDArray[np.int64] | None" = None,
        index: "JobIndex | None" = None,
    ):
        import torch

        torch.set_num_threads(1)
        self.model_url = model_url
        self.dataset = dataset
        self.run = run
        self.recall_settings = recall
        self.index = index
        self.allowed = allowed
        self.vocabulary: Vocabulary | None = None
        self.recall: AutoregressiveRecall | None = None

    def load(self) -> None:
        """Load model and vocabulary, once; not while the actor is made, where no error gets out whole."""
        import numpy as np
        import torch

        from recgpt.retrieval.recall_model import load_recall

        if self.recall is None:
            allowed = None if self.allowed is None else torch.from_numpy(self.allowed)
            self.vocabulary = self.dataset.vocabulary()
            popularity_R = torch.from_numpy(np.concatenate([[0], self.vocabulary.counts]))
            self.recall = load_recall(
                self.model_url,
                self.recall_settings,
                popularity_R=popularity_R,
                allowed=allowed,
                index=None if self.index is None else self.index.load(allowed),
            )
            self.meters = Meters()

    def write_candidates(self, unit: "WorkUnit") -> "Iterator[int | CandidateFile]":
        """Candidates of one unit's users, written under the unit's own name, and then its receipt.

        Yields numbers of users as candidates for them are found, and at last the file.
        """
        import pyarrow as pa

        from recgpt.retrieval.candidate_job import check_run_is_latest, write_receipt
        from recgpt.retrieval.candidates import write_part

        self.load()  # a no-op, unless the actor was started again after a crash
        table = unit.histories(self.dataset)
        pieces = []
        for first in range(0, len(table), USERS_PER_STEP):
            users = table.slice(first, USERS_PER_STEP)
            pieces.append(self._candidates(users))
            yield len(users)
        check_run_is_latest(self.run.folder, self.run.token)
        file = write_part(self.run.folder, unit.part, pa.concat_tables(pieces).combine_chunks())
        write_receipt(self.run, file)
        yield file

    def _candidates(self, users: "pa.Table") -> "pa.Table":
        import numpy as np
        import torch

        from recgpt.data.arrow import list_arrays
        from recgpt.retrieval.candidates import candidates_table

        assert self.recall is not None
        assert self.vocabulary is not None
        started = time.perf_counter()
        values, offsets = list_arrays(users[ITEM_INDICES])
        recalled = self.recall.recommend(
            torch.from_numpy(values.astype(np.int64)),
            torch.from_numpy(offsets),
            torch.from_numpy(users[USER_HASH].to_numpy().copy()),
        )
        seconds = time.perf_counter() - started
        table = candidates_table(users[USER_ID], recalled, self.vocabulary)
        self.meters.count(users=len(users), seconds=seconds, candidates=len(list_arrays(table[ITEM_IDS])[0]))
        return table


class Meters:
    """What an actor has done so far, at Ray's metrics endpoint."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        self._users = Counter("recgpt_recall_users", description="Users with candidates.")
        self._seconds = Counter("recgpt_recall_seconds", description="Seconds of recall, reading apart.")
        self._candidates = Counter("recgpt_recall_candidates", description="Candidates of these users.")

    def count(self, *, users: int, seconds: float, candidates: int) -> None:
        for counter, value in (
            (self._users, users),
            (self._seconds, seconds),
            (self._candidates, candidates),
        ):
            if value:  # Ray refuses to add nothing
                counter.inc(value)
