"""``phosphene run`` and ``phosphene replay``: one subcommand per method, generated from its spec."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, redirect_stdout
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
from .app import app, method_names, print_event
from .argument_rows import argument_rows
from .model_options import MODEL_OPTIONS, model_settings

if TYPE_CHECKING:
    from ..registry.method import Method
    from ..spec.spec import MethodSpec


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="Folder of a saved result.")]) -> None:
    """Run a saved result again and compare: exit code 0 if every tensor is bit for bit the same, else 1."""
    from ..runs.replay import replay as run_again

    outcome = run_again(folder)
    print(f"{folder}: {outcome}")
    if not outcome.same:
        raise typer.Exit(1)


#: The options of images that are read from files: type and help text.
_IMAGE_OPTIONS: dict[str, tuple[Any, str]] = {
    "image_size": (str | None, "resize and crop files to SIDE or HEIGHT,WIDTH, instead of the model's size"),
}


#: The options of every run: type and help text.
_RUN_OPTIONS: dict[str, tuple[Any, str]] = {
    "out": (str | None, "folder to save the result in [default phosphene-out/NAME]"),
    "batch_size": (int | None, "largest number of images in one pass through the model"),
    "device": (str | None, "device: cpu, cuda"),
    "stream": (
        bool,
        "read the images batch by batch, as a data set, and save a row for each in shards, for any number",
    ),
    "executor": (str | None, "where the run is executed: local, processes, processes:4, ray, ..."),
    "address": (str | None, "address of the executor's cluster, such as auto"),
    "json": (str | None, "JSON file with the request (- for standard input); the response is JSON, too"),
    "events": (bool, "progress as JSON lines on standard error, instead of bars"),
    "quiet": (bool, "print nothing and draw no progress bars"),
}


def _option(name: str, kind: Any, option: str, text: str = "", panel: str = "Run", **more: Any) -> Any:
    """One option of a command, as a parameter of its function."""
    declared = typer.Option(option, help=escape(text), rich_help_panel=panel, show_default=False, **more)
    default: Any = {bool: False, list[str]: []}.get(kind)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared])


def _options(spec: MethodSpec) -> list[Any]:
    """All options of ``run NAME``: the method's inputs and parameters, the model's and the run's."""
    options: list[Any] = []
    for name, option, metavar, bounds, default, meaning in argument_rows(spec):
        limits = [bounds, default if default in ("", "required") else f"default {default}"]
        if len(metavar) > 40:  # a wide placeholder would leave no width for the text
            limits, metavar = [metavar, *limits], "WORD,..." if metavar.endswith(",...") else "WORD"
        text = f"{meaning} [{'; '.join(filter(None, limits))}]".removesuffix(" []")
        field = spec.params.model_fields.get(name)
        flag, panel = field and field.annotation is bool, "Parameters" if field else "Inputs"
        kind, option = (bool | None, f"{option}/--no-{option[2:]}") if flag else (list[str], option)
        options.append(_option(name, kind, option, text, panel, metavar=None if flag else metavar))
    optional = [("model", MODEL_OPTIONS), ("images", _IMAGE_OPTIONS)]
    declared = {n: o for role, options in optional if spec.input(role) for n, o in options.items()}
    for name, (kind, text) in (declared | _RUN_OPTIONS).items():
        options.append(_option(f"_{name}", kind, f"--{name.replace('_', '-')}", text))
    return options


def _command(name: str, function: Any, options: list[Any], text: str, panel: str | None = None) -> Any:
    """A function as a command with these options."""
    function.__signature__, function.__annotations__ = Signature(options), {}
    command_app = typer.Typer(add_completion=False)
    command_app.command(name, help=escape(text), rich_help_panel=panel)(function)
    return typer.main.get_command(command_app)


class _MethodCommands(TyperGroup):
    """The subcommands of ``run``. Only the one that is called loads its method, and with it torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        return method_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command for help and completion, with what can be read from the method's source."""
        if cmd_name not in methods:
            return None
        plugin = methods.resolve(cmd_name)
        outline = methods.outline(plugin)
        names = [option_name(name, plugin.short_name) for name in outline.arguments]
        more = _IMAGE_OPTIONS if "images" in outline.arguments else ()
        names += [f"--{name.replace('_', '-')}" for name in (*MODEL_OPTIONS, *more, *_RUN_OPTIONS)]
        options = [_option(f"_{n}", str | None, option) for n, option in enumerate(names)]
        return _command(cmd_name, lambda **_: None, options, outline.summary, family_title(plugin.family))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, *rest = args
        if ctx.resilient_parsing:  # shell completion
            return name, self.get_command(ctx, name), rest
        method = methods[name]
        text = f"{method.spec.summary}\n\nEquation, sources and invariants: phosphene show {name}"
        return name, _command(name, partial(_run, method), _options(method.spec), text), rest


