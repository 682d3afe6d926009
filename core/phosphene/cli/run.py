"""``phosphene run`` and ``phosphene replay``: one subcommand per method, generated from its spec."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext, redirect_stdout
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from ..errors import InputError
from ..parameter_text import option_name, read_option
from ..registry.families import family_title
from ..registry.lookup import methods

if TYPE_CHECKING:
    from ..spec.spec import MethodSpec
from .app import app, method_names, print_event
from .argument_rows import argument_rows


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="A folder that a run was saved in.")]) -> None:
    """Run a saved result again and say whether it came out the same."""
    from ..runs.replay import replay as run_again

    outcome = run_again(folder)
    print(f"{folder}: {outcome}")
    if not outcome.same:
        raise typer.Exit(1)


#: What can be said of a model that is taken, and of every run.
_MODEL: dict[str, tuple[Any, str]] = {
    "weights": (str | None, "the model's: a safetensors or .pth file, or a name its scheme knows"),
    "pretrained": (bool, "take the model with its scheme's usual weights"),
}


_RUN: dict[str, tuple[Any, str]] = {
    "out": (str | None, "folder to save in [default phosphene-out/NAME]"),
    "batch_size": (int | None, "at most so many images at once"),
    "device": (str | None, "where the method runs: cpu, cuda"),
    "executor": (str | None, "where it is carried out: local, or where a plugin offers"),
    "json": (str | None, "file with a request as JSON (- for standard input); the answer is JSON, too"),
    "events": (bool, "tell progress as JSON lines on standard error, instead of bars"),
    "quiet": (bool, "say nothing and draw no progress bars"),
}


def _option(name: str, kind: Any, option: str, told: str = "", panel: str = "Run", **more: Any) -> Any:
    """One option of a command, as a parameter of its function."""
    declared = typer.Option(option, help=escape(told), rich_help_panel=panel, show_default=False, **more)
    default: Any = {bool: False, list[str]: []}.get(kind)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared])


def _options(spec: MethodSpec) -> list[Any]:
    """All options of ``run NAME``: the method's inputs and parameters, and where and how it runs."""
    found: list[Any] = []
    for name, option, metavar, bounds, default, meaning in argument_rows(spec):
        limits = [bounds, default if default in ("", "required") else f"default {default}"]
        if len(metavar) > 40:  # a wide column would leave none for the words
            limits, metavar = [metavar, *limits], "WORD,..." if metavar.endswith(",...") else "WORD"
        told = f"{meaning} [{'; '.join(filter(None, limits))}]".removesuffix(" []")
        field = spec.params.model_fields.get(name)
        flag, panel = field and field.annotation is bool, "Parameters" if field else "Inputs"
        kind, option = (bool | None, f"{option}/--no-{option[2:]}") if flag else (list[str], option)
        found.append(_option(name, kind, option, told, panel, metavar=None if flag else metavar))
    for name, (kind, told) in ((_MODEL if spec.input("model") else {}) | _RUN).items():
        found.append(_option(f"_{name}", kind, f"--{name.replace('_', '-')}", told))
    return found


def _command(name: str, function: Any, options: list[Any], told: str, panel: str | None = None) -> Any:
    function.__signature__, function.__annotations__ = Signature(options), {}
    single = typer.Typer(add_completion=False)
    single.command(name, help=escape(told), rich_help_panel=panel)(function)
    return typer.main.get_command(single)


class _MethodCommands(TyperGroup):
    """The commands of ``run``; only the one that is called loads its method, and so torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        return method_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in for help and completion, with what the method's source tells."""
        if cmd_name not in methods:
            return None
        plugin = methods.resolve(cmd_name)
        written = [option_name(name, plugin.short_name) for name in plugin.arguments()]
        written += [f"--{name.replace('_', '-')}" for name in (*_MODEL, *_RUN)]
        options = [_option(f"_{n}", str | None, option) for n, option in enumerate(written)]
        return _command(cmd_name, lambda **_: None, options, plugin.summary(), family_title(plugin.family))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, *rest = args
        if ctx.resilient_parsing:  # somebody pressed the tab key
            return name, self.get_command(ctx, name), rest
        spec = methods[name].spec
        told = f"{spec.summary}\n\n'phosphene show {name}' tells all about it."
        return name, _command(name, partial(_run, name, spec), _options(spec), told), rest


def _run(name: str, spec: MethodSpec, **values: Any) -> None:
    from ..checkpoints import RESUME_HINT, checkpoint_path
    from ..runs.run import run
    from .json_requests import format_response, read_request

    given: dict[str, Any] = {}
    for declared in spec.inputs:
        texts = values[declared.name]
        if declared.role == "labels":
            texts = [label.strip() for text in texts for label in text.split(",")]
        if texts:
            given[declared.name] = texts[0] if len(texts) == 1 else texts
    for key, field in spec.params.model_fields.items():
        if (written := values[key]) not in (None, []):
            # What is repeated is put together: --layers a --layers b is --layers a,b.
            given[key] = written if field.annotation is bool else read_option(",".join(written), field)
    owner, settings = spec.input("model"), {key: v for key in _MODEL if (v := values.get(f"_{key}"))}
    if owner and settings:
        if owner.name not in given:
            raise InputError(f"--{next(iter(settings))} is about a model: say which with --{owner.name}")
        given[owner.name] = {"uri": given[owner.name], **settings}
    how = ("out", "device", "batch_size", "executor")
    given |= {key: v for key in how if (v := values[f"_{key}"]) is not None}
    file, quiet, clock = values["_json"], values["_quiet"], time.perf_counter()
    asked = read_request(file, spec) if file else {}
    for key in asked.keys() & given.keys():
        option = f"--{key.replace('_', '-')}" if key in how else option_name(key, spec.short_name)
        raise InputError(f"{option} is said by --json {file}, too: leave one of them out")
    arguments = {"out": f"phosphene-out/{spec.short_name}", **asked, **given}
    progress = print_event if values["_events"] else False if quiet else None
    # Whatever a method prints, standard output holds one answer.
    try:
        with redirect_stdout(sys.stderr) if file else nullcontext():
            result = run(name, progress=progress, **arguments)
    except KeyboardInterrupt as error:  # of which typer says no more than that it was
        print("\n", *getattr(error, "__notes__", ()), sep="", file=sys.stderr)
        raise
    out, interrupted = Path(arguments["out"]), result.provenance and result.provenance.interrupted
    if file:
        print(format_response(result, out, time.perf_counter() - clock))
    elif not quiet:
        print(*result.lines(), f"{spec.title} is saved in {out}: look at {out / 'picture.png'}", sep="\n")
    if interrupted:
        kept = f"; {RESUME_HINT}" if checkpoint_path(out).is_file() else ""
        print(f"interrupted {interrupted}{kept}", file=sys.stderr)
        raise typer.Exit(130)
