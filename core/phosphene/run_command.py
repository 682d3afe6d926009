"""``phosphene run NAME``: one command per method, its options made from the method's schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from .errors import InputError, PhospheneError
from .families import title
from .options import (
    bounds_text,
    default_text,
    is_flag,
    kind_text,
    option_name,
    parameter_schemas,
    read_option,
)
from .registry import methods

if TYPE_CHECKING:
    from .spec import Input, MethodSpec

#: What to write for an input of each role.
INPUT_HELP = {
    "model": "scheme:name, such as timm:resnet18 (default: builtin:shapes-vgg)",
    "images": "picture file or folder, repeatable; or builtin:scenes/8",
    "labels": "class of each image, by name or number: a,b,... (default: what the model predicts)",
    "target": "class, or one for each image, or a unit such as 'layer4[17]' (default: the predicted class)",
    "dataset": "folder of pictures, or builtin:scenes/1000",
    "texture": "picture file, or builtin:bricks; repeatable",
    "styles": "picture file, or builtin:bricks; repeatable",
    "stylizer": "folder that a training method saved its network in",
}
_REPEATABLE = {"images", "labels", "target", "texture", "styles"}
_METAVARS = {"model": "URI", "images": "FILE|FOLDER", "dataset": "FOLDER", "stylizer": "FOLDER"}
#: Options of every run; a parameter of the same name gets its method's before it.
_RUN_OPTIONS = {"out", "batch_size", "device", "quiet", "help"}


def option(
    name: str, kind: Any, written: str, told: str, panel: str, *, default: Any = None, **more: Any
) -> inspect.Parameter:
    """One option of a command, as a parameter of its function."""
    declared = typer.Option(written, help=escape(told), rich_help_panel=panel, show_default=False, **more)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


def with_signature(parameters: list[inspect.Parameter]) -> Callable[[Any], Any]:
    """Give a function of ``**values`` the signature that typer reads its options from."""

    def decorate(function: Any) -> Any:
        function.__signature__ = inspect.Signature(parameters)
        function.__annotations__ = {}
        return function

    return decorate


def flowing(text: str) -> str:
    """A docstring's prose without its line ends, its equations with theirs."""
    return re.sub(r"(?<=[^\n]{60})\n(?=\S)", " ", text)


# --- what every model can be told ------------------------------------------------------------

_MODEL_OPTIONS: dict[str, tuple[str | None, str]] = {
    "weights": ("FILE", "a safetensors or .pth file, or a name the scheme knows"),
    "pretrained": (None, "with the scheme's usual weights"),
    "input_size": ("SIZE", "size of its pictures: 224, or channels,height,width"),
    "mean": ("R,G,B", "mean it was trained with, of pixels in [0, 1]"),
    "std": ("R,G,B", "standard deviation likewise"),
}


def model_options(taken: Set[str] = frozenset()) -> list[inspect.Parameter]:
    """``--weights``, ``--pretrained`` and the like; a name that is taken becomes ``--model-...``."""
    return [
        option(
            f"model_{name}", str | None if metavar else bool, _free(name, taken, "model"), told, "Model",
            default=None if metavar else False, metavar=metavar,
        )
        for name, (metavar, told) in _MODEL_OPTIONS.items()
    ]  # fmt: skip


def model_settings(values: dict[str, Any]) -> dict[str, Any]:
    """What ``load_model`` is to be told, out of a command's values."""
    settings = {name: values[f"model_{name}"] for name in _MODEL_OPTIONS if values.get(f"model_{name}")}
    for name in {"mean", "std", "input_size"} & set(settings):
        kind = int if name == "input_size" else float
        try:
            settings[name] = tuple(map(kind, settings[name].split(",")))
        except ValueError:
            written = f"--{option_name(name)}"
            raise InputError(f"{written} takes numbers separated by commas, not {settings[name]!r}") from None
    if size := settings.get("input_size"):
        settings["input_size"] = size = (3, *size * 2) if len(size) == 1 else size
        if len(size) != 3 or min(size) < 1:
            raise InputError("--input-size is one number, or channels,height,width")
    return settings


def _free(name: str, taken: Set[str], prefix: str) -> str:
    return f"--{prefix}-{option_name(name)}" if name in taken else f"--{option_name(name)}"


# --- one command per method ------------------------------------------------------------------


def input_option(declared: Input) -> str:
    """The option for an input: ``--image`` for ``images``, else its own name."""
    return "--image" if declared.name == "images" else f"--{option_name(declared.name)}"


