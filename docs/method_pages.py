"""Documentation pages of the methods: one per method, from its spec, with the figure of its demo run."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import phosphene
import phosphene_plugins
from phosphene import MethodSpec, load_model, methods
from phosphene.files import write_file
from phosphene.parameter_text import bounds_text, default_text, input_help, kind_text, option_name
from phosphene.registry import family_title
from phosphene.results import Result
from phosphene.roles import ROLES
from phosphene.spec import Invariant, Relation
from phosphene_plugins.gallery._gallery_page import Source, make_exhibit
from phosphene_plugins.pages._single_file_page import picture

#: A figure's command and Python lines, its seconds, and a digest of the sources that it was drawn with.
Demo = dict[str, Any]
#: The files of a method.
_SUFFIXES = (".md", ".html", ".json")


def write_method_pages(folder: Path, log: Callable[[str], None]) -> None:
    """Write ``index.md`` and, for every first-party method, ``ID.md`` with its figure ``ID.html``.

    A figure is drawn again only where the package's sources differ from those it was drawn with; ``log`` is
    called with the name of each method that is drawn.
    """
    folder.mkdir(exist_ok=True)
    by_family = {
        family: {call: p.id for call, p in plugins.items() if p.distribution == "phosphene"}
        for family, plugins in methods.by_family().items()
    }
    calls = {call: id for ids in by_family.values() for call, id in ids.items()}
    for stale in {*folder.iterdir()} - {folder / f"{id}{e}" for id in calls.values() for e in _SUFFIXES}:
        stale.unlink()
    sources = sources_digest()
    for call, id in calls.items():
        demo = cached_demo(folder / id, sources) or draw(call, folder / id, sources, log)
        write_file(folder / f"{id}.md", method_page(methods[call].spec, demo))
    write_file(folder / "index.md", _index({family: ids for family, ids in by_family.items() if ids}))


def sources_digest() -> str:
    """A digest of everything that a figure depends on."""
    sha = hashlib.sha256(version("torch").encode())
    for package in (phosphene, phosphene_plugins):
        root = Path(package.__path__[0])
        for file in sorted(f for f in root.rglob("*") if f.is_file() and f.suffix != ".pyc"):
            sha.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return sha.hexdigest()


def cached_demo(stem: Path, sources: str) -> Demo | None:
    """The demo of an earlier build, if its figure was drawn with these sources."""
    figure, record = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".html", ".json"))
    if not (figure.is_file() and record.is_file()):
        return None
    demo: Demo = json.loads(record.read_text())
    return demo if demo["sources"] == sources else None


def draw(call: str, stem: Path, sources: str, log: Callable[[str], None]) -> Demo:
    """Run a method's demo, and write its figure and the commands that reproduce it."""
    log(f"drawing {call}")
    exhibit = make_exhibit(call, Source(load_model("builtin:shapes-vgg")))
    if exhibit.failure:
        raise RuntimeError(f"the demo of {call} failed: {exhibit.failure}")
    demo = {"command": exhibit.command, "python": exhibit.python, "seconds": exhibit.seconds}
    write_file(stem.with_name(f"{stem.name}.html"), picture(exhibit.rows, exhibit.spec.title))
    write_file(stem.with_name(f"{stem.name}.json"), json.dumps(demo | {"sources": sources}))
    return demo


def method_page(spec: MethodSpec, demo: Demo) -> str:
    """One method's page: figure, commands, description, signature, what is tested, cost and references."""
    parts = [
        f"# {spec.title}",
        spec.summary,
        f"```{{raw}} html\n:file: {spec.name}.html\n```",
        f"The figure above was made by:\n\n```text\n{demo['command']}\n```",
        f"```python\n{demo['python']}\n```",
        "## Description",
        *_prose(spec.description),
        "## Signature",
        "Options on the command line have the same names, with `--` before them and `-` for `_`.",
        _signature(spec),
        f"It returns {_article(spec.returns)} `{spec.returns}`: {_result(spec.returns)}",
    ]
    if spec.invariants:
        parts += ["## Invariants", "Tested for any model, image and parameters:"]
        parts += ["\n".join(f"- {invariant_text(i)}" for i in spec.invariants)]
    if spec.relations:
        parts += ["## Relations", "Tested by further calls on changed inputs:"]
        parts += ["\n".join(f"- `{relation}`: {relation_text(relation)}" for relation in spec.relations)]
    if spec.exempt:
        parts += ["## Exemptions", "Checks that do not hold, with the reason:"]
        parts += ["\n".join(f"- `{check}`: {_escaped(reason)}." for check, reason in spec.exempt.items())]
    if spec.oracle:
        parts += ["## Oracle", "Tested on an input whose right answer is known:"]
        parts += [f"> {_escaped(inspect.getdoc(spec.oracle) or spec.oracle.__name__)}"]
    parts += ["## Cost", _cost(spec, demo["seconds"])]
    if spec.references:
        sources = [f"- {r.authors} ({r.year}). [{r.title}]({r.url})." for r in spec.references]
        parts += ["## References", "\n".join(sources)]
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> list[str]:
    """A docstring's paragraphs: equations and code verbatim, section headings in bold, the rest prose."""
    parts: list[str] = []
    for paragraph in (p for p in re.split(r"\n\s*\n(?! )", text) if p.strip()):
        heading = re.match(r"(Args|Returns|Raises|Example|Source)(::?)[ \n]", paragraph)
        if heading is None:
            parts.append(f"```text\n{paragraph}\n```" if _is_equation(paragraph) else _escaped(paragraph))
            continue
        body = textwrap.dedent(paragraph[heading.end() :]).strip("\n")
        parts.append(f"**{heading[1]}**")
        parts.append(f"```python\n{body}\n```" if heading[2] == "::" else _escaped(body))
    return parts


