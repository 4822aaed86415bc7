"""A seeded, realistic interaction log: for the quickstart, for tests and for scaling experiments.

How a user comes to the next item (U users, N items, C clusters):

- Items have Zipf popularity. Similar ones form a kind (phone cases), kinds form a cluster (phones).
  After an item of one kind usually comes one of a few other kinds, mostly of the same cluster.
- A user likes a few clusters, unequally. Interactions come in sessions, and each session has one
  of these clusters as its theme.
- The next item is, by the shares in the settings, a successor of the last item (what a first-order
  Markov chain can know), a successor of one of the items before it (what takes a longer memory),
  an item of the session's theme (what takes the user's taste), or any popular item (noise).
- Users seldom take the same item twice.
"""

from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from recgpt import storage
from recgpt.config import NotNegative, Positive, Rate
from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID

FIRST_SECOND = 1_704_067_200  # 2024-01-01 00:00:00 UTC
SECONDS_PER_DAY = 86_400
MIN_LENGTH = 3  # interactions of the briefest user: one each for training, validation and test
LENGTH_SPREAD = 0.7  # standard deviation of log(length)
MAX_LENGTH_IN_MEANS = 8  # lengths are cut off at this multiple of the mean
ZIPF_OFFSET = 5.0  # popularity of the item of rank r is 1 / (r + offset) ** exponent
NEXT_KINDS = 4  # kinds that usually follow a kind
NEXT_KIND_DECAY = 0.6  # each of them follows this much as often as the one before it
SAME_CLUSTER = 0.8  # share of them in the kind's own cluster; the others are in the next one
THEME_WEIGHTS = (0.6, 0.3, 0.1)  # how often a user's first, second and third cluster are the theme
LOOK_BACK = 5  # a successor of an earlier item goes back to the 2nd, ... or 5th last
SECONDS_WITHIN_SESSION = 90.0  # median between two interactions of a session
REDRAWS = 3  # times an item that the user already took is drawn again

IntArray = npt.NDArray[np.int64]


@dataclass(config=ConfigDict(extra="forbid"))
class SyntheticSettings:
    """What the log looks like; the defaults are the quickstart's log."""

    num_users: Positive = 6000
    """Users, each with at least three interactions."""
    num_items: Positive = 1000
    """Items that can occur; rare ones may not."""
    mean_length: Positive = 18
    """Mean interactions per user, about."""
    num_clusters: Positive = 20
    """Clusters of items."""
    items_per_kind: Positive = 20
    """Items of the same kind."""
    zipf_exponent: Annotated[float, Field(ge=0)] = 0.8
    """Skew of item popularity."""
    successor_share: Rate = 0.25
    """Share of interactions that follow from the last item."""
    earlier_share: Rate = 0.35
    """Share of interactions that follow from one of the items before the last."""
    theme_share: Rate = 0.3
    """Share of interactions that follow from the session's theme. The rest is noise."""
    mean_session: Positive = 6
    """Mean interactions per session."""
    days: Positive = 180
    """Days that the log spans, about."""
    seed: NotNegative = 0
    """The same seed gives the same log."""

    def __post_init__(self) -> None:
        if self.successor_share + self.earlier_share + self.theme_share > 1.0 + 1e-9:
            raise ValueError("successor_share, earlier_share and theme_share sum to more than 1")


def interactions(settings: SyntheticSettings) -> pa.Table:
    """The log in time order: user_id and item_id (string), timestamp (int64, seconds since 1970).

    Takes memory for some 50 bytes x num_users x the longest history.
    """
    generator = np.random.default_rng(settings.seed)
    catalogue = _Catalogue(settings, generator)
    length_U = _lengths(settings, generator)
    starts_UL = _session_starts(settings, length_U, generator)
    item_UL = _items(settings, catalogue, length_U, starts_UL, generator)
    time_UL = _timestamps(settings, length_U, starts_UL, generator)

    real_UL = np.arange(item_UL.shape[1]) < length_U[:, None]
    number_U = generator.permutation(settings.num_users)  # a user's name tells nothing of the length
    user = np.broadcast_to(number_U[:, None], item_UL.shape)[real_UL]
    times = time_UL[real_UL]
    order = np.argsort(times, kind="stable")
    return pa.table(
        {
            USER_ID: _names("user", settings.num_users).take(pa.array(user[order])),
            ITEM_ID: _names("item", settings.num_items).take(pa.array(item_UL[real_UL][order])),
            TIMESTAMP: pa.array(times[order]),
        }
    )


