"""The check that oracle, invariants and relations notice when the method computes something else."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import SkipTest

from ...errors import MissingExtra
from ..cases import compared_cases
from ..reproduction import LineFailure, case_code, method_import
from .base import ARITHMETIC_UNTESTED, ORACLE_MISSING, ORACLE_PASSES, UntestedError, register_check

if TYPE_CHECKING:
    from ..mutation import MutantOutcome, MutationReport
    from .base import AnyMethod

#: At most so many mutants of a method run, for about so many seconds of CPU time.
MUTANTS, SECONDS = 64, 15.0
#: More than this fraction of the changes that give other numbers may not be unnoticed. Changes that raise an
#: error say nothing about a test.
MOST_UNNOTICED = 0.15
#: The changes that no test notices are on so many lines, or so many change the result of the oracle's own
#: calls: one line is often the choice of a default.
LEAST_LINES, LEAST_OF_ORACLE = 2, 2
#: Lines in the message.
MOST_SHOWN = 6


def _reason_to_skip(method: AnyMethod) -> str | None:
    spec, function = method.spec, inspect.unwrap(method)
    if spec.oracle is None and not spec.relations:
        return ARITHMETIC_UNTESTED
    if sys.platform != "linux":
        return "it runs on Linux only, where processes are forked and their memory is limited"
    module = sys.modules.get(function.__module__)
    if getattr(module, function.__name__, None) is not method or function.__module__ == "__main__":
        return "it is not a name of a module that another process can import"
    return None


@register_check(
    "method",
    "Oracle and relations notice when an operator, constant or argument of the method is another one.",
    "the oracle: add a case at which these lines matter (an image that is not square and has no symmetry, "
    "several images, several steps, a parameter other than its default, a network with biases and ReLU), and "
    "compute what it expects without the method's own functions; a comment '# equivalent mutants: reason' "
    "explains a change that computes the same",
    _reason_to_skip,
    exemptible=True,
    requires=ORACLE_PASSES,
)
def arithmetic_is_tested(method: AnyMethod) -> None:
    from ..mutation import surviving_changes

    try:
        report = surviving_changes(method, mutants=MUTANTS, seconds=SECONDS)
    except MissingExtra as missing:
        raise SkipTest(str(missing)) from missing
    has_oracle = method.spec.oracle is not None
    if not report.outcomes:
        if not report.total:
            raise SkipTest("it has no arithmetic of its own")
        tests = "oracle and relations" if has_oracle else "relations"
        reason = "; ".join(report.failing if has_oracle else ()) or f"its {tests} take too long"
        raise SkipTest(f"{reason}; phosphene check {method.spec.short_name} --mutate has no time limit")
    untested = untested_lines(report)
    survivors = [outcome for outcomes in untested.values() for outcome in outcomes]
    noticed = sum(o.verdict == "killed" and not o.crashed for o in report.outcomes)
    if not has_oracle:
        if survivors:
            # Relations seldom determine all of a right method: no failure.
            reason = f"it has no oracle; relations notice {noticed} of {noticed + len(survivors)} changes"
            raise UntestedError(reason, f"{ORACLE_MISSING}.\n{_message(method, report, untested, noticed)}")
        return
    if len(survivors) <= MOST_UNNOTICED * (noticed + len(survivors)):
        return
    of_oracle = sum(outcome.changed == "the oracle" for outcome in survivors)
    if len(untested) >= LEAST_LINES or of_oracle >= LEAST_OF_ORACLE:
        raise LineFailure(_message(method, report, untested, noticed), next(iter(untested)))


def untested_lines(report: MutationReport) -> dict[int, list[MutantOutcome]]:
    """The survivors whose results differ from the unchanged method's, by line.

    Not those of lines whose effect has a check of its own: that a seed matters, and that without a target the
    predicted class is explained.
    """
    lines: dict[int, list[MutantOutcome]] = {}
    for outcome in report.survivors:
        before, _ = _changed_line(outcome)
        if outcome.changed and ".manual_seed(" not in before and "target.resolve(" not in before:
            lines.setdefault(outcome.line, []).append(outcome)
    return dict(sorted(lines.items()))


def _message(
    method: AnyMethod, report: MutationReport, lines: dict[int, list[MutantOutcome]], noticed: int
) -> str:
    survivors = sum(map(len, lines.values()))
    tests = "relations do" if method.spec.oracle is None else "oracle and relations do"
    parts = [
        f"of {noticed + survivors} changes of {Path(report.file).name} that give other numbers, {tests} not "
        f"notice {survivors}:"
    ]
    for number, outcomes in list(lines.items())[:MOST_SHOWN]:
        before, after = _changed_line(outcomes[0])
        more = f"  ({len(outcomes) - 1} more changes)" if len(outcomes) > 1 else ""
        title, changed = f"your line {number}: ", "changed to: "
        width = max(len(title), len(changed))
        parts += [f"{title:>{width}}{before}", f"{changed:>{width}}{after}{more}"]
        parts += [f"{'':{width}}{_where(method, outcomes[0])}"]
    if len(lines) > MOST_SHOWN:
        parts.append(
            f"and {len(lines) - MOST_SHOWN} more lines: {', '.join(map(str, list(lines)[MOST_SHOWN:]))}"
        )
    case = next((o.changed for outcomes in lines.values() for o in outcomes if o.changed != "the oracle"), "")
    return "\n".join([*parts, *([_comparison(method, case)] if case else [])])


def _changed_line(outcome: MutantOutcome) -> tuple[str, str]:
    """The first line of a diff that changes, before and after."""
    lines = outcome.diff.splitlines()[2:]
    before, after = (next((li[1:].strip() for li in lines if li[0] == sign), "") for sign in "-+")
    return before, after


def _where(method: AnyMethod, outcome: MutantOutcome) -> str:
    if outcome.changed == "the oracle":
        return (
            "this changes the result of the oracle's own call, and the oracle passes: it compares too "
            f"little, or calls {outcome.function} itself"
        )
    unnoticed = "" if method.spec.oracle is None else ", and none of the oracle's calls shows it"
    return f"this changes the result of {outcome.changed}{unnoticed}"


def _comparison(method: AnyMethod, changed: str) -> str:
    """Python code that prints the result of a case, to run before and after a change."""
    case = next(case for case in compared_cases(method) if repr(case) == changed)
    code = f"from phosphene.testing import Case\n{method_import(method)}\n\n{case_code(method, case)}\n"
    code += "print(dict(case.run(method).fields()))"
    return "to see the difference, run this before and after a change:\n" + textwrap.indent(code, "    ")
