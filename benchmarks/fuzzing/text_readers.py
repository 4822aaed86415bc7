"""Small files that people write: settings, overrides, DeepSpeed files, lists of ids, titles."""

import io
import json
import math
import random
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.fuzzing import goods
from benchmarks.fuzzing.hostile import bombs, code
from benchmarks.fuzzing.mutators import (
    HOSTILE_VALUES,
    URL_WITH_SECRET,
    json_bytes,
    spoiled_bytes,
    spoiled_json,
)
from benchmarks.fuzzing.readers import Input, Place, Reader, spoiled_folder
from recgpt.config import TrainSettings
from recgpt.retrieval.id_files import read_ids
from recgpt.retrieval.one_user import read_titles
from recgpt.settings_reading import from_dict, known_keys, load_train_settings, to_dict
from recgpt.training.engine import read_deepspeed_config

SETTINGS = {
    "workers": 2,
    "stages": ["pretrain"],
    "model": {"width": 16, "heads": 4, "user": {"kind": "hashed", "buckets": 7}},
    "pretrain": {"max_epochs": 3, "optimizer": {"learning_rate": 0.001}},
    "recall": {"k": 10, "quotas": [8, 2], "keep_seen": True},
    "data": {"split": {"protocol": "time", "valid_from": 100, "test_from": 200}},
}
_YAML = (
    "2026-13-45", "0b_", "0x_", "!!int a", "!!timestamp a", "!!bool x", "!!float x", "1:99:99", "&a [*a]",
    "? [1]", "{[1]: 2}", "!!set {a, b}", "!!binary x", "!!omap [a]", "!!pairs [a]", "<<: 1", "%YAML 3.0",
    "--- a\n--- b", "\t", "@a", "`", "!!python/name:os.system", "!!str 5", "!!null x", "=", "9" * 25, "0o9",
    "1e5", "2026-01-01", "!!seq 5", "!!map 5",
)  # fmt: skip
_BOOLEANS = {"true", "false", "1", "0", "1.0", "0.0", "yes", "no", "on", "off", "t", "f", "y", "n"}


class SettingsFile(Reader):
    """`--config`."""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        (place.folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))

    def spoil(self, chance: random.Random, place: Place) -> Input:
        if chance.random() < 0.5:
            return spoiled_folder(self.good, chance, place)
        text = json_bytes(spoiled_json(SETTINGS, chance))  # YAML as well
        return Input({"run.yaml": text}, "structure of run.yaml")

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        return to_dict(load_train_settings(str(place.folder / "run.yaml")))

    def objection(self, value: dict[str, Any], truth: Any, given: Input) -> str | None:
        written = yaml.safe_load(given.files["run.yaml"])
        return _differing(value, written or {}) or _not_sound(value)


class Overrides(Reader):
    """`--set`."""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        (place.folder / "set.json").write_text(
            json.dumps(["model.width=128", "recall.quotas=[18, 2]", "seed=7"])
        )

    def spoil(self, chance: random.Random, place: Place) -> Input:
        keys = known_keys(TrainSettings)
        overrides = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            key = chance.choice(
                (chance.choice(keys), *keys[:3], "model", "", ".", "model..width", "a" * 9999)
            )
            hostile = chance.choice([one for one in HOSTILE_VALUES if one != URL_WITH_SECRET])
            value = chance.choice((str(hostile), chance.choice(_yaml_values(place))))
            override = f"{key}={value}"
            if chance.random() < 0.3:
                override = spoiled_bytes(override.encode(errors="replace"), chance).decode(errors="replace")
            overrides.append(override)
        return Input({}, f"overrides {overrides}"[:200], more=overrides)

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        overrides = given.more or json.loads((place.folder / "set.json").read_text())
        return to_dict(load_train_settings(None, overrides))

    def objection(self, value: dict[str, Any], truth: Any, given: Input) -> str | None:
        written: dict[str, Any] = {}
        for override in given.more:
            *parents, leaf = override.partition("=")[0].split(".")
            inner = written
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[leaf] = yaml.safe_load(override.partition("=")[2])
        return _differing(value, written) or _not_sound(value)


def _yaml_values(place: Place) -> list[str]:
    hostile = {**code(str(place.marker)), **bombs()}
    return [*(data.decode() for name, data in hostile.items() if "yaml" in name), *_YAML]


