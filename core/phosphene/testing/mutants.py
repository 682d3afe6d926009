"""Mutants of a source file: each changes one operator, constant, index, argument or statement."""

from __future__ import annotations

import ast
import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtra

try:
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation import mutators
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] not in ("libcst", "mutmut"):
        raise
    raise MissingExtra("phosphene check --mutate", "mutation") from error

#: A comment that begins so, on the mutated line or alone on the line above the statement, explains why the
#: mutants of that line that no test notices compute the same.
EQUIVALENT = "# equivalent mutants:"

#: Keyword arguments that change no number on the machine of a test.
_WITHOUT_EFFECT = {"device", "generator", "desc", "non_blocking", "memory_format", "strict", "total"}
#: Methods of tensors that change no number either.
_IDENTITIES = {"contiguous", "to", "cpu", "type_as", "double", "float"}
#: Functions that are replaced by one of the same signature.
_COUNTERPARTS = {
    "amax": "amin",
    "amin": "amax",
    "argmax": "argmin",
    "argmin": "argmax",
    "ceil": "floor",
    "floor": "ceil",
    "max": "min",
    "maximum": "minimum",
    "mean": "sum",
    "min": "max",
    "minimum": "maximum",
    "sum": "mean",
}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    ``line``: the number of the changed line; ``function``: the qualified name of its function;
    ``source``: the changed file; ``diff``: the change as a unified diff;
    ``explanation``: the author's, from a comment that begins with ``EQUIVALENT``.
    """

    line: int
    function: str
    source: str
    diff: str
    explanation: str | None


def generate_mutants(
    file: Path, functions: Sequence[str], limit: int | None = None, *, by_line: bool = False
) -> tuple[list[Mutant], int]:
    """Mutants of the bodies of these functions and of what they use in the file, and their total number.

    ``functions``: names of functions and classes at the top level of the file. ``limit``: at most so many
    mutants, evenly from all; the same in every call. ``by_line``: instead, one of each line, then another of
    each, and so on, operators, numbers and functions before arguments left out. Not changed are strings,
    annotations, decorators, raise statements and conditions that guard nothing but one, and the methods of a
    result that display it, since no check of its numbers runs them.

    Raises MissingExtra without the packages of the extra ``mutation``.
    """
    source = file.read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    names = _reachable_names(source, functions)
    changes = _Changes(names, _imported_names(source), _display_functions(source))
    wrapper.visit(changes)
    changed = _by_line(changes.changes)[:limit] if by_line else changes.changes
    if limit is not None and len(changed) > limit:
        changed = [changed[n * len(changed) // limit] for n in range(limit)]
    mutants = [_build_mutant(file, source, wrapper.module, change) for change in changed]
    return [mutant for mutant in mutants if mutant is not None], len(changes.changes)


@dataclass(frozen=True)
class _Change:
    node: cst.CSTNode
    replacement: cst.CSTNode
    line: int
    statement: int
    function: str
    #: Whether an argument or a method's call is left out.
    leaves_out: bool


def _by_line(changes: Sequence[_Change]) -> list[_Change]:
    """The first change of each line, then the second of each, and so on; those that leave out come last."""
    counts: Counter[int] = Counter()
    ranks = {}
    for change in sorted(changes, key=lambda change: change.leaves_out):
        ranks[id(change)] = counts[change.line]
        counts[change.line] += 1
    return sorted(changes, key=lambda change: (ranks[id(change)], change.line))


def _build_mutant(file: Path, source: str, module: cst.Module, change: _Change) -> Mutant | None:
    mutated = module.deep_replace(change.node, change.replacement)
    assert isinstance(mutated, cst.Module)
    before, after = source.splitlines(), mutated.code.splitlines()
    diff = "\n".join(
        line for line in difflib.unified_diff(before, after, str(file), str(file), n=1, lineterm="")
    )
    return Mutant(change.line, change.function, mutated.code, diff, _explanation(before, change))


def _explanation(lines: Sequence[str], change: _Change) -> str | None:
    for number in (change.line, change.statement):
        line, above = lines[number - 1], lines[number - 2].strip() if number > 1 else ""
        for text in (line, above if above.startswith(EQUIVALENT) else ""):
            _, marker, reason = text.partition(EQUIVALENT)
            if marker and reason.strip():
                return reason.strip()
    return None


# --- which code ------------------------------------------------------------------------------


def _reachable_names(source: str, functions: Sequence[str]) -> set[str]:
    """The functions, classes and constants of the file that these functions use, themselves included."""
    definitions: dict[str, list[ast.AST]] = {}
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name, body=body):
                definitions[name] = list(body)
            case ast.ClassDef(name=name, body=body, bases=bases):
                definitions[name] = [*body, *bases]
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                definitions[name] = [value]
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id=name))], value=value):
                definitions.setdefault(name, []).append(
                    value
                )  # a class's attribute, such as a table of rules
    reached: set[str] = set()
    waiting = [name for name in functions if name in definitions]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            used = {
                node.id
                for part in definitions[name]
                for node in ast.walk(part)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            }
            waiting += sorted(used & definitions.keys())
    return reached


#: Methods of a result that turn it into panels, lines and figures.
_DISPLAYS = {"animation_frames", "draw", "lines", "panels", "rows"}


def _display_functions(source: str) -> set[str]:
    """The qualified names of methods that display a result, and of private functions that only these use."""
    uses: dict[str, set[str]] = {}
    for node in ast.parse(source).body:
        parts = node.body if isinstance(node, ast.ClassDef) else []
        methods = [part for part in parts if isinstance(part, ast.FunctionDef)]
        for method in methods:
            uses[f"{getattr(node, 'name', '')}.{method.name}"] = _used_names([method])
        if not methods:
            uses[getattr(node, "name", str(node))] = _used_names([node])
    displays = {name for name in uses if "." in name and name.rpartition(".")[2] in _DISPLAYS}

    def is_display(name: str) -> bool:
        own = name.rpartition(".")[2]
        users = {user for user, used in uses.items() if own in used and user != name}
        return own.startswith("_") and not own.startswith("__") and bool(users) and users <= displays

    while added := {name for name in uses if name not in displays and is_display(name)}:
        displays |= added
    return displays


def _used_names(nodes: Sequence[ast.AST]) -> set[str]:
    parts = [part for node in nodes for part in ast.walk(node)]
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return names | {part.attr for part in parts if isinstance(part, ast.Attribute)}


def _imported_names(source: str) -> set[str]:
    return {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


class _Changes(cst.CSTVisitor):
    """Collects every change of the functions, classes and constants with these names."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, names: set[str], imported: set[str], displays: set[str]) -> None:
        super().__init__()
        self.names = names
        self.displays = displays
        self.imported = imported
        self.changes: list[_Change] = []
        self._definitions: list[str] = []
        self._optional: set[str] = set()
        self._statements: list[int] = []
        self._texts: set[tuple[int, int, int, int, str]] = set()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Module):
            return True
        if not self._definitions:
            return self._visit_definition(node)
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self._visit_body(node)
            return False
        if _is_excluded(node):
            return False
        if _is_statement(node):
            self._statements.append(self._position(node)[0])
        self._change(node)
        if isinstance(node, cst.Call) and _name(node.func) == "progress_bar":
            node.args[0].visit(self)
            return False
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self._statements and _is_statement(original_node):
            self._statements.pop()
        super().on_leave(original_node)

    def _visit_definition(self, node: cst.CSTNode) -> bool:
        """At the top level: the bodies of the named functions and classes, and named numbers."""
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            if node.name.value in self.names and node.name.value not in _HOOKS:
                self._optional = _optional_parameters(node) if isinstance(node, cst.FunctionDef) else set()
                self._visit_body(node)
            return False
        if isinstance(node, cst.SimpleStatementLine):
            for statement in node.body:
                target, value = _assignment(statement)
                if target in self.names and value is not None and _is_number(value):
                    self._definitions.append(target)
                    self._visit_number(node, value)
                    self._definitions.pop()
        return False

    def _visit_body(self, node: cst.FunctionDef | cst.ClassDef) -> None:
        """A function's statements; a class's methods and numbers, as its fields are declarations."""
        self._definitions.append(node.name.value)
        if ".".join(self._definitions) in self.displays:
            pass
        elif isinstance(node, cst.FunctionDef):
            node.body.visit(self)
        else:
            for part in node.body.body:
                match part:
                    case cst.FunctionDef() | cst.ClassDef():
                        part.visit(self)
                    case cst.SimpleStatementLine(body=[cst.Assign(value=value)]) if _is_number(value):
                        self._visit_number(part, value)
        self._definitions.pop()

    def _visit_number(self, statement: cst.SimpleStatementLine, value: cst.BaseExpression) -> None:
        self._statements.append(self._position(statement)[0])
        value.visit(self)
        self._statements.pop()

    def _position(self, node: cst.CSTNode) -> tuple[int, int, int, int]:
        position = self.get_metadata(PositionProvider, node)
        return position.start.line, position.start.column, position.end.line, position.end.column

    def _change(self, node: cst.CSTNode) -> None:
        replacements = [r for kind, operator in _OPERATORS if isinstance(node, kind) for r in operator(node)]
        operators = len(replacements)
        if isinstance(node, cst.Call):
            replacements += _change_arguments(node, self._optional)
            if _name(node) not in self.imported:
                replacements += _drop_method(node)
        for number, replacement in enumerate(replacements):
            position = self._position(node)
            text = cst.Module([]).code_for_node(replacement)
            if (*position, text) in self._texts:
                continue
            self._texts.add((*position, text))
            statement = self._statements[-1] if self._statements else position[0]
            name = ".".join(self._definitions)
            self.changes.append(_Change(node, replacement, position[0], statement, name, number >= operators))


