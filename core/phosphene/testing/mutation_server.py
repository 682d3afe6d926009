"""Runs tests against mutants, a forked process for each; started by ``mutation`` as a process of its own.

The process imports the modules once and never runs a backward pass itself, after which autograd could not be
used in its forks. A mutant's functions are put into the module by their code objects, so that everything that
refers to them (methods, oracles, other modules) uses the mutant.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import resource
import selectors
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from unittest import SkipTest

import torch

from .cases import Case, compared_cases, fixed_cases
from .checks import CHECKS, CHOICES_DIFFER, checks_of
from .checks.oracle_calls import record_calls, recorded_calls
from .kit import run_check
from .observation import observe
from .projections import Projections, differ, projections

if TYPE_CHECKING:
    from ..registry.method import Method
    from .checks import Check
    from .mutation import MutationTests
    from .observation import Observation

    AnyMethod = Method[..., Any]

#: Checks of manners and documentation, in which a change of the arithmetic does not show, and the check
#: against another process, which runs the unchanged code: it would fail for every mutant with another result.
MANNERS = frozenset(
    {
        "answers",
        "arithmetic_is_tested",
        "clean_after_errors",
        "concurrent_runs_equal",
        "documented",
        "figure_not_blank",
        "no_leak",
        "no_side_effects",
        "model_unchanged",
        "oracle",
        "panels_in_range",
        "runs_on_cuda",
        "same_seed_same_bits",
        "same_in_another_process",
        "same_values_everywhere",
        "saves_and_replays",
        "shows_progress",
        "streams_equal_the_call",
        "valid_defaults",
    }
)
#: Checks of a single run use this many cases, checks that run a method several times one.
MOST_CASES = 9
#: Cases on which the results of mutants that survive are compared with the unchanged method's.
MOST_COMPARED = 6
#: Where only a part of the mutants fits into the CPU time, so many run: few steps, so that the time that the
#: unchanged method takes, which is not the same in each run, seldom changes the number.
STEPS = (64, 48, 32, 24, 16, 12)
#: Real time after which a test that waits is ended.
MOST_SECONDS = 3600
#: Bytes that a test may use beside those of this process.
MEMORY = 6 * 2**30


def main() -> None:
    """Read one request from standard input; write one line of JSON for the baseline and for each mutant."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a module prints at its import is no reply
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    torch.set_num_threads(1)
    module = importlib.import_module(request["module"])
    tested = [getattr(importlib.import_module(name), attribute) for name, attribute in request["methods"]]
    tests = Tests(tested, request["tests"], request["cpu"])
    (baseline,) = _run_forks([tests.baseline], 1, request["seconds"], lambda index, reply: None)
    _reply(replies, baseline)
    if "cpu" not in baseline:
        return
    for name in baseline["imported"]:  # once here instead of in each fork
        try:
            importlib.import_module(name)
        except Exception:
            continue
    tests.plan = baseline["plan"]
    tests.results = baseline["results"]
    live = {name: list(_functions_of(module, name)) for name in request["functions"]}
    jobs = [
        (lambda mutant=mutant: _test_mutant(module, live, mutant, request["file"], tests))
        for mutant in request["mutants"][: _affordable(request, baseline)]
    ]
    # Ten times what the unchanged method takes: more is an endless loop. Less where the time is limited.
    factor = 10 if request["cpu"] is None else 3
    tests.seconds = factor * (1 + baseline["cpu"])
    # Each fork compiles again what the oracle compiles at its first run.
    seconds = 2 + baseline["first_cpu"] + factor * baseline["oracle_cpu"]
    _run_forks(
        jobs, request["jobs"], seconds, lambda index, reply: _reply(replies, {"index": index, **reply})
    )


def _affordable(request: Mapping[str, Any], baseline: Mapping[str, Any]) -> int:
    """How many mutants fit into the request's CPU time: each runs the oracle, one in three the rest."""
    count, limit = len(request["mutants"]), request["cpu"]
    if limit is None:
        return count
    # Without an oracle nothing notices a change before the rest.
    mutant = 0.05 + baseline["oracle_cpu"] + baseline["rest_cpu"] / (3 if baseline["has_oracle"] else 1)
    if count * mutant <= limit:
        return count
    return next((step for step in STEPS if step * mutant <= limit), 0)


