"""The page docs/settings.md: every setting, with what its dataclass says of it.

`python -m recgpt.settings_reference > docs/settings.md` writes the page; a test fails where it is stale.
"""

import ast
import inspect
import itertools
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter

from recgpt.config import TrainSettings
from recgpt.data.prepare_settings import PrepareSettings

HEAD = """# Settings

Every setting with its type, default, allowed values and meaning. The page is written from
[config.py](../recgpt/config.py) and [prepare_settings.py](../recgpt/data/prepare_settings.py) by
`python -m recgpt.settings_reference > docs/settings.md`: change those, not the page.

What is "global" counts over all workers together, what is "per rank" for each worker. None is written `null`.

## recgpt train

In a YAML file (`--config`) or one by one (`--set KEY=VALUE`): see [training](training.md#settings).
"""
PREPARE_HEAD = """
## recgpt prepare

Options of the command line; what is done with them stands in [data formats](data-formats.md#logs).
"""
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """The page, in Markdown."""
    options = [["--" + name.replace("_", "-"), *cells] for name, *cells in settings_of(PrepareSettings())]
    return HEAD + "".join(_train_sections("", TrainSettings())) + PREPARE_HEAD + _table("option", options)


def settings_of(section: Any) -> Iterator[list[str]]:
    """Of each setting that stands in a section itself: name, type, default, allowed values, meaning."""
    schema = TypeAdapter(type(section)).json_schema()["properties"]
    meaning = _meanings(type(section))
    for name, value in _leaves(section):
        kind, allowed = _type_and_range(schema[name])
        yield [name, kind, f"`{_as_yaml(value)}`", allowed, meaning[name]]


def _train_sections(key: str, section: Any) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    if key:
        yield f"\n### {key}\n\n{_one_line(inspect.getdoc(type(section)) or '')}\n"
    prefix = key and key + "."
    yield _table("setting", [[prefix + name, *cells] for name, *cells in settings_of(section)])
    for field in fields(section):
        if is_dataclass(inner := getattr(section, field.name)):
            yield from _train_sections(prefix + field.name, inner)


def _leaves(section: Any) -> Iterator[tuple[str, Any]]:
    values = ((field.name, getattr(section, field.name)) for field in fields(section))
    return ((name, value) for name, value in values if not is_dataclass(value))


def _meanings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, by the field's name."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: _one_line(below.value.value)
        for field, below in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _type_and_range(schema: dict[str, Any]) -> tuple[str, str]:
    """What JSON Schema says of a value: its type, and its choices or bounds."""
    if "anyOf" in schema:
        types, ranges = zip(*map(_type_and_range, schema["anyOf"]), strict=True)
        return " or ".join(dict.fromkeys(types)), ", ".join(filter(None, ranges))
    if schema["type"] == "array":
        kind, allowed = _type_and_range(schema["items"])
        return f"list of {kind}", allowed
    choices = [f"`{choice}`" for choice in schema.get("enum", [])]
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in _BOUNDS.items() if bound in schema]
    return schema["type"], ", ".join(choices + bounds)


def _as_yaml(value: Any) -> str:
    """A value as it is written after `KEY=`."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`").replace("|", r"\|")


def _table(first: str, rows: list[list[str]]) -> str:
    header = f"\n| {first} | type | default | allowed | meaning |\n|---|---|---|---|---|\n"
    return header + "".join(f"| `{name}` | {' | '.join(cells)} |\n" for name, *cells in rows)


if __name__ == "__main__":
    print(reference(), end="")