#: Hooks that a plugin implements; they only hand over what the file defines.
_HOOKS = {"phosphene_methods", "phosphene_roles", "phosphene_commands"}


def _is_statement(node: cst.CSTNode) -> bool:
    if isinstance(node, (cst.FunctionDef, cst.ClassDef)) or _is_excluded(node):
        return False
    return isinstance(node, (cst.SimpleStatementLine, cst.BaseCompoundStatement))


def _is_excluded(node: cst.CSTNode) -> bool:
    match node:
        case cst.Annotation() | cst.BaseString() | cst.Decorator() | cst.Raise() | cst.Assert():
            return True
        case cst.Import() | cst.ImportFrom():
            return True
        case cst.Arg(keyword=cst.Name(value="strict")):  # of zip: a guard, as a raise statement
            return True
        case cst.If(body=cst.IndentedBlock(body=[cst.SimpleStatementLine(body=[cst.Raise()])]), orelse=None):
            return True
    return False


def _name(node: cst.BaseExpression | cst.CSTNode) -> str | None:
    """The name at the root of an expression such as ``torch.linalg.norm(...)``."""
    while True:
        match node:
            case cst.Attribute(value=value) | cst.Subscript(value=value):
                node = value
            case cst.Call(func=func):
                node = func
            case cst.Name(value=name):
                return name
            case _:
                return None


