"""pytest --phosphene-method NAME: adds the conformance checks of a registered method to a test run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .kit import BoundCheck


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("phosphene", "conformance of Phosphene methods")
    group.addoption(
        "--phosphene-method",
        action="append",
        default=[],
        metavar="NAME",
        help="also run the conformance checks of this method; repeatable",
    )
    group.addoption(
        "--phosphene-profile",
        default="ci",
        choices=["quick", "ci", "thorough"],
        help="how many cases to run (default: ci)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("xdist"):  # xdist registers this mark itself
        config.addinivalue_line("markers", "xdist_group(name): tests that run in one process")


class _CheckItem(pytest.Item):
    def __init__(self, *, check: BoundCheck, **rest: Any) -> None:
        super().__init__(**rest)
        self.check = check
        for mark in check.marks():
            self.add_marker(mark)

    def runtest(self) -> None:
        self.check()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *rest: Any, **more: Any) -> Any:
        if isinstance(excinfo.value, AssertionError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *rest, **more)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, self.name


class _Conformance(pytest.Collector):
    def collect(self) -> Iterator[_CheckItem]:
        from .kit import bound_checks

        for name in self.config.getoption("phosphene_method"):
            for check in bound_checks(name, self.config.getoption("phosphene_profile")):
                yield _CheckItem.from_parent(self, name=check.id, check=check)


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    if session.config.getoption("phosphene_method"):
        items += _Conformance.from_parent(session, name="phosphene").collect()
