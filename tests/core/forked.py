"""Runs functions in a forked process: one that may be killed, change its user, or have its files limited."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

# Autograd's first pass in a process decides whether it starts threads, as it would after torch.export. With
# them, a forked process cannot use it.
torch.ones(1, requires_grad=True).sum().backward()


class Killed(Exception):
    """The process was ended by SIGKILL."""


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked process. Raises its exception, or ``Killed``."""
    return start(function)()


def start(function: Callable[[], Any]) -> Callable[[], Any]:
    """Begin a function in a forked process; the returned function waits for what it returns."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            try:
                answer: tuple[bool, Any] = True, function()
            except BaseException as error:
                answer = False, error
            _watching.clear()
            with os.fdopen(writing, "wb") as stream:
                try:
                    content = pickle.dumps(answer)
                except Exception:  # pytest's own exceptions hold what cannot be pickled
                    content = pickle.dumps((False, RuntimeError(repr(answer))))
                stream.write(content)
        finally:
            os._exit(0)
    os.close(writing)

    def wait() -> Any:
        with os.fdopen(reading, "rb") as stream:
            content = stream.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            raise Killed
        succeeded, value = pickle.loads(content)
        if not succeeded:
            raise value
        return value

    setattr(wait, "pid", pid)  # noqa: B010
    return wait


#: Whether operations are counted: until the function of ``start`` ends.
_watching: set[int] = set()


def at_operation(number: int, function: Callable[[], Any]) -> None:
    """From now on, call a function instead of one operation on files: the ``number``-th of this process."""
    count = 0
    _watching.add(number)

    def watch(event: str, arguments: Any) -> None:
        nonlocal count
        if _watching and (event == "open" or event.startswith(("os.", "shutil."))):
            count += 1
            if count == number:
                function()

    sys.addaudithook(watch)
