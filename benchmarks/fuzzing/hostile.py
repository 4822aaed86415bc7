"""Whole files made to harm: they would run code, or unfold to very much, if a reader let them.

Whoever loads one of the first kind makes the folder ``marker``.
"""

import gzip
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

MIB = 2**20


class _MakesFolder:
    """Unpickling one makes a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def code(marker: str) -> dict[str, bytes]:
    """Files that would run code, by what they look like."""
    payload = pickle.dumps(_MakesFolder(marker), protocol=2)
    return {
        "pickle": payload,
        "pickle in text": pickle.dumps(_MakesFolder(marker), protocol=0),
        "torch": _zip({"archive/data.pkl": payload, "archive/version": b"3\n"}),
        "numpy": _numpy_file(payload),
        "safetensors with a pickle": len(payload).to_bytes(8, "little") + payload,
        "safetensors with a pickle inside": _safetensors_around(payload),
        "yaml tag": f"!!python/object/apply:os.mkdir [{json.dumps(marker)}]\n".encode(),
        "yaml tag in a value": f"model: {{width: !!python/object/apply:os.mkdir [{marker}]}}\n".encode(),
        "parquet with a pickled type": _parquet_with_pickled_type(payload),
    }


def _zip(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return sink.getvalue()


def _numpy_file(payload: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


def _safetensors_around(payload: bytes) -> bytes:
    header = {
        "__metadata__": {"format": "pickle", "__reduce__": "os.mkdir"},
        "rows": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def _parquet_with_pickled_type(payload: bytes) -> bytes:
    """A type that pyarrow before 14.0.1 unpickled when a file was opened (CVE-2023-47248)."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload,
    }
    field = pa.field("user_id", pa.binary(), metadata=metadata)
    columns = [pa.array([b"a"]), pa.array(["b"]), pa.array([1_700_000_000])]
    schema = pa.schema([field, ("item_id", pa.string()), ("timestamp", pa.int64())])
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink)
    return sink.getvalue()


@lru_cache
def bombs() -> dict[str, bytes]:
    """Small files that unfold to very much."""
    row = b"u1,i1,1700000000\n"
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
    )
    merged = "a0: &a0 {x: 1}\n" + "".join(
        f"a{number}: &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 9)}]}}\n" for number in range(1, 12)
    )
    return {
        "gzip of one line": _gzip(b"x", 256 * MIB),
        "gzip of items of one user": _gzip(b"u1" + b" i1" * 10, 256 * MIB),
        "gzip of line ends": _gzip(b"\n", 256 * MIB),
        "gzip of a table": _gzip(row, 256 * MIB, b"user_id,item_id,timestamp\n"),
        "gzip of broken rows": _gzip(b"a\n", 64 * MIB, b"user_id,item_id,timestamp\n"),
        "gzip of a long field": _gzip(b"x", 128 * MIB, b'user_id,item_id,timestamp\n"'),
        "gzip in gzip": gzip.compress(_gzip(row, MIB)),
        "parquet of one long string": _parquet_bomb(),
        "yaml laughs": (laughs + "model: {width: *a11}\n").encode(),
        "yaml laughs for a known key": (laughs + "workers: *a11\n").encode(),
        "yaml merges": merged.encode(),
        "deep yaml": b"[" * 5000,
        "deep yaml mapping": b"{a: " * 5000,
        "deep json": b"[" * 100_000 + b"]" * 100_000,
        "deep json object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "json of many digits": b'{"schema_version": ' + b"9" * 100_000 + b"}",
        "safetensors with a huge header": (2**62).to_bytes(8, "little") + b"{}",
    }


def _gzip(piece: bytes, size: int, before: bytes = b"") -> bytes:
    """The gzip file of ``before`` and ``piece`` again and again, made without holding all of it."""
    sink = io.BytesIO()
    block = piece * (MIB // len(piece))
    with gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=1, mtime=0) as file:
        file.write(before)
        for _ in range(size // len(block)):
            file.write(block)
    return sink.getvalue()


def _parquet_bomb() -> bytes:
    """A megabyte of text that stands in a hundred thousand rows: stored once, in the dictionary."""
    rows = 100_000
    long = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * MIB]))
    table = pa.table({"user_id": long, "item_id": ["i"] * rows, "timestamp": [1_700_000_000] * rows})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def any_file(marker: str, chance: random.Random) -> tuple[str, bytes]:
    """One of the files above, or one with nothing that any reader knows; and what it is."""
    plain = {"empty": b"", "zeros": bytes(4096), "random": chance.randbytes(2000), "a line end": b"\n"}
    kinds = chance.choice((code(marker), code(marker), plain, bombs()))
    name = chance.choice(sorted(kinds))
    return name, kinds[name]
