"""Writes ``docs/mutation-scores.md``: the scores of all methods, or of the methods and modules named."""

from __future__ import annotations

import sys
from pathlib import Path

from phosphene import methods
from phosphene.testing import MutationReport, mutation_score

PAGE = Path(__file__).parent.parent / "docs" / "mutation-scores.md"
HEADER = """# Mutation scores

How many small changes of a method's own code its oracle, invariants, relations and the conformance kit's
checks of results notice: `phosphene check NAME --mutate --mutants 40`. Where a file has
more mutants than that, 40 are drawn. A mutant is *explained* where it computes the same, for the reason that
a comment in the source states. Written by `python tests/mutation_scores.py`.

| method | mutants | of | killed | by the oracle | explained | score |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def table_row(report: MutationReport, name: str | None = None) -> str:
    """One row of the table; ``name`` of a shared module is its path."""
    by_oracle = sum(o.verdict == "killed" and o.test == "oracle" for o in report.outcomes)
    name = name or ", ".join(report.methods)
    cells = [name, len(report.outcomes), report.total, report.count("killed"), by_oracle]
    return f"| {' | '.join(map(str, [*cells, report.count('explained'), f'{report.score:.0%}']))} |\n"


def write_rows(rows: list[str]) -> None:
    """Write the page with these rows, and the earlier ones of other names."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True) if PAGE.is_file() else []
    earlier = [line for line in lines if line.startswith("| ") and line.split("|")[2].strip().isdecimal()]
    by_name = {row.split("|")[1].strip(): row for row in [*earlier, *rows]}
    PAGE.write_text(HEADER + "".join(by_name[name] for name in sorted(by_name)), encoding="utf-8")


def main(names: list[str], limit: int = 40) -> None:
    """Add rows to the page, and print the survivors."""
    for name in names or sorted(plugin.id for plugin in methods.plugins.values()):
        report = mutation_score(name, mutants=limit)
        print(report, flush=True)
        write_rows([table_row(report, name if name.endswith(".py") else None)])


if __name__ == "__main__":
    main(sys.argv[1:])
