"""A reader under test: its good input, ways to spoil that, and what a right answer to it is."""

import io
import json
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch

from benchmarks.fuzzing.hostile import any_file
from benchmarks.fuzzing.mutators import (
    SECRET,
    URL_WITH_SECRET,
    json_bytes,
    spoiled_bytes,
    spoiled_json,
    spoiled_lines,
    spoiled_table,
    spoiled_tensors,
)
from recgpt.data.dataset import parquet_footer
from recgpt.storage import checksum_of

Files = dict[str, bytes]

LONGEST_MESSAGE = 2500


@dataclass(frozen=True)
class Place:
    """Where an input lies. ``outside`` holds the same files as a good input; nothing may be read there."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "input"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def marker(self) -> Path:
        """Made by code that came with data, if any ran."""
        return self.root / "marker"


@dataclass
class Input:
    """Files for a reader."""

    files: Files
    how: str
    """How they were made, in words."""
    must_be_refused: bool = False
    """Whether it would be wrong to read the good value: a name leads to it, outside of the folder."""
    sealed: bool = False
    """Whether a checksum was made to fit what was changed."""
    more: Any = None
    """What the reader gets besides files."""


@dataclass
class Reader(ABC):
    """One reader of files; subclasses say what it reads and how.

    ``read`` returns plain values (numbers, strings, lists, dictionaries), so that they can be compared.
    """

    name: str
    good: Files = field(default_factory=dict)

    @abstractmethod
    def make_good(self, place: Place) -> None:
        """Write the good input into ``place.folder``."""

    @abstractmethod
    def read(self, place: Place, given: Input) -> Any:
        """What the program makes of an input. Raises ``UserError`` if it refuses it."""

    def spoil(self, chance: random.Random, place: Place) -> Input:
        """A bad input."""
        return spoiled_folder(self.good, chance, place)

    def objection(self, value: Any, truth: Any, given: Input) -> str | None:
        """Why a value that is not that of the good input is wrong, or None if the format allows it."""
        return "another value was taken for right"

    def is_quarantined(self, value: Any) -> bool:
        """Whether the value says that something bad was left out."""
        return False


def files_of(folder: Path) -> Files:
    """The contents of all files below a folder, by their paths in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def spoiled_folder(good: Files, chance: random.Random, place: Place) -> Input:
    """One file of a folder damaged, made anew with a wrong structure, replaced, removed or named wrongly."""
    actions = [_damage, _damage, _damage, _restructure, _restructure, _replace, _misplace]
    if any(_names_in(data) for name, data in good.items() if name.endswith(".json")):
        actions.append(_lead_elsewhere)
    return chance.choice(actions)(dict(good), chance, place)


def _damage(files: Files, chance: random.Random, place: Place) -> Input:
    name = chance.choice(sorted(files))
    files[name] = spoiled_bytes(files[name], chance)
    return Input(files, f"bytes of {name}")


def _restructure(files: Files, chance: random.Random, place: Place) -> Input:
    name = chance.choice(sorted(files))
    files[name] = restructured(name, files[name], chance)
    sealed = chance.random() < 0.7 and seal(files, name)
    return Input(files, f"structure of {name}{', checksum made to fit' * sealed}", sealed=sealed)


def restructured(name: str, data: bytes, chance: random.Random) -> bytes:
    """A file that can be read, but does not hold what it should."""
    if name.endswith(".json"):
        return json_bytes(spoiled_json(json.loads(data), chance))
    if name.endswith(".parquet"):
        sink = io.BytesIO()
        try:
            pq.write_table(
                spoiled_table(pq.read_table(pa.BufferReader(data)), chance), sink, row_group_size=5
            )
        except (pa.ArrowException, OverflowError):  # what Parquet cannot store
            return data
        return sink.getvalue()
    if name.endswith(".safetensors"):
        return safetensors.torch.save(spoiled_tensors(safetensors.torch.load(data), chance))
    if name.endswith((".csv", ".txt", ".inter")):
        return spoiled_lines(data, chance)
    return spoiled_bytes(data, chance)


