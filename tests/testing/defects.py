"""Methods that are defined with and without a defect, by the check that tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phosphene import Method, method
from phosphene.testing import check_method

#: A method, with the defect (True) or without it.
Maker = Callable[[bool], Method[Any, Any]]


class Makers(list[tuple[str, Maker]]):
    """Pairs of a check and a method; ``spec`` are arguments of ``method`` for all of them."""

    def __init__(self, **spec: Any) -> None:
        super().__init__()
        self.spec = {"family": "claims", **spec}

    def caught_by(self, check: str, **spec: Any) -> Callable[[Callable[[bool], Callable[..., Any]]], Maker]:
        """Register a function that defines a method with and without a defect."""

        def register(make: Callable[[bool], Callable[..., Any]]) -> Maker:
            def made(wrong: bool) -> Method[Any, Any]:
                return method(**{**self.spec, **spec})(make(wrong))

            self.append((check, made))
            return made

        return register

    @property
    def ids(self) -> list[str]:
        """A name of each for pytest."""
        return [f"{check}-{number}" for number, (check, _) in enumerate(self)]


def outcome(check: str, tested: Method[Any, Any]) -> Any:
    """The outcome of one check of a method."""
    (single,) = check_method(tested, profile="quick", only=[check]).outcomes
    return single


def assert_defect_is_refused(check: str, make: Maker) -> None:
    """Without the defect the method passes, with it the check fails."""
    right, wrong = outcome(check, make(False)), outcome(check, make(True))
    assert (right.verdict, wrong.verdict) == ("passed", "failed"), f"{right}\n{wrong}"
