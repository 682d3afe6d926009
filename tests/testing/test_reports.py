"""What the kit's report says of a failure: each mistake once, with the line and the code to repeat it."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phosphene.testing import Case, Report, bound_checks, check_method
from phosphene.testing.checks import ORACLE_MISSING
from phosphene.testing.reproduction import describe_case, location

SOURCE = '''"""A map."""

import torch
from phosphene import Cost, Reference, hookimpl, input_gradient, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Equivariant, MapPerPixel, size


@method(
    family="attribution",
    references=[Reference(key="k", title="T", authors="A", year=2020, url="https://example.org")],
    invariants=[MapPerPixel()],
    relations=[Equivariant("transpose")],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
)
def mapped(model: Model, images: Images, target: Target = None) -> Attribution:
    """A map of something."""
    maps = input_gradient(model, images, target).abs().sum(1)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")
'''
#: Checks of where a map's values are.
POSITIONS = ("explains_the_target", "localizes", "covers_the_image", "equivariant('transpose')")


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Import the method with a changed line."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(before: str = "", after: str = "") -> Any:
        assert before in SOURCE
        (tmp_path / "mapped_source.py").write_text(SOURCE.replace(before, after) if before else SOURCE)
        sys.modules.pop("mapped_source", None)
        importlib.invalidate_caches()
        return importlib.import_module("mapped_source").mapped

    yield load
    sys.modules.pop("mapped_source", None)


def verdicts(report: Report) -> dict[str, tuple[str, str]]:
    return {outcome.check: (outcome.verdict, outcome.reason) for outcome in report.outcomes}


def test_map_of_another_shape_is_no_failure_of_positions(mapped: Callable[..., Any]) -> None:
    cropped = mapped(".sum(1)", ".sum(1)[:, 10:]")
    outcomes = verdicts(
        check_method(cropped, profile="quick", only=["map_per_pixel(field='maps')", *POSITIONS])
    )
    assert outcomes.pop("map_per_pixel(field='maps')")[0] == "failed"
    reason = "the maps have no value for each pixel (map_per_pixel(field='maps'))"
    assert outcomes == dict.fromkeys(POSITIONS, ("skipped", reason))


def test_wrong_positions_fail_where_the_shape_is_right(mapped: Callable[..., Any]) -> None:
    # Of square images the shape is right, and the profile has no other case: the failure is not hidden.
    transposed = mapped(".sum(1)", ".sum(1).mT")
    (outcome,) = check_method(transposed, profile="quick", only=["explains_the_target"]).outcomes
    assert outcome.verdict == "failed"


def test_error_of_every_call_is_one_failure_at_its_line(mapped: Callable[..., Any]) -> None:
    broken = mapped(".sum(1)", ".sum(1).no_such_method()")
    names = [
        name for b in bound_checks(broken, "quick") if (name := b.check.name) not in ("no_leak", "resumes")
    ]
    report = check_method(broken, profile="quick", only=names)
    assert [outcome.check for outcome in report.failures] == ["answers"]
    line = 1 + [".abs()" in text for text in SOURCE.splitlines()].index(True)
    assert report.failures[0].hint.endswith(f"mapped_source.py, line {line}")
    skipped = [o for o in report.outcomes if o.reason == 'it raises the error of the check "answers"']
    assert len(skipped) > 10


def test_failure_leads_to_the_line_of_the_function(mapped: Callable[..., Any]) -> None:
    line = 1 + [text.startswith("def mapped") for text in SOURCE.splitlines()].index(True)
    assert location(mapped()).endswith(f"mapped_source.py, line {line}")


def test_example_says_what_the_case_is(mapped: Callable[..., Any]) -> None:
    assert describe_case(mapped(), Case()) == "network 'gap', images (2, 3, 24, 24)"
    (outcome,) = check_method(
        mapped(".sum(1)", ".sum(1)[:, 10:]"), profile="quick", only=["map_per_pixel(field='maps')"]
    ).outcomes
    assert "case = Case(count=1)  # network 'gap', images (1, 3, 24, 24)\n" in outcome.example


def test_method_without_an_oracle_is_a_warning_in_every_profile(mapped: Callable[..., Any]) -> None:
    report = check_method(mapped(), profile="quick", only=["documented"])
    (warning,) = report.warnings
    assert warning.startswith(ORACLE_MISSING)
    assert "--profile ci" in warning


def test_warning_of_a_check_is_one_of_pytest(
    mapped: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unittest import SkipTest

    from phosphene.testing.checks import UntestedError

    def undecided(method: Any) -> None:
        raise UntestedError("it has no oracle", "line 1 is not tested")

    (bound,) = (b for b in bound_checks(mapped()) if b.check.name == "arithmetic_is_tested")
    monkeypatch.setattr("phosphene.testing.kit.run_check", lambda check, method, *rest: undecided(method))
    warning = re.escape("attribution.mapped: line 1 is not tested")
    with pytest.warns(UserWarning, match=warning), pytest.raises(SkipTest, match="no oracle"):
        bound()
