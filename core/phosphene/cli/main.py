"""The command line. Torch is imported inside the commands that need it: help and ``list`` answer at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import PhospheneError
from ..registry.extensions import extensions
from . import list as _list_commands  # noqa: F401  (registers its commands)
from .app import app
from .run import _MethodCommands


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what goes wrong on purpose is one sentence on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    command = next((word for word in given if not word.startswith("-")), None)
    if command not in typer.main.get_group(app).commands:  # what is built in means the same, whoever joins in
        extensions.notify("phosphene_commands", app=app)
    try:
        app(given, prog_name="phosphene", obj={"debug": debug})
    except Exception as error:
        if any(word.partition("=")[0] == "--json" for word in given):  # a program reads the answer
            told = {"type": type(error).__name__, "message": str(error)}
            print(json.dumps({"error": told}, indent=2, ensure_ascii=False))
        # A full disk or a missing permission is nobody's bug either.
        if debug or not isinstance(error, (PhospheneError, OSError)):
            raise
        print(f"phosphene: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    version_asked: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """One door to everything that can be seen inside a vision model, and everything drawn with one."""
    # --debug is taken out by main, so that it can stand anywhere; here it has its line of help.
    if version_asked:
        print(version("phosphene"))
        raise typer.Exit


app.add_typer(typer.Typer(cls=_MethodCommands, no_args_is_help=True), name="run", help="Run a method.")