def write_log(settings: SyntheticSettings, folder: str, files: int = 4) -> list[str]:
    """Write the log as Parquet files, cut by time as a real one is; returns their paths or URLs."""
    log = interactions(settings)
    bounds = np.linspace(0, len(log), files + 1).astype(int)
    paths = [storage.join(folder, f"interactions-{index:05d}.parquet") for index in range(files)]
    for path, first, end in zip(paths, bounds[:-1], bounds[1:], strict=True):
        sink = pa.BufferOutputStream()
        pq.write_table(log.slice(first, end - first), sink)
        storage.write_bytes(path, sink.getvalue().to_pybytes())
    return paths


class _Catalogue:
    """The items: which are popular, which belong together, what follows what.

    Items are laid out so that those of a kind (K kinds), and the kinds of a cluster, stand side by
    side: to draw from a kind or a cluster is to draw from a range of places.
    """

    def __init__(self, settings: SyntheticSettings, generator: np.random.Generator):
        kinds = max(1, settings.num_items // settings.items_per_kind)
        self.clusters = min(settings.num_clusters, kinds)
        rank_N = generator.permutation(settings.num_items)
        weight_N = 1.0 / (rank_N + ZIPF_OFFSET) ** settings.zipf_exponent
        self._kind_of_item = generator.permutation(settings.num_items) % kinds  # no kind is empty
        self._item_at = np.argsort(self._kind_of_item, kind="stable")
        self._cumulative = np.concatenate([[0.0], np.cumsum(weight_N[self._item_at])])
        self._kind_bounds = np.searchsorted(self._kind_of_item[self._item_at], np.arange(kinds + 1))
        first_kind_of_cluster = np.linspace(0, kinds, self.clusters + 1).astype(np.int64)
        self._cluster_bounds = self._kind_bounds[first_kind_of_cluster]
        cluster_of_kind = np.repeat(np.arange(self.clusters), np.diff(first_kind_of_cluster))
        self._next_kinds = self._draw_next_kinds(cluster_of_kind, generator)

    def _draw_next_kinds(self, cluster_K: IntArray, generator: np.random.Generator) -> IntArray:
        """[K, NEXT_KINDS] kinds that usually follow each kind."""
        stays = generator.random((len(cluster_K), NEXT_KINDS)) < SAME_CLUSTER
        cluster = np.where(stays, cluster_K[:, None], (cluster_K[:, None] + 1) % self.clusters)
        return self._kind_of_item[self.of_cluster(cluster, generator)]

    def of_cluster(self, cluster: IntArray, generator: np.random.Generator) -> IntArray:
        """For each cluster, one of its items by popularity."""
        return self._draw(self._cluster_bounds[cluster], self._cluster_bounds[cluster + 1], generator)

    def any_item(self, count: int, generator: np.random.Generator) -> IntArray:
        """``count`` items by popularity."""
        first = np.zeros(count, np.int64)
        return self._draw(first, first + len(self._item_at), generator)

    def after(self, item: IntArray, generator: np.random.Generator) -> IntArray:
        """For each item, one of a kind that usually follows it."""
        weight = NEXT_KIND_DECAY ** np.arange(NEXT_KINDS)
        choice = generator.choice(NEXT_KINDS, len(item), p=weight / weight.sum())
        kind = self._next_kinds[self._kind_of_item[item], choice]
        return self._draw(self._kind_bounds[kind], self._kind_bounds[kind + 1], generator)

    def liked_clusters(self, users: int, generator: np.random.Generator) -> IntArray:
        """[users, 3] clusters, the favourite first; popular clusters are liked by more users."""
        popularity_C = np.diff(self._cumulative[self._cluster_bounds])
        share_C = popularity_C / popularity_C.sum()
        return generator.choice(self.clusters, size=(users, len(THEME_WEIGHTS)), p=share_C)

    def _draw(self, first: IntArray, end: IntArray, generator: np.random.Generator) -> IntArray:
        """For each range of places, one of its items by popularity."""
        point = generator.uniform(self._cumulative[first], self._cumulative[end])
        place = np.searchsorted(self._cumulative, point, side="right") - 1
        return self._item_at[place.clip(first, end - 1)]


def _lengths(settings: SyntheticSettings, generator: np.random.Generator) -> IntArray:
    """Interactions per user, long-tailed; longest first, so that those still going on stand in front."""
    centre = np.log(settings.mean_length) - LENGTH_SPREAD**2 / 2  # the mean of a log-normal
    length_U = generator.lognormal(centre, LENGTH_SPREAD, settings.num_users).astype(np.int64)
    return np.sort(length_U.clip(MIN_LENGTH, MAX_LENGTH_IN_MEANS * settings.mean_length + MIN_LENGTH))[::-1]


def _session_starts(
    settings: SyntheticSettings, length_U: IntArray, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """bool [U, L]: True where an interaction is the first of a session."""
    starts_UL = generator.random((len(length_U), int(length_U[0]))) < 1.0 / settings.mean_session
    starts_UL[:, 0] = True
    return starts_UL


def _items(
    settings: SyntheticSettings,
    catalogue: _Catalogue,
    length_U: IntArray,
    starts_UL: npt.NDArray[np.bool_],
    generator: np.random.Generator,
) -> npt.NDArray[np.int32]:
    """int32 [U, L] item numbers; places after a user's length hold nothing."""
    item_UL: npt.NDArray[np.int32] = np.full(starts_UL.shape, -1, np.int32)
    liked_UC = catalogue.liked_clusters(len(length_U), generator)
    theme_U = np.zeros(len(length_U), np.int64)
    for step in range(item_UL.shape[1]):
        active = int(np.searchsorted(-length_U, -step))  # users of more than `step` interactions
        begins = np.flatnonzero(starts_UL[:active, step])
        theme_U[begins] = liked_UC[begins, generator.choice(len(THEME_WEIGHTS), len(begins), p=THEME_WEIGHTS)]
        users = np.arange(active)
        for _ in range(1 + REDRAWS):
            item = _next_item(settings, catalogue, item_UL[users, :step], theme_U[users], generator)
            repeated = (item_UL[users, :step] == item[:, None]).any(1)
            item_UL[users, step] = item
            users = users[repeated]
    return item_UL


def _next_item(
    settings: SyntheticSettings,
    catalogue: _Catalogue,
    past_UL: npt.NDArray[np.int32],
    theme_U: IntArray,
    generator: np.random.Generator,
) -> IntArray:
    users, step = past_UL.shape
    item_U: IntArray = catalogue.any_item(users, generator)
    shares = np.cumsum([settings.theme_share, settings.successor_share, settings.earlier_share])
    source_U = np.digitize(generator.random(users), shares)
    by_theme = np.flatnonzero(source_U < (1 if step else 3))  # a first item follows from nothing else
    item_U[by_theme] = catalogue.of_cluster(theme_U[by_theme], generator)
    if step:
        by_last, by_earlier = (np.flatnonzero(source_U == source) for source in (1, 2))
        item_U[by_last] = catalogue.after(past_UL[by_last, -1], generator)
        back = generator.integers(2, LOOK_BACK + 1, len(by_earlier)).clip(max=step)
        item_U[by_earlier] = catalogue.after(past_UL[by_earlier, step - back], generator)
    return item_U


def _timestamps(
    settings: SyntheticSettings,
    length_U: IntArray,
    starts_UL: npt.NDArray[np.bool_],
    generator: np.random.Generator,
) -> IntArray:
    """int64 [U, L], strictly increasing for each user."""
    span = settings.days * SECONDS_PER_DAY
    first_U = generator.uniform(0, span / 2, len(length_U))
    active_U = generator.uniform(0, span - first_U)  # from a user's first session to the last
    sessions_UL = starts_UL & (np.arange(starts_UL.shape[1]) < length_U[:, None])
    between_UL = np.where(sessions_UL, generator.exponential(1.0, starts_UL.shape), 0.0)
    between_UL *= (active_U / between_UL.sum(1))[:, None]
    within_UL = generator.lognormal(np.log(SECONDS_WITHIN_SESSION), 1.0, starts_UL.shape)
    gap_UL = 1 + np.where(starts_UL, between_UL, within_UL).astype(np.int64)
    return FIRST_SECOND + first_U.astype(np.int64)[:, None] + np.cumsum(gap_UL, axis=1)


def _names(kind: str, count: int) -> pa.Array:
    digits = max(5, len(str(count)))
    return pa.array([f"{kind}-{number:0{digits}d}" for number in range(1, count + 1)])