def _differing(value: Any, written: Any, key: str = "") -> str | None:
    """The first setting that is another one than the file says."""
    if isinstance(value, dict) and isinstance(written, dict):
        for name, one in written.items():
            if name not in value:
                return f"{key}{name} was passed over"
            if problem := _differing(value[name], one, f"{key}{name}."):
                return problem
        return None
    if isinstance(value, list) and isinstance(written, list):
        problems = [_differing(one, other, key) for one, other in zip(value, written, strict=True)]
        return next(filter(None, problems), None)
    if value == written or str(value) == str(written):
        return None
    if isinstance(value, bool) and str(written).lower() in _BOOLEANS:
        return None
    if isinstance(value, int | float) and isinstance(written, str) and float(written) == value:
        return None
    return f"{key[:-1]} is {value!r}, the file says {written!r}"[:300]


def _not_sound(value: Any) -> str | None:
    if from_dict(TrainSettings, value, "again") is None:
        return "it cannot be read again"
    return _not_finite(value)


def _not_finite(value: Any, key: str = "settings") -> str | None:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    problems = [_not_finite(one, str(name)) for name, one in inner]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} is {value}"
    return next(filter(None, problems), None)


class DeepSpeedFile(Reader):
    """The file that the setting `deepspeed` names."""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        (place.folder / "zero.json").write_text(
            json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}})
        )

    def read(self, place: Place, given: Input) -> Any:
        return read_deepspeed_config(str(place.folder / "zero.json"))

    def objection(self, value: Any, truth: Any, given: Input) -> str | None:
        written = json.loads(given.files["zero.json"])
        return None if repr(value) == repr(written) else "it is not what the file says"


@dataclass
class IdFile(Reader):
    """`--users`, `--exclude-items` and `--only-items`."""

    file: str = ""
    id_type: str = "int64"

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        ids = list(goods.HISTORIES)
        sink = io.BytesIO()
        pq.write_table(pa.table({"user_id": pa.array(ids, pa.int64())}), sink)
        text = "".join(f"{one}\n" for one in ids).encode()
        (place.folder / self.file).write_bytes(sink.getvalue() if "parquet" in self.file else text)

    def read(self, place: Place, given: Input) -> list[Any]:
        id_type = pa.int64() if self.id_type == "int64" else pa.string()
        return read_ids(str(place.folder / self.file), "user_id", id_type, "--users").to_pylist()

    def objection(self, value: list[Any], truth: Any, given: Input) -> str | None:
        data = given.files[self.file]
        if data.startswith(b"PAR1"):
            column = pq.read_table(pa.BufferReader(data))["user_id"]
            plain = pa.types.is_integer(column.type) or pa.types.is_string(column.type)
            plain = plain or (self.id_type == "int64" and pa.types.is_floating(column.type))
            if not (plain or pa.types.is_dictionary(column.type) or pa.types.is_large_string(column.type)):
                return f"ids were made of {column.type}"
            lines = [str(int(one)) if isinstance(one, float) else str(one) for one in column.to_pylist()]
        else:
            lines = [line.strip(" \t\r") for line in data.decode("utf-8-sig").split("\n")]
        expected = [line if self.id_type == "string" else str(int(line)) for line in lines if line]
        return (
            None if list(map(str, value)) == list(dict.fromkeys(expected)) else "the ids are not the file's"
        )


@dataclass
class Titles(Reader):
    """`recgpt show --items`."""

    file: str = ""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        titles = [f"title of {item}" for item in goods.ITEMS]
        if self.file.endswith(".parquet"):
            pq.write_table(pa.table({"item_id": goods.ITEMS, "title": titles}), place.folder / self.file)
        else:
            lines = "".join(f"{item},{title}\n" for item, title in zip(goods.ITEMS, titles, strict=True))
            (place.folder / self.file).write_text(f"item_id,title\n{lines}")

    def read(self, place: Place, given: Input) -> dict[str, str]:
        return read_titles(str(place.folder / self.file), "item_id", "title", pa.array(goods.ITEMS))

    def objection(self, value: dict[str, str], truth: Any, given: Input) -> str | None:
        return None if set(value) <= set(goods.ITEMS) else "titles of other items"


def text_readers() -> list[Reader]:
    return [
        SettingsFile("settings: YAML"),
        Overrides("settings: --set"),
        DeepSpeedFile("settings: DeepSpeed JSON"),
        IdFile("ids: text", file="users.txt"),
        IdFile("ids: text, as strings", file="users.txt", id_type="string"),
        IdFile("ids: Parquet", file="users.parquet"),
        IdFile("ids: Parquet, as strings", file="users.parquet", id_type="string"),
        Titles("titles: CSV", file="items.csv"),
        Titles("titles: Parquet", file="items.parquet"),
    ]
