"""What the readers of manifests share."""

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from recgpt.errors import UserError

Manifest = TypeVar("Manifest")


def validated(kind: type[Manifest], values: Any, where: str, advice: str) -> Manifest:
    """A manifest from its JSON values; raises ``UserError`` with the first thing that is wrong with them.

    Args:
        where: path or URL of the file that they come from.
        advice: what to do.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{where}: damaged, {key}: {problem['msg']}; {advice}") from None
