"""The commands ``phosphene check`` and ``phosphene new``. Slow imports happen only when they run."""

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

_COLORS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def _names() -> list[str]:
    plugins = methods.plugins.values()
    return [*dict.fromkeys([*(p.short_name for p in plugins), *(p.distribution for p in plugins)])]


def check(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE|DISTRIBUTION",
            help="A method, a .py file with methods, or a distribution with methods; with --mutate also a "
            "module (_name.py) of functions that methods import.",
            autocompletion=_names,
        ),
    ],
    profile: Annotated[
        str, typer.Option(metavar="quick|ci|thorough", help="Number of examples per check.")
    ] = "ci",
    only: Annotated[list[str], typer.Option(metavar="CHECK", help="Run only this check; repeatable.")] = [],  # noqa: B006
    mutate: Annotated[
        bool,
        typer.Option(
            "--mutate",
            help="Instead of the checks, run the oracle on mutants of the method's code and print those that "
            "no test notices; exit code 1 below 90 %.",
        ),
    ] = False,
    mutants: Annotated[int, typer.Option(min=1, help="With --mutate: at most so many mutants.")] = 60,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="With --mutate: processes at once. Default: the CPUs.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also print the checks that are skipped, with the reasons.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Run the conformance checks of a method; exit code 1 if one fails."""
    try:
        from phosphene.testing import bound_checks, check_method
    except ModuleNotFoundError as error:
        if error.name not in ("hypothesis", "pytest"):
            raise
        raise MissingExtra("phosphene check", "testing") from error

    from ._find_methods import resolve_methods

    console = Console() if sys.stdout.isatty() else Console(width=200)
    if mutate:
        _print_mutation_scores(console, what, mutants, jobs, as_json)
        return
    with resolve_methods(what) as selected:
        checks = [[bound.check.name for bound in bound_checks(method, profile)] for method in selected]
        available = dict.fromkeys(name for names in checks for name in names)
        for name in only:
            if name not in available:
                raise UnknownName("check", name, available, what)
        reports: list[Report] = []
        clock = time.perf_counter()
        for method, names in zip(selected, checks, strict=True):
            chosen = [name for name in names if name in only]
            if only and not chosen:
                continue
            # A check named by --only is printed in any case.
            table = _CheckTable(console, names, hides_skipped=not verbose and not only)
            if not as_json:
                table.print_header(method, profile)
            report = (lambda outcome: None) if as_json else table.print_row
            reports.append(check_method(method, profile=profile, only=chosen, on_outcome=report))
            if not as_json:
                table.print_hidden()
    if as_json:
        print(
            json.dumps([report.model_dump(mode="json") for report in reports], indent=2, ensure_ascii=False)
        )
    else:
        _print_summary(console, reports, time.perf_counter() - clock)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


#: The least mutation score that passes.
LEAST_SCORE = 0.9


def _print_mutation_scores(
    console: Console, what: str, mutants: int, jobs: int | None, as_json: bool
) -> None:
    """Print the mutation score of each method and the mutants that survive; exit code 1 below 90 %."""
    from phosphene.testing import mutation_score

    from ._find_methods import resolve_methods

    reports = []

    def test_mutants(target: Any) -> None:
        reports.append(mutation_score(target, mutants=mutants, jobs=jobs))
        if not as_json:
            console.print(Text(str(reports[-1])), soft_wrap=True)

    file = Path(what)
    if file.suffix == ".py" and file.stem.startswith("_") and file.stem != "__init__":
        test_mutants(file)
    else:
        with resolve_methods(what) as selected:
            for method in selected:
                test_mutants(method)
    if as_json:
        print(json.dumps([report.model_dump(mode="json") for report in reports], indent=2))
    if any(report.score < LEAST_SCORE for report in reports):
        raise typer.Exit(1)


