"""Writes ``docs/mutation-scores.md``: the mutation score of every method, or of those named as arguments."""

from __future__ import annotations

import sys
from pathlib import Path

from phosphene import methods
from phosphene.testing import MutationReport, mutation_score

PAGE = Path(__file__).parent.parent / "docs" / "mutation-scores.md"
HEADER = """# Mutation scores

How many small changes of a method's own code its oracle, invariants, relations and the conformance kit's
checks of results notice: `phosphene check NAME --mutate --mutants {limit}`. A mutant is *explained* where it
computes the same, for the reason that a comment in the source states. Written by
`python tests/mutation_scores.py`.

| method | mutants | of | killed | by the oracle | explained | score |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def table_row(report: MutationReport) -> str:
    """One row of the table."""
    by_oracle = sum(o.verdict == "killed" and o.test == "oracle" for o in report.outcomes)
    cells = [", ".join(report.methods), len(report.outcomes), report.total, report.count("killed"), by_oracle]
    return f"| {' | '.join(map(str, [*cells, report.count('explained'), f'{report.score:.0%}']))} |\n"


def main(names: list[str], limit: int = 60) -> None:
    """Write the page, and print the survivors."""
    rows = []
    for name in names or sorted(plugin.id for plugin in methods.plugins.values()):
        report = mutation_score(name, mutants=limit)
        print(report, flush=True)
        rows.append(table_row(report))
        PAGE.write_text(HEADER.format(limit=limit) + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
