"""The modules of the core form no import cycle, imports for type checkers and inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "core"
#: Its signatures name the arguments and results of hooks, so it alone refers to modules above it.
EXEMPT = "phosphene.registry.hookspecs"


def modules(root: Path) -> dict[str, Path]:
    """Every module of the core by its dotted name."""
    names = {}
    for path in sorted((root / "phosphene").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(name: str, path: Path, paths: dict[str, Path]) -> Iterator[str]:
    """The modules that a module imports anywhere in its source: also in functions and under TYPE_CHECKING."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            home = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                # ``from package import x`` imports the module package.x if it exists.
                yield f"{home}.{alias.name}" if f"{home}.{alias.name}" in paths else home
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def import_graph(root: Path) -> dict[str, set[str]]:
    """For each module those of the core that it imports."""
    paths = modules(root)
    return {name: {*imports_of(name, path, paths)} & paths.keys() - {name} for name, path in paths.items()}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                components.append(sorted(component))

    for name in graph:
        if name not in order:
            visit(name)
    return components


def remove_module(graph: dict[str, set[str]], name: str) -> dict[str, set[str]]:
    return {module: others - {name} for module, others in graph.items() if module != name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph(CORE)


def test_no_modules_import_each_other(graph: dict[str, set[str]]) -> None:
    assert cycles(remove_module(graph, EXEMPT)) == []


def test_spec_and_results_do_not_import_the_registry(graph: dict[str, set[str]]) -> None:
    for name, others in graph.items():
        if name.startswith(("phosphene.spec", "phosphene.results")):
            assert not [other for other in others if other.startswith("phosphene.registry")], name


def test_imports_of_every_kind_are_counted(tmp_path: Path) -> None:
    package = tmp_path / "phosphene"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sub" / "__init__.py").write_text("from .a import x\n")
    (package / "sub" / "a.py").write_text("import torch\ndef f():\n    from ..b import y\n")
    (package / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .sub import a\n"
    )
    imports = import_graph(tmp_path)
    assert imports == {
        "phosphene": set(),
        "phosphene.b": {"phosphene.sub.a"},
        "phosphene.sub": {"phosphene.sub.a"},
        "phosphene.sub.a": {"phosphene.b"},
    }
    assert cycles(imports) == [["phosphene.b", "phosphene.sub.a"]]
    assert cycles(remove_module(imports, "phosphene.b")) == []
