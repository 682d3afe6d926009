"""Commands that list methods, plugins, models and layers."""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.text import Text

from ..errors import InputError
from ..registry.extensions import extensions
from ..registry.families import family_title
from ..registry.lookup import methods
from ..registry.plugins import Plugin, import_costs, incompatible_plugins, shadowed_distributions
from .app import app, method_names, show_table
from .model_options import ModelTask, Pretrained, Weights, model_settings

_AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command("list")
def list_methods(as_json: _AsJson = False) -> None:
    """List every method, by family."""
    entries = []
    for family, plugins in methods.by_family().items():
        outlines = {name: methods.outline(plugin) for name, plugin in plugins.items()}
        summaries = {n: o.summary or "(no summary: its module cannot be read)" for n, o in outlines.items()}
        if not as_json:
            _print_family(family, summaries)
        for name, plugin in plugins.items():
            entry = {"name": name, "id": plugin.id, "title": outlines[name].title, "family": family}
            origin = {"distribution": plugin.distribution, "version": plugin.version}
            entries.append(entry | {"summary": summaries[name]} | origin)
    if as_json:
        print(json.dumps(entries, indent=2, ensure_ascii=False))


def _print_family(family: str, summaries: Mapping[str, str]) -> None:
    """Print a family's methods, names and summaries, under its heading."""
    heading, _, about = family_title(family).partition(": ")
    show_table(f"{heading:22}", about, rows=[(Text(n, "cyan"), text) for n, text in summaries.items()])


