"""The command line. Torch is imported inside the commands that need it: help and ``list`` answer at once."""

from __future__ import annotations

import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from importlib.metadata import version
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from .errors import InputError, PhospheneError
from .families import title
from .options import bounds_text, default_text, kind_text, option_name, read_option
from .registry import extensions, methods, other_versions

if TYPE_CHECKING:
    from .bars import ProgressEvent
    from .spec import MethodSpec

app = typer.Typer(name="phosphene", no_args_is_help=True, pretty_exceptions_enable=False)


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


def _show(*headings: str, rows: Sequence[Sequence[str | Text]]) -> None:
    """A table on standard output; what goes into a pipe or a file is not broken into lines."""
    table = Table(*headings, box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table, "")


@app.command("list")
def list_methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List every method, by family."""
    told = []
    for family, plugins in methods.by_family().items():
        summaries = {n: p.summary() or "its module cannot be read" for n, p in plugins.items()}
        if not as_json:
            heading, _, about = title(family).partition(": ")
            _show(f"{heading:22}", about, rows=[(Text(n, "cyan"), text) for n, text in summaries.items()])
        for name, plugin in plugins.items():
            by = {"distribution": plugin.distribution, "version": plugin.version}
            told.append({"name": name, "id": plugin.id, "family": family, "summary": summaries[name]} | by)
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))


def _method_names() -> list[str]:
    """Every method's shortest name, family by family."""
    return [name for plugins in methods.by_family().values() for name in plugins]


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method.", autocompletion=_method_names)],
    as_json: Annotated[bool, typer.Option("--json", help="The spec as JSON.")] = False,
) -> None:
    """Show all there is to know of a method: parameters, equation, sources, promises, cost."""
    spec = methods[name].spec
    if as_json:
        print(json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return
    about = f"{spec.title}   {spec.name}   {methods[name].distribution}"
    print(about, spec.summary, "", *filter(None, [spec.description]), sep="\n", end="\n\n")
    _show("input, parameter", "option", "kind", "bounds", "default", "meaning", rows=_arguments(spec))
    facts = [("needs", ", ".join(spec.needs).replace("_", " "))] if spec.needs else []
    if spec.cost:
        facts.append(("cost", f"forward {spec.cost.forward}; backward {spec.cost.backward}"))
    for promise in spec.invariants:
        told = promise.model_dump(exclude_none=True, exclude={"kind"}).items()
        facts.append(("promise", ", ".join([promise.kind.replace("_", " "), *(f"{k} {v}" for k, v in told)])))
    facts += [("source", f"{s.authors} {s.year}. {s.title}. {s.url}") for s in spec.references]
    _show("gives", spec.returns, rows=facts)


@app.command()
def plugins(context: typer.Context) -> None:
    """List the plugins and their state; --debug shows in full what broke."""
    broken, other = methods.broken(), other_versions()
    states = {}
    for plugin, others in methods.shadowed().items():
        beside = ", ".join(other.qualified for other in others)
        states[plugin] = Text(f"ok, as {methods.shortest_name(plugin)}; {beside} has the same id", "yellow")
    states |= {p: Text(f"left alone: written for {p.entry_point.group}", "yellow") for p in other}
    states |= {b.plugin: Text(f"broken: {b.reason}", "red") for b in broken}
    every = (*methods.plugins.values(), *extensions.plugins(), *other)
    rows = [(p.id, f"{p.distribution} {p.version}", states.get(p, Text("ok", "green"))) for p in every]
    _show("plugin", "distribution", "state", rows=rows)
    for failure in broken if context.obj["debug"] else ():
        print(f"{failure.plugin.qualified}\n{failure.traceback}")


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'timm:resnet*'.")] = "",
) -> None:
    """List the models that can be loaded, of all schemes."""
    from .models.loading import loaders

    every = [f"{scheme}:{name}" for scheme, loader in loaders().items() for name in loader.names()]
    found = [uri for uri in every if fnmatch.fnmatch(uri.lower(), f"*{pattern.lower()}*")]
    if not found:
        raise InputError(f"none of {len(every)} models is called anything like {pattern!r}")
    print(*found, sep="\n")


@app.command()
def layers(model: Annotated[str, typer.Argument(help="scheme:name, such as timm:resnet18")]) -> None:
    """Show a model's layers in the order they run: what they are, and how large."""
    from .models import load_model

    loaded = load_model(model)
    anatomy, rows = loaded.anatomy, []
    for name, info in anatomy.layers.items():
        shape = "x".join(map(str, info.shape or "-"))
        rows.append((name, info.type, shape, str(info.calls), f"{info.parameters:,}"))
    _show("layer", "type", "shape", "calls", "parameters", rows=rows)
    size = "x".join(map(str, loaded.input_size))
    print(
        f"{loaded.name}: pictures {size}, {loaded.class_count} classes; the last map is {anatomy.last_map};",
        end=" ",
    )
    print(f"CAM's weights are {anatomy.classifier}" if anatomy.head else "no GAP + linear head, so no CAM")


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="A folder that a run was saved in.")]) -> None:
    """Run a saved result again and say whether it came out the same."""
    from .running import replay as run_again

    outcome = run_again(folder)
    print(f"{folder}: {outcome}")
    if not outcome.same:
        raise typer.Exit(1)