def _assignment(statement: cst.BaseSmallStatement) -> tuple[str, cst.BaseExpression | None]:
    match statement:
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))], value=value):
            return name, value
        case cst.AnnAssign(target=cst.Name(value=name), value=value):
            return name, value
    return "", None


def _optional_parameters(function: cst.FunctionDef) -> set[str]:
    """The parameters whose default is None."""
    parameters = (*function.params.params, *function.params.kwonly_params)
    return {p.name.value for p in parameters if isinstance(p.default, cst.Name) and p.default.value == "None"}


def _is_number(node: cst.BaseExpression) -> bool:
    match node:
        case cst.BaseNumber():
            return True
        case cst.UnaryOperation(expression=inner):
            return _is_number(inner)
        case cst.BinaryOperation(left=left, right=right):
            return _is_number(left) and _is_number(right)
        case cst.Tuple(elements=elements) | cst.List(elements=elements):
            return all(_is_number(element.value) for element in elements)
    return False


# --- which changes ---------------------------------------------------------------------------


def _change_arguments(node: cst.Call, optional: set[str]) -> Iterator[cst.CSTNode]:
    """A keyword or last argument left out, or an optional parameter (``optional``) replaced by None.

    Other arguments raise an error when they are missing, which says nothing about a test.
    """
    if _name(node.func) in ("isinstance", "len", "progress_bar") or not node.args:
        return
    for changed in mutators.operator_arg_removal(node):
        assert isinstance(changed, cst.Call)
        (argument,) = (before for before in node.args if not any(before is after for after in changed.args))
        if argument.keyword and argument.keyword.value in _WITHOUT_EFFECT:
            continue
        if isinstance(argument.value, cst.BaseString):
            continue
        if len(changed.args) == len(node.args):
            if isinstance(argument.value, cst.Name) and argument.value.value in optional:
                yield changed
        elif argument.keyword or argument is node.args[-1] and not argument.star:
            yield changed