class _CheckTable:
    """The table of one method's checks, printed row by row as they finish.

    ``hides_skipped``: without checks that are skipped, except those from which the author exempts the method.
    """

    def __init__(self, console: Console, names: Sequence[str], *, hides_skipped: bool) -> None:
        self.console = console
        self.hides_skipped = hides_skipped
        self.hidden = 0
        self.check = min(console.width // 3, max(map(len, names)))
        self.promise = max(20, min(105, console.width - self.check - 34))

    def print_header(self, method: Method[Any, Any], profile: str) -> None:
        header = Text.assemble(
            (method.spec.name, "bold cyan"), f"   {method.distribution}   profile {profile}"
        )
        self.console.print(header)
        self._write(
            *(Text(word, "bold") for word in ("verdict", "check", "promise", "cases", "refused", "s"))
        )

    def print_row(self, outcome: Outcome) -> None:
        is_exempt = outcome.reason.startswith("exempt: ")
        if self.hides_skipped and outcome.verdict == "skipped" and not is_exempt:
            self.hidden += 1
            return
        promise = Text(outcome.promise, no_wrap=True, overflow="ellipsis")
        if outcome.verdict == "skipped":
            promise = Text(f"not tested: {outcome.reason}", "dim")
        counts = (outcome.cases or "", outcome.refused or "", f"{outcome.seconds:.1f}")
        verdict = Text(outcome.verdict, _COLORS[outcome.verdict])
        self._write(verdict, Text(outcome.check), promise, *(Text(str(count)) for count in counts))

    def print_hidden(self) -> None:
        if self.hidden:
            word = "checks do" if self.hidden > 1 else "check does"
            text = (
                f"{self.hidden} {word} not apply to this method or cannot decide: --verbose lists the reasons"
            )
            self.console.print(Text(text, "dim"))

    def _write(self, *cells: Text) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=7)
        table.add_column(width=self.check, overflow="fold")
        table.add_column(width=self.promise)
        for width in (5, 7, 5):
            table.add_column(width=width, justify="right")
        table.add_row(*cells)
        self.console.print(table)


def _print_summary(console: Console, reports: Sequence[Report], seconds: float) -> None:
    """Print every failure in full, then the counts in one line."""
    for report in reports:
        for failure in report.failures:
            console.print("", Text(f"{report.method} ({report.distribution})", "bold cyan"), sep="\n")
            console.print(Text(str(failure)), soft_wrap=True)
        for warning in report.warnings:
            console.print()
            console.print(Text(f"WARNING {report.method}: {warning}", "bold yellow"), soft_wrap=True)
    verdicts = [outcome.verdict for report in reports for outcome in report.outcomes]
    counts = [
        Text(f"{verdicts.count(word)} {word}", color) for word, color in _COLORS.items() if word in verdicts
    ]
    name = f"{len(reports)} methods" if len(reports) != 1 else reports[0].method
    console.print("", Text.assemble(f"{name}: ", Text(", ").join(counts), f" in {seconds:.1f} s"), sep="\n")


def new(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="Name of the method, such as gradient_entropy.")
    ],
    family: Annotated[str, typer.Option(metavar="NAME", help="Family of the method.")] = "attribution",
    template: Annotated[
        str | None,
        typer.Option(
            metavar="attribution|attacks|objective_attack|dataset|training",
            help="What the method starts from; default: by the family.",
        ),
    ] = None,
    licence: Annotated[
        str, typer.Option("--license", metavar="apache-2.0|mit|bsd-3-clause", help="License of the plugin.")
    ] = "apache-2.0",
    author: Annotated[str, typer.Option(metavar="NAME", help="Author of the plugin.")] = "",
    into: Annotated[Path, typer.Option(metavar="FOLDER", help="Parent of the plugin's folder.")] = Path("."),
) -> None:
    """Create a plugin: a folder with a working method, its tests and the files to publish it."""
    from ._project_template import write_project

    folder = write_project(
        method, family=family, template=template, licence=licence, author=author, into=into
    )
    source = Path("src", folder.name.replace("-", "_"), "__init__.py")
    print(
        f"{folder} contains a working method. Next:",
        f"  cd {shlex.quote(str(folder))}",
        f"  # write your method between the marks in {source}",
        "  # and change what it declares: oracle, promises, parameters, docstring, references",
        "  pip install -e '.[test]'",
        "  pytest",
        f"  phosphene run {method}",
        sep="\n",
    )


@hookimpl
def phosphene_commands(app):
    app.command()(new)
    app.command()(check)
