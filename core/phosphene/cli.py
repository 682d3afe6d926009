"""The command line. Torch is imported inside the commands that need it: help and ``list`` answer at once."""

from __future__ import annotations

import fnmatch
import inspect
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import InputError, PhospheneError
from .families import title
from .options import bounds_text, default_text, kind_text, parameter_schemas
from .registry import extensions, methods, other_versions
from .run_command import (
    INPUT_HELP,
    MethodCommands,
    flowing,
    input_option,
    method_names,
    model_options,
    model_settings,
    option,
    with_signature,
)

if TYPE_CHECKING:
    from .gallery import Exhibit, Gallery

app = typer.Typer(
    name="phosphene",
    help="One door to everything that can be seen inside a vision model, and everything drawn with one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(
    typer.Typer(cls=MethodCommands, no_args_is_help=True),
    name="run",
    help="Run a method: 'phosphene run NAME --help' tells its options.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what goes wrong on purpose is one sentence on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    commands = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    own = {*commands, *(group.name for group in app.registered_groups)}
    if next((word for word in given if not word.startswith("-")), None) not in own:
        extensions.add_commands(app)
    try:
        app(given, prog_name="phosphene")
    except (PhospheneError, OSError) as error:  # a full disk or a missing permission is nobody's bug either
        if debug:
            raise
        print(f"phosphene: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:
            print("phosphene: interrupted", file=sys.stderr)
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("phosphene"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    # --debug is taken out by main, so that it can stand anywhere; here it has its line of help.
    pass


def _console() -> Console:
    """Standard output; what goes into a pipe or a file is not broken into lines."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


# --- methods and plugins ---------------------------------------------------------------------


@app.command("list")
def list_methods(
    family: Annotated[str | None, typer.Option(help="Only this family.", metavar="NAME")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List every method, by family."""
    shelves = methods.by_family()
    if family is not None:
        if family not in shelves:
            raise InputError(f"no family {family!r}; there is {', '.join(shelves)}")
        shelves = {family: shelves[family]}
    if as_json:
        rows = [
            {"name": name, "summary": p.summary()}
            | {key: getattr(p, key) for key in ("id", "family", "distribution", "version")}
            for plugins in shelves.values()
            for name, p in plugins.items()
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for position, (shelf, plugins) in enumerate(shelves.items()):
        if position:
            table.add_row()
        heading, _, about = title(shelf).partition(": ")
        table.add_row(Text(heading, "bold"), Text(about, "dim"))
        for name, plugin in plugins.items():
            summary = plugin.summary()
            table.add_row(
                Text(name, "cyan"), Text(summary) if summary else Text("its module cannot be found", "red")
            )
    _console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method.", autocompletion=method_names)],
    as_json: Annotated[bool, typer.Option("--json", help="The spec as JSON.")] = False,
) -> None:
    """Show all there is to know of a method: parameters, equation, sources, promises, cost."""
    method = methods[name]
    spec = method.spec
    if as_json:
        print(json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return
    console = _console()
    console.print(Text.assemble((spec.title, "bold"), f"   {spec.name}   ", (method.distribution, "dim")))
    console.print(Text(f"{spec.summary}\n\n{flowing(spec.description)}".strip() + "\n"))
    inputs = _table("input", "option", "what to write")
    for declared in spec.inputs:
        inputs.add_row(declared.name, input_option(declared), Text(INPUT_HELP[declared.role]))
    console.print(inputs)
    if spec.params.model_fields:
        parameters = _table("parameter", "kind", "bounds", "default", "meaning")
        for key, schema in parameter_schemas(spec.params_schema).items():
            default = default_text(schema) or ("none" if "default" in schema else "required")
            row = (key, kind_text(schema), bounds_text(schema), default, schema.get("description", ""))
            parameters.add_row(*map(Text, row))
        console.print("", parameters, sep="\n")
    facts = [("gives", spec.returns), ("needs", ", ".join(spec.needs).replace("_", " "))]
    if spec.cost:
        facts.append(("cost", f"forward {spec.cost.forward}; backward {spec.cost.backward}"))
    for promise in spec.invariants:
        told = promise.model_dump(exclude={"kind"}, exclude_none=True)
        words = ", ".join(f"{k} {v}" for k, v in told.items())
        facts.append(("promise", promise.kind.replace("_", " ") + (f" ({words})" if words else "")))
    facts += [("source", f"{s.authors} {s.year}. {s.title}. {s.url}") for s in spec.references]
    table = Table.grid(padding=(0, 3))
    for heading, fact in facts:
        if fact:
            table.add_row(Text(heading, "bold"), Text(fact))
    console.print("", table, sep="\n")


@app.command()
def plugins(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show in full what broke.")] = False,
) -> None:
    """List the plugins and their state: ok, broken, shadowed, or written for another version."""
    _ = extensions.manager  # loaded, so that broken() knows of them, too
    broken = {b.plugin: b for b in methods.broken()}
    shadowed = dict(methods.shadowed())
    table = _table("plugin", "distribution", "state")
    for plugin in (*methods.plugins.values(), *extensions.plugins()):
        state = Text("ok", "green")
        if plugin in broken:
            state = Text(f"broken: {broken[plugin].reason}", "red")
        elif plugin in shadowed:
            others = ", ".join(other.qualified for other in shadowed[plugin])
            state = Text(f"shadowed by {others}: call it {plugin.qualified}", "yellow")
            if methods.shortest_name(plugin) != plugin.qualified:
                state = Text(f"ok; {others} has the same id", "green")
        table.add_row(plugin.id, f"{plugin.distribution} {plugin.version}", state)
    for plugin in other_versions():
        state = Text(f"left alone: written for {plugin.entry_point.group}", "yellow")
        table.add_row(plugin.id, f"{plugin.distribution} {plugin.version}", state)
    _console().print(table)
    if traceback:
        for failure in broken.values():
            print(f"\n{failure.plugin.qualified}\n{failure.traceback or failure.reason}")


# --- models ----------------------------------------------------------------------------------


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'timm:resnet*'.")] = "",
) -> None:
    """List the models that can be loaded, of all schemes."""
    from .models.loading import loaders

    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    every = [f"{scheme}:{name}" for scheme, loader in loaders().items() for name in loader.names()]
    found = [uri for uri in every if fnmatch.fnmatch(uri.lower(), wanted.lower())]
    if not found:
        raise InputError(f"none of {len(every)} models is called anything like {pattern!r}")
    print(*found, sep="\n")


_MODEL_ARGUMENT = inspect.Parameter(
    "model",
    inspect.Parameter.KEYWORD_ONLY,
    annotation=Annotated[str, typer.Argument(help="scheme:name, such as timm:resnet18", metavar="MODEL")],
)


@app.command()
@with_signature([_MODEL_ARGUMENT, *model_options()])
def layers(**values: Any) -> None:
    """Show a model's layers in the order they run: what they are, and how large."""
    from .models import load_model

    model = load_model(values["model"], **model_settings(values))
    anatomy = model.anatomy
    table = _table("layer", "type", "shape", "calls", "parameters", "")
    for info in anatomy.layers.values():
        marks = ["the last map"] if info.name == anatomy.last_map else []
        if anatomy.head and info.name == anatomy.classifier:
            marks.append("CAM's weights")
        shape = "x".join(map(str, info.shape)) if info.shape is not None else "-"
        table.add_row(info.name, info.type, shape, str(info.calls), f"{info.parameters:,}", ", ".join(marks))
    console = _console()
    console.print(table)
    size = "x".join(map(str, model.input_size))
    head = f"CAM reads {anatomy.head.layer}" if anatomy.head else "no GAP + linear head, so no CAM"
    console.print(Text(f"{model.name}: pictures {size}, {model.class_count} classes, {head}", "dim"))


# --- results ---------------------------------------------------------------------------------


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="A folder that a run was saved in.")]) -> None:
    """Run a saved result again and say whether it came out the same."""
    from .running import replay as run_again

    outcome = run_again(folder)
    print(f"{folder}: {outcome}")
    if not outcome.same:
        raise typer.Exit(1)


