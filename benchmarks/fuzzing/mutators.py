"""Ways to spoil a good input: its bytes, the structure of JSON, the columns of Parquet, and tensors.

Everything follows from the random generator that is given, so that an input can be made again.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import torch

LONG = 100_000
DEEP = 20_000

# JSON that ``json.dumps`` cannot write stands in for one of these until the text is made.
_RAW = {
    "<deep list>": "[" * DEEP + "]" * DEEP,
    "<deep object>": '{"a":' * DEEP + "1" + "}" * DEEP,
    "<huge exponent>": "1e400",
    "<many digits>": "9" * 5000,
}

SECRET = "planted-secret"
URL_WITH_SECRET = f"s3://key:{SECRET}@bucket/x"
HOSTILE_VALUES: list[Any] = [
    URL_WITH_SECRET,
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "-1", "1.5", "NaN", "true", "null",
    "\x00", "\ud800", "\u202e", "a\nb", "ä" * 10, "𝟙", "٣", "x" * LONG, "=cmd()", "{{ 1 }}",
    "<script>", [], {}, [[]], [None], [1, "a"], {"": 0}, {"a": {"b": []}}, *_RAW,
]  # fmt: skip

NUMBERS: list[Callable[[float], float]] = [
    lambda number: number + 1,
    lambda number: number - 1,
    lambda number: -number,
    lambda number: number * 2,
    lambda number: number + 0.5,
    lambda number: 0,
    lambda number: 2**31,
    lambda number: 2**63,
]


def spoiled_bytes(data: bytes, chance: random.Random) -> bytes:
    """The same bytes, damaged in one to three places."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = chance.choice(_BYTE_MUTATORS)(data, chance)
    return data


def _range(data: bytes, chance: random.Random, longest: int = 64) -> tuple[int, int]:
    start = chance.randrange(len(data) + 1)
    return start, min(len(data), start + chance.randint(1, longest))


