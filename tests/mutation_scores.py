"""Writes ``docs/mutation-scores.md``: the scores of all methods, or of the methods and modules named."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from phosphene import methods
from phosphene.testing import MutationReport, mutation_score

PAGE = Path(__file__).parent.parent / "docs" / "mutation-scores.md"
HEADER = """# Mutation scores

How many small changes of a method's own code its tests notice: `phosphene check NAME --mutate --mutants 40`.
Where a file has more mutants than that, 40 are drawn, or 25 where the oracle takes long. A mutant is
*explained* where it computes the same, for the reason that a comment in the source states.

Column "tests": "all" are the oracle, invariants, relations and the conformance kit's checks of results on
several cases; "own" are the oracle, invariants and relations, on one case each; "oracle" is the oracle alone.
Scores of the last two are lower bounds. Shared modules are tested by all methods that import them. Methods of
a result that display it are not changed. Written by `python tests/mutation_scores.py` (`--own` for a quick
run without the kit's checks).

Below 90 %: of `concept_factorization`, `umap` and the modules of principal components and trustworthiness the
rows are older than the present oracles; what survives are mainly numbers of steps and seeds that are passed to
scikit-learn and umap-learn.

| method | mutants | of | killed | by the oracle | explained | score | tests |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""


def table_row(report: MutationReport, name: str | None = None, tests: str = "all") -> str:
    """One row of the table; ``name`` of a shared module is its path."""
    by_oracle = sum(o.verdict == "killed" and o.test == "oracle" for o in report.outcomes)
    name = name or ", ".join(report.methods)
    cells = [name, len(report.outcomes), report.total, report.count("killed"), by_oracle]
    cells += [report.count("explained"), f"{report.score:.0%}", tests]
    return f"| {' | '.join(map(str, cells))} |\n"


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
    parser.add_argument("--mutants", type=int, default=40, help="at most so many of a file")
    parser.add_argument("--own", action="store_true", help="oracle, invariants and relations alone")
    options = parser.parse_args(arguments)
    for name in options.names or sorted(plugin.id for plugin in methods.plugins.values()):
        report = mutation_score(name, mutants=options.mutants, all_checks=not options.own)
        print(report, flush=True)
        is_module = name.endswith(".py")
        tests = "own" if options.own or is_module else "all"
        write_rows([table_row(report, name if is_module else None, tests)])


if __name__ == "__main__":
    main(sys.argv[1:])
