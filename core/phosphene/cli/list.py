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
    entries = []
    for family, plugins in methods.by_family().items():
        summaries = {n: p.summary() or "(no summary: its module cannot be read)" for n, p in plugins.items()}
        if not as_json:
            heading, _, about = family_title(family).partition(": ")
            show_table(
                f"{heading:22}", about, rows=[(Text(n, "cyan"), text) for n, text in summaries.items()]
            )
        for name, plugin in plugins.items():
            origin = {"distribution": plugin.distribution, "version": plugin.version}
            entry = {"name": name, "id": plugin.id, "family": family, "summary": summaries[name]}
            entries.append(entry | origin)
    if as_json:
        print(json.dumps(entries, indent=2, ensure_ascii=False))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a method.", autocompletion=method_names)],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show a method's parameters, equation, sources, invariants, relations and cost."""
    method = methods[name]
    spec = method.spec
    if as_json:
        print(json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return
    about = f"{spec.title}   {spec.name}   {method.distribution}"
    print(about, spec.summary, "", *filter(None, [spec.description]), sep="\n", end="\n\n")
    headings = ("input, parameter", "option", "type", "bounds", "default", "meaning")
    show_table(*headings, rows=argument_rows(spec))
    facts = [("needs", ", ".join(spec.needs).replace("_", " "))] if spec.needs else []
    if spec.cost:
        facts.append(("cost", f"forward {spec.cost.forward}; backward {spec.cost.backward}"))
    for invariant in spec.invariants:
        settings = [(k, getattr(invariant, k)) for k in type(invariant).model_fields if k != "kind"]
        words = [f"{key} {value}" for key, value in settings if value is not None]
        facts.append(("invariant", ", ".join([invariant.kind.replace("_", " "), *words])))
    facts += [("relation", str(relation)) for relation in spec.relations]
    facts += [("exempt", f"{check}: {reason}") for check, reason in spec.exempt.items()]
    facts += [("source", f"{s.authors} {s.year}. {s.title}. {s.url}") for s in spec.references]
    show_table("returns", spec.returns, rows=facts)


@app.command()
def plugins(context: typer.Context) -> None:
    """List the plugins and their state; --debug prints the tracebacks of broken ones."""
    broken, other = methods.broken(), incompatible_plugins()
    states = {}
    for plugin, others in methods.shadowed().items():
        beside = ", ".join(other.qualified for other in others)
        states[plugin] = Text(f"ok, as {methods.shortest_name(plugin)}; {beside} has the same id", "yellow")
    states |= {p: Text(f"not loaded: written for {p.entry_point.group}", "yellow") for p in other}
    states |= {b.plugin: Text(f"broken: {b.reason}", "red") for b in broken}
    listed = (*methods.plugins.values(), *extensions.plugins(), *other)
    rows = [(p.id, f"{p.distribution} {p.version}", states.get(p, Text("ok", "green"))) for p in listed]
    show_table("plugin", "distribution", "state", rows=rows)
    for failure in broken if context.obj["debug"] else ():
        print(f"{failure.plugin.qualified}\n{failure.traceback}")


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern: 'timm:resnet*'.")] = "",
) -> None:
    """List the models that can be loaded by name."""
    from ..models.loading import loaders

    uris = [f"{scheme}:{name}" for scheme, loader in loaders().items() for name in loader.names()]
    matching = [uri for uri in uris if fnmatch.fnmatch(uri.lower(), f"*{pattern.lower()}*")]
    if not matching:
        raise InputError(f"none of {len(uris)} models matches {pattern!r}")
    print(*matching, sep="\n")


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="Model as scheme:name, such as timm:resnet18.")],
) -> None:
    """List a model's layers in the order they run, with type, output shape and number of parameters."""
    from ..models import load_model

    loaded = load_model(model)
    structure, rows = loaded.structure, []
    for name, info in structure.layers.items():
        shape = "x".join(map(str, info.shape or "-"))
        rows.append((name, info.type, shape, str(info.calls), f"{info.parameters:,}"))
    show_table("layer", "type", "shape", "calls", "parameters", rows=rows)
    size = "x".join(map(str, loaded.input_size))
    head = f"CAM weights: {structure.classifier}" if structure.head else "no GAP + linear head, so no CAM"
    print(f"{loaded.name}: input {size}; {loaded.class_count} classes; last map {structure.last_map}; {head}")
