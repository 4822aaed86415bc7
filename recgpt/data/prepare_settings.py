"""The settings of `recgpt prepare`, and what follows from them for the rows of a log."""

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from recgpt.config import Positive, Rate
from recgpt.data.interactions import Wanted, id_type
from recgpt.data.sources import Source
from recgpt.data.times import Unit, finest, parse_instant
from recgpt.errors import UserError
from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class PrepareSettings:
    """Everything that `recgpt prepare` can be told, but for where it reads and writes."""

    format: str = "auto"
    """Of all files; "auto" recognises each by its content."""
    user_column: str = USER_ID
    """Column of the user ids."""
    item_column: str = ITEM_ID
    """Column of the item ids."""
    time_column: str = TIMESTAMP
    """Column of the times."""
    event_column: str = "event"
    """Column of the types of events; read only if ``events`` are named."""
    events: tuple[str, ...] | None = None
    """Types of events that count; None for all."""
    time_unit: Unit | Literal["auto", "none"] = "auto"
    """Of times that are plain numbers. "auto": by their size. "none": no unit, only an order."""
    since: str | None = None
    """First instant that counts: ISO text, or a number in the log's unit."""
    until: str | None = None
    """First instant that counts no longer."""
    repeats: Literal["keep", "collapse"] = "keep"
    """What becomes of an item that a user takes several times in a row."""
    max_history: Positive | None = None
    """Interactions kept of each user, the newest; None for all."""
    min_user_interactions: Positive = 1
    """Interactions that a user must have to stay."""
    min_item_interactions: Positive = 1
    """Interactions that an item must have to stay."""
    max_bad_fraction: Rate = 0.01
    """Largest share of rows that are broken, and of bytes in unreadable files, to go on with."""


def what_is_wanted(sources: Sequence[Source], settings: PrepareSettings) -> Wanted:
    """Types, unit, events and instants that the rows of these files shall have.

    Raises ``UserError`` for an instant that cannot be understood, or one where there are no times.
    """
    given = settings.since or settings.until
    if given and any(source.time_type == "position" for source in sources):
        raise UserError("--since, --until: the log has no times, only an order; leave them out")
    units = {source.time_unit for source in sources if source.time_unit and source.has_times}
    unit = finest(units) if units else None
    since, until = (
        None if text is None else parse_instant(text, unit, option)
        for text, option in ((settings.since, "--since"), (settings.until, "--until"))
    )
    return Wanted(
        id_type(source.user_type for source in sources),
        id_type(source.item_type for source in sources),
        unit,
        settings.events,
        since,
        until,
    )