def _reply(replies: IO[str], reply: Mapping[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _test_mutant(
    module: types.ModuleType, live: Mapping[str, Any], mutant: Mapping[str, Any], file: str, tests: Tests
) -> dict[str, Any]:
    apply_source(module, live, mutant["source"], mutant["function"], file)
    return tests.first_failure()


#: The index of a case, or -1 for the oracle's calls; projections of the unchanged results; and the checks of
#: a single run, by index, that pass on the case.
UnchangedResults = tuple[int, list[Projections], list[int]]


class Tests:
    """The oracles of some methods, then their invariants, relations and checks of the kit on a few cases.

    ``kind``: "all" of these; "own", without the kit's checks, on one case each; "oracle", the oracles alone.
    """

    def __init__(self, methods: Sequence[AnyMethod], kind: MutationTests, limit: float | None = None) -> None:
        self.methods = methods
        self.kind = kind
        #: CPU time for all mutants; the results of those that survive are then compared with the unchanged
        #: method's.
        self.limit = limit
        self.results: list[UnchangedResults] = []
        #: Limit of CPU time after the oracles.
        self.seconds = 0.0
        #: (method, check, case) by index, as far as they pass without a mutant.
        self.plan: list[tuple[int, int, int]] = []
        self._observations: dict[int, dict[Case, Observation]] = {
            number: {} for number, _ in enumerate(methods)
        }

    def baseline(self) -> dict[str, Any]:
        """Which tests pass without a mutant, their CPU time and the modules that they import."""
        before, cpu = set(sys.modules), time.process_time()
        failing, plan = [], []
        for method in self.methods:
            try:
                if method.spec.oracle is None:
                    failing.append(f"{method.spec.name} has no oracle")
                else:
                    _run_oracle(method)
            except Exception as error:
                failing.append(f"the oracle of {method.spec.name}: {_first_line(error)}")
        first_cpu = time.process_time() - cpu
        if self.limit is not None and any(failure.startswith("the oracle of") for failure in failing):
            return {"failing": failing}
        if self.limit is not None and first_cpu * STEPS[-1] > 2 * self.limit:
            return {"failing": [f"its oracle takes {first_cpu:.0f} s of CPU time"]}
        if not failing:  # again, without the time of imports
            cpu = time.process_time()
            for method in self.methods:
                _run_oracle(method)
        oracle_cpu = time.process_time() - cpu
        for number, method in enumerate(self.methods if self.kind != "oracle" else ()):
            accepted = [index for index, _ in enumerate(_cases(method)) if self._is_accepted(number, index)]
            for index, check in enumerate(_checks(method)):
                if check.reason_to_skip(method) is not None or (self.kind == "own" and _is_general(check)):
                    continue
                cases = accepted[: 1 if self.kind == "own" or check.on == "case" else None]
                for case in [0] if check.on == "method" else cases:
                    failure = self._failure(number, index, case)
                    if failure is None:
                        plan.append((number, index, case))
                    else:
                        failing.append(f"{check.name} of {method.spec.name}: {failure}")
        rest_cpu = time.process_time() - cpu - oracle_cpu
        results, results_cpu = self._unchanged_results() if self.limit is not None else ([], 0.0)
        return {
            "failing": failing,
            "plan": plan,
            "has_oracle": any(method.spec.oracle is not None for method in self.methods),
            "first_cpu": first_cpu,
            "oracle_cpu": oracle_cpu,
            "rest_cpu": rest_cpu + results_cpu,
            "cpu": time.process_time() - cpu,
            "imported": sorted(set(sys.modules) - before),
            "results": results,
        }

    def _unchanged_results(self) -> tuple[list[UnchangedResults], float]:
        """Those of the oracle's calls (-1) and of the first cases, by index, that are accepted and the same
        when they are computed again; and the CPU time of one run of each.
        """
        method, results, cpu = self.methods[0], [], 0.0
        for index in range(-1, len(compared_cases(method))):
            rows, before = self._results(index), time.process_time()
            again = self._results(index)
            cpu += time.process_time() - before
            if not isinstance(rows, str) and not isinstance(again, str) and not _differ(rows, again):
                passing = [
                    number
                    for number, check in enumerate(_checks(method) if index >= 0 else ())
                    if check.on in ("observation", "run")
                    and check.reason_to_skip(method) is None
                    and self._failure_on(index, number) is None
                ]
                results.append((index, rows, passing))
            if len(results) > MOST_COMPARED:
                break
        return results, cpu

    def _results(self, index: int) -> list[Projections] | str:
        """Projections of the results of the oracle's calls (-1) or of a case; or the error."""
        (method,) = self.methods
        try:
            if index >= 0:
                case = compared_cases(method)[index]
                return [projections(case.run(method, case.model(recorded=False)))]
            with record_calls(method):
                _run_oracle(method)
            return [projections(call.result) for call in recorded_calls(method)]
        except Exception as error:
            return f"{type(error).__name__}: {_first_line(error)}"

    def _changed_result(self) -> dict[str, Any]:
        """Where a result of a mutant that survives differs: in the oracle, on a case, or nowhere."""
        method = self.methods[0]
        for index, unchanged, passing in self.results:
            rows = self._results(index)
            if isinstance(rows, str):
                return {"test": "answers", "message": rows, "crashed": True}
            if _differ(rows, unchanged):
                for number in passing:
                    if failure := self._failure_on(index, number):
                        return {"test": _checks(method)[number].name, "message": failure, "crashed": False}
                case = "the oracle" if index < 0 else repr(compared_cases(method)[index])
                return {"test": None, "changed": case}
        return {"test": None}

    def _failure_on(self, index: int, number: int) -> str | None:
        """The message of a check of a single run that fails on a compared case; None if it passes."""
        method = self.methods[0]
        return _failure(method, _checks(method)[number], compared_cases(method)[index], self._observations[0])

    def first_failure(self) -> dict[str, Any]:
        """The first test that fails, by name and message; ``{"test": None}`` if the mutant survives."""
        for method in self.methods:
            try:
                _run_oracle(method)
            except Exception as error:
                crashed = not isinstance(error, AssertionError)
                return {"test": "oracle", "message": _first_line(error), "crashed": crashed}
        _limit_cpu(self.seconds)
        for number, index, case in self.plan:
            failure = self._failure(number, index, case)
            if failure is not None:
                name = _checks(self.methods[number])[index].name
                return {"test": name, "message": failure, "crashed": "it raised " in failure}
        return self._changed_result() if self.limit is not None else {"test": None}

    def _is_accepted(self, number: int, index: int) -> bool:
        method, observations = self.methods[number], self._observations[number]
        case = _cases(method)[index]
        if case not in observations:
            try:
                observations[case] = observe(method, case)
            except Exception:  # reported by the check that runs the case
                return True
        return observations[case].refusal is None

    def _failure(self, number: int, index: int, case: int) -> str | None:
        """The message of a check that fails on a case; None if it passes."""
        method = self.methods[number]
        return _failure(method, _checks(method)[index], _cases(method)[case], self._observations[number])


def _failure(
    method: AnyMethod, check: Check, case: Case, observations: dict[Case, Observation]
) -> str | None:
    try:
        accepted = run_check(check, method, case, observations)
    except AssertionError as error:
        return _first_line(error)
    except SkipTest:
        return None  # undecided, as for the unchanged method
    return None if accepted else "the case is refused"


def _run_oracle(method: AnyMethod) -> None:
    torch.manual_seed(0)  # an oracle may draw its inputs, which are then those of every mutant
    if method.spec.oracle is not None:
        method.spec.oracle()


def _differ(one: list[Projections], other: list[Projections]) -> bool:
    return len(one) != len(other) or any(map(differ, one, other))


@functools.cache
def _checks(method: AnyMethod) -> list[Check]:
    """Invariants and relations first, then the checks of every method."""
    chosen = [check for check in checks_of(method) if check.name not in MANNERS]
    return sorted(chosen, key=_is_general)


def _is_general(check: Check) -> bool:
    """Whether a check is neither an invariant nor a relation that the method declares."""
    return check.name in CHECKS or check.name.startswith(CHOICES_DIFFER)


@functools.cache
def _cases(method: AnyMethod) -> list[Case]:
    """Two networks, and each choice of each parameter."""
    choices = [case for case in fixed_cases(method, all_pairs=False) if case.params]
    plain = [Case(), Case("functional", "noise"), Case("flat")]
    return [*plain, *choices][:MOST_CASES]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# --- code of a mutant ------------------------------------------------------------------------


def apply_source(
    module: types.ModuleType, live: Mapping[str, list[Any]], source: str, function: str, file: str
) -> None:
    """Give a module's function, class or constant of this qualified name the code of a changed source."""
    name = function.partition(".")[0]
    code = compile(source, file, "exec", dont_inherit=True)
    changed = {part.co_qualname: part for part in _code_objects(code)}
    functions = live[name]
    for existing in functions:
        existing.__code__ = changed[existing.__code__.co_qualname]
    if isinstance(value := getattr(module, name), type):
        for attribute, number in _class_numbers(source, name):
            if vars(value)[attribute] != number:
                setattr(value, attribute, number)
    elif not functions:  # a constant
        namespace = dict(vars(module))
        statements = [s for s in _assignments(source, name)]
        exec(compile("\n".join(statements), file, "exec"), namespace)
        _replace_everywhere(name, value, namespace[name])


def _class_numbers(source: str, name: str) -> Iterator[tuple[str, Any]]:
    """The attributes of a class that are numbers, with their values."""
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.ClassDef) and node.name == name else ():
            match part:
                case ast.Assign(targets=[ast.Name(id=attribute)], value=value):
                    if not any(isinstance(p, (ast.Name, ast.Call)) for p in ast.walk(value)):
                        yield attribute, eval(ast.unparse(value), {})


def _assignments(source: str, name: str) -> Iterator[str]:
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            yield ast.unparse(node)


def _replace_everywhere(name: str, old: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        if vars(module).get(name) is old:
            setattr(module, name, new)


def _code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _code_objects(constant)


def _functions_of(module: types.ModuleType, name: str) -> Iterator[types.FunctionType]:
    """The functions that a name at the top level of a module stands for: itself, or a class's methods."""
    value = getattr(module, name)
    values = vars(value).values() if isinstance(value, type) else [value]
    for item in values:
        function = _plain_function(item)
        # A dataclass's generated functions have no code in the source.
        if function is not None and function.__code__.co_filename == module.__file__:
            yield function


def _plain_function(value: Any) -> types.FunctionType | None:
    while True:
        match value:
            case types.FunctionType() if not hasattr(value, "__wrapped__"):
                return value
            case property():
                value = value.fget
            case staticmethod() | classmethod():
                value = value.__func__
            case _:
                inner = getattr(value, "__wrapped__", None) or getattr(value, "func", None)
                if inner is None:
                    return None
                value = inner


# --- processes -------------------------------------------------------------------------------


def _run_forks(
    jobs: Sequence[Callable[[], dict[str, Any]]],
    at_once: int,
    seconds: float,
    on_reply: Callable[[int, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Each job's reply, run in a fork of this process; ``{"killed": reason}`` for one that was ended.

    ``seconds``: limit of CPU time, which a job may raise. ``MOST_SECONDS`` is the limit of real
    time, for a job that waits.
    """
    replies: list[dict[str, Any]] = [{} for _ in jobs]
    selector = selectors.DefaultSelector()
    waiting, running = list(enumerate(jobs)), 0
    while waiting or running:
        while waiting and running < at_once:
            index, job = waiting.pop(0)
            pid, pipe = _fork(job, seconds)
            selector.register(pipe, selectors.EVENT_READ, [index, pid, time.monotonic() + MOST_SECONDS, b""])
            running += 1
        for key, _ in selector.select(1):
            received = os.read(key.fd, 1 << 20)
            key.data[3] += received
            if not received:
                index, pid, _, text = key.data
                _, status = os.waitpid(pid, 0)
                selector.unregister(key.fd)
                os.close(key.fd)
                replies[index] = json.loads(text) if text else {"killed": _reason(status)}
                on_reply(index, replies[index])
                running -= 1
        for key in list(selector.get_map().values()):
            if time.monotonic() > key.data[2]:
                os.kill(key.data[1], signal.SIGKILL)
    return replies


def _reason(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return "the process ended"
    ended_by = os.WTERMSIG(status)
    if ended_by in (signal.SIGXCPU, signal.SIGKILL):
        return "time limit"
    return f"the process ended by {signal.Signals(ended_by).name}"


def _fork(job: Callable[[], dict[str, Any]], seconds: float) -> tuple[int, int]:
    """The process id of a fork that runs the job, and the file descriptor of its reply."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    status = 1
    try:
        os.close(read)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        _limit_resources(seconds)
        try:
            reply = job()
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(reply).encode())
        status = 0
    finally:
        os._exit(status)


def _limit_resources(seconds: float) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    _limit_cpu(seconds)


def _limit_cpu(seconds: float) -> None:
    """End this process after so much more CPU time."""
    limit = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