@app.command()
@with_signature(
    [
        option("model", str | None, "--model", INPUT_HELP["model"], "Inputs", metavar="URI"),
        option(
            "image", list[str], "--image", INPUT_HELP["images"], "Inputs", default=[], metavar="FILE|FOLDER"
        ),
        *model_options(),
        option("out", str, "--out", "folder for the page [default gallery]", "Run",
               default="gallery", metavar="FOLDER"),
        option("only", list[str], "--only", "this method; repeatable", "Run", default=[], metavar="NAME"),
    ]
)  # fmt: skip
def demo(**values: Any) -> None:
    """Run every method on the small world that comes along, and make a page of what they show."""
    from .gallery import make_gallery

    console = _console()

    def tell(exhibit: Exhibit) -> None:
        said = Text(exhibit.failure, "red") if exhibit.failure else Text(exhibit.spec.summary)
        took = Text(f"{exhibit.seconds:6.1f} s  ", "dim")
        console.print(Text.assemble(took, (f"{exhibit.call:22}", "cyan"), said))

    gallery = make_gallery(
        values["out"], model=values["model"], settings=model_settings(values),
        images=values["image"], only=values["only"], tell=tell,
    )  # fmt: skip
    _tell_scores(console, gallery)
    for broken in gallery.broken:
        console.print(Text(f"broken plugin {broken.plugin.qualified}: {broken.reason}", "yellow"))
    failed = [exhibit.call for exhibit in gallery.exhibits if exhibit.failure]
    if failed:
        told = f"{len(failed)} of {len(gallery.exhibits)} methods gave no picture: {', '.join(failed)}"
        console.print(Text(told, "red"))
    print(gallery.page.resolve().as_uri())
    if failed and gallery.bundled:
        raise typer.Exit(1)


def _tell_scores(console: Console, gallery: Gallery) -> None:
    table = _table("where a map is highest", "in the object", "within 4 pixels", "by chance", "scenes")
    for name, score in gallery.scores.items():
        chance = f"{score.chance_inside:.0%}, {score.chance_near:.0%}"
        table.add_row(name, f"{score.inside:.0%}", f"{score.near:.0%}", chance, str(score.count))
    if gallery.scores:
        console.print("", table, "", sep="\n")
