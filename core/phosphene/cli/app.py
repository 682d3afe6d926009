"""The typer application and its shared output helpers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..progress import ProgressEvent


from ..registry.lookup import methods

app = typer.Typer(name="phosphene", no_args_is_help=True, pretty_exceptions_enable=False)


def show_table(*headings: str, rows: Sequence[Sequence[str | Text]]) -> None:
    """Print a table; into a pipe or a file, without breaking lines."""
    table = Table(*headings, box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table, "")


def print_event(event: ProgressEvent) -> None:
    """Print a progress event on standard error as a line of JSON."""
    print(event.as_json(), file=sys.stderr, flush=True)


def method_names() -> list[str]:
    """Every method's shortest name, family by family."""
    return [name for plugins in methods.by_family().values() for name in plugins]
