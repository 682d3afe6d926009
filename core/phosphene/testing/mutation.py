"""``mutation_score``: how many small changes of a method's own code its oracle and relations notice."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, computed_field

from ..errors import InputError, PluginError, UnknownName
from ..registry.lookup import methods
from ..registry.method import Method
from .cases import DEVICE_VARIABLE

if TYPE_CHECKING:
    from .mutants import Mutant

#: Seconds of CPU time that the tests of the unchanged method may take.
BASELINE_SECONDS = 600

#: What the report says above the diffs.
SURVIVORS = (
    "Each diff is a change of the code that no test notices: the oracle passes with it, as do invariants, "
    "relations and checks.\nAdd a case to the oracle in which the line matters. If the change computes the "
    "same, say why in a comment on the line\nor above it: # equivalent mutants: reason"
)

#: Which tests run on mutants: those of ``mutation_score``.
MutationTests = Literal["all", "own", "oracle"]


class MutantOutcome(BaseModel):
    """What became of one mutant.

    ``verdict``: "killed" by a failing test or the time limit; "survived"; "explained" where it survived and a
    comment ``# equivalent mutants: reason`` in the source says why. ``test``: the test that failed.
    ``message``: its message, or the explanation. ``crashed``: whether it failed by another error than an
    assertion. ``changed``: of ``surviving_changes``, where a result of a survivor differs from the unchanged
    method's: "the oracle" or a case; "" for nowhere.
    """

    line: int
    function: str
    diff: str
    verdict: Literal["killed", "survived", "explained"]
    test: str = ""
    message: str = ""
    crashed: bool = False
    changed: str = ""


class MutationReport(BaseModel):
    """The outcomes of a file's mutants, and how many more there are than were tested."""

    file: str
    methods: list[str]
    total: int
    outcomes: list[MutantOutcome]
    #: Tests that fail without a mutant, which are left out.
    failing: list[str] = []

    def count(self, verdict: str) -> int:
        """How many mutants have this verdict."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def score(self) -> float:
        """killed / (killed + survived), in [0, 1]; 1 without mutants."""
        decided = self.count("killed") + self.count("survived")
        return self.count("killed") / decided if decided else 1.0

    @property
    def survivors(self) -> list[MutantOutcome]:
        """The mutants that no test notices."""
        return [outcome for outcome in self.outcomes if outcome.verdict == "survived"]

    def summary(self) -> str:
        """The score in one sentence."""
        killed = [outcome for outcome in self.outcomes if outcome.verdict == "killed"]
        by_oracle = sum(outcome.test == "oracle" for outcome in killed)
        names = ", ".join(self.methods)
        sample = f" (of {self.total})" if self.total > len(self.outcomes) else ""
        return (
            f"{names}: {len(killed)} of {len(self.outcomes)} mutants{sample} are killed, {by_oracle} of them "
            f"by the oracle; {self.count('survived')} survive, {self.count('explained')} are explained: "
            f"mutation score {self.score:.0%}"
        )

    def __str__(self) -> str:
        parts = [f"{outcome.diff}\n" for outcome in self.survivors]
        if parts:
            parts.insert(0, f"{SURVIVORS}\n")
        explained = [o for o in self.outcomes if o.verdict == "explained"]
        parts += [f"{self.file}:{o.line}: explained: {o.message}" for o in explained]
        parts += [f"left out, since it fails without a mutant: {failure}" for failure in self.failing]
        return "\n".join([*parts, self.summary()])


def mutation_score(
    method: str | Path | Method[..., Any],
    *,
    mutants: int = 60,
    jobs: int | None = None,
    tests: MutationTests = "all",
    by: Sequence[str] = (),
) -> MutationReport:
    """Test a method's oracle, invariants and relations on mutants of its code.

    Each mutant changes one operator, constant, index, argument or statement in the method's function or in a
    function of the same file that it uses. Its oracle runs on the mutant, then its invariants, relations and
    the kit's checks of results on a few cases, until one fails. A mutant that passes them all survives: its
    diff is a mistake that nothing would notice.

    method: a method, its name, or the path of a module of functions that methods import, which is tested by
    those methods. mutants: at most so many, evenly from all; the same in every call. jobs: processes at once;
    default: the number of CPUs. tests: "all"; "own", oracle, invariants and relations alone, on one case
    each, as always where several methods are tested; "oracle", the oracle alone. by: names of the methods
    whose tests run; default: the method itself, or of a module all that import it, directly or not.

    Raises MissingExtra without the extra ``mutation``, InputError for a file that no method uses, UnknownName
    for a method or ``tests`` that does not exist, PluginError where the tests of the unchanged method do not
    run.
    """
    from .mutants import generate_mutants

    if tests not in get_args(MutationTests):
        raise UnknownName("tests", tests, get_args(MutationTests))
    tested, module, functions = _target(method, [methods[name] for name in by])
    file = Path(str(module.__file__))
    generated, total = generate_mutants(file, functions, mutants)
    kind: MutationTests = "own" if tests == "all" and len(tested) > 1 else tests
    return _measure(module, tested, generated, total, tests=kind, jobs=jobs)


def surviving_changes(method: Method[..., Any], *, mutants: int, seconds: float) -> MutationReport:
    """A method's oracle, invariants and relations on mutants, evenly from its lines; survivors are compared.

    The results of a mutant that survives are compared with the unchanged method's, in the oracle's calls and
    on a few cases: a difference shows that it computes something else.

    mutants: at most so many, and no more than take about ``seconds`` of CPU time.

    Raises MissingExtra without the extra ``mutation``, PluginError where the tests do not run.
    """
    from .mutants import generate_mutants

    (tested,), module, functions = _target(method, [])
    generated, total = generate_mutants(Path(str(module.__file__)), functions, mutants, by_line=True)
    return _measure(module, [tested], generated, total, tests="own", seconds=seconds)


def _measure(
    module: Any,
    tested: list[Method[..., Any]],
    generated: Sequence[Mutant],
    total: int,
    *,
    tests: MutationTests,
    jobs: int | None = None,
    seconds: float | None = None,
) -> MutationReport:
    file = Path(str(module.__file__))
    report = MutationReport(
        file=_shortened(file), methods=[m.spec.name for m in tested], total=total, outcomes=[]
    )
    if not generated:
        return report
    request = {
        "path": sys.path,
        "module": module.__name__,
        "file": str(file),
        "methods": [(inspect.unwrap(m).__module__, inspect.unwrap(m).__name__) for m in tested],
        "functions": sorted({mutant.function.partition(".")[0] for mutant in generated}),
        "mutants": [{"function": mutant.function, "source": mutant.source} for mutant in generated],
        "tests": tests,
        "seconds": BASELINE_SECONDS,
        "cpu": seconds,
        "jobs": jobs or len(os.sched_getaffinity(0)),
    }
    replies = _serve(request)
    baseline = next(replies)
    if "failing" not in baseline:
        raise PluginError(f"{report.file}: the tests of the unchanged method do not run: {baseline}")
    outcomes = {reply["index"]: _outcome(generated[reply["index"]], reply) for reply in replies}
    report.failing = baseline["failing"]
    report.outcomes = [outcomes[index] for index in sorted(outcomes)]
    return report


def _shortened(file: Path) -> str:
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)


def _outcome(mutant: Mutant, reply: dict[str, Any]) -> MutantOutcome:
    outcome = MutantOutcome(line=mutant.line, function=mutant.function, diff=mutant.diff, verdict="killed")
    if "error" in reply or "killed" in reply:
        changed = {"test": "error" if "error" in reply else "limit", "crashed": True}
        return outcome.model_copy(update={**changed, "message": reply.get("error") or reply["killed"]})
    if reply["test"] is not None:
        return outcome.model_copy(update=reply | {"index": None})
    if mutant.explanation:
        return outcome.model_copy(update={"verdict": "explained", "message": mutant.explanation})
    return outcome.model_copy(update={"verdict": "survived", "changed": reply.get("changed", "")})


# --- which methods and functions -------------------------------------------------------------


def _target(
    method: str | Path | Method[..., Any], by: list[Method[..., Any]]
) -> tuple[list[Method[..., Any]], Any, list[str]]:
    """The methods whose tests run, the module that is mutated, and the names of functions in it."""
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".py")):
        return _shared_module(Path(method), by)
    tested = methods[method] if isinstance(method, str) else method
    module = importlib.import_module(inspect.unwrap(tested).__module__)
    return by or [tested], module, _own_functions(tested, module.__name__)


def _own_functions(method: Method[..., Any], module: str) -> list[str]:
    functions = (method.function, method.network, method.defense)
    return [f.__name__ for f in functions if f is not None and f.__module__ == module]


def _shared_module(file: Path, by: list[Method[..., Any]]) -> tuple[list[Method[..., Any]], Any, list[str]]:
    """A module of functions, and ``by`` or the methods that import it; a module with methods, and these."""
    file = file.resolve()
    folder, parts = file.parent, [file.stem]
    while (folder / "__init__.py").is_file():
        folder, parts = folder.parent, [folder.name, *parts]
    name = ".".join(parts)
    module = importlib.import_module(name)
    if own := _methods_of(module):
        return by or own, module, [function for method in own for function in _own_functions(method, name)]
    definitions = (ast.FunctionDef, ast.ClassDef)
    functions = [n.name for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, definitions)]
    return by or _users(file, folder, parts[0]), module, functions


def _methods_of(module: Any) -> list[Method[..., Any]]:
    """The methods that a module defines."""
    values = [value for value in vars(module).values() if isinstance(value, Method)]
    return [value for value in values if inspect.unwrap(value).__module__ == module.__name__]


def _users(file: Path, root: Path, package: str) -> list[Method[..., Any]]:
    """The methods of a package whose modules import a file, directly or not."""
    imports = {path: _imported_files(path, root) for path in (root / package).rglob("*.py")}
    users = {file}
    while added := {path for path, used in imports.items() if used & users} - users:
        users |= added
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in sorted(users)]
    tested = [method for name in names for method in _methods_of(importlib.import_module(name))]
    if not tested:
        raise InputError(f"{file}: no method imports this module; name the methods that test it with by=")
    return tested


def _imported_files(path: Path, root: Path) -> set[Path]:
    """The files of the package that a file imports."""
    files = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else root
            folder = base.joinpath(*(node.module or "").split("."))
            files |= {folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)}
    return {file for file in files if file.is_file()}


# --- the process that runs the tests ----------------------------------------------------------


def _serve(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The replies of a ``mutation_server``: the unchanged method's first, then the mutants' as they end."""
    command = [sys.executable, "-m", "phosphene.testing.mutation_server"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop(DEVICE_VARIABLE, None)  # each fork would start CUDA anew
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            json.dump(request, server.stdin)
            server.stdin.close()
            for line in server.stdout:
                yield json.loads(line)
            if code := server.wait():
                raise PluginError(
                    f"the process that tests mutants of {request['file']} ended with code {code}"
                )
        finally:
            server.kill()
