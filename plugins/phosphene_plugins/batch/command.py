"""``phosphene batch``: the command that carries out a plan. Torch is imported when it runs, not before."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phosphene import hookimpl

if TYPE_CHECKING:
    from phosphene import ProgressEvent

    from ._execute_plan import Outcome

_COLOURS = {"made": "green", "kept": "dim", "failed": "red"}


def batch(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in YAML: models, images and methods.")],
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="For results and report (default: as the plan has it)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would run, at what cost.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON, and nothing else.")] = False,
    events: Annotated[
        bool, typer.Option("--events", help="Progress as JSON lines on standard error, instead of bars.")
    ] = False,
) -> None:
    """Run every method of a plan on every model and picture, and make one report.

    What is done already is kept, so that an interrupted or extended plan goes on where it was.
    """
    from tqdm.auto import tqdm

    from phosphene import progress_bar, report_progress

    from ._execute_plan import open_batch
    from ._plan import read_plan
    from ._report import Report

    console = Console(stderr=as_json, soft_wrap=True)
    asked = read_plan(plan)
    work = open_batch(asked, Path(out or asked.out or f"phosphene-out/{plan.stem}"))
    report, runs = Report(work), len(work.combinations)
    # Whatever a method prints, standard output holds one answer.
    with (
        report_progress(_tell if events else None),
        redirect_stdout(sys.stderr) if as_json else nullcontext(),
    ):
        try:
            for outcome in progress_bar(work.outcomes(dry=dry_run), plan.name, runs, note=report.standing):
                report.add(outcome)
                if not dry_run:
                    with tqdm.external_write_mode():  # a bar that is being drawn makes room
                        console.print(_line(outcome, f"{report.counts.total()}/{runs}"))
        except KeyboardInterrupt:
            done = f"{report.counts.total()} of {runs} runs are done and stay"
            print(f"\nstopped: {done}; the same command goes on from there", file=sys.stderr)
            raise
        if dry_run:
            _foretell(console, report.runs)
        page = None if dry_run else report.write()
    if as_json:
        print(json.dumps(report.document(), indent=2, ensure_ascii=False))
    elif page is not None:
        print(report.standing(), page.resolve().as_uri(), sep="\n")
    if report.counts["failed"]:
        raise typer.Exit(1)


def _tell(event: ProgressEvent) -> None:
    print(event.as_json(), file=sys.stderr, flush=True)


def _line(outcome: Outcome, count: str) -> Text:
    colour = _COLOURS[outcome.state]
    told = f"{outcome.seconds:7.1f} s  ", "dim"
    state = f"{outcome.state:7}", colour
    line = Text.assemble((f"{count:>9}", "dim"), told, state, str(outcome.combination))
    return line.append(f": {outcome.failure}", colour) if outcome.failure else line


def _foretell(console: Console, runs: list[dict[str, Any]]) -> None:
    """What would run, and how many images that sends through the models."""
    table = Table("", "method", "model", "images", box=None, header_style="bold", padding=(0, 3, 0, 0))
    for heading in ("forward", "backward"):
        table.add_column(heading, justify="right")
    for run in runs:
        passes = ("?" if run[way] is None else f"{run[way]:,}" for way in ("forward", "backward"))
        table.add_row(*(run[key] or "" for key in ("state", "method", "model", "images")), *passes)
    console.print(table)
    coming = [run for run in runs if run["state"] == "to run"]
    told = [run for run in coming if run["forward"] is not None]
    forward, backward = (sum(run[way] for run in told) for way in ("forward", "backward"))
    silent = f", and {len(coming) - len(told)} runs that do not say" if len(coming) > len(told) else ""
    cost = f"{forward:,} images forward, {backward:,} backward{silent}"
    console.print(f"{len(coming)} of {len(runs)} runs to do: {cost}")


@hookimpl
def phosphene_commands(app):
    app.command()(batch)
