"""What a failure's report says so that its author can repeat it: code, inputs and the line to look at."""

from __future__ import annotations

import ast
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PhospheneError
from .observation import input_tensors

if TYPE_CHECKING:
    from ..registry.method import Method
    from .cases import Case

    AnyMethod = Method[..., Any]


def method_import(method: AnyMethod) -> str:
    """Python code that names the method ``method``."""
    function = inspect.unwrap(method)
    if method.distribution == "unregistered":
        return f"from {function.__module__} import {method.spec.short_name} as method"
    return f'from phosphene import methods\n\nmethod = methods["{method.spec.name}"]'


def case_code(method: AnyMethod, case: Case) -> str:
    """Python code that creates a case, with a comment that says what it is."""
    return f"case = {case!r}  # {describe_case(method, case)}"


def describe_case(method: AnyMethod, case: Case) -> str:
    """A case's network, the shapes of its inputs, and its parameters, in one line."""
    parts = [f"network {case.network!r}"] if method.spec.input("model") else []
    try:
        inputs = input_tensors(case.inputs(method, case.model()))
        parts += [f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items()]
        params = method.validate(case.arguments(method))
    except PhospheneError:  # a case that the method refuses
        params = case.arguments(method)
    return ", ".join([*parts, *(f"{name}={value!r}" for name, value in params.items())])


class LineFailure(AssertionError):
    """A failure whose cause is a line of the method's file."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def location(function: Callable[..., Any], error: BaseException | None = None) -> str:
    """The deepest line of an error's traceback in the function's file; else the line of its ``def``."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None:
        return function.__module__
    line = error.line if isinstance(error, LineFailure) else _line_in(code.co_filename, error)
    line = line or _definition_line(code.co_filename, code.co_name, code.co_firstlineno)
    return f"{code.co_filename}, line {line}"


def crash_of(method: AnyMethod, error: BaseException) -> tuple[str, str] | None:
    """The type of an error that the method's file raises, and the line; None for one that a check raises."""
    function = inspect.unwrap(method)
    while error.__cause__ is not None:
        error = error.__cause__
    code = getattr(function, "__code__", None)
    if code is None or _line_in(code.co_filename, error) is None:
        return None
    return type(error).__name__, location(function, error)


def _line_in(file: str, error: BaseException | None) -> int | None:
    """The deepest line of a file in the tracebacks of an error and its causes."""
    line = None
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == file), None) or line
        error = error.__cause__
    return line


def _definition_line(file: str, name: str, first_line: int) -> int:
    """The line of a function's ``def``, of which ``first_line`` is that of its first decorator."""
    try:
        nodes = list(ast.walk(ast.parse(Path(file).read_text("utf-8"))))
    except (OSError, SyntaxError):
        return first_line
    lines = [node.lineno for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
    return min((line for line in lines if line >= first_line), default=first_line)
