"""One page per method, made from its spec, with the picture that its demo run gives."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import phosphene
import phosphene_plugins
from phosphene import MethodSpec, load_model, methods
from phosphene.parameter_text import bounds_text, default_text, kind_text, option_name
from phosphene.registry import family_title
from phosphene.results import Result
from phosphene.spec import Invariant
from phosphene_plugins.gallery._gallery_page import make_exhibit
from phosphene_plugins.pages._single_file_page import picture, write_whole

#: A picture's command and Python lines, how long it took, and a digest of what it was drawn with.
Again = dict[str, Any]
#: The files of a method.
_KINDS = (".md", ".html", ".json")
#: What an input of each role is.
_ROLES = {
    "model": "a model; left out, the bundled one",
    "images": "pictures; left out, bundled scenes",
    "labels": "a class for each image; left out, what the model predicts",
    "start": "a picture to begin the search from, one for all images or one each; left out, random noise",
    "guide": "pictures whose forms are wanted, of any size; left out, none",
    "target": "what the score is of; left out, the predicted class",
    "dataset": "many pictures, read in batches; left out, bundled scenes",
    "texture": "one picture of a texture; left out, a bundled one",
    "styles": "pictures of styles; left out, bundled textures",
    "stylizer": "a network that `fast_style_fit` trained; left out, the bundled one",
    "adaptive_stylizer": "a network that `adaptive_style_fit` trained; left out, the bundled one",
    "denoiser": "a diffusion model: a diffusers pipeline's folder, a `Denoiser`; left out, the bundled one",
    "generator": "a decoder from codes to pictures, a `Generator`; left out, the bundled autoencoder's",
}


def write_method_pages(folder: Path, tell: Callable[[str], None]) -> None:
    """Write ``index.md`` and, for every method of this project, ``ID.md`` with its picture ``ID.html``.

    A picture is drawn again only where the package's sources are other than those it was drawn with;
    ``tell`` hears which.
    """
    folder.mkdir(exist_ok=True)
    shelves = {
        family: {call: p.id for call, p in plugins.items() if p.distribution == "phosphene"}
        for family, plugins in methods.by_family().items()
    }
    calls = {call: id for shelf in shelves.values() for call, id in shelf.items()}
    for stale in {*folder.iterdir()} - {folder / f"{id}{e}" for id in calls.values() for e in _KINDS}:
        stale.unlink()
    sources = sources_digest()
    for call, id in calls.items():
        shown = kept(folder / id, sources) or draw(call, folder / id, sources, tell)
        write_whole(folder / f"{id}.md", method_page(methods[call].spec, shown))
    write_whole(folder / "index.md", _index({f: shelf for f, shelf in shelves.items() if shelf}))


def sources_digest() -> str:
    """A digest of everything that a picture depends on."""
    sha = hashlib.sha256(version("torch").encode())
    for package in (phosphene, phosphene_plugins):
        root = Path(package.__path__[0])
        for file in sorted(f for f in root.rglob("*") if f.is_file() and f.suffix != ".pyc"):
            sha.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return sha.hexdigest()


def kept(stem: Path, sources: str) -> Again | None:
    """How to make a picture again, if there is one that was drawn with these sources."""
    drawn, told = (stem.with_name(f"{stem.name}{kind}") for kind in (".html", ".json"))
    if not (drawn.is_file() and told.is_file()):
        return None
    again: Again = json.loads(told.read_text())
    return again if again["sources"] == sources else None


def draw(call: str, stem: Path, sources: str, tell: Callable[[str], None]) -> Again:
    """Run a method's demo: its picture is written, and beside it how to make it again."""
    tell(f"drawing {call}")
    exhibit = make_exhibit(call, load_model("builtin:shapes-vgg"))
    if exhibit.failure:
        raise RuntimeError(f"{call} gave no picture: {exhibit.failure}")
    again = {"command": exhibit.command, "python": exhibit.python, "seconds": exhibit.seconds}
    write_whole(stem.with_name(f"{stem.name}.html"), picture(exhibit.rows, exhibit.spec.title))
    write_whole(stem.with_name(f"{stem.name}.json"), json.dumps(again | {"sources": sources}))
    return again


