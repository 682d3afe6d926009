"""The conformance kit: wrong methods fail the expected check, right methods pass all checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from right_methods import RIGHT
from wrong_methods import WRONG

from phosphene import Method, UnknownName, method, methods
from phosphene.graceful_stop import Terminated
from phosphene.results import Attribution
from phosphene.roles import Images
from phosphene.testing import Case, check, check_method, parametrize_with_checks
from phosphene.testing.cases import _of_small_images, properties_of
from phosphene.testing.checks import CHECKS
from phosphene.testing.kit import Examination, Outcome
from phosphene.testing.observation import Observations, observe

FOLDER = Path(__file__).parent
#: "quick", or "ci" in ``make test-nightly``.
PROFILE = os.environ.get("PHOSPHENE_PROFILE", "quick")
#: Of a test run in a process of its own, whose output the options of this run would change.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=[m.spec.short_name for _, m in WRONG])
def test_wrong_method_fails_its_check(name: str, wrong: Method[Any, Any]) -> None:
    (outcome,) = check_method(wrong, only=[name]).outcomes
    assert outcome.verdict == "failed", str(outcome)
    assert outcome.promise in str(outcome)
    assert "wrong_methods.py, line" in outcome.hint
    # The example is code that reproduces the failure.
    with pytest.raises(AssertionError):
        exec(outcome.example, {})


@pytest.mark.parametrize("right", RIGHT, ids=[m.spec.short_name for m in RIGHT])
def test_right_method_passes_all_checks(right: Method[Any, Any]) -> None:
    report = check_method(right, profile=PROFILE)
    assert report.ok, str(report)
    for outcome in report.outcomes:
        assert outcome.verdict == "passed" or outcome.reason, "a skipped check has a reason"


def test_wrong_methods_cover_most_checks() -> None:
    assert len(WRONG) >= 85
    assert len(RIGHT) >= 20
    caught = {name.partition("(")[0] for name, _ in WRONG}
    assert len(caught) >= 35, "the wrong methods must fail many different checks"


def by_name(name: str) -> Method[Any, Any]:
    return next(m for m in (*RIGHT, *(wrong for _, wrong in WRONG)) if m.spec.short_name == name)


def test_choices_of_one_parameter_are_exempt_with_a_reason() -> None:
    def mean_of_channels(
        images: Images,
        *,
        order: Literal["rgb", "bgr"] = "rgb",
        scale: Literal["same", "half", "halved"] = "same",
    ) -> Attribution:
        """Mean of the channels, in either order."""
        maps = images.mean(1) if scale == "same" else images.mean(1) / 2
        return Attribution(images=images, maps=maps, targets=("mean",) * len(images))

    checks = ["choices_differ(order)", "choices_differ(scale)"]
    exempt = {checks[0]: "a mean does not depend on the order"}
    one, other = check_method(method(family="wrong", exempt=exempt)(mean_of_channels), only=checks).outcomes
    assert one.verdict == "skipped" and one.reason == f"exempt: {exempt[checks[0]]}"
    assert other.verdict == "failed" and "'half' and 'halved'" in other.reason
    assert "'same'" not in other.reason
    with pytest.raises(UnknownName, match=r"choices_differ\(scale\)"):
        check_method(
            method(family="wrong", exempt={"choices_differ(scales)": "both halve the mean"})(mean_of_channels)
        )


def test_example_is_the_simplest_failing_case() -> None:
    (outcome,) = check_method(by_name("divides_by_the_standard_deviation"), only=["finite"]).outcomes
    assert "Case(pictures='flat', count=1)" in outcome.example or "Case(pictures='black'" in outcome.example
    (outcome,) = check_method(by_name("crops_odd_sides"), only=["map_per_pixel(field='maps')"]).outcomes
    assert "count=1, size=(" in outcome.example


def test_one_broken_promise_fails_one_check() -> None:
    """One defect must not fail other checks, whose messages would hide the cause."""
    for name, wrong in WRONG:
        if wrong.spec.short_name in (
            "prints_to_standard_output",
            "returns_signed_maps",
            "exceeds_the_declared_cost",
        ):
            report = check_method(wrong, profile="quick")
            assert [outcome.check for outcome in report.failures] == [name]


def test_termination_in_a_drawn_case_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    error, calls = Examination._error, []

    def terminated_once(*arguments: Any) -> AssertionError | None:
        calls.append(arguments)
        if len(calls) == 1:
            raise Terminated
        return error(*arguments)

    monkeypatch.setattr(Examination, "_error", terminated_once)
    outcome = Outcome(check="finite", promise="", hint="", verdict="passed")
    with pytest.raises(KeyboardInterrupt):
        Examination(by_name("plain_gradient"), "quick")._drawn(CHECKS["finite"], outcome, 3)


def test_check_runs_on_one_case() -> None:
    case = Case("functional", "noise", count=1)
    check(by_name("plain_gradient"), "finite", case)
    with pytest.raises(AssertionError, match="2 images|forward"):
        check(by_name("exceeds_the_declared_cost"), "within_cost", case)
    with pytest.raises(UnknownName, match="finite"):
        check(by_name("plain_gradient"), "finit", case)


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.on == "case"])
def test_network_from_whose_output_no_input_can_be_made_is_refused(name: str) -> None:
    """The sample of a data set needs the number of classes, which this output does not tell."""
    if CHECKS[name].reason_to_skip(methods["part_importance"]) is None:
        check(methods["part_importance"], name, Case("rows", count=1))


def test_images_of_drawn_cases_are_small() -> None:
    schemas = properties_of(methods["maco"].spec.params_schema)
    bounds = [
        (b["minimum"], b["maximum"]) for b in _of_small_images(schemas["size"])["anyOf"] if "maximum" in b
    ]
    assert bounds == [(8, 96)]
    assert _of_small_images(schemas["steps"]) is schemas["steps"]


def test_large_results_are_not_all_stored() -> None:
    gradient, observations = by_name("plain_gradient"), Observations(most=40_000)  # 9,216 an image
    cases = [Case(count=count) for count in (1, 2, 3, 4)]
    for case in cases:
        observations[case] = observe(gradient, case)
    assert list(observations) == cases[3:]
    large = Case(count=20)
    observations[large] = observe(gradient, large)
    assert list(observations) == [large], "the newest is needed"


def test_side_effects_of_importing_a_library_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library_that_sets_environ.py").write_text("import os; os.environ['SET_ON_IMPORT'] = '1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "library_that_sets_environ", raising=False)
    report = check_method(imports_during_the_call, profile="quick", only=["no_side_effects"])
    assert "library_that_sets_environ" in sys.modules
    assert report.ok, str(report)


def test_method_for_some_networks_is_tested_on_those_networks() -> None:
    report = check_method(by_name("transformers_only"), profile=PROFILE)
    assert report.ok, str(report)
    for outcome in report.outcomes:
        if outcome.check in ("finite", "batch_equals_single", "saves_and_replays"):
            assert outcome.refused < outcome.cases


def test_setting_that_an_oracle_changes_at_its_first_run_only_is_reported() -> None:
    """The watched run is the first: later ones, in which the setting is changed already, would pass."""
    runs: list[int] = []

    def oracle() -> None:
        if not runs:
            torch.backends.cudnn.deterministic = True
        runs.append(1)

    @method(family="wrong", oracle=oracle)
    def changes_a_setting_once(images: Images) -> Attribution:
        """The oracle changes a setting at its first run."""
        return Attribution(images=images, maps=images.mean(1), targets=("mean",) * len(images))

    report = check_method(changes_a_setting_once, profile="quick")
    assert "oracle_has_no_side_effects" in [outcome.check for outcome in report.failures]
    assert not torch.backends.cudnn.deterministic, "the setting is restored"


def test_images_of_any_memory_format_are_accepted() -> None:
    case, view_flat = Case(count=2), by_name("views_images_flat")
    model = case.model()
    images = case.inputs(view_flat, model)["images"]
    strided = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(view_flat(model, strided, 0).maps, view_flat(model, images, 0).maps)


def test_unknown_profile_or_check_suggests_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="thorough"):
        check_method("saliency", profile="through")
    with pytest.raises(UnknownName, match="within_cost"):
        check_method("saliency", only=["within_costs"])


def test_repr_of_a_case_recreates_it() -> None:
    case = Case("tokens", "flat", target=3, params={"eps": 0.5})
    assert eval(repr(case), {"Case": Case}) == case
    assert torch.equal(*(case.inputs(by_name("plain_gradient"), case.model())["images"] for _ in range(2)))


@method(family="right")
def imports_during_the_call(images: Images) -> Attribution:
    """A library is imported during the call."""
    import library_that_sets_environ  # noqa: F401

    return Attribution(images=images, maps=images.mean(1), targets=("mean",) * len(images))


@parametrize_with_checks([by_name("plain_gradient")], profile="quick", only_declared=True)
def test_parametrize_with_checks_makes_one_test_per_check(check: Any) -> None:
    check()


def test_checks_that_a_declaration_skips_are_left_out() -> None:
    every, declared = (
        [parameter.values[0].check for parameter in parametrize_with_checks(["saliency"], **only).args[1]]
        for only in ({}, {"only_declared": True})
    )
    names = [check.name for check in every if check.reason_to_skip(methods["saliency"]) is None]
    assert len(names) < len(every) and [check.name for check in declared] == names


def test_pytest_runs_the_checks_of_a_method_in_any_repository(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    arguments = ["-q", "-p", "no:cacheprovider", "--phosphene-method", "cam", "--phosphene-profile", "quick"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=tmp_path,
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "attribution.cam" not in process.stdout
    assert " passed" in process.stdout and "skipped" in process.stdout


def test_pytest_reports_a_broken_promise_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import phosphene.testing.kit as kit\n"
        "from wrong_methods import prints_to_standard_output as prints\n"
        "kit.methods = {prints.spec.short_name: prints}\n"
    )
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--phosphene-method",
        "prints_to_standard_output",
        "--phosphene-profile",
        "quick",
    ]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=tmp_path,
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert "It has no side effects" in process.stdout
    assert "standard output" in process.stdout
    assert "where to look" in process.stdout
    assert "Traceback" not in process.stdout