def _is_equation(paragraph: str) -> bool:
    """Whether a paragraph is a formula: it does not end as a sentence does and contains a relation."""
    ends_as_sentence = paragraph.rstrip().endswith((".", ":"))
    return not ends_as_sentence and bool(re.search(r" = | <- |\bmin_|\bmax_| : ", paragraph))


def _escaped(text: str) -> str:
    """Plain text as Markdown that displays the same; text in double back-quotes is code."""
    pieces = re.split(r"(``.+?``)", text, flags=re.DOTALL)
    escaped = [p if p.startswith("``") else re.sub(r"([\\*_<>\[\]|#$~])", r"\\\1", p) for p in pieces]
    return "".join(escaped)


def _signature(spec: MethodSpec) -> str:
    """Inputs and parameters in one table."""
    rows = [["name", "type", "bounds", "default", "description"], ["---"] * 5]
    for declared in spec.inputs:
        role = ROLES[declared.role]
        meaning = f"{role.description}; command line: {input_help(role.help, declared.default)}"
        rows.append([_named(declared.name, spec), "input", "", "", _escaped(meaning)])
    for name, schema in spec.params_schema["properties"].items():
        cells = [kind_text(schema), bounds_text(schema), default_text(schema), schema.get("description", "")]
        rows.append([_named(name, spec), *map(_escaped, cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _named(name: str, spec: MethodSpec) -> str:
    """A name, and its command-line option where the two differ."""
    option = option_name(name, spec.short_name)
    return f"`{name}`" if option == "--" + name.replace("_", "-") else f"`{name}`, `{option}`"


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


def _result(name: str) -> str:
    """The description of a result type."""
    words = _escaped(inspect.getdoc(Result.types[name]) or "")
    return words[0].lower() + words[1:]


def relation_text(relation: Relation) -> str:
    """A relation's summary."""
    return _escaped((type(relation).__doc__ or "").strip().partition("\n")[0])


def invariant_text(invariant: Invariant) -> str:
    """An invariant's summary, with the names of the field and the parameters that it refers to."""
    text = (type(invariant).__doc__ or "").strip().partition("\n")[0]
    for name, value in invariant.model_dump().items():
        text = text.replace(f"``{name}``", f"`{value}`")
    return f"{text} (If `{invariant.when}`.)" if invariant.when else text


def _cost(spec: MethodSpec, seconds: float) -> str:
    """The declared cost, its values for four images, and the seconds that the demo took."""
    duration = "less than 0.1" if seconds < 0.1 else f"{seconds:.1f}"
    duration = f"The figure above took {duration} s when this page was built."
    if not spec.cost:
        return f"No cost is declared. {duration}"
    formula = f"Images through the model: forward `{spec.cost.forward}`"
    formula += "." if str(spec.cost.backward) == "0" else f", backward `{spec.cost.backward}`."
    if spec.input("images"):
        method = methods[spec.name]
        demo = method.validate(spec.demonstration()[1])
        sizes = method.sizes(load_model("builtin:shapes-vgg"), demo)
        sample = {"images": 4, "height": 64, "width": 64, "dataset": 1000, "styles": 4, "checkpoints": 4}
        forward, backward = spec.cost.evaluate(demo, **sample, **sizes)
        formula += f" For four images of 64 x 64 pixels: {forward} forward, {backward} backward."
    return f"{formula} {duration}"


def _index(by_family: dict[str, dict[str, str]]) -> str:
    """All methods, by family."""
    parts = [
        "# Methods",
        "Each page is generated from the method's spec, its figure by running the method's demo.",
    ]
    for family, ids in by_family.items():
        name, _, about = family_title(family).partition(": ")
        parts += [f"## {name}", f"{about[:1].upper()}{about[1:]}." if about else ""]
        parts.append(
            "\n".join(
                f"- [{methods[c].spec.title}]({id}.md): {methods[c].spec.summary}" for c, id in ids.items()
            )
        )
    pages = "\n".join(id for ids in by_family.values() for id in ids.values())
    return "\n\n".join([*filter(None, parts), f"```{{toctree}}\n:hidden:\n\n{pages}\n```"]) + "\n"
