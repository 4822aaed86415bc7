"""Settings read from dictionaries, YAML files and `--set`, and written again; unknown keys are errors."""

import difflib
import reprlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from recgpt import plain_yaml, storage
from recgpt.config import TrainSettings
from recgpt.errors import UserError

Settings = TypeVar("Settings")

_LARGEST_SETTINGS_FILE = 1 << 20  # bytes
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as nested plain dictionaries, fit for JSON and YAML."""
    return TypeAdapter(type(settings)).dump_python(settings, mode="json")


def from_dict(kind: type[Settings], values: Any, where: str) -> Settings:
    """Build settings from nested dictionaries; ``where`` names their origin in the error.

    Raises ``UserError`` for an unknown key (naming the nearest known one) or a wrong value.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(kind, error)}") from None


def load_train_settings(path: str | None, overrides: Sequence[str] = ()) -> TrainSettings:
    """Settings from a YAML file (path, URL, or the name of a shipped one) and ``KEY=VALUE`` overrides.

    Raises ``UserError`` for a missing file, an unknown key or a wrong value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(shipped_file("configs", path, ".yaml"))
    for override in overrides:
        _apply_override(values, override)
    where = " and ".join(filter(None, [path, "--set" if overrides else None])) or "settings"
    # Over all defaults: who names one setting of a stage leaves the others as they are.
    return from_dict(TrainSettings, _merged(to_dict(TrainSettings()), values), where)


def shipped_file(folder: str, name: str, suffix: str) -> str:
    """The path of ``name``: itself if it is a file, else the shipped file of that name.

    Raises ``UserError`` if neither is there.
    """
    if storage.is_file(name):
        return name
    package = Path(__file__).parent
    for root in (package, package.parent):  # inside an installed package, beside it in a checkout
        candidate = root / folder / (name.removesuffix(suffix) + suffix)
        if candidate.is_file():
            return str(candidate)
    known = sorted(
        file.stem for root in (package, package.parent) for file in (root / folder).glob("*" + suffix)
    )
    problem = "is a folder" if storage.exists(name) else "no such file"
    raise UserError(f"{name}: {problem}, and no shipped file has that name; shipped are {', '.join(known)}")


def read_yaml(path: str) -> dict[str, Any]:
    """The keys and values of a YAML file; raises ``UserError`` if it is no such file."""
    if storage.size(path) > _LARGEST_SETTINGS_FILE:
        raise UserError(f"{path}: is too large for a file of settings; give the YAML file")
    try:
        values = plain_yaml.load(storage.read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected settings as KEY: VALUE, found a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for example model.width=128")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {parent} holds a value, not further settings")
    try:
        values[leaf] = plain_yaml.load(text)
    except ValueError as error:
        raise UserError(f"--set {override}: {text!r} is not a valid YAML value ({error})") from None


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``values``, key by key at every depth."""
    result = {**values, **over}
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            result[key] = _merged(values[key], value)
    return result


def _first_problem(kind: Any, error: ValidationError) -> str:
    problem = error.errors()[0]
    location = [part for part in problem["loc"] if isinstance(part, str)]
    key = ".".join(location) or "settings"
    if problem["type"] == "unexpected_keyword_argument":
        nearest = difflib.get_close_matches(key, known_keys(kind), n=1, cutoff=0.0)
        return f"unknown setting {key}; the nearest known one is {nearest[0]}"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return message
    given = "" if isinstance(problem["input"], dict) else f" (got {_SHORT.repr(problem['input'])})"
    return f"{key}: {message}{given}"


def known_keys(kind: Any, prefix: str = "") -> list[str]:
    """All dotted keys that settings of this kind know."""
    keys = []
    for field in fields(kind):
        key = prefix + field.name
        nested = is_dataclass(field.type)
        keys += known_keys(field.type, key + ".") if nested else [key]
    return keys