def _drop_statement(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """A call for its effect, an augmented assignment or the change of a variable left out."""
    if len(node.body) != 1:
        return
    match node.body[0]:
        case cst.Expr(value=cst.Call()) | cst.AugAssign():
            yield node.with_changes(body=[cst.Pass()])
        case cst.Assign(targets=[cst.AssignTarget(target=target)], value=value):
            parts = [e.value for e in target.elements] if isinstance(target, cst.Tuple) else [target]
            names = set(map(cst.Module([]).code_for_node, parts))
            if isinstance(target, cst.Subscript) or names <= _names_in(value):
                yield node.with_changes(body=[cst.Pass()])


def _names_in(node: cst.CSTNode) -> set[str]:
    names = {node.value} if isinstance(node, cst.Name) else set()
    return names.union(*map(_names_in, node.children))


def _drop_method(node: cst.Call) -> Iterator[cst.CSTNode]:
    """``x.relu()`` becomes ``x``; a function of a module is no method."""
    match node.func:
        case cst.Attribute(value=value, attr=cst.Name(value=name)) if name not in _IDENTITIES:
            yield value


def _negate_condition(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    if isinstance(node.test, cst.UnaryOperation):  # its operator is left out by another change
        return
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    space = cst.SimpleWhitespace(" ")
    yield node.with_changes(
        test=cst.UnaryOperation(operator=cst.Not(), expression=test),
        **({"whitespace_before_test": space} if isinstance(node, cst.If) else {}),
    )


def _empty_loop(node: cst.For) -> Iterator[cst.CSTNode]:
    yield node.with_changes(iter=cst.Tuple([]))


def _replace_function(node: cst.Attribute | cst.Name) -> Iterator[cst.CSTNode]:
    name = node.attr if isinstance(node, cst.Attribute) else node
    if name.value in _COUNTERPARTS:
        changed = name.with_changes(value=_COUNTERPARTS[name.value])
        yield node.with_changes(attr=changed) if isinstance(node, cst.Attribute) else changed


def _replace_called(node: cst.Call) -> Iterator[cst.CSTNode]:
    if isinstance(node.func, (cst.Attribute, cst.Name)):
        for changed in _replace_function(node.func):
            yield node.with_changes(func=changed)


#: mutmut's operators without those for strings, which change messages and names, and those that assign None,
#: which raise an error at once and so say nothing about a test; and operators of our own.
_OPERATORS: list[tuple[Any, Callable[[Any], Iterable[Any]]]] = [
    (cst.BaseNumber, mutators.operator_number),
    (cst.Name, mutators.operator_name),
    (cst.AugAssign, mutators.operator_augmented_assignment),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.Match, mutators.operator_match),
    (cst.IfExp, mutators.operator_if_exp),
    (cst.Call, _replace_called),
    ((cst.If, cst.While), _negate_condition),
    (cst.For, _empty_loop),
    (cst.SimpleStatementLine, _drop_statement),
]
