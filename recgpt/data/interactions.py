"""From the rows of a file to interactions: types, broken values, filters; and dividing them by user.

An interaction table has the columns user_id and item_id (int64 or string), and timestamp (int64).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recgpt.data.arrow import combine
from recgpt.data.formats import RawBatch
from recgpt.data.hashing import part_of_hash, stable_hash
from recgpt.data.sources import CANONICAL_INTEGER, ColumnType, Source
from recgpt.data.times import UNITS, Unit
from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID

MISSING_VALUES = "missing_values"
BAD_VALUES = "bad_values"
OTHER_EVENTS = "other_events"
OUTSIDE_TIME_WINDOW = "outside_time_window"

BAD_ROWS_SCHEMA = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("content", pa.string())]
)


class OtherTokens(Exception):
    """Ids of a text file that were taken for integers are not; the message is the column."""


@dataclass(frozen=True)
class Wanted:
    """What the rows of all files become."""

    user_type: pa.DataType
    item_type: pa.DataType
    time_unit: Unit | None
    """None: numbers stand as in the log."""
    events: tuple[str, ...] | None = None
    """Types of events that count; None for all."""
    since: int | None = None
    """First instant that counts, in ``time_unit``."""
    until: int | None = None
    """First instant that counts no longer."""

    @property
    def schema(self) -> pa.Schema:
        return interaction_schema(self.user_type, self.item_type)


@dataclass
class Cleaned:
    """The interactions of a batch, and what became of its other rows."""

    interactions: pa.Table
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    bad_rows: pa.Table = field(default_factory=BAD_ROWS_SCHEMA.empty_table)
    """Those of them that lack a value or hold a broken one, in ``BAD_ROWS_SCHEMA``."""


def interaction_schema(user_type: pa.DataType, item_type: pa.DataType) -> pa.Schema:
    return pa.schema([(USER_ID, user_type), (ITEM_ID, item_type), (TIMESTAMP, pa.int64())])


def id_type(types: Iterable[ColumnType]) -> pa.DataType:
    """The one type of the ids of all files: int64 if they are integers in all of them, else string.

    Text without types counts as integers if every token is one as it would be printed (so that "007" stays
    what it is); where the first lines promise that and a later one breaks it, ``clean`` raises
    ``OtherTokens``.
    """
    return pa.int64() if set(types) <= {"int64", "text_of_integers"} else pa.string()


def clean(batch: RawBatch, source: Source, wanted: Wanted) -> Cleaned:
    """The rows that are complete, of the wanted types, events and times.

    Times are converted to ``wanted.time_unit``; fractions are cut off downward.
    Raises ``OtherTokens``, see ``id_type``.
    """
    dropped = {BAD_VALUES: len(batch.broken)}
    _check_tokens(batch.user, source.user_type, wanted.user_type, USER_ID)
    _check_tokens(batch.item, source.item_type, wanted.item_type, ITEM_ID)
    if wanted.events is not None and batch.event is not None:
        batch, dropped[OTHER_EVENTS] = _of_events(batch, wanted.events)
    columns = {
        USER_ID: (batch.user, _ids(batch.user, wanted.user_type)),
        ITEM_ID: (batch.item, _ids(batch.item, wanted.item_type)),
        TIMESTAMP: (batch.time, _times(batch.time, source, wanted.time_unit)),
    }
    table = pa.table({name: typed for name, (_, typed) in columns.items()}, schema=wanted.schema)
    bad_rows = _broken_rows(batch, source)
    if any(column.null_count for column in table.columns):
        missing, rows = _bad_rows(batch, source, columns)
        dropped[MISSING_VALUES] = missing
        dropped[BAD_VALUES] += len(rows) - missing
        bad_rows = pa.concat_tables([bad_rows, rows])
        table = table.drop_null()
    # What an older dataset holds was chosen when it was prepared.
    if source.format != "dataset" and (wanted.since is not None or wanted.until is not None):
        table, dropped[OUTSIDE_TIME_WINDOW] = _in_window(table, wanted.since, wanted.until)
    return Cleaned(table, dropped, bad_rows)


def divide_by_user(interactions: pa.Table, num_parts: int) -> Sequence[pa.Table]:
    """One table per part; a user is whole in one of them, and parts are in the order of the user's hash."""
    if num_parts == 1:
        return [interactions]
    part = part_of_hash(stable_hash(combine(interactions[USER_ID])), num_parts)
    if num_parts <= 2**16:
        part = part.astype(np.uint16)  # sorted by radix
    ordered = interactions.take(pa.array(np.argsort(part, kind="stable")))
    ends = np.cumsum(np.bincount(part, minlength=num_parts)).tolist()
    return [ordered.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def are_integers(tokens: pa.Array) -> bool:
    """True if every token (nulls aside) is an int64 in its usual form."""
    if pc.all(pc.match_substring_regex(tokens, CANONICAL_INTEGER)).as_py() is False:
        return False
    try:
        tokens.cast(pa.int64())
    except pa.ArrowInvalid:  # 19 digits may be too many
        return False
    return True


def _of_events(batch: RawBatch, events: tuple[str, ...]) -> tuple[RawBatch, int]:
    assert batch.event is not None
    chosen = pc.fill_null(pc.is_in(_text(batch.event), pa.array(events, pa.string())), False)
    kept = RawBatch(
        batch.user.filter(chosen),
        batch.item.filter(chosen),
        batch.time.filter(chosen),
        batch.row[chosen.to_numpy(zero_copy_only=False)],
        broken=batch.broken,
    )
    return kept, len(batch.row) - len(kept.row)


def _in_window(table: pa.Table, since: int | None, until: int | None) -> tuple[pa.Table, int]:
    times = table[TIMESTAMP].to_numpy()
    inside = np.ones(len(times), np.bool_)
    if since is not None:
        inside &= times >= since
    if until is not None:
        inside &= times < until
    return table.filter(pa.array(inside)), int(len(inside) - inside.sum())


def _check_tokens(ids: pa.Array, stored: ColumnType, wanted: pa.DataType, column: str) -> None:
    """Over all rows, those of other events too: what the type is must not depend on which rows come first."""
    if stored == "text_of_integers" and pa.types.is_int64(wanted) and not are_integers(_text(ids)):
        raise OtherTokens(column)


def _ids(ids: pa.Array, wanted: pa.DataType) -> pa.Array:
    if pa.types.is_string(wanted):
        return _text(ids)
    ids = _text(ids) if pa.types.is_binary(ids.type) else ids
    return _cast_or_null(ids, lambda some: some.cast(pa.int64()))


def _text(values: pa.Array) -> pa.Array:
    """As strings, null where bytes are not UTF-8, which no writer of Parquet has to check."""

    def checked(some: pa.Array) -> pa.Array:
        text = some.cast(pa.string())
        text.validate(full=True)
        return text

    return _cast_or_null(values, checked)


def _times(times: pa.Array, source: Source, unit: Unit | None) -> pa.Array:
    """int64 [n] in the given unit, from integers, floats, timestamps, dates, or text that holds one."""
    if pa.types.is_binary(times.type) or pa.types.is_string(times.type):
        times = pc.utf8_trim_whitespace(_text(times))
    factor = UNITS[unit] // UNITS[source.time_unit] if unit and source.time_unit and source.has_times else 1
    assert factor >= 1
    convert = _instants if source.time_type == "instant" else _numbers
    return _cast_or_null(times, lambda some: convert(some, factor))


def _instants(times: pa.Array, factor: int) -> pa.Array:
    if pa.types.is_string(times.type):
        times = pc.replace_substring_regex(times, r"(\.\d{6})\d+", r"\1")
        times = times.cast(pa.timestamp("us", _zone_of(times)))
    if pa.types.is_timestamp(times.type) and times.type.unit == "ns":
        nanoseconds = times.cast(pa.int64())
        filled = pc.fill_null(nanoseconds, 0).to_numpy(zero_copy_only=False)
        microseconds = pa.array(filled // 1000, mask=nanoseconds.is_null().to_numpy(zero_copy_only=False))
    else:
        microseconds = times.cast(pa.timestamp("us")).cast(pa.int64())
    return pc.multiply_checked(microseconds, factor) if factor != 1 else microseconds


def _numbers(times: pa.Array, factor: int) -> pa.Array:
    if pa.types.is_string(times.type):
        hexadecimal = pc.or_(pc.starts_with(times, "0x"), pc.starts_with(times, "0X"))
        times = pc.if_else(hexadecimal, None, times)  # Arrow would read them as numbers
        try:
            times = times.cast(pa.int64())
        except pa.ArrowInvalid:
            times = times.cast(pa.float64())
    if pa.types.is_integer(times.type):
        times = times.cast(pa.int64())
        return pc.multiply_checked(times, factor) if factor != 1 else times
    times = pc.if_else(pc.is_nan(times), None, times.cast(pa.float64()))
    return pc.floor(pc.multiply(times, float(factor))).cast(pa.int64())


def _zone_of(times: pa.Array) -> str | None:
    """UTC if the first instant names a zone (``Z`` or ``+01:00``): Arrow wants all of them to, or none."""
    zoned = pc.match_substring_regex(times.drop_null()[:1], r"(Z|[+-]\d\d(:?\d\d)?)$")
    with_time = pc.match_substring(times.drop_null()[:1], ":")
    return "UTC" if pc.any(pc.and_(zoned, with_time)).as_py() else None


def _cast_or_null(values: pa.Array, cast: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """``cast(values)``, null where a value cannot be cast; found by halving, since such values are few."""
    try:
        return cast(values)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        if len(values) == 1:
            return pa.nulls(1, cast(values[:0]).type)
    middle = len(values) // 2
    halves = [_cast_or_null(values[:middle], cast), _cast_or_null(values[middle:], cast)]
    return pa.concat_arrays(halves)


def _broken_rows(batch: RawBatch, source: Source) -> pa.Table:
    rows, reasons, contents = zip(*batch.broken, strict=True) if batch.broken else ((), (), ())
    return _bad_rows_table(source, rows, reasons, contents)


def _bad_rows(
    batch: RawBatch, source: Source, columns: dict[str, tuple[pa.Array, pa.Array]]
) -> tuple[int, pa.Table]:
    """How many rows lack a value, and the rows that lack one or hold a broken one, with the first reason."""
    invalid = {name: _is_null(typed) for name, (_, typed) in columns.items()}
    bad = np.flatnonzero(np.logical_or.reduce(list(invalid.values())))
    missing = np.logical_or.reduce([_is_null(raw)[bad] for raw, _ in columns.values()])
    raw = {name: _printed(values.take(pa.array(bad))) for name, (values, _) in columns.items()}
    reasons = []
    for place, is_missing in zip(range(len(bad)), missing, strict=True):
        name = next(
            name
            for name, values in raw.items()
            if invalid[name][bad[place]] and (values[place] is None) == is_missing
        )
        reasons.append(
            f"{name} is missing" if is_missing else f"{name} cannot be read as {columns[name][1].type}"
        )
    contents = [
        ", ".join(f"{name}={values[place]}" for name, values in raw.items() if values[place] is not None)
        for place in range(len(bad))
    ]
    return int(missing.sum()), _bad_rows_table(source, batch.row[bad], reasons, contents)


def _is_null(values: pa.Array) -> npt.NDArray[np.bool_]:
    return values.is_null().to_numpy(zero_copy_only=False)


def _printed(values: pa.Array) -> list[str | None]:
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = values.cast(pa.binary())  # which need not be UTF-8
    if pa.types.is_binary(values.type):
        return [None if value is None else value.decode(errors="replace") for value in values.to_pylist()]
    return [_printed_value(value) if value.is_valid else None for value in values]


def _printed_value(value: pa.Scalar) -> str:
    try:
        return str(value.as_py())
    except (OverflowError, ValueError):  # an instant beyond Python's calendar
        return str(value.value)


def _bad_rows_table(
    source: Source,
    rows: Sequence[int] | npt.NDArray[np.int64],
    reasons: Sequence[str],
    contents: Sequence[str],
) -> pa.Table:
    columns = [[source.url] * len(reasons), rows, reasons, contents]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, BAD_ROWS_SCHEMA.types, strict=True)]
    return pa.table(arrays, schema=BAD_ROWS_SCHEMA)
