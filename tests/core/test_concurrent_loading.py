"""Networks that several threads build at the same time."""

import sys
import threading
from collections.abc import Callable

import pytest
from torch import nn

from phosphene import ModelError, load_result
from phosphene.models.parameter_limit import limit_parameters


def _concurrent_errors(*functions: Callable[[], object]) -> list[BaseException]:
    """The errors of functions that each run in a thread, which the interpreter switches very often."""
    errors: list[BaseException] = []

    def call(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return errors


def test_a_limit_does_not_disturb_a_network_that_another_thread_builds() -> None:
    """A global hook that is added or removed ends the loop over the hooks in the other thread."""

    def build() -> None:
        for _ in range(1000):
            with limit_parameters(1000):
                nn.Linear(3, 3)

    assert not _concurrent_errors(*[build] * 4)


def test_concurrent_threads_load_one_result() -> None:
    def load() -> None:
        for _ in range(20):
            load_result("builtin:shapes-styles")

    assert not _concurrent_errors(load, load)


def test_a_limit_counts_only_the_networks_inside_it() -> None:
    def build() -> None:
        nn.Linear(100, 100)

    with limit_parameters(10):
        nn.Linear(3, 2)
        assert not _concurrent_errors(build)
        with limit_parameters(100), pytest.raises(ModelError, match="more than 10 numbers"):
            nn.Linear(3, 3)
    nn.Linear(100, 100)
