"""Tables on stdout, as wide as the terminal or, where there is none, wide enough to be read from a file."""

from rich.console import Console
from rich.table import Table

WIDTH_WHERE_NO_TERMINAL = 130


def console() -> Console:
    """A console on stdout; a pipe or a file has no width to respect: no number is cut off there."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, WIDTH_WHERE_NO_TERMINAL))


def print_tables(*tables: Table) -> None:
    """Print them one after the other."""
    for table in tables:
        console().print(table)
