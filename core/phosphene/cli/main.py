"""The command line. Torch is imported inside the commands that need it: help and ``list`` are fast."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import PhospheneError
from ..graceful_stop import allow_early_stop
from ..random_weights import report_random_weights
from ..registry.extensions import extensions
from . import list as _list_commands  # noqa: F401  (registers its commands)
from . import results as _result_commands  # noqa: F401
from .app import app
from .run import _MethodCommands

#: The exit code after Ctrl-C.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A ``PhospheneError`` is printed in one sentence, with exit code 2.

    The exit code is 130 after Ctrl-C and 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    command = next((word for word in words if not word.startswith("-")), None)
    if command not in typer.main.get_group(app).commands:  # plugins cannot replace built-in commands
        extensions.notify("phosphene_commands", app=app)
    stop = allow_early_stop()
    try:
        _print_random_weights.cache_clear()
        with stop, report_random_weights(_print_random_weights):
            app(words, prog_name="phosphene", obj={"debug": debug})
    except SystemExit as left:
        if left.code == INTERRUPTED:
            sys.exit(stop.stop.exit_code)  # 143 after SIGTERM
        raise
    except Exception as error:
        if any(word.partition("=")[0] == "--json" for word in words):  # a program reads standard output
            answer = {"error": {"type": type(error).__name__, "message": str(error)}}
            print(json.dumps(answer, indent=2, ensure_ascii=False))
        # A full disk or a missing permission is no bug either, and needs no traceback.
        if debug or not isinstance(error, (PhospheneError, OSError)):
            raise
        print(f"phosphene: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(2)


@functools.cache
def _print_random_weights(uri: str) -> None:
    """Say on standard error, once for each model, that its weights are random."""
    hint = "--pretrained loads its published weights, --weights a file"
    print(f"phosphene: the weights of {uri} are random; {hint}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Visualize vision models, attribute, attack and defend them, and synthesize images with them."""
    # main() handles --debug at any position; it is declared here for the help text only.
    if show_version:
        print(version("phosphene"))
        raise typer.Exit


app.add_typer(typer.Typer(cls=_MethodCommands, no_args_is_help=True), name="run", help="Run a method.")
