"""Commands that list methods, plugins, models and layers."""

from __future__ import annotations

import fnmatch
import json
from typing import Annotated

import typer
from rich.text import Text

from ..errors import InputError
from ..registry.extensions import extensions
from ..registry.families import family_title
from ..registry.lookup import methods
from ..registry.plugins import incompatible_plugins
from .app import app, method_names, show_table
from .argument_rows import argument_rows


@app.command("list")
def list_methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List every method, by family."""
    told = []
    for family, plugins in methods.by_family().items():
        summaries = {n: p.summary() or "its module cannot be read" for n, p in plugins.items()}
        if not as_json:
            heading, _, about = family_title(family).partition(": ")
            show_table(
                f"{heading:22}", about, rows=[(Text(n, "cyan"), text) for n, text in summaries.items()]
            )
        for name, plugin in plugins.items():
            by = {"distribution": plugin.distribution, "version": plugin.version}
            told.append({"name": name, "id": plugin.id, "family": family, "summary": summaries[name]} | by)
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method.", autocompletion=method_names)],
    as_json: Annotated[bool, typer.Option("--json", help="The spec as JSON.")] = False,
) -> None:
    """Show all there is to know of a method: parameters, equation, sources, promises, cost."""
    spec = methods[name].spec
    if as_json:
        print(json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return
    about = f"{spec.title}   {spec.name}   {methods[name].distribution}"
    print(about, spec.summary, "", *filter(None, [spec.description]), sep="\n", end="\n\n")
    show_table("input, parameter", "option", "kind", "bounds", "default", "meaning", rows=argument_rows(spec))
    facts = [("needs", ", ".join(spec.needs).replace("_", " "))] if spec.needs else []
    if spec.cost:
        facts.append(("cost", f"forward {spec.cost.forward}; backward {spec.cost.backward}"))
    for promise in spec.invariants:
        told = promise.model_dump(exclude_none=True, exclude={"kind"}).items()
        facts.append(("promise", ", ".join([promise.kind.replace("_", " "), *(f"{k} {v}" for k, v in told)])))
    facts += [("source", f"{s.authors} {s.year}. {s.title}. {s.url}") for s in spec.references]
    show_table("gives", spec.returns, rows=facts)


@app.command()
def plugins(context: typer.Context) -> None:
    """List the plugins and their state; --debug shows in full what broke."""
    broken, other = methods.broken(), incompatible_plugins()
    states = {}
    for plugin, others in methods.shadowed().items():
        beside = ", ".join(other.qualified for other in others)
        states[plugin] = Text(f"ok, as {methods.shortest_name(plugin)}; {beside} has the same id", "yellow")
    states |= {p: Text(f"left alone: written for {p.entry_point.group}", "yellow") for p in other}
    states |= {b.plugin: Text(f"broken: {b.reason}", "red") for b in broken}
    every = (*methods.plugins.values(), *extensions.plugins(), *other)
    rows = [(p.id, f"{p.distribution} {p.version}", states.get(p, Text("ok", "green"))) for p in every]
    show_table("plugin", "distribution", "state", rows=rows)
    for failure in broken if context.obj["debug"] else ():
        print(f"{failure.plugin.qualified}\n{failure.traceback}")


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'timm:resnet*'.")] = "",
) -> None:
    """List the models that can be loaded, of all schemes."""
    from ..models.loading import loaders

    every = [f"{scheme}:{name}" for scheme, loader in loaders().items() for name in loader.names()]
    found = [uri for uri in every if fnmatch.fnmatch(uri.lower(), f"*{pattern.lower()}*")]
    if not found:
        raise InputError(f"none of {len(every)} models is called anything like {pattern!r}")
    print(*found, sep="\n")


@app.command()
def layers(model: Annotated[str, typer.Argument(help="scheme:name, such as timm:resnet18")]) -> None:
    """Show a model's layers in the order they run: what they are, and how large."""
    from ..models import load_model

    loaded = load_model(model)
    structure, rows = loaded.structure, []
    for name, info in structure.layers.items():
        shape = "x".join(map(str, info.shape or "-"))
        rows.append((name, info.type, shape, str(info.calls), f"{info.parameters:,}"))
    show_table("layer", "type", "shape", "calls", "parameters", rows=rows)
    size = "x".join(map(str, loaded.input_size))
    print(
        f"{loaded.name}: images {size}, {loaded.class_count} classes; last map {structure.last_map};",
        end=" ",
    )
    print(
        f"CAM's weights are {structure.classifier}" if structure.head else "no GAP + linear head, so no CAM"
    )
