"""``DeclaredCondition``: what invariants and relations share, a registered kind and where it applies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import UnknownName
from .base import FrozenModel
from .expressions import Condition


class DeclaredCondition(FrozenModel):
    """A condition that a method declares; a subclass with ``kinds`` is the base class of its kinds.

    A kind is a subclass of that class with a ``kind``, by which it is registered. ``when`` limits a condition
    to some values of a parameter.
    """

    kinds: ClassVar[dict[str, type[Any]]]
    kind: str
    when: Condition | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "kinds" in vars(cls):
            return
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise TypeError(f"{cls.__name__} needs a kind: Literal['...'] = '...'")
        owner = cls.kinds.get(kind, cls).__module__
        if owner != cls.__module__:
            raise TypeError(f"{cls.__name__} needs another kind: {kind!r} is one of {owner}")
        cls.kinds[kind] = cls

    @classmethod
    def from_json(cls, value: Any) -> Any:
        """A condition from its JSON form. A plugin's kinds exist once its module is imported."""
        if not isinstance(value, Mapping):
            return value
        kind = value.get("kind")
        if kind not in cls.kinds:
            raise UnknownName(f"{cls.__name__.lower()} kind", kind, cls.kinds)
        return cls.kinds[kind].model_validate(value)

    def parameters(self) -> set[str]:
        """Names of the method's parameters that it depends on."""
        return {self.when.parameter} if self.when else set()

    def applies(self, params: Mapping[str, Any]) -> bool:
        """Whether it has to be met under these parameters."""
        return self.when is None or self.when.holds(params)
