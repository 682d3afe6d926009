"""Deprecated names and parameters work with a warning that names the replacement."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest

import phosphene
from phosphene import PhospheneDeprecationWarning
from phosphene.deprecation import moved, renamed
from phosphene.errors import InputError


def unknown(name: str) -> None:
    raise AttributeError(name)


def module_of_old_names() -> ModuleType:
    module = ModuleType("somewhere")
    vars(module)["__getattr__"] = moved("somewhere", {"BadInput": "phosphene.errors.InputError"}, unknown)
    return module


@renamed(lr="learning_rate")
def optimize(steps: int, *, learning_rate: float = 1.0) -> float:
    """Optimize."""
    return steps * learning_rate


def test_moved_name_works_with_a_warning() -> None:
    module = module_of_old_names()
    with pytest.warns(PhospheneDeprecationWarning) as caught:
        assert module.BadInput is InputError
    (warning,) = caught
    assert str(warning.message) == ("somewhere.BadInput is deprecated: use phosphene.errors.InputError")
    assert warning.filename == __file__
    with pytest.raises(AttributeError, match="BadOutput"):
        _ = module.BadOutput


def test_renamed_parameter_works_with_a_warning() -> None:
    with pytest.warns(PhospheneDeprecationWarning) as caught:
        assert optimize(3, lr=2.0) == 6
    (warning,) = caught
    assert str(warning.message) == "optimize(lr=...) is deprecated: use learning_rate="
    assert warning.filename == __file__
    both = {"lr": 2.0, "learning_rate": 1.0}
    with pytest.warns(PhospheneDeprecationWarning), pytest.raises(TypeError, match="multiple values"):
        optimize(3, **both)


def test_new_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimize(3, learning_rate=2.0) == 6
        assert optimize.__doc__ == "Optimize."
        assert phosphene.InputError is InputError
        assert not hasattr(phosphene, "BadInput")


def test_own_code_may_not_use_deprecated_names() -> None:
    with pytest.raises(PhospheneDeprecationWarning):  # as pyproject.toml has it
        optimize(3, lr=2.0)
    with pytest.raises(PhospheneDeprecationWarning):
        _ = module_of_old_names().BadInput