def _cut_off(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _flip_bit(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return data
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def _replace_block(data: bytes, chance: random.Random) -> bytes:
    start, end = _range(data, chance)
    fill = chance.choice((bytes(end - start), b"\xff" * (end - start), chance.randbytes(end - start)))
    return data[:start] + fill + data[end:]


def _remove_block(data: bytes, chance: random.Random) -> bytes:
    start, end = _range(data, chance)
    return data[:start] + data[end:]


def _repeat_block(data: bytes, chance: random.Random) -> bytes:
    start, end = _range(data, chance)
    return data[:start] + data[start:end] * chance.choice((2, 3, 100)) + data[end:]


def _swap_blocks(data: bytes, chance: random.Random) -> bytes:
    (a, b), (c, d) = sorted((_range(data, chance), _range(data, chance)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


_GARBAGE = (
    b"\n", b"\r", b"\r\n", b"\x00", b",", b"\t", b'"', b" ", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\x1a",
    "\u2028".encode(), "\u0665".encode(), b"-", b"-0", b"1e999", b"9" * 30, b"NaN", b"'", b"{", b"]", b": ",
    b"&a", b"*a", b"2026-13-45", b"PAR1", b"\x1f\x8b", b"x" * 1000,
)  # fmt: skip


def _insert(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.choice(_GARBAGE) + data[place:]


def _garbage_number(data: bytes, chance: random.Random) -> bytes:
    """Four or eight bytes become the largest or the least number, where a length may stand."""
    width = chance.choice((4, 8))
    place = chance.randrange(max(1, len(data) - width))
    number = chance.choice((0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width) - 1, 2 ** (4 * width)))
    return data[:place] + number.to_bytes(width, "little") + data[place + width :]


_BYTE_MUTATORS = (
    _cut_off, _flip_bit, _flip_bit, _replace_block, _remove_block, _repeat_block, _swap_blocks, _insert,
    _garbage_number,
)  # fmt: skip


_FIELDS = (
    "", " ", "0", "-0", "007", "+7", "-1", "1.5", "1e3", "1e999", "NaN", "inf", "9" * 19, "9" * 30, "0x10",
    "1_000", "2026-01-31", "2026-13-45", "2026-01-31 10:00:00", "2026-01-31T10:00:00Z",
    "2026-01-31T10:00+25:00", "null", "1700000000000", "1700000000000000000", "1.7e9", "True",
    '"', '""', '"a', "a\"b", "'", "a b", "a\tb", "a\nb",
    "\ufeff", "ä", "\u0665", "\x00", "\u2028", "=1+1", "../x", "x" * 3000,
)  # fmt: skip


def spoiled_lines(data: bytes, chance: random.Random) -> bytes:
    """A table or histories as text, wrong in a line, a column, the delimiter, line ends or the encoding."""
    lines = data.decode(errors="replace").split("\n")
    delimiter = next((one for one in ("\t", ",", " ") if one in lines[0]), ",")
    place = chance.randrange(len(lines))
    fields = lines[place].split(delimiter)
    field = chance.randrange(len(fields))
    action = chance.choice(
        ("field", "field", "fields", "column", "line", "lines", "delimiter", "ends", "coded")
    )
    if action == "field":
        fields[field] = chance.choice(_FIELDS)
        lines[place] = delimiter.join(fields)
    elif action == "fields":
        lines[place] = delimiter.join(chance.choice((fields[:field], [*fields, "x"], fields[::-1], [])))
    elif action == "column":
        rows = [line.split(delimiter) for line in lines]
        new = chance.choice(_FIELDS)
        rows = [[*row[:field], new, *row[field + 1 :]] if number else row for number, row in enumerate(rows)]
        lines = [delimiter.join(row) for row in rows]
    elif action == "line":
        lines = chance.choice(
            (lines[1:], lines[:1], [lines[place], *lines], [*lines, lines[place]], ["", *lines])
        )
    elif action == "lines":
        chance.shuffle(lines)
    elif action == "delimiter":
        other = chance.choice(";|:\t, ")
        lines = [line.replace(delimiter, other) for line in lines]
    elif action == "ends":
        return chance.choice(("\r", "\r\n", "\n\r", " \n", "\n\n", "\x0b", "\u2028")).join(lines).encode()
    else:
        return "\n".join(lines).encode(chance.choice(("utf-8-sig", "utf-16", "utf-32", "utf-7")), "replace")
    return "\n".join(lines).encode()


def spoiled_json(value: Any, chance: random.Random) -> Any:
    """A copy of nested dictionaries and lists that is wrong in one or two places."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            return chance.choice(HOSTILE_VALUES)
        _spoil_place(*chance.choice(places), chance)
    return value if chance.random() < 0.97 else chance.choice(HOSTILE_VALUES)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place where a value stands: the dictionary or list, and the key or index in it."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _spoil_place(holder: Any, key: Any, chance: random.Random) -> None:
    old = holder[key]
    is_number = isinstance(old, int | float) and not isinstance(old, bool)
    action = chance.choice(("hostile", "hostile", "remove", "add", "near", "near", "wrap"))
    if action == "remove":
        del holder[key]
    elif action == "add" and isinstance(holder, dict):
        holder[chance.choice(("unknown", "", "__class__", "é" * 50, f"{key}_", str(key).upper()))] = old
    elif action == "add":
        holder.insert(chance.randrange(len(holder) + 1), old)
    elif action == "near" and is_number:
        holder[key] = chance.choice(NUMBERS)(old)
    elif action == "near" and isinstance(old, str):
        holder[key] = chance.choice((old.upper(), old + " ", old[:-1], old * 2, old[::-1]))
    elif action == "wrap":
        holder[key] = chance.choice(([old], {"value": old}, str(old), [old, old]))
    else:
        holder[key] = chance.choice(HOSTILE_VALUES)


def json_bytes(value: Any) -> bytes:
    """JSON with what ``json.dumps`` cannot write, too."""
    text = json.dumps(value)
    for stand_in, raw in _RAW.items():
        text = text.replace(json.dumps(stand_in), raw)
    return text.encode()


def spoiled_table(table: pa.Table, chance: random.Random) -> pa.Table:
    """A Parquet table with a column that is missing, of another type, without values, or with wrong ones."""
    name = chance.choice(table.column_names)
    place = table.column_names.index(name)
    column = table[name].combine_chunks()
    action = chance.choice(("drop", "type", "type", "nulls", "values", "values", "rows", "rename", "twice"))
    if action == "drop":
        return table.drop([name])
    if action == "rename":
        return table.rename_columns([f"{one}_" if one == name else one for one in table.column_names])
    if action == "twice":
        return table.append_column(name, column)
    if action == "rows":
        rows = [
            chance.randrange(len(table)) for _ in range(chance.choice((0, 1, len(table), len(table) + 1)))
        ]
        return table.take(rows)
    spoilt = {"type": _other_type, "nulls": _some_nulls, "values": _other_values}[action](column, chance)
    return table.set_column(place, name, spoilt)


def _other_type(column: pa.Array, chance: random.Random) -> pa.Array:
    size = len(column)
    makers: list[Callable[[], pa.Array]] = [
        lambda: pa.array([chance.random() for _ in range(size)]),
        lambda: pa.array([chance.choice((True, False, None)) for _ in range(size)]),
        lambda: pa.array([f"{chance.randrange(9)}" for _ in range(size)]),
        lambda: pa.array([chance.randbytes(3) for _ in range(size)]),
        lambda: pa.array([chance.randrange(2**63) for _ in range(size)], pa.uint64()),
        lambda: pa.array([chance.randrange(2**40) for _ in range(size)], pa.timestamp("ns", "Asia/Tokyo")),
        lambda: pa.array([[chance.randrange(9)] for _ in range(size)]),
        lambda: pa.array([[[1]]] * size),
        lambda: pa.array([{"a": 1}] * size),
        lambda: pa.array([[("a", 1)]] * size, pa.map_(pa.string(), pa.int64())),
        lambda: pa.nulls(size),
        lambda: pa.array(["a"] * size).dictionary_encode(),
        lambda: pa.array([1] * size, pa.decimal128(20, 2)),
        lambda: pa.array([1] * size, pa.duration("s")),
        lambda: pa.array([1] * size, pa.time64("us")),
        lambda: pa.array([1.5] * size, pa.float16()),
    ]
    return chance.choice(makers)()


def _some_nulls(column: pa.Array, chance: random.Random) -> pa.Array:
    values = column.to_pylist()
    for place in chance.sample(range(len(values)), chance.randint(0, len(values))):
        if isinstance(values[place], list) and values[place] and chance.random() < 0.5:
            values[place][chance.randrange(len(values[place]))] = None
        else:
            values[place] = None
    return pa.array(values, column.type)


def _other_values(column: pa.Array, chance: random.Random) -> pa.Array:
    """Values that the type can hold, and the format perhaps not: other signs, sizes, orders and lengths."""

    def other(value: Any) -> Any:
        if isinstance(value, list):
            return chance.choice((value[::-1], [], value * 3, [other(one) for one in value]))
        if isinstance(value, str):
            return chance.choice(("", value * 2, " ", "\x00", "\n", "é" * 300))
        if isinstance(value, float):
            return chance.choice((float("nan"), float("inf"), -value, value + 1))
        return chance.choice((-1, 0, 1, 127, -128, value + 1 if value < 127 else value - 1))

    values = column.to_pylist()
    for place in chance.sample(range(len(values)), chance.randint(0, len(values))):
        values[place] = other(values[place])
    return pa.array(values, column.type)


def spoiled_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """Tensors with one that is missing, of another shape or dtype, or with values that are no numbers."""
    name = chance.choice(sorted(tensors))
    old = tensors[name]
    action = chance.choice(("drop", "rename", "shape", "shape", "dtype", "dtype", "values", "empty", "add"))
    if action == "drop":
        return {key: value for key, value in tensors.items() if key != name}
    if action == "rename":
        return {f"{key}_" if key == name else key: value for key, value in tensors.items()}
    if action == "add":
        return {**tensors, "further": torch.zeros(chance.choice((0, 1, 3)))}
    if action == "shape":
        flat = old.flatten()
        turned = old.mT if old.dim() > 1 else flat
        new = chance.choice((old[None], flat, flat[:-1], torch.cat([flat, flat]), turned)).contiguous()
    elif action == "dtype":
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
        new = old.to(chance.choice(kinds))
    elif action == "empty":
        new = old.flatten()[:0].contiguous()
    else:
        new = old.clone()
        if new.numel():
            fills = (float("nan"), float("inf"), -1.0) if new.is_floating_point() else (0, -1, 2**40)
            new.view(-1)[chance.randrange(new.numel())] = chance.choice(fills)
    return {**tensors, name: new}
