"""The public API as lines of text, from the sources; ``python -m tests.core.public_api`` keeps its record.

Public are the names of ``phosphene.__all__`` and, of the modules below, every name without an underscore
that is defined in them (not merely imported). The record is renewed only when the changelog names what
changed, once more than it did before; so how often it names everything is in the record, too.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = Path("tests", "core", "public_api.json")
CHANGELOG = Path("CHANGELOG.md")
#: As CONTRIBUTING.md tells them. A package is what its stub or its ``__all__`` says.
_BESIDE = (
    "attacks builtin.answers builtin.clip builtin.image_adapter builtin.part_scenes builtin.scenes data "
    "errors files generative hooks images images.charts models optimize parameter_text registry results "
    "roles spec targets testing training"
)
MODULES = ("phosphene", *(f"phosphene.{name}" for name in _BESIDE.split()))


@functools.cache
def _syntax_tree(text: str) -> ast.Module:
    """The syntax tree of a text, which nobody changes: most texts are read many times."""
    return ast.parse(text)


class Sources:
    """The modules of a checkout as syntax trees."""

    def __init__(self, root: Path) -> None:
        self.core = root / "core"
        self.read: dict[str, ast.Module] = {}

    def tree(self, module: str) -> ast.Module:
        if module not in self.read:
            self.read[module] = self._parsed(module)
        return self.read[module]

    def _parsed(self, module: str) -> ast.Module:
        path = self.core.joinpath(*module.split("."))
        # A stub says what a package exports where there is one; only packages have one.
        files = (path / "__init__.pyi", path / "__init__.py", path.with_suffix(".py"))
        return _syntax_tree(next(file for file in files if file.is_file()).read_text())

    def names(self, module: str) -> dict[str, str]:
        """The public names of a module, each with the module that defines it."""
        tree = self.tree(module)
        imported: dict[str, str] = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                parents = module.split(".")
                home = ".".join([*parents[: len(parents) - node.level + 1], node.module or ""])
                imported |= {alias.asname or alias.name: home for alias in node.names}
        if self._is_package(module):
            # What a package exports may itself come from another package's exports.
            return {
                n: self.names(home)[n] if self._is_package(home) else home for n, home in imported.items()
            }
        return {name: module for name, _ in _definitions(tree) if not name.startswith("_")}

    def _is_package(self, module: str) -> bool:
        return self.core.joinpath(*module.split(".")).is_dir()

    def definition(self, module: str, name: str) -> ast.stmt:
        return dict(_definitions(self.tree(module)))[name]


#: What a signature is written with; nobody imports these.
_VARIABLES = ("TypeVar", "ParamSpec")


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            made = node.value.func if isinstance(node.value, ast.Call) else None
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and not (made and ast.unparse(made) in _VARIABLES):
                    yield target.id, node


def lines_of(root: Path = ROOT) -> list[str]:
    """Every public name of a checkout with its signature, its fields, its members: one line each."""
    sources, lines = Sources(root), []
    #: The package that exports a definition, so that ``phosphene`` refers to it instead of repeating it.
    packages = {(home, name): m for m in MODULES[1:] for name, home in sources.names(m).items()}
    for module in MODULES:
        for name, home in sources.names(module).items():
            package = packages.get((home, name), module)
            if module == "phosphene" and package != module:
                lines.append(f"{module}.{name} is {package}.{name}")
                continue
            node = sources.definition(home, name)
            lines += _described(f"{module}.{name}", node)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                # One object of a class of its own: the class's members are its members.
                made = dict(_definitions(sources.tree(home))).get(ast.unparse(node.value.func))
                lines += _members(f"{module}.{name}", made) if isinstance(made, ast.ClassDef) else []
    return sorted(set(lines))


#: Decorators that change how a thing is used; others are the module's own affair.
_MARKS = [
    "property",
    "classmethod",
    "staticmethod",
    "contextmanager",
    "abstractmethod",
    "dataclass",
    "hookspec",
]
_SPECIAL = ("__init__", "__call__", "__getitem__", "__iter__", "__len__", "__enter__")


def _described(name: str, node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef():
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            yield f"{name}({ast.unparse(node.args)}){returns}{_marks(node)}"
        case ast.ClassDef():
            bases = ", ".join(map(ast.unparse, (*node.bases, *node.keywords)))
            yield f"{name}: class({bases}){_marks(node)}"
            yield from _members(name, node)
        case ast.AnnAssign():
            value = f" = {ast.unparse(node.value)}" if node.value else ""
            yield f"{name}: {ast.unparse(node.annotation)}{value}"
        case ast.Assign():
            yield f"{name} = {ast.unparse(node.value)}"


def _marks(node: ast.FunctionDef | ast.ClassDef) -> str:
    written = [ast.unparse(mark).replace("cached_property", "property") for mark in node.decorator_list]
    return "".join(f"  @{mark}" for mark in written if mark.partition("(")[0] in _MARKS)


def _members(owner: str, node: ast.ClassDef) -> Iterator[str]:
    """The public methods, fields and attributes of a class, and how it is made and called."""
    for name, member in _definitions(ast.Module(node.body, [])):
        if not name.startswith("_") or name in _SPECIAL:
            yield from _described(f"{owner}.{name}", member)
        if name in ("__init__", "__post_init__"):
            stored = [part for part in ast.walk(member) if isinstance(part, ast.Attribute)]
            names = [ast.unparse(part) for part in stored if isinstance(part.ctx, ast.Store)]
            yield from (f"{owner}.{n[5:]}" for n in names if re.fullmatch(r"self\.[a-z]\w*", n))


def mentions(text: str) -> Counter[str]:
    """How often each word stands in backticks."""
    return Counter(word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code))


def unreleased(root: Path = ROOT) -> str:
    """The changelog's "Unreleased" section."""
    _, heading, rest = (root / CHANGELOG).read_text().partition("\n## Unreleased\n")
    if not heading:
        raise SystemExit(f'{CHANGELOG} has no section "## Unreleased"')
    return re.split(r"^## ", rest, flags=re.MULTILINE)[0]