def _run(method: Method[..., Any], /, **values: Any) -> None:
    from ..checkpoints import RESUME_HINT, checkpoint_path
    from ..models import refuse_user_code
    from ..results import ResultSequence
    from ..results.base import reuse_panels
    from ..runs.run import run
    from .json_requests import format_response, read_request

    spec, start = method.spec, time.perf_counter()
    arguments = _arguments(spec, values)
    file, quiet = values["_json"], values["_quiet"]
    request = read_request(file, spec) if file else {}
    for key in request.keys() & arguments.keys():
        option = f"--{key.replace('_', '-')}" if key in _RUN_ARGUMENTS else option_name(key, spec.short_name)
        raise InputError(f"{option} is set in --json {file}, too: leave one of them out")
    arguments = {"out": f"phosphene-out/{spec.short_name}", **request, **arguments}
    out = Path(arguments["out"])
    progress = print_event if values["_events"] else False if quiet else None
    with reuse_panels():  # computed once for the figure and the printed lines
        try:
            with ExitStack() as stack:
                if file:  # standard output must hold the response only, not what a method prints
                    stack.enter_context(redirect_stdout(sys.stderr))
                    stack.enter_context(refuse_user_code())
                result = run(method, progress=progress, **arguments)
        except KeyboardInterrupt as error:  # typer would not print the error's notes
            print("\ninterrupted", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
            raise
        if file:
            print(format_response(result, out, time.perf_counter() - start))
        elif not quiet:
            where, first = str(out), out
            if isinstance(result, ResultSequence):
                first, last = (result.subfolder(out, number) for number in (0, len(result) - 1))
                where = f"{first} to {last}"
            print(*result.lines(), f"{spec.title}: saved in {where}, see {first / 'picture.png'}", sep="\n")
    if result.provenance and result.provenance.interrupted:
        hint = f"; {RESUME_HINT}" if checkpoint_path(out).is_file() else ""
        print(f"interrupted {result.provenance.interrupted}{hint}", file=sys.stderr)
        raise typer.Exit(130)


#: The arguments of ``run`` that are options of every method.
_RUN_ARGUMENTS = ("out", "device", "batch_size", "executor", "stream")


def _arguments(spec: MethodSpec, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``run`` that the options set; parameters are parsed from text."""
    from ..roles import ROLES

    arguments: dict[str, Any] = {}
    for declared in spec.inputs:
        if texts := values[declared.name]:
            arguments[declared.name] = ROLES[declared.role].parse_option(texts)
    for key, field in spec.params.model_fields.items():
        if (text := values[key]) not in (None, []):
            # A repeated option is one list: --layers a --layers b is --layers a,b.
            arguments[key] = text if field.annotation is bool else read_option(",".join(text), field)
    described = {key: values.get(f"_{key}") for key in MODEL_OPTIONS}
    owner, settings = spec.input("model"), model_settings(described)
    if owner and settings:
        if owner.name not in arguments:
            option = next(key for key, value in described.items() if value).replace("_", "-")
            raise InputError(f"--{option} is an option of a model: add --{owner.name}")
        arguments[owner.name] = {"uri": arguments[owner.name], **settings}
    if (size := values.get("_image_size")) is not None:
        images = spec.input("images")
        assert images is not None  # the option exists only for such a method
        if images.name not in arguments:
            raise InputError(f"--image-size is an option of files: add --{images.name}")
        arguments[images.name] = {"files": arguments[images.name], "size": size}
    arguments |= {k: v for k in _RUN_ARGUMENTS if (v := values[f"_{k}"]) is not None and v is not False}
    if (address := values["_address"]) is not None:
        if "executor" not in arguments:
            raise InputError("--address is an option of an executor: add --executor ray")
        arguments["executor"] += f":{address}"
    return arguments
