"""``phosphene check`` and ``phosphene new``. What is heavy is imported when they run, not before."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phosphene import MissingExtra, UnknownName, hookimpl, methods

if TYPE_CHECKING:
    from phosphene import Method
    from phosphene.testing import Outcome, Report

_COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def _names() -> list[str]:
    plugins = methods.plugins.values()
    return [*dict.fromkeys([*(p.short_name for p in plugins), *(p.distribution for p in plugins)])]


def check(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE|DISTRIBUTION",
            help="A method, a .py file with methods, or a distribution: all its methods.",
            autocompletion=_names,
        ),
    ],
    profile: Annotated[str, typer.Option(metavar="quick|ci|thorough", help="How thorough to be.")] = "ci",
    only: Annotated[list[str], typer.Option(metavar="CHECK", help="This check; repeatable.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="The reports as JSON.")] = False,
) -> None:
    """Put every promise of a method to the test; exit code 1 where one is broken."""
    try:
        from phosphene.testing import bound_checks, check_method
    except ModuleNotFoundError as error:
        if error.name not in ("hypothesis", "pytest"):
            raise
        raise MissingExtra("phosphene check", "testing") from error

    from ._find_methods import methods_of

    console = Console() if sys.stdout.isatty() else Console(width=200)
    with methods_of(what) as found:
        owed = [[bound.check.name for bound in bound_checks(method, profile)] for method in found]
        known = dict.fromkeys(name for names in owed for name in names)
        for name in only:
            if name not in known:
                raise UnknownName("check", name, known, what)
        reports: list[Report] = []
        clock = time.perf_counter()
        for method, names in zip(found, owed, strict=True):
            asked = [name for name in names if name in only]
            if only and not asked:
                continue
            sheet = _Sheet(console, names)
            if not as_json:
                sheet.head(method, profile)
            tell = (lambda outcome: None) if as_json else sheet.row
            reports.append(check_method(method, profile=profile, only=asked, on_outcome=tell))
    if as_json:
        print(
            json.dumps([report.model_dump(mode="json") for report in reports], indent=2, ensure_ascii=False)
        )
    else:
        _conclude(console, reports, time.perf_counter() - clock)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


class _Sheet:
    """The table of one method's checks, written row by row as they come."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.check = min(console.width // 3, max(map(len, names)))
        self.promise = max(20, min(105, console.width - self.check - 34))

    def head(self, method: Method[Any, Any], profile: str) -> None:
        about = Text.assemble(
            (method.spec.name, "bold cyan"), f"   {method.distribution}   profile {profile}"
        )
        self.console.print(about)
        self._write(
            *(Text(word, "bold") for word in ("verdict", "check", "promise", "cases", "refused", "s"))
        )

    def row(self, outcome: Outcome) -> None:
        promise = Text(outcome.promise, no_wrap=True, overflow="ellipsis")
        if outcome.verdict == "skipped":
            promise = Text(f"not tested: {outcome.reason}", "dim")
        counts = (outcome.cases or "", outcome.refused or "", f"{outcome.seconds:.1f}")
        verdict = Text(outcome.verdict, _COLOURS[outcome.verdict])
        self._write(verdict, Text(outcome.check), promise, *(Text(str(count)) for count in counts))

    def _write(self, *cells: Text) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=7)
        table.add_column(width=self.check, overflow="fold")
        table.add_column(width=self.promise)
        for width in (5, 7, 5):
            table.add_column(width=width, justify="right")
        table.add_row(*cells)
        self.console.print(table)


def _conclude(console: Console, reports: Sequence[Report], seconds: float) -> None:
    """Every failure in full, then the counts in one line."""
    for report in reports:
        for failure in report.failures:
            console.print("", Text(f"{report.method} ({report.distribution})", "bold cyan"), sep="\n")
            console.print(Text(str(failure)), soft_wrap=True)
    verdicts = [outcome.verdict for report in reports for outcome in report.outcomes]
    counts = [
        Text(f"{verdicts.count(word)} {word}", colour)
        for word, colour in _COLOURS.items()
        if word in verdicts
    ]
    many = f"{len(reports)} methods" if len(reports) != 1 else reports[0].method
    console.print("", Text.assemble(f"{many}: ", Text(", ").join(counts), f" in {seconds:.1f} s"), sep="\n")


def new(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Its name, such as gradient_entropy.")],
    family: Annotated[str, typer.Option(metavar="NAME", help="What it belongs to.")] = "attribution",
    licence: Annotated[
        str, typer.Option("--license", metavar="apache-2.0|mit|bsd-3-clause", help="The plugin's.")
    ] = "apache-2.0",
    author: Annotated[str, typer.Option(metavar="NAME", help="Who writes it.")] = "",
    into: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the plugin's folder goes.")] = Path("."),
) -> None:
    """Begin a plugin: a folder with one method that runs, its tests, and all it takes to publish it."""
    from ._project_template import write_project

    folder = write_project(method, family=family, licence=licence, author=author, into=into)
    source = Path("src", folder.name.replace("-", "_"), "__init__.py")
    print(
        f"{folder} holds a method that runs as it stands. Next:",
        f"  cd {shlex.quote(str(folder))}",
        f"  # write your method between the two marks in {source}",
        "  pip install -e '.[test]'",
        "  pytest",
        f"  phosphene run {method}",
        sep="\n",
    )


@hookimpl
def phosphene_commands(app):
    app.command()(new)
    app.command()(check)