def recorded(root: Path = ROOT) -> dict[str, Any]:
    """The record; without a file nothing was ever public or told."""
    file = root / RECORD
    return json.loads(file.read_text()) if file.is_file() else {"api": [], "told": {}}


def changes(root: Path = ROOT) -> list[str]:
    """What differs from the record: lines that are gone with "- ", new ones with "+ "."""
    told = list(difflib.unified_diff(recorded(root)["api"], lines_of(root), n=0, lineterm=""))
    return [f"{line[0]} {line[1:]}" for line in told[2:] if not line.startswith("@@")]


def untold(root: Path = ROOT) -> list[str]:
    """Functions and classes that changed without the changelog naming them once more, under "Unreleased"."""
    before, now = recorded(root)["told"], mentions((root / CHANGELOG).read_text())
    unreleased_ones = mentions(unreleased(root))
    changed = dict.fromkeys(_function_or_class(line[2:]) for line in changes(root))
    return [n for n in changed if n not in unreleased_ones or now[n] <= before.get(n, 0)]


def _function_or_class(line: str) -> str:
    module = max((m for m in MODULES if line.startswith(f"{m}.")), key=len)
    return re.match(r"\w+", line.removeprefix(f"{module}."))[0]


def renew(root: Path = ROOT) -> None:
    """Record the API as it is now; SystemExit where the changelog does not tell what changed."""
    if missing := untold(root):
        names = ", ".join(f"`{name}`" for name in missing)
        raise SystemExit(f'not recorded: {CHANGELOG} says nothing new of {names} under "Unreleased"')
    told = dict(sorted(mentions((root / CHANGELOG).read_text()).items()))
    text = json.dumps({"api": lines_of(root), "told": told}, indent=1, ensure_ascii=False)
    new = (root / RECORD).with_suffix(".new")
    new.write_text(text + "\n")
    new.replace(root / RECORD)


if __name__ == "__main__":
    print(*changes(), sep="\n")
    renew()
    print(f"{RECORD} is the API as it is now", file=sys.stderr)