@app.command()
def find(
    text: Annotated[
        str, typer.Argument(help="Words of the title, name, summary, description or a reference.")
    ] = "",
    family: Annotated[list[str], typer.Option(help="Family, or one of several.")] = [],  # noqa: B006
    tags: Annotated[list[str], typer.Option(help="Tags that the method has.")] = [],  # noqa: B006
    needs: Annotated[list[str], typer.Option(help="What the method needs.")] = [],  # noqa: B006
    accepts: Annotated[list[str], typer.Option(help="Input roles that the method takes.")] = [],  # noqa: B006
    returns: Annotated[list[str], typer.Option(help="Result type, or one of several.")] = [],  # noqa: B006
    without: Annotated[
        list[str],
        typer.Option(help="Tags, needs, input roles, families and result types that it must not have."),
    ] = [],  # noqa: B006
    reference: Annotated[str, typer.Option(help="Words of a reference's authors, title, key or URL.")] = "",
    year: Annotated[
        str, typer.Option(metavar="YEAR|YEAR-YEAR", help="Year of a reference, or first and last year.")
    ] = "",
    max_forward: Annotated[
        int | None,
        typer.Option(help="Largest number of forward passes for one image, by default parameters."),
    ] = None,
    max_backward: Annotated[
        int | None, typer.Option(help="Largest number of backward passes; 0 selects black-box methods.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Find methods by text, family, tags, needs, inputs, result, reference and cost; exit code 1 for none.

    Options that list words may be repeated, or separated by commas: --needs gradients,dataset.
    """
    matching = methods.find(
        text,
        family=_split(family),
        tags=_split(tags),
        needs=_split(needs),
        accepts=_split(accepts),
        returns=_split(returns),
        without=_split(without),
        reference=reference,
        year=_read_year(year),
        max_forward=max_forward,
        max_backward=max_backward,
    )
    if as_json:
        documents = [
            {**info.document, "passes": info.passes, "distribution": info.distribution} for info in matching
        ]
        print(json.dumps(documents, indent=2, ensure_ascii=False))
    else:
        rows = [
            (Text(methods.shortest_name(info.plugin), "cyan"), info.title, info.summary) for info in matching
        ]
        if rows:
            show_table("method", "title", "summary", rows=rows)
    if not matching:
        print(_no_match(text), file=sys.stderr)
        raise typer.Exit(1)


def _no_match(text: str) -> str:
    """What is said where no method matches, with the nearest words of names, titles and summaries."""
    if not text:
        return "no method has all of these properties"
    known = set()
    for plugins_of_family in methods.by_family().values():
        for name, plugin in plugins_of_family.items():
            outline = methods.outline(plugin)
            known |= {name, *re.findall(r"[a-z0-9]{3,}", f"{name} {outline.title} {outline.summary}".lower())}
    nearest = []
    for word in text.lower().split():
        if word not in known:
            nearest += difflib.get_close_matches(word, sorted(known), n=2, cutoff=0.6)
    hint = f" - did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return f"no method matches {text!r}{hint}"


def _split(values: list[str]) -> list[str]:
    return [word.strip() for value in values for word in value.split(",")]


def _read_year(text: str) -> int | tuple[int, int] | None:
    """The year or the range of years that an option names."""
    if not text:
        return None
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)):
        raise InputError(f"--year {text!r} should be a year, 2017, or the first and the last: 2014-2017")
    return (int(first), int(last)) if dash else int(first)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name or title of a method.", autocompletion=method_names)],
    as_json: _AsJson = False,
) -> None:
    """Show a method's parameters, equation, sources, invariants, relations and cost."""
    from .argument_rows import document_rows

    info = methods.info(name)
    spec = info.document
    if as_json:
        print(json.dumps(spec, indent=2, ensure_ascii=False))
        return
    about = f"{info.title}   {info.name}   {info.distribution}"
    print(about, info.summary, "", *filter(None, [spec["description"]]), sep="\n", end="\n\n")
    headings = ("input, parameter", "option", "type", "bounds", "default", "meaning")
    properties = spec["params_schema"]["properties"]
    rows = document_rows(info.plugin.short_name, spec["inputs"], properties, info.roles)
    show_table(*headings, rows=rows)
    facts = [("needs", ", ".join(info.needs).replace("_", " "))] if info.needs else []
    if cost := spec["cost"]:
        facts.append(("cost", f"forward {cost['forward']}; backward {cost['backward']}"))
    facts += [("invariant", _declared_text(invariant)) for invariant in spec["invariants"]]
    facts += [("relation", relation) for relation in info.relations]
    facts += [("exempt", f"{check}: {reason}") for check, reason in spec["exempt"].items()]
    facts += [("source", f"{s['authors']} {s['year']}. {s['title']}. {s['url']}") for s in info.references]
    show_table("returns", info.returns, rows=facts)


def _declared_text(declared: Mapping[str, Any]) -> str:
    """An invariant in words: its kind, and the settings that it has."""
    settings = [f"{key} {value}" for key, value in declared.items() if key != "kind" and value is not None]
    return ", ".join([declared["kind"].replace("_", " "), *settings])


#: CPU seconds of an import from which ``phosphene plugins`` reports it.
SLOW_IMPORT = 0.5


@app.command()
def plugins(context: typer.Context) -> None:
    """List the plugins and their state, slow imports and shadowed distributions among it.

    --debug prints the tracebacks of broken ones.
    """
    from ..registry import method  # noqa: F401  (torch and the core, which no plugin is charged with)

    broken, other = methods.broken(), incompatible_plugins()
    notes: dict[Plugin, list[str]] = {}
    for plugin, others in methods.shadowed().items():
        beside = ", ".join(other.qualified for other in others)
        notes[plugin] = [f"as {methods.shortest_name(plugin)}; {beside} has the same id"]
    for plugin, cost in import_costs.items():
        if cost.seconds >= SLOW_IMPORT:
            libraries = f" with {', '.join(cost.libraries)}" if cost.libraries else ""
            notes.setdefault(plugin, []).append(f"slow import: {cost.seconds:.1f} CPU s{libraries}")
    states = {plugin: Text(f"ok, {'; '.join(texts)}", "yellow") for plugin, texts in notes.items()}
    states |= {p: Text(f"not loaded: written for {p.entry_point.group}", "yellow") for p in other}
    states |= {b.plugin: Text(f"broken: {b.reason}", "red") for b in broken}
    listed = (*methods.plugins.values(), *extensions.plugins(), *other)
    rows = [(p.id, f"{p.distribution} {p.version}", states.get(p, Text("ok", "green"))) for p in listed]
    show_table("plugin", "distribution", "state", rows=rows)
    for hidden, used in shadowed_distributions():
        print(f"not used: {hidden}, shadowed by {used}")
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
    weights: Weights = None,
    pretrained: Pretrained = False,
    model_task: ModelTask = None,
) -> None:
    """List a model's layers in the order they run, with type, output shape and number of parameters."""
    from ..models import load_model

    values = {"weights": weights, "pretrained": pretrained, "model_task": model_task}
    loaded = load_model(model, **model_settings(values))
    structure, rows = loaded.structure, []
    for name, info in structure.layers.items():
        shape = "x".join(map(str, info.shape or "-"))
        rows.append((name, info.type, shape, str(info.calls), f"{info.parameters:,}"))
    show_table("layer", "type", "shape", "calls", "parameters", rows=rows)
    size = "x".join(map(str, loaded.input_size))
    head = f"CAM weights: {structure.classifier}" if structure.head else "no GAP + linear head, so no CAM"
    print(f"{loaded.name}: input {size}; {loaded.class_count} classes; last map {structure.last_map}; {head}")
