"""Names in the core and the plugins are nouns or a verb and its object, as CONTRIBUTING.md asks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_name_is_a_participle_or_a_metaphor(file: Path) -> None:
    names = [
        (line, name)
        for line, name in bound_names(ast.parse(file.read_text()))
        if name.strip("_") in MEANINGLESS
    ]
    assert names == []