def _options(spec: MethodSpec) -> list[inspect.Parameter]:
    """All options of ``run NAME``: the method's inputs and parameters, and where and how it runs."""
    found = []
    for declared in spec.inputs:
        kind: Any = list[str] if declared.role in _REPEATABLE else str | None
        written, told = input_option(declared), INPUT_HELP[declared.role]
        more: dict[str, Any] = {"metavar": _METAVARS.get(declared.role, "TEXT")}
        if declared.role in _REPEATABLE:
            more["default"] = []
        found.append(option(f"input_{declared.name}", kind, written, told, "Inputs", **more))
    taken = _RUN_OPTIONS | {declared.name for declared in spec.inputs} | {"image"}
    for name, schema in parameter_schemas(spec.params_schema).items():
        written = _free(name, taken, spec.short_name)
        default = f"default {default_text(schema)}" if default_text(schema) else ""
        limits = [bounds_text(schema), default if "default" in schema else "required"]
        told = f"{schema.get('description', '')} [{'; '.join(filter(None, limits))}]".removesuffix(" []")
        kind, more = list[str], {"default": [], "metavar": kind_text(schema)}
        if is_flag(schema):
            kind, more, written = bool | None, {}, f"{written}/--no-{written[2:]}"
        found.append(option(f"param_{name}", kind, written, told, "Parameters", **more))
    if spec.input("model"):
        found += model_options(taken | set(spec.params.model_fields))
    where = f"folder to save in [default phosphene-out/{spec.short_name}]"
    return [
        *found,
        option("out", str | None, "--out", where, "Run", metavar="FOLDER"),
        option("batch_size", int | None, "--batch-size", "at most so many images", "Run", metavar="INT"),
        option("device", str | None, "--device", "where the model runs: cpu, cuda", "Run", metavar="TEXT"),
        option("quiet", bool, "--quiet", "say nothing and draw no progress bars", "Run", default=False),
    ]


def method_names() -> list[str]:
    """Every method's shortest name, family by family."""
    return [name for plugins in methods.by_family().values() for name in plugins]


class MethodCommands(TyperGroup):
    """The commands of ``run``; only the one that is called loads its method, and so torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        return method_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in for help and completion, with what the method's source tells."""
        try:
            plugin = methods.resolve(cmd_name)
        except PhospheneError:
            return None
        names = [*plugin.arguments(), *sorted(_RUN_OPTIONS - {"help"})]
        written = ["--image" if n == "images" else f"--{option_name(n)}" for n in names]
        options = [option(f"_{n}", str | None, w, "", "Options") for n, w in zip(names, written, strict=True)]
        stand_in = with_signature(options)(lambda **_: None)
        return _command(cmd_name, stand_in, plugin.summary(), title(plugin.family))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if ctx.resilient_parsing:  # somebody pressed the tab key
            return name, self.get_command(ctx, name), args[1:]
        spec = methods[name].spec
        command = with_signature(_options(spec))(partial(_run, name, spec))
        return name, _command(name, command, f"{spec.summary}\n\n{flowing(spec.description)}", None), args[1:]


def _command(name: str, function: Any, told: str, panel: str | None) -> Any:
    single = typer.Typer(add_completion=False)
    single.command(name, help=escape(told), rich_help_panel=panel)(function)
    return typer.main.get_command(single)


def _run(name: str, spec: MethodSpec, **values: Any) -> None:
    from .models import load_model
    from .running import run

    arguments: dict[str, Any] = {}
    for declared in spec.inputs:
        given = values[f"input_{declared.name}"]
        if declared.role == "labels":
            given = [label.strip() for text in given for label in text.split(",")]
        elif isinstance(given, list) and len(given) == 1:
            (given,) = given
        if given:
            arguments[declared.name] = given
    for key, schema in parameter_schemas(spec.params_schema).items():
        written = values[f"param_{key}"]
        if written is not None and written != []:
            arguments[key] = written if is_flag(schema) else read_option(written, schema)
    owner, settings = spec.input("model"), model_settings(values)
    if owner and settings:
        if owner.name not in arguments:
            about = option_name(next(iter(settings)))
            raise InputError(f"--{about} is about a model: say which with --model")
        arguments[owner.name] = load_model(arguments[owner.name], **settings)
    out = Path(values["out"] or f"phosphene-out/{spec.short_name}")
    result = run(
        name, out=out, device=values["device"], batch_size=values["batch_size"],
        progress=False if values["quiet"] else None, **arguments,
    )  # fmt: skip
    if values["quiet"]:
        return
    for line in result.lines():
        print(line)
    seconds = result.provenance.seconds if result.provenance else 0
    print(f"{spec.title} took {seconds:.1f} s; saved in {out}, to look at: {out / 'picture.png'}")
