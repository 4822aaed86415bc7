"""`recgpt generate`: Ray actors recall candidates, one part file per row group of the dataset."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.actor_pool import run_on_actors
from ray_jobs.command_line import (
    ActorsOption,
    DatasetOption,
    DebugOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    verb_app,
)
from ray_jobs.runtime import run_command, start_ray
from recgpt import storage
from recgpt.errors import UserError
from recgpt.progress import progress_bar
from recgpt.schema import ITEM_INDICES, USER_HASH, USER_ID

if TYPE_CHECKING:
    import pyarrow as pa

    from recgpt.config import RecallSettings
    from recgpt.data.dataset import HistoryDataset
    from recgpt.data.vocabulary import Vocabulary
    from recgpt.retrieval.autoregressive import AutoregressiveRecall
    from recgpt.retrieval.candidates import CandidateFile
    from recgpt.retrieval.user_selection import WorkUnit

USERS_PER_STEP = 1024  # recalled between two reports of progress


def run_generate(
    model: str,
    dataset: str,
    output: str,
    *,
    k: int | None = None,
    quotas: Sequence[int] | None = None,
    users: str | None = None,
    actors: int = 1,
    keep_seen: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write candidates for all users of a dataset, or for those listed in ``users``; returns the manifest.

    ``k``, ``quotas`` and ``keep_seen`` change the model's own recall settings (see ``resolve_recall``).
    Each actor takes one CPU. What the user can put right raises ``UserError``, nearly always before Ray
    is started, and leaves what was in ``output`` before as it was.
    """
    from recgpt.data.dataset import HistoryDataset
    from recgpt.model.export import model_fingerprint
    from recgpt.retrieval.candidates import MadeFrom, finish
    from recgpt.retrieval.recall_model import model_for_dataset, resolve_recall
    from recgpt.retrieval.user_selection import all_users, selected_users

    histories = HistoryDataset.open(dataset)
    model_url, info = model_for_dataset(model, histories)
    recall = resolve_recall(info, k, quotas, keep_seen)
    output = storage.absolute(output)
    storage.check_output_apart(output, dataset, model, *([] if users is None else [users]))
    storage.check_output_is_free(output, overwrite)
    units = all_users(histories) if users is None else selected_users(histories, users)
    made_from = MadeFrom(
        model=model_url,
        model_fingerprint=model_fingerprint(model_url),
        dataset=histories.url,
        dataset_fingerprint=histories.fingerprint,
        vocabulary_fingerprint=info.vocabulary_fingerprint,
    )
    actors = min(actors, len(units))
    start_ray(min_cpus=actors + 1)
    with storage.staged_output(output, overwrite) as folder:
        files = []
        arguments = (model_url, histories, folder, recall)
        with progress_bar("generate", sum(unit.num_users for unit in units), "users") as bar:
            for _, done in run_on_actors(RecallWorker, arguments, "write_candidates", units, actors):
                if isinstance(done, int):
                    bar.update(done)
                else:
                    files.append(done)
        return asdict(finish(folder, files, recall, made_from))


class RecallWorker:
    """What one actor does: loads the model once, then turns row groups of histories into part files."""

    def __init__(self, model_url: str, dataset: "HistoryDataset", folder: str, recall: "RecallSettings"):
        import torch

        torch.set_num_threads(1)
        self.model_url = model_url
        self.dataset = dataset
        self.folder = folder
        self.recall_settings = recall
        self.vocabulary: Vocabulary | None = None
        self.recall: AutoregressiveRecall | None = None

    def load(self) -> None:
        """Load model and vocabulary, once; not while the actor is made, where no error gets out whole."""
        from recgpt.retrieval.recall_model import load_recall

        if self.recall is None:
            self.vocabulary = self.dataset.vocabulary()
            self.recall = load_recall(self.model_url, self.recall_settings)

    def write_candidates(self, unit: "WorkUnit") -> "Iterator[int | CandidateFile]":
        """Candidates of one unit's users, written under the unit's own name.

        Yields numbers of users as candidates for them are found, and at last the file.
        """
        import pyarrow as pa

        from recgpt.retrieval.candidates import write_part

        self.load()  # a no-op, unless the actor was started again after a crash
        table = self.dataset.read_row_group(unit.row_group, [USER_ID, USER_HASH, ITEM_INDICES])
        if unit.rows is not None:
            table = table.take(unit.rows)
        pieces = []
        for first in range(0, len(table), USERS_PER_STEP):
            users = table.slice(first, USERS_PER_STEP)
            pieces.append(self._candidates(users))
            yield len(users)
        yield write_part(self.folder, unit.part, pa.concat_tables(pieces).combine_chunks())

    def _candidates(self, users: "pa.Table") -> "pa.Table":
        import numpy as np
        import torch

        from recgpt.data.sequences import history_lists
        from recgpt.retrieval.candidates import candidates_table

        assert self.recall is not None
        assert self.vocabulary is not None
        values, offsets = history_lists(users)
        recalled = self.recall.recommend(
            torch.from_numpy(values.astype(np.int64)),
            torch.from_numpy(offsets),
            torch.from_numpy(users[USER_HASH].to_numpy().copy()),
        )
        return candidates_table(users[USER_ID], recalled, self.vocabulary)


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
    users: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Only the users in this file (path or s3:// URL): text with one id per line, or Parquet "
            "with a column user_id. Example: --users users.txt",
            show_default="all users of the dataset",
        ),
    ] = None,
    actors: ActorsOption = 1,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Items of the user's history may be candidates again.")
    ] = False,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Write candidate items for every user of a dataset, by autoregressive recall.

    The output folder holds Parquet files (`user_id`, `item_ids`, `scores`, `steps`; one row per user, with
    the log's own ids), a manifest with row counts and checksums, and `_SUCCESS` once it is whole.
    Users come in the order of the dataset.

    Example: `recgpt generate --model runs/beauty --dataset data/beauty --output candidates --actors 2`
    """
    manifest = run_generate(
        model,
        dataset,
        output,
        k=k,
        quotas=None if quotas is None else _parse_quotas(quotas),
        users=users,
        actors=actors,
        keep_seen=keep_seen,
        overwrite=overwrite,
    )
    typer.echo(f"{manifest['num_candidates']} candidates for {manifest['num_users']} users are in {output}")


app = verb_app(command)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    # Under the module's own name: Ray's workers then import what they run, and need not unpickle it.
    from ray_jobs import generate

    generate.main()
