"""Names are nouns or a verb and its object, and prose has American spelling, as CONTRIBUTING.md asks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("core", "plugins") for path in (ROOT / folder).rglob("*.py"))
#: Participles and metaphors that say nothing about the value that they name.
MEANINGLESS = set(
    [
        "told",
        "kept",
        "found",
        "given",
        "made",
        "seen",
        "shown",
        "said",
        "gave",
        "wanted",
        "judged",
        "taken",
        "held",
        "room",
        "dear",
        "heaps",
        "abreast",
        "asleep",
        "whole",
        "place",
        "places",
        "beaten",
        "look",
        "aim",
        "alike",
        "uphill",
        "climb",
    ]
)


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, argument, attribute, function and class that a module binds."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def test_no_name_is_a_participle_or_a_metaphor() -> None:
    names = [
        f"{file.relative_to(ROOT)}, line {line}: {name}"
        for file in FILES
        for line, name in bound_names(ast.parse(file.read_text()))
        if name.strip("_") in MEANINGLESS
    ]
    assert names == []


#: Texts that are checked for their spelling: code, documentation and templates, without the changelog.
TEXTS = sorted(
    path
    for folder in ("core", "plugins", "docs")
    for suffix in ("py", "pyi", "md", "j2")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
    if not {"_build", "methods"} & {*path.relative_to(ROOT).parts}
) + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
_STEMS = (
    "categor|character|custom|discret|equal|emphas|factor|final|general|initial|linear|local|maxim|memor|minim"
    "|neutral|normal|optim|organ|orthogonal|parametr|penal|quant|random|real|recogn|regular|serial|special"
    "|stabil|standard|styl|summar|symmetr|synthes|util|vector|visual"
)
BRITISH = re.compile(
    rf"\b[a-z]*(?:{_STEMS})is(?:e|ed|es|ing|er|ers|ation|ations|able)\b|\b[a-z]*colour|\bcentr(?:e|es|ed|ing)\b"
    r"|\bneighbour|\b(?:behavi|fav|hon)our|\bartefact|\banalys(?:e|ed|ing)\b|\b(?:un)?label(?:led|ling)\b"
    r"|\bmodell(?:ed|ing)\b|\bcancell(?:ed|ing)\b|\bcatalogue|(?:\b|_)grey(?:\b|_)",
    re.IGNORECASE,
)
#: Titles, names in results, keys of random numbers, files, and patterns that match both spellings.
QUOTED = (
    *("Deep Inside Convolutional Networks: Visualising", "Visualising and Understanding"),
    *("own colours", 'key, "colour"', "|centre|", '"grey": 0.5', '("gray", "grey")'),
)


def test_spelling_is_american() -> None:
    words = []
    for file in TEXTS:
        text = re.sub(r"https?://\S+", "", file.read_text())
        for quoted in QUOTED:
            text = text.replace(quoted, "")
        words += [f"{file.relative_to(ROOT)}: {match[0]}" for match in BRITISH.finditer(text)]
    assert words == []
