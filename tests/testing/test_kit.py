"""The kit itself: it catches every wrong method by the check that should, and lets right ones pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from right_methods import RIGHT
from wrong_methods import WRONG

from phosphene import Method, UnknownName, method
from phosphene.results import Attribution
from phosphene.roles import Images
from phosphene.testing import Case, check, check_method, parametrize_with_checks

HERE = Path(__file__).parent


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=[m.spec.short_name for _, m in WRONG])
def test_a_wrong_method_is_caught_by_the_check_that_should(name: str, wrong: Method[Any, Any]) -> None:
    (outcome,) = check_method(wrong, only=[name]).outcomes
    assert outcome.verdict == "failed", str(outcome)
    assert outcome.promise in str(outcome)
    assert "wrong_methods.py, line" in outcome.hint
    # The example is code that shows the failure.
    with pytest.raises(AssertionError):
        exec(outcome.example, {})


@pytest.mark.parametrize("right", RIGHT, ids=[m.spec.short_name for m in RIGHT])
def test_a_right_method_passes_everything(right: Method[Any, Any]) -> None:
    report = check_method(right)
    assert report.ok, str(report)
    for outcome in report.outcomes:
        assert outcome.verdict == "passed" or outcome.reason, "what is skipped has a reason"


def test_there_are_enough_of_both() -> None:
    assert len(WRONG) >= 25
    assert len(RIGHT) >= 10
    caught = {name.partition("(")[0] for name, _ in WRONG}
    assert len(caught) >= 18, "the wrong methods try the checks, not one of them"


def by_name(name: str) -> Method[Any, Any]:
    return next(m for m in (*RIGHT, *(wrong for _, wrong in WRONG)) if m.spec.short_name == name)


def test_the_smallest_case_is_plain_but_for_what_breaks_the_promise() -> None:
    (outcome,) = check_method(by_name("breaks_on_a_flat_picture"), only=["finite"]).outcomes
    assert "Case(pictures='flat', count=1)" in outcome.example or "Case(pictures='black'" in outcome.example
    (outcome,) = check_method(by_name("rounds_odd_sizes"), only=["map_per_pixel(field='maps')"]).outcomes
    assert "count=1, size=(" in outcome.example


def test_only_the_checks_concerned_fail() -> None:
    """A breach must not be drowned by others that follow from nothing of the author's."""
    for name, wrong in WRONG:
        if wrong.spec.short_name in ("prints", "keeps_the_sign", "blows_the_declared_cost"):
            report = check_method(wrong, profile="quick")
            assert [outcome.check for outcome in report.failures] == [name]


def test_a_check_can_be_tried_on_one_case() -> None:
    case = Case("functional", "noise", count=1)
    check(by_name("plain_gradient"), "finite", case)
    with pytest.raises(AssertionError, match="2 images|forward"):
        check(by_name("blows_the_declared_cost"), "within_cost", case)
    with pytest.raises(UnknownName, match="finite"):
        check(by_name("plain_gradient"), "finit", case)


def test_what_a_library_does_when_it_is_imported_is_not_held_against_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rude_library.py").write_text("import os; os.environ['RUDE_LIBRARY'] = '1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rude_library", raising=False)
    report = check_method(imports_late, profile="quick", only=["no_side_effects"])
    assert "rude_library" in sys.modules
    assert report.ok, str(report)


def test_a_method_for_some_networks_only_is_tested_on_them() -> None:
    for profile in ("quick", "ci"):
        report = check_method(by_name("transformers_only"), profile=profile)
        assert report.ok, str(report)
        for outcome in report.outcomes:
            if outcome.check in ("finite", "batch_equals_single", "saves_and_replays"):
                assert outcome.refused < outcome.cases


def test_pictures_may_lie_in_memory_as_they_like() -> None:
    case, reads = Case(count=2), by_name("reads_flat_pictures")
    model = case.model()
    images = case.inputs(reads, model)["images"]
    strided = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(reads(model, strided, 0).maps, reads(model, images, 0).maps)


def test_unknown_profiles_and_checks_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="thorough"):
        check_method("saliency", profile="through")
    with pytest.raises(UnknownName, match="within_cost"):
        check_method("saliency", only=["within_costs"])


def test_a_case_says_how_it_is_made() -> None:
    case = Case("tokens", "flat", target=3, params={"eps": 0.5})
    assert eval(repr(case), {"Case": Case}) == case
    assert torch.equal(*(case.inputs(by_name("plain_gradient"), case.model())["images"] for _ in range(2)))


@method(family="right")
def imports_late(images: Images) -> Attribution:
    """Import what it needs when it is called."""
    import rude_library  # noqa: F401

    return Attribution(images=images, maps=images.mean(1), targets=("mean",) * len(images))


@parametrize_with_checks([by_name("plain_gradient")], profile="quick")
def test_checks_can_be_tests_of_their_own(check: Any) -> None:
    check()


def test_pytest_runs_the_checks_of_a_method_in_any_repository(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    words = ["-q", "-p", "no:cacheprovider", "--phosphene-method", "cam", "--phosphene-profile", "quick"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attribution.cam" not in done.stdout
    assert " passed" in done.stdout and "skipped" in done.stdout


def test_pytest_tells_a_broken_promise_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import phosphene.testing.kit as kit\n"
        "from wrong_methods import prints\n"
        "kit.methods = {'prints': prints}\n"
    )
    words = ["-q", "-p", "no:cacheprovider", "--phosphene-method", "prints", "--phosphene-profile", "quick"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "It has no side effects" in done.stdout
    assert "standard output" in done.stdout
    assert "where to look" in done.stdout
    assert "Traceback" not in done.stdout
