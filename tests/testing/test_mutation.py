"""Mutation scores: which mutants are generated, and which of them the tests of a method kill."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.mutation_scores import code_digest, digest_of_source, measured_scores

from phosphene import InputError, UnknownName, methods
from phosphene.cli.main import main
from phosphene.testing import check_method, mutation_score, mutation_server
from phosphene.testing.checks import ARITHMETIC_UNTESTED, ORACLE_MISSING
from phosphene.testing.kit import Outcome, Report, bound_checks
from phosphene.testing.mutants import generate_mutants

ROOT = Path(__file__).parents[2]

#: The oracle does not reveal ``_edge``, nor the number of steps unless it is endless.
METHOD = '''"""Weighted gradient."""

import torch
from phosphene import Cost, Reference, hookimpl, input_gradient, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import size
from phosphene.testing import linear_model

SOURCE = Reference(key="k", title="T", authors="A", year=2020, url="https://example.org")


def oracle() -> None:
    weight = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 1, 3, 4)
    images = torch.ones(1, 1, 3, 4, dtype=torch.float64) * 0.5
    maps = weighted(linear_model(weight), images, 1).maps
    torch.testing.assert_close(maps, 2 * weight[1])


@method(
    family="attribution", references=[SOURCE], needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images), oracle=oracle,
)
def weighted(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient times two."""
    gradient = input_gradient(model, images, target)
    maps = scale(gradient).sum(1) + _edge(images)
    steps = 2
    while steps > 0:  # equivalent mutants: no step changes the map
        steps -= 1
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)))


def scale(x):
    """Twice x."""
    if x.ndim != 4:
        raise ValueError(f"not 4 but {x.ndim}")
    return FACTOR * x


def _edge(images):
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (brightest[:, 0] - 0.5).clamp(min=0) * 0.25


def unused(x):
    return x + 1


FACTOR = 2.0


@hookimpl
def phosphene_methods():
    return [weighted]
