"""Writes ``docs/mutation-scores.md``: the scores of all methods, or of the methods and modules named."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import get_args

from phosphene import methods
from phosphene.testing import MutationReport, MutationTests, mutation_score
from phosphene.testing.mutants import EQUIVALENT, generate_mutants

PAGE = Path(__file__).parent.parent / "docs" / "mutation-scores.md"
HEADER = """# Mutation scores

How many small changes of a method's own code its tests notice: `phosphene check NAME --mutate --mutants 40`.
Where a file has more mutants than that, 40 are drawn, or 25 where the oracle takes long. A mutant is
*explained* where it computes the same, for the reason that a comment in the source states.

Column "tests": "all" are the oracle, invariants, relations and the conformance kit's checks of results on
several cases; "own" are the oracle, invariants and relations, on one case each; "oracle" is the oracle alone.
Scores of the last two are lower bounds. Shared modules are tested by all methods that import them, or by the
methods that the column names. Methods of a result that display it are not changed. "code" is the start of the
SHA-256 digest of the code that was measured, without texts and types.

Modules of types, texts and display, in which nothing is changed, have no row. Neither have modules that are
tests or inputs of the kit: oracles, closed forms, cases, references of comparisons, relations and roles.
`python tests/mutation_scores.py --missing` lists the others without a row.

`python tests/mutation_scores.py NAME ...` measures methods and modules and writes their rows:

- `--tests own` or `--tests oracle` is quicker than all tests: an oracle that kills 90 % needs no others.
- `--by METHOD`, repeatable, tests a module by these methods alone: where many import it, or none, since it is
  in the core. `python tests/mutation_scores.py core/phosphene/images/blur.py --tests oracle --by occlusion`.
- `--mutants 25` draws fewer mutants of a file.

| method | mutants | of | killed | by the oracle | explained | score | tests | code |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""


def table_row(report: MutationReport, name: str, tests: str) -> str:
    """One row of the table; ``name`` of a shared module is its path."""
    by_oracle = sum(o.verdict == "killed" and o.test == "oracle" for o in report.outcomes)
    cells = [name, len(report.outcomes), report.total, report.count("killed"), by_oracle]
    cells += [report.count("explained"), f"{report.score:.0%}", tests, code_digest(name)]
    return f"| {' | '.join(map(str, cells))} |\n"


def code_digest(name: str) -> str:
    """The start of the digest of a method's or module's code: a row of other code is out of date."""
    file = PAGE.parent.parent / name
    if not name.endswith(".py"):
        file = Path(str(importlib.import_module(inspect.unwrap(methods[name]).__module__).__file__))
    return digest_of_source(file.read_text(encoding="utf-8"))


def digest_of_source(source: str) -> str:
    """The start of the SHA-256 digest of what mutants and tests depend on, not of texts and types."""
    code = ast.unparse(_WithoutTexts().visit(ast.parse(source)))
    explained = [line.strip() for line in source.splitlines() if EQUIVALENT in line]
    return hashlib.sha256("\n".join([code, *explained]).encode()).hexdigest()[:10]


class _WithoutTexts(ast.NodeTransformer):
    """Removes docstrings, annotations, imports, raised errors and what a method declares beside its tests."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            del node.body[0]
        return node

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Pass()

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        alias = isinstance(node.annotation, ast.Name) and node.annotation.id == "TypeAlias"
        node.annotation = ast.Constant(None)
        return None if alias else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call):
                decorator.keywords = [k for k in decorator.keywords if k.arg in _TESTS]
        return self.generic_visit(node)


_TESTS = {"oracle", "invariants", "relations", "exempt"}


def measured_scores() -> dict[str, tuple[int, str]]:
    """The score in percent and the digest of the measured code of each row of the page."""
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.endswith("|")]
    return {
        row[1].strip(): (int(row[7].strip().rstrip("%")), row[9].strip())
        for row in rows
        if row[2].strip().isdecimal()
    }


#: Names of modules that are tests, or inputs of the conformance kit. ``_query_oracle`` is that of an attack.
TEST_MODULE = re.compile(
    r"_(?!query)(.*_)?(cases|closed_forms|oracle|reference|relations|roles?)|_(oracle|reference|textbook)_.*"
)


def modules_without_row() -> dict[str, int]:
    """The plugins' private modules that have mutants and no row, and how many mutants."""
    root, measured, missing = PAGE.parent.parent, measured_scores(), {}
    for path in sorted((root / "plugins" / "phosphene_plugins").rglob("_*.py")):
        name = str(path.relative_to(root))
        if path.stem == "__init__" or TEST_MODULE.fullmatch(path.stem) or name in measured:
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        functions = [part.name for part in body if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
        _, total = generate_mutants(path, functions, 1)
        missing |= {name: total} if total else {}
    return missing


def write_rows(rows: list[str]) -> None:
    """Write the page with these rows, and the earlier ones of other names."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True) if PAGE.is_file() else []
    earlier = [line for line in lines if line.startswith("| ") and line.split("|")[2].strip().isdecimal()]
    by_name = {row.split("|")[1].strip(): row for row in [*earlier, *rows]}
    PAGE.write_text(HEADER + "".join(by_name[name] for name in sorted(by_name)), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Add rows to the page, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="methods or paths of modules; default: all methods")
    parser.add_argument("--jobs", type=int, help="processes at once; default: the number of CPUs")
    parser.add_argument("--mutants", type=int, default=40, help="at most so many of a file")
    parser.add_argument("--tests", choices=get_args(MutationTests), default="all", help="which tests run")
    parser.add_argument(
        "--by", metavar="METHOD", action="append", default=[], help="whose tests run; repeatable"
    )
    parser.add_argument("--missing", action="store_true", help="list modules without a row")
    options = parser.parse_args(arguments)
    if options.missing:
        for name, total in sorted(modules_without_row().items(), key=lambda item: -item[1]):
            print(f"{total:5} {name}")
        return
    for name in options.names or sorted(plugin.id for plugin in methods.plugins.values()):
        report = mutation_score(
            name, mutants=options.mutants, tests=options.tests, by=options.by, jobs=options.jobs
        )
        print(report, flush=True)
        if report.failing:
            sys.exit(f"{name}: no row was written: a test fails without a mutant, {report.failing[0]}")
        is_module = name.endswith(".py")
        tests = "own" if options.tests == "all" and len(report.methods) > 1 else options.tests
        by = f" of {', '.join(report.methods)}" if options.by else ""
        write_rows([table_row(report, name if is_module else methods[name].spec.name, tests + by)])


if __name__ == "__main__":
    main(sys.argv[1:])
