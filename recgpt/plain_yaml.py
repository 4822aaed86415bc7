"""YAML of plain values: what settings are written in."""

from typing import Any

import yaml


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them can stand for more than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "write the value itself in place of an alias", mark)
        return super().compose_node(parent, index)


def load(text: str | bytes) -> Any:
    """The values in a text. Raises ``ValueError`` with the reason if it is not YAML."""
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("its lists and mappings lie too deep in each other") from None
    except Exception as error:  # whatever the constructors of numbers and dates make of a wrong one
        raise ValueError(f"it holds a value that is none ({error})") from None