def method_page(spec: MethodSpec, again: Again) -> str:
    """One method's page: its picture, how to make it, equation, signature, promises, cost and sources."""
    parts = [
        f"# {spec.title}",
        spec.summary,
        f"```{{raw}} html\n:file: {spec.name}.html\n```",
        f"The picture above, made again:\n\n```text\n{again['command']}\n```",
        f"```python\n{again['python']}\n```",
        "## What it does",
        *_prose(spec.description),
        "## Signature",
        "Options on the command line have the same names, with `--` before them and `-` for `_`.",
        _signature(spec),
        f"It returns {_article(spec.returns)} `{spec.returns}`: {_result(spec.returns)}",
    ]
    if spec.invariants:
        parts += ["## Promises", "Tested for any model, picture and parameters:"]
        parts += ["\n".join(f"- {promise(i)}" for i in spec.invariants)]
    if spec.oracle:
        parts += ["## Known answer", "Tested where the right answer is known:"]
        parts += [f"> {_escaped(inspect.getdoc(spec.oracle) or spec.oracle.__name__)}"]
    parts += ["## Cost", _cost(spec, again["seconds"])]
    if spec.references:
        sources = [f"- {r.authors} ({r.year}). [{r.title}]({r.url})." for r in spec.references]
        parts += ["## References", "\n".join(sources)]
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> list[str]:
    """A docstring's paragraphs: those that are equations as they stand, the others as prose."""
    found = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    return [f"```text\n{p}\n```" if _is_equation(p) else _escaped(p) for p in found]


def _is_equation(paragraph: str) -> bool:
    """Whether a paragraph is a formula: it is no sentence, and says what something is or becomes."""
    ends_as_sentence = paragraph.rstrip().endswith((".", ":"))
    return not ends_as_sentence and bool(re.search(r" = | <- |\bmin_|\bmax_| : ", paragraph))


def _escaped(text: str) -> str:
    """Plain text as Markdown that shows the same; what stands in double back-quotes is code."""
    pieces = re.split(r"(``.+?``)", text, flags=re.DOTALL)
    shown = [p if p.startswith("``") else re.sub(r"([\\*_<>\[\]|#$~])", r"\\\1", p) for p in pieces]
    return "".join(shown)


def _signature(spec: MethodSpec) -> str:
    """Inputs and parameters in one table."""
    rows = [["name", "kind", "bounds", "default", "meaning"], ["---"] * 5]
    for given in spec.inputs:
        rows.append([_named(given.name, spec), "input", "", "", _ROLES.get(given.role, given.role)])
    for name, schema in spec.params_schema["properties"].items():
        cells = [kind_text(schema), bounds_text(schema), default_text(schema), schema.get("description", "")]
        rows.append([_named(name, spec), *map(_escaped, cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _named(name: str, spec: MethodSpec) -> str:
    """A name, and its option on the command line where that is called otherwise."""
    option = option_name(name, spec.short_name)
    return f"`{name}`" if option == "--" + name.replace("_", "-") else f"`{name}`, `{option}`"


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


def _result(name: str) -> str:
    """What a result holds, in its own words."""
    words = _escaped(inspect.getdoc(Result.types[name]) or "")
    return words[0].lower() + words[1:]


def promise(invariant: Invariant) -> str:
    """What an invariant says, of the field and the parameters that it says it of."""
    text = (type(invariant).__doc__ or "").strip().partition("\n")[0]
    for name, value in invariant.model_dump().items():
        text = text.replace(f"``{name}``", f"`{value}`")
    return f"{text} (When `{invariant.when}`.)" if invariant.when else text


def _cost(spec: MethodSpec, seconds: float) -> str:
    """The declared formula, its numbers where they need nothing but a picture, and the time it took here."""
    took = "less than 0.1" if seconds < 0.1 else f"{seconds:.1f}"
    took = f"The picture above took {took} s when this page was made."
    if not spec.cost:
        return f"It declares none. {took}"
    formula = f"Images through the model: forward `{spec.cost.forward}`"
    formula += "." if spec.cost.backward == "0" else f", backward `{spec.cost.backward}`."
    if spec.input("images"):
        method = methods[spec.name]
        demo = method.validate(spec.demonstration()[1])
        sizes = method.sizes(load_model("builtin:shapes-vgg"), demo)
        pictures = {"images": 4, "height": 64, "width": 64, "dataset": 1000, "styles": 4}
        forward, backward = spec.cost.evaluate(demo, **pictures, **sizes)
        formula += f" For the four pictures above: {forward} forward, {backward} backward."
    return f"{formula} {took}"


def _index(shelves: dict[str, dict[str, str]]) -> str:
    """All methods, by family."""
    parts = ["# Methods", "Each page is made from the method itself, its picture by running it."]
    for family, shelf in shelves.items():
        name, _, about = family_title(family).partition(": ")
        parts += [f"## {name}", f"{about[:1].upper()}{about[1:]}." if about else ""]
        entries = [
            f"- [{methods[c].spec.title}]({id}.md): {methods[c].spec.summary}" for c, id in shelf.items()
        ]
        parts += ["\n".join(entries)]
    listed = "\n".join(id for shelf in shelves.values() for id in shelf.values())
    return "\n\n".join([*filter(None, parts), f"```{{toctree}}\n:hidden:\n\n{listed}\n```"]) + "\n"