def seal(files: Files, name: str) -> bool:
    """Write the checksum of a file into the JSON that names it, as who made it on purpose would.

    Returns whether there is such JSON.
    """
    checksum, sealed = checksum_of(files[name]), False
    for description in [one for one in files if one.endswith(".json") and one != name]:
        value = json.loads(files[description])
        beside = Path(description).parent
        for entry in _entries(value):
            named = str(entry.get("path") or entry.get("file"))
            if "sha256" in entry and Path(name) in (beside / named, beside.parent / named):
                entry["sha256"], sealed = checksum, True
                if "footer_sha256" in entry:
                    entry["footer_sha256"] = checksum_of(parquet_footer(io.BytesIO(files[name])))
            if "vocabulary_sha256" in entry and name == "vocabulary.parquet":
                entry["vocabulary_sha256"], sealed = checksum, True
            if isinstance(entry.get("sha256"), dict) and name in entry["sha256"]:
                entry["sha256"][name], sealed = checksum, True
        files[description] = json.dumps(value).encode()
    return sealed


def _replace(files: Files, chance: random.Random, place: Place) -> Input:
    name = chance.choice(sorted(files))
    what, files[name] = any_file(str(place.marker), chance)
    sealed = chance.random() < 0.5 and seal(files, name)
    return Input(files, f"{what} in place of {name}", sealed=sealed)


def _misplace(files: Files, chance: random.Random, place: Place) -> Input:
    name, other = chance.choice(sorted(files)), chance.choice(sorted(files))
    action = chance.choice(("removed", "emptied", "swapped", "doubled"))
    if action == "removed":
        del files[name]
    elif action == "emptied":
        files[name] = b""
    elif action == "swapped":
        files[name], files[other] = files[other], files[name]
    else:
        files[name] = files[name] * 2
    return Input(files, f"{name} {action}")


def _lead_elsewhere(files: Files, chance: random.Random, place: Place) -> Input:
    """A name in JSON that leads to the good file outside of the folder, or to another machine."""
    description = chance.choice([name for name in sorted(files) if _names_in(files[name])])
    value = json.loads(files[description])
    entry, key = chance.choice([pair for pair in _named(value) if "." in pair[0][pair[1]]])
    old = entry[key]
    up = "../" * (old.count("/") + 1 + description.count("/"))
    entry[key] = chance.choice(
        [
            f"../outside/{old}", f"{place.outside}/{old}", f"file://{place.outside}/{old}",
            f"{up}outside/{old}", f"histories/../../outside/{old}", f"..\\outside\\{old}",
            f"s3://bucket/{old}", f"./../outside/{old}", f"https://127.0.0.1:9/{old}",
            "../../../../../../../../etc/passwd", "/etc/passwd", f"{old}\x00", "..", URL_WITH_SECRET,
            f"simplecache::file://{place.outside}/{old}", f"zip://{old}::{place.outside}/x", ".", "", "~/x",
        ]
    )  # fmt: skip
    files[description] = json.dumps(value).encode()
    return Input(files, f"name in {description}: {entry[key]!r}", must_be_refused=True)


def _entries(value: Any) -> list[dict[str, Any]]:
    """All dictionaries in a nested value."""
    if isinstance(value, dict):
        return [value, *(entry for one in value.values() for entry in _entries(one))]
    return [entry for one in value for entry in _entries(one)] if isinstance(value, list) else []


def _named(value: Any) -> list[tuple[dict[str, Any], str]]:
    """The places in JSON that name files of the folder."""
    return [
        (entry, key)
        for entry in _entries(value)
        if "rows" in entry or "bytes" in entry
        for key in ("path", "file")
        if isinstance(entry.get(key), str) and "format" not in entry
    ]


def _names_in(data: bytes) -> bool:
    try:
        return bool(_named(json.loads(data)))
    except ValueError:
        return False


def problem_of_message(message: str) -> str | None:
    """What is wrong with an error's line, if anything."""
    if not message.strip() or len(message) > LONGEST_MESSAGE:
        return f"the message has {len(message)} characters"
    if any(not character.isprintable() for character in message):
        return f"the message is not one printable line: {message[:200]!r}"
    return f"the message shows a secret: {message}" if SECRET in message else None