'''


#: Without the loop, whose mutants are endless.
WEAK = METHOD.replace(METHOD[METHOD.index("    steps = 2") : METHOD.index("    return Attribution")], "")
#: With an oracle that shows every line: two channels, two images, pixels brighter and darker than 0.5.
RIGHT = (
    WEAK.replace("view(2, 1, 3, 4)", "view(2, 2, 2, 3)")
    .replace(
        "torch.ones(1, 1, 3, 4, dtype=torch.float64) * 0.5",
        "torch.linspace(0, 1, 24, dtype=torch.float64).view(2, 2, 2, 3)",
    )
    .replace(
        "(maps, 2 * weight[1])",
        "(maps, 2 * weight[1].sum(0) + torch.tensor([0, 0.125], dtype=torch.float64)[:, None, None])",
    )
)
#: With an oracle that computes what it expects by the method's own function.
CALLS_THE_HELPER = RIGHT.replace("2 * weight[1].sum(0)", "scale(weight[1:])[0].sum(0)").replace(
    "return FACTOR * x", "return (FACTOR * x + x) / 4"
)


@pytest.fixture
def method_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "weighted_gradient.py"
    file.write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield file
    sys.modules.pop("weighted_gradient", None)


def changed_lines(diff: str) -> tuple[str, str]:
    removed, added = (
        [line[1:].strip() for line in diff.splitlines()[2:] if line.startswith(sign)] for sign in "-+"
    )
    return " ".join(removed), " ".join(added)


def test_mutants_change_the_method_and_what_it_uses_only(method_file: Path) -> None:
    mutants, total = generate_mutants(method_file, ["weighted"])
    assert len(mutants) == total
    assert {mutant.function for mutant in mutants} == {"weighted", "scale", "_edge", "FACTOR"}
    changes = {changed_lines(mutant.diff) for mutant in mutants}
    assert ("return FACTOR * x", "return FACTOR / x") in changes
    assert ("FACTOR = 2.0", "FACTOR = 3.0") in changes
    assert ("steps -= 1", "steps += 1") in changes
    assert (
        "maps = scale(gradient).sum(1) + _edge(images)",
        "maps = scale(gradient).mean(1) + _edge(images)",
    ) in changes
    # Neither guards, messages, annotations and decorators, nor what the method does not use.
    assert not [
        change for change in changes if "ndim" in change[0] or "@" in change[0] or "def " in change[0]
    ]
    for mutant in mutants:
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != METHOD
        assert f"-{METHOD.splitlines()[mutant.line - 1]}" in mutant.diff
    assert len({mutant.source for mutant in mutants}) == total, "a mutant is generated twice"


def test_sample_of_mutants_is_even_and_the_same_each_time(method_file: Path) -> None:
    every, total = generate_mutants(method_file, ["weighted"])
    some, again = (generate_mutants(method_file, ["weighted"], 5) for _ in range(2))
    assert some == again
    assert some[1] == total
    assert some[0] == [every[n * total // 5] for n in range(5)]


def test_oracle_kills_mutants_that_it_sees_and_no_others(method_file: Path) -> None:
    report = mutation_score(method_file, tests="own")
    outcomes = {changed_lines(outcome.diff): outcome for outcome in report.outcomes}
    assert report.methods == ["attribution.weighted"]
    assert not report.failing
    doubled = outcomes["FACTOR = 2.0", "FACTOR = 3.0"]
    assert (doubled.verdict, doubled.test, doubled.crashed) == ("killed", "oracle", False)
    # The oracle's image is not brighter than 0.5, so that it does not see the term of the brightest pixel.
    edge = "return (brightest[:, 0] - 0.5).clamp(min=0) * 0.25"
    assert outcomes[edge, edge.replace("* 0.25", "* 1.25")].verdict == "survived"
    assert outcomes[edge, edge.replace("- 0.5", "+ 0.5")].verdict == "killed"
    loop = "while steps > 0:  # equivalent mutants: no step changes the map"
    explained = outcomes[loop, loop.replace("> 0", "> 1")]
    assert (explained.verdict, explained.message) == ("explained", "no step changes the map")
    endless = outcomes["steps -= 1", "steps += 1"]
    assert (endless.verdict, endless.test, endless.message) == ("killed", "limit", "time limit")
    killed, survived = report.count("killed"), report.count("survived")
    assert report.score == killed / (killed + survived)
    assert len(report.outcomes) == report.total == killed + survived + report.count("explained")
    # A survivor is printed as a diff with its file and line.
    text = str(report)
    assert f"{method_file}" in text
    assert text.startswith("Each diff is a change of the code that no test notices")
    assert "+    return (brightest[:, 0] - 0.5).clamp(min=0) * 1.25" in text
    assert text.splitlines()[-1] == report.summary()
    assert report.model_dump(mode="json")["score"] == report.score


def test_shared_module_is_tested_by_the_methods_that_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "shared_arithmetic"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_factors.py").write_text(
        "def twice(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
    )
    (package / "weighted.py").write_text(
        METHOD.replace("from phosphene.spec", "from ._factors import twice\nfrom phosphene.spec").replace(
            "FACTOR * x", "twice(x)"
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        report = mutation_score(package / "_factors.py")
        assert report.methods == ["attribution.weighted"]
        verdicts = {changed_lines(outcome.diff)[1]: outcome.verdict for outcome in report.outcomes}
        assert verdicts["return 2 / x"] == "killed"
        # Nothing uses half.
        assert verdicts["return x * 2"] == "survived"
        # The methods named test it alone, also where they do not import it.
        report = mutation_score(package / "_factors.py", tests="oracle", by=["bit_depth"])
        assert report.methods == ["defenses.bit_depth"]
        assert {outcome.verdict for outcome in report.outcomes} == {"survived"}
        (package / "_unused.py").write_text("def one():\n    return 1\n")
        with pytest.raises(InputError, match="no method imports this module"):
            mutation_score(package / "_unused.py")
    finally:
        for name in [name for name in sys.modules if name.startswith("shared_arithmetic")]:
            del sys.modules[name]


def test_unknown_tests_and_methods_are_refused(method_file: Path) -> None:
    with pytest.raises(UnknownName, match='"oracle"|oracle'):
        mutation_score(method_file, tests="oracles")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="bit_depth"):
        mutation_score(method_file, by=["bit_depths"])


def test_oracle_alone_tests_no_relations() -> None:
    method = methods["attacks.fgsm"]
    baseline = mutation_server.Tests([method], "oracle").baseline()
    assert (baseline["plan"], baseline["failing"]) == ([], [])
    assert mutation_server.Tests([method], "own").baseline()["plan"]


def test_numbers_of_classes_are_changed_and_their_fields_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "shared_classes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_scale.py").write_text(
        "from dataclasses import dataclass, field\n\n\n@dataclass\nclass Scale:\n    FACTOR = 2.0\n"
        "    unit: float = field(default=1.0, repr=False)\n\n"
        "    def apply(self, x):\n        return self.FACTOR * x\n"
    )
    (package / "weighted.py").write_text(
        METHOD.replace("from phosphene.spec", "from ._scale import Scale\nfrom phosphene.spec").replace(
            "FACTOR * x", "Scale().apply(x)"
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        report = mutation_score(package / "_scale.py")
    finally:
        for name in [name for name in sys.modules if name.startswith("shared_classes")]:
            del sys.modules[name]
    outcomes = {changed_lines(outcome.diff): outcome.test for outcome in report.outcomes}
    assert outcomes["FACTOR = 2.0", "FACTOR = 3.0"] == "oracle"
    assert {removed for removed, _ in outcomes} == {"FACTOR = 2.0", "return self.FACTOR * x"}


def test_command_prints_survivors_and_the_score(
    method_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command's second call prints the outcomes of the first.
    monkeypatch.setattr("phosphene.testing.mutation_score", functools.cache(mutation_score))

    def run(*arguments: str) -> tuple[int, str]:
        try:
            main(["check", str(method_file), "--mutate", "--mutants", "3", *arguments])
        except SystemExit as left:
            return int(left.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    code, text = run()
    assert "attribution.weighted: " in text.splitlines()[-1]
    assert "mutation score " in text.splitlines()[-1]
    _, text = run("--json")
    (report,) = json.loads(text)
    assert report["methods"] == ["attribution.weighted"]
    assert len(report["outcomes"]) == 3
    assert code == (report["score"] < 0.9)


@pytest.mark.nightly
def test_checks_of_results_kill_mutants_that_the_oracle_does_not_see(method_file: Path) -> None:
    some = mutation_score(method_file)
    few = mutation_score(method_file, tests="own")
    assert some.count("killed") > few.count("killed")


def test_what_displays_a_result_is_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "displayed.py"
    file.write_text(
        "class Regions(Result):\n"
        "    def share(self):\n        return self._total() + _scaled(1)\n\n"
        "    def draw(self):\n        return self._colors() + _wide(self._total()) + 4\n\n"
        "    def _colors(self):\n        return _scaled(5)\n\n"
        "    def _total(self):\n        return 2\n\n\n"
        "def _scaled(x):\n    return x * 3\n\n\n"
        "def _wide(x):\n    return x * 6\n\n\n"
        "def method():\n    return Regions()\n"
    )
    mutants, _ = generate_mutants(file, ["method"])
    assert {mutant.function for mutant in mutants} == {"Regions.share", "Regions._total", "_scaled"}


def test_scores_of_the_page_are_of_methods_and_modules_that_exist() -> None:
    names = {plugin.id for plugin in methods.plugins.values()}
    assert all(name in names or (ROOT / name).is_file() for name in measured_scores())


def test_digest_of_a_row_changes_with_the_code_and_not_with_texts() -> None:
    digest = digest_of_source(METHOD)
    for text, other in (
        ("Gradient times two.", "Twice the gradient."),
        ("images: Images", "images: Tensor"),
        ("not 4 but", "4, not"),
        ('title="T"', 'title="U"'),
        ("cost=Cost(forward=size.images,", "cost=Cost(forward=2 * size.images,"),
    ):
        changed = METHOD.replace(text, other)
        assert changed != METHOD
        # Of references and other constants the texts count, since a function may use them.
        assert (digest_of_source(changed) == digest) == ("title" not in text), text
    for code, other in (
        ("FACTOR = 2.0", "FACTOR = 3.0"),
        ("oracle=oracle,", ""),
        ("# equivalent mutants: no step", "# no step"),
        ("sum(1)", "mean(1)"),
    ):
        changed = METHOD.replace(code, other)
        assert changed != METHOD
        assert digest_of_source(changed) != digest, code


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(plugin.id for plugin in methods.plugins.values()))
def test_nine_of_ten_mutants_of_a_method_are_killed(name: str) -> None:
    """By its row of the page, or measured again where its code has changed since."""
    score, measured = measured_scores().get(name, (0, ""))
    if measured == code_digest(name):
        assert score >= 90
        return
    report = mutation_score(name, mutants=40)
    assert not [failure for failure in report.failing if "oracle" in failure], report.failing
    assert report.score >= 0.9, str(report)


def test_checks_left_out_of_mutation_runs_exist() -> None:
    from phosphene.testing.checks import CHECKS
    from phosphene.testing.mutation_server import MANNERS

    assert CHECKS.keys() >= MANNERS
    # It compares with a process that runs the unchanged code.
    assert "same_in_another_process" in MANNERS


def test_checks_from_which_a_method_is_exempt_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from phosphene.testing.checks import CHECKS

    exempt = methods["attacks.deepfool"]
    assert "parameters_matter" in exempt.spec.exempt
    monkeypatch.setattr(mutation_server, "_checks", lambda method: [CHECKS["parameters_matter"]])
    monkeypatch.setattr(mutation_server, "_cases", lambda method: [])
    baseline = mutation_server.Tests([exempt], "all").baseline()
    assert (baseline["plan"], baseline["failing"]) == ([], [])


# --- the check of the kit --------------------------------------------------------------------------


def arithmetic_report(source: str, file: Path, *only: str) -> Report:
    """The report of the check, and of others, for the method ``weighted`` of this source."""
    file.write_text(source)
    sys.modules.pop(file.stem, None)
    importlib.invalidate_caches()
    tested = importlib.import_module(file.stem).weighted
    return check_method(tested, only=[*only, "arithmetic_is_tested"])


def arithmetic_is_tested(source: str, file: Path) -> Outcome:
    """The outcome of the check for the method ``weighted`` of this source."""
    (outcome,) = arithmetic_report(source, file).outcomes
    return outcome


def test_line_that_the_oracle_does_not_show_is_named(method_file: Path) -> None:
    outcome = arithmetic_is_tested(WEAK, method_file)
    assert outcome.verdict == "failed"
    line = "return (brightest[:, 0] - 0.5).clamp(min=0) * 0.25"
    number = 1 + [text.strip() for text in WEAK.splitlines()].index(line)
    assert f"your line {number}: {line}\n" in outcome.reason
    assert "changed to: return (brightest[:, 0]" in outcome.reason
    assert "this changes the result of Case(" in outcome.reason
    first = re.search(r"your line (\d+): ", outcome.reason)
    assert first is not None
    assert outcome.hint.endswith(f"{method_file}, line {first[1]}")
    # The code below it prints the numbers that differ.
    code = outcome.reason.partition("before and after a change:\n")[2]
    printed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=method_file.parent, capture_output=True, text=True
    )
    assert "'maps': tensor(" in printed.stdout, printed.stderr
    assert "FACTOR" not in outcome.reason
    assert "a parameter other than its default" in outcome.hint
    assert "has no symmetry" in outcome.hint


def test_function_that_the_oracle_calls_itself_is_named(method_file: Path) -> None:
    outcome = arithmetic_is_tested(CALLS_THE_HELPER, method_file)
    assert outcome.verdict == "failed"
    assert ": return (FACTOR * x + x) / 4\n" in outcome.reason
    assert "this changes the result of the oracle's own call" in outcome.reason
    assert "or calls scale itself" in outcome.reason


def test_oracle_that_shows_every_line_passes(method_file: Path) -> None:
    outcome = arithmetic_is_tested(RIGHT, method_file)
    assert outcome.verdict == "passed", str(outcome)


def test_method_is_exempt_from_tested_arithmetic_with_a_reason(method_file: Path) -> None:
    exempt = 'oracle=oracle, exempt={"arithmetic_is_tested": "the edge is decoration"},'
    outcome = arithmetic_is_tested(WEAK.replace("oracle=oracle,", exempt), method_file)
    assert (outcome.verdict, outcome.reason) == ("skipped", "exempt: the edge is decoration")
    outcome = arithmetic_is_tested(WEAK.replace("oracle=oracle,", ""), method_file)
    assert (outcome.verdict, outcome.reason) == ("skipped", ARITHMETIC_UNTESTED)


#: With relations, which hold for the sum over the channels and for their mean.
RELATIONS_ONLY = RIGHT.replace(
    "oracle=oracle,", 'relations=[LinearIn("target"), Equivariant("hflip")],'
).replace("import size", "import Equivariant, LinearIn, size")
RELATIONS_ONLY = RELATIONS_ONLY.replace(" + _edge(images)", "")


def test_lines_that_relations_do_not_notice_are_a_warning(method_file: Path) -> None:
    report = arithmetic_report(RELATIONS_ONLY, method_file)
    (outcome,) = report.outcomes
    assert report.ok
    assert outcome.verdict == "skipped"
    assert re.fullmatch(r"it has no oracle; relations notice \d+ of \d+ changes", outcome.reason)
    (warning,) = report.warnings
    assert warning == outcome.warning
    assert warning.startswith(ORACLE_MISSING)
    assert "changed to: maps = scale(gradient)" in warning


def test_relations_that_notice_every_change_are_no_warning(method_file: Path) -> None:
    determined = "class Is(Relation):\n" + (
        '    """Twice the gradient, summed over the channels."""\n\n    kind: Literal["is"] = "is"\n\n'
        "    def check(self, calls):\n"
        "        names = ('images', 'target')\n"
        "        gradient = input_gradient(calls.model, *(calls.inputs[name] for name in names))\n"
        "        torch.testing.assert_close(calls.result.maps, 2 * gradient.sum(1))\n\n\n@method("
    )
    source = RELATIONS_ONLY.replace('LinearIn("target")', "Is()").replace("@method(", determined)
    source = source.replace("import Equivariant, LinearIn, size", "import Equivariant, Relation, size")
    source = source.replace("import torch\n", "from typing import Literal\n\nimport torch\n", 1)
    report = arithmetic_report(source, method_file)
    assert [outcome.verdict for outcome in report.outcomes] == ["passed"], str(report)
    assert not report.warnings


def test_oracle_that_fails_is_not_examined(method_file: Path) -> None:
    report = arithmetic_report(WEAK.replace("FACTOR = 2.0", "FACTOR = 3.0"), method_file, "oracle")
    names = {bound.check.name for bound in bound_checks("saliency") if bound.check.name.startswith("oracle_")}
    verdicts = {outcome.check: outcome.verdict for outcome in report.outcomes}
    assert verdicts == {"oracle": "failed", "arithmetic_is_tested": "skipped"}
    outcomes = arithmetic_report(
        WEAK.replace("FACTOR = 2.0", "FACTOR = 3.0"), method_file, *(names - {"oracle_has_no_side_effects"})
    ).outcomes
    reasons = {outcome.reason for outcome in [*outcomes, report.outcomes[1]]}
    assert reasons == {"the oracle fails on the unchanged method (oracle)"}
    # The failure leads to the line of the comparison.
    hint = report.outcomes[0].hint
    line = int(hint.rpartition(" ")[2])
    assert "assert_close" in method_file.read_text().splitlines()[line - 1]


def test_tested_arithmetic_is_no_check_of_the_quick_profile() -> None:
    names = {bound.check.name for bound in bound_checks("saliency", "quick")}
    assert "arithmetic_is_tested" not in names
    assert "arithmetic_is_tested" in {bound.check.name for bound in bound_checks("saliency", "ci")}


def test_mutants_by_line_begin_with_one_of_each_line(method_file: Path) -> None:
    every, total = generate_mutants(method_file, ["weighted"])
    ordered, again = generate_mutants(method_file, ["weighted"], by_line=True)
    assert again == total
    assert sorted(m.diff for m in ordered) == sorted(m.diff for m in every)
    lines = sorted({mutant.line for mutant in every})
    assert [mutant.line for mutant in ordered[: len(lines)]] == lines
    # Of a line with both, a number is changed before an argument is left out.
    first, *rest = [mutant for mutant in ordered if ".clamp(min=0)" in changed_lines(mutant.diff)[0]]
    assert changed_lines(first.diff)[0].count("0.25") and "clamp(" in changed_lines(first.diff)[1]
    assert generate_mutants(method_file, ["weighted"], 5, by_line=True)[0] == ordered[:5]
