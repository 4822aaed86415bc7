"""What a run recommends, for its report: how candidates spread over the catalogue, and some users' lists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from recgpt import storage
from recgpt.data.arrow import combine
from recgpt.data.dataset import HistoryDataset
from recgpt.pages import percent
from recgpt.plots import Curve, Plot, curve_plot, share_axis
from recgpt.retrieval.candidate_checks import dataset_of
from recgpt.retrieval.candidates import CandidatesManifest, read_manifest, read_part
from recgpt.retrieval.one_user import Candidate, Interaction, OneUser, read_titles, read_user
from recgpt.retrieval.spread import Counts, count_candidates, popularity_places, share_of_top, spread
from recgpt.schema import USER_ID

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INTERACTIONS_SHOWN = 10
CANDIDATES_SHOWN = 20
TOP_SHARES = (0.01, 0.1)

_CURVE_POINTS = 200


class TitleFile(NamedTuple):
    """A CSV or Parquet file with the titles of items."""

    path: str
    item_column: str
    title_column: str


class Compared(NamedTuple):
    """A figure of the candidates beside that of the log."""

    name: str
    candidates: str
    log: str


@dataclass(frozen=True)
class Example:
    """One user, whose lists are cut."""

    user_id: int | str
    num_interactions: int
    num_candidates: int
    history: list[Interaction]
    """The newest last."""
    candidates: list[Candidate]
    """The best of the first step first."""

    @property
    def has_times(self) -> bool:
        return any(some.time for some in self.history)


@dataclass(frozen=True)
class Recommended:
    """What a folder of candidates holds."""

    url: str
    manifest: CandidatesManifest
    spread: list[Compared]
    """Empty if nobody has candidates."""
    concentration: Plot | None
    """None if nobody has candidates."""
    examples: list[Example]
    titles: dict[Any, str]
    """Of items that the examples show, as far as they are known."""


def read_recommended(
    url: str, dataset_url: str | None, title_file: TitleFile | None, num_examples: int
) -> Recommended:
    """Read candidates, and the histories of some users from their dataset (None: where it lay).

    Raises ``UserError`` if candidates, dataset or titles cannot be read, or do not belong together.
    """
    url = storage.absolute(url)
    manifest = read_manifest(url)
    dataset = dataset_of(manifest, dataset_url)
    vocabulary = dataset.vocabulary()
    counts_I = count_candidates(url, vocabulary)
    examples = [
        _example(user_id, read_user(url, manifest, dataset, str(user_id)))
        for user_id in example_users(url, manifest, num_examples)
    ]
    return Recommended(
        url,
        manifest,
        _compared(counts_I, vocabulary.counts) if counts_I.any() else [],
        _concentration(counts_I, vocabulary.counts) if counts_I.any() else None,
        examples,
        {} if title_file is None else _titles(title_file, dataset, examples),
    )


def example_users(url: str, manifest: CandidatesManifest, number: int) -> list[int | str]:
    """The ids of so many users (all, if there are fewer) at even distances in the order of the folder."""
    number = min(number, manifest.num_users)
    places = [(2 * place + 1) * manifest.num_users // (2 * number) for place in range(number)]
    users: list[int | str] = []
    before = 0
    for file in manifest.files:
        inside = [place - before for place in places if before <= place < before + file.rows]
        if inside:
            users += combine(read_part(url, file)[USER_ID]).take(pa.array(inside)).to_pylist()
        before += file.rows
    return users


def _example(user_id: int | str, user: OneUser) -> Example:
    return Example(
        user_id,
        len(user.history),
        len(user.candidates),
        user.history[-INTERACTIONS_SHOWN:],
        user.candidates[:CANDIDATES_SHOWN],
    )


def _titles(file: TitleFile, dataset: HistoryDataset, examples: Sequence[Example]) -> dict[Any, str]:
    id_type = pa.int64() if dataset.manifest.item_id_type == "int64" else pa.string()
    shown = [some.item_id for example in examples for some in example.history]
    shown += [some.item_id for example in examples for some in example.candidates]
    return read_titles(*file, pa.array(shown, id_type))


def _compared(counts_I: Counts, log_I: Counts) -> list[Compared]:
    places_I = popularity_places(log_I)
    ours, logs = spread(counts_I, places_I), spread(log_I, places_I)
    top = [
        Compared(
            f"share of the {share:.0%} of items that occur most",
            percent(share_of_top(counts_I, share)),
            percent(share_of_top(log_I, share)),
        )
        for share in TOP_SHARES
    ]
    return [
        Compared("items that occur, of the catalogue", percent(ours.coverage), percent(logs.coverage)),
        *top,
        Compared("Gini coefficient (0: all items alike)", f"{ours.gini:.3f}", f"{logs.gini:.3f}"),
        Compared(
            f"mean popularity rank (1 to {len(log_I):,})", f"{ours.mean_rank:,.1f}", f"{logs.mean_rank:,.1f}"
        ),
    ]


def _concentration(counts_I: Counts, log_I: Counts) -> Plot:
    """Which share of all occurrences falls on which share of the items, those that occur most first."""
    num_items = len(counts_I)
    ranks = np.unique(np.geomspace(1, num_items, _CURVE_POINTS).round().astype(np.int64))

    def curve(name: str, counts: Counts) -> Curve:
        sums = np.sort(counts)[::-1].cumsum()[ranks - 1]
        return Curve(name, np.stack([ranks / num_items, sums / counts.sum()], axis=1))

    def refine(axes: "Axes") -> None:
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        share_axis(axes.xaxis)
        share_axis(axes.yaxis)

    return curve_plot(
        "Concentration",
        "How much falls on the items that occur most. The scale below is logarithmic.",
        [curve("candidates", counts_I), curve("log", log_I)],
        ("share of the catalogue", "share of occurrences"),
        refine,
    )