# --- run: one command per method, its options made from the method's schema ------------------

#: What to write for an input of each role.
_INPUTS = {
    "model": ("URI", "scheme:name, such as timm:resnet18 (default: builtin:shapes-vgg)"),
    "images": ("FILE|FOLDER", "picture file or folder, repeatable; or builtin:scenes/8"),
    "labels": ("TEXT,...", "class of each image, by name or number (default: what the model predicts)"),
    "masks": (
        "FILE",
        "mask picture of each image, white in the object; repeatable (the bundled scenes have theirs)",
    ),
    "start": (
        "FILE",
        "picture to begin from, one for all or one each, repeatable; or a saved result",
    ),
    "guide": ("FILE", "picture whose forms are wanted, or builtin:bricks; repeatable"),
    "target": ("TEXT", "class, or one for each image, or a unit: layer4[17] (default: the predicted class)"),
    "dataset": ("FOLDER", "folder of pictures, builtin:scenes/1000 or builtin:textures/64"),
    "texture": ("FILE", "picture file, or builtin:bricks; repeatable"),
    "styles": ("FILE", "picture file, or builtin:bricks; repeatable"),
    "stylizer": ("FOLDER", "folder that a training method saved its network in"),
    "adaptive_stylizer": ("FOLDER", "folder that adaptive_style_fit saved its network in"),
    "denoiser": ("FOLDER", "folder of a diffusers pipeline (default: the bundled builtin:shapes-diffusion)"),
    "generator": ("FOLDER", "folder that a generator was saved in (default: builtin:shapes-autoencoder)"),
}
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


def _arguments(spec: MethodSpec) -> list[tuple[str, ...]]:
    """A method's inputs and parameters in words: name, option, kind, bounds, default, meaning."""
    found = [(i.name, _INPUTS[i.role][0], "", "", _INPUTS[i.role][1]) for i in spec.inputs]
    for name, schema in spec.params_schema["properties"].items():
        limits = bounds_text(schema), default_text(schema)
        found.append((name, kind_text(schema), *limits, schema.get("description", "")))
    return [(name, option_name(name, spec.short_name), *words) for name, *words in found]


def _option(name: str, kind: Any, option: str, told: str = "", panel: str = "Run", **more: Any) -> Any:
    """One option of a command, as a parameter of its function."""
    declared = typer.Option(option, help=escape(told), rich_help_panel=panel, show_default=False, **more)
    default: Any = {bool: False, list[str]: []}.get(kind)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared])


def _options(spec: MethodSpec) -> list[Any]:
    """All options of ``run NAME``: the method's inputs and parameters, and where and how it runs."""
    found: list[Any] = []
    for name, option, metavar, bounds, default, meaning in _arguments(spec):
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
        return _method_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in for help and completion, with what the method's source tells."""
        if cmd_name not in methods:
            return None
        plugin = methods.resolve(cmd_name)
        written = [option_name(name, plugin.short_name) for name in plugin.arguments()]
        written += [f"--{name.replace('_', '-')}" for name in (*_MODEL, *_RUN)]
        options = [_option(f"_{n}", str | None, option) for n, option in enumerate(written)]
        return _command(cmd_name, lambda **_: None, options, plugin.summary(), title(plugin.family))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, *rest = args
        if ctx.resilient_parsing:  # somebody pressed the tab key
            return name, self.get_command(ctx, name), rest
        spec = methods[name].spec
        told = f"{spec.summary}\n\n'phosphene show {name}' tells all about it."
        return name, _command(name, partial(_run, name, spec), _options(spec), told), rest


app.add_typer(typer.Typer(cls=_MethodCommands, no_args_is_help=True), name="run", help="Run a method.")


def _run(name: str, spec: MethodSpec, **values: Any) -> None:
    from .checkpoints import GOES_ON, unfinished
    from .programs import answer, read_request
    from .running import run

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
    progress = _tell if values["_events"] else False if quiet else None
    # Whatever a method prints, standard output holds one answer.
    try:
        with redirect_stdout(sys.stderr) if file else nullcontext():
            result = run(name, progress=progress, **arguments)
    except KeyboardInterrupt as error:  # of which typer says no more than that it was
        print("\n", *getattr(error, "__notes__", ()), sep="", file=sys.stderr)
        raise
    out, interrupted = Path(arguments["out"]), result.provenance and result.provenance.interrupted
    if file:
        print(answer(result, out, time.perf_counter() - clock))
    elif not quiet:
        print(*result.lines(), f"{spec.title} is saved in {out}: look at {out / 'picture.png'}", sep="\n")
    if interrupted:
        kept = f"; {GOES_ON}" if unfinished(out).is_file() else ""
        print(f"interrupted {interrupted}{kept}", file=sys.stderr)
        raise typer.Exit(130)


def _tell(event: ProgressEvent) -> None:
    print(event.as_json(), file=sys.stderr, flush=True)
