"""The command ``phosphene batch``, which executes a plan. Torch is imported only when it runs."""

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

_COLORS = {"completed": "green", "reused": "dim", "failed": "red"}


def batch(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="YAML file with models, images and methods.")],
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Output folder (default: the plan's)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and their cost, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    events: Annotated[
        bool, typer.Option("--events", help="Progress as JSON lines on standard error.")
    ] = False,
) -> None:
    """Run every method of a plan on every model and image, and write one report.

    Saved results of the same run are reused, so an interrupted or extended plan resumes.
    """
    from tqdm.auto import tqdm

    from phosphene import progress_bar, report_progress
    from phosphene.models import refuse_user_code

    from ._execute_plan import open_batch
    from ._plan import read_plan
    from ._report import Report

    console = Console(stderr=as_json, soft_wrap=True)
    parsed = read_plan(plan)
    with refuse_user_code():  # a plan may be a stranger's
        work = open_batch(parsed, Path(out or parsed.out or f"phosphene-out/{plan.stem}"))
    report, runs = Report(work), len(work.combinations)
    # With --json, standard output holds the report only, whatever a method prints.
    with (
        report_progress(_print_event if events else None),
        redirect_stdout(sys.stderr) if as_json else nullcontext(),
        refuse_user_code(),
    ):
        try:
            for outcome in progress_bar(work.outcomes(dry=dry_run), plan.name, runs, note=report.summary):
                report.add(outcome)
                if not dry_run:
                    with (
                        tqdm.external_write_mode()
                    ):  # so that the progress bar is not interleaved with the line
                        console.print(_line(outcome, f"{report.counts.total()}/{runs}"))
        except KeyboardInterrupt:
            done = f"{report.counts.total()} of {runs} runs are saved"
            print(f"\nstopped: {done}; the same command resumes", file=sys.stderr)
            raise
        if dry_run:
            _print_dry_run(console, report.runs)
        page = None if dry_run else report.write()
    if as_json:
        print(json.dumps(report.document(), indent=2, ensure_ascii=False))
    elif page is not None:
        print(report.summary(), page.resolve().as_uri(), sep="\n")
    if report.counts["failed"]:
        raise typer.Exit(1)


def _print_event(event: ProgressEvent) -> None:
    print(event.as_json(), file=sys.stderr, flush=True)


def _line(outcome: Outcome, count: str) -> Text:
    color = _COLORS[outcome.state]
    seconds = f"{outcome.seconds:7.1f} s  ", "dim"
    state = f"{outcome.state:11}", color
    line = Text.assemble((f"{count:>9}", "dim"), seconds, state, str(outcome.combination))
    return line.append(f": {outcome.failure}", color) if outcome.failure else line


def _print_dry_run(console: Console, runs: list[dict[str, Any]]) -> None:
    """Print the combinations, their state and their cost in images forward and backward."""
    table = Table("", "method", "model", "images", box=None, header_style="bold", padding=(0, 3, 0, 0))
    for heading in ("forward", "backward"):
        table.add_column(heading, justify="right")
    for run in runs:
        passes = (
            "?" if run[direction] is None else f"{run[direction]:,}" for direction in ("forward", "backward")
        )
        table.add_row(*(run[key] or "" for key in ("state", "method", "model", "images")), *passes)
    console.print(table)
    pending = [run for run in runs if run["state"] == "pending"]
    with_cost = [run for run in pending if run["forward"] is not None]
    forward, backward = (sum(run[direction] for run in with_cost) for direction in ("forward", "backward"))
    unknown = len(pending) - len(with_cost)
    rest = f", and {unknown} runs of unknown cost" if unknown else ""
    cost = f"{forward:,} images forward, {backward:,} backward{rest}"
    console.print(f"{len(pending)} of {len(runs)} runs to do: {cost}")


@hookimpl
def phosphene_commands(app):
    app.command()(batch)
