"""``MethodSpec``: a method's inputs, parameters, references, cost, invariants and relations as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    computed_field,
    model_validator,
)

from ..errors import InputError, PluginError, UnknownName
from .base import FrozenModel
from .cost import Cost
from .declared_condition import DeclaredCondition
from .invariants import Invariant
from .relations import Relation

#: What a method may need of a model or of its caller.
Need = Literal["gradients", "gap_head", "dataset", "training", "generator", "relu"]


@dataclass(frozen=True)
class Role:
    """Marks the role of an input, or a parameter that is more than a value (``layer``, ``seed``).

    ``Annotated[Tensor, Role("images")]`` is an input that the role ``images`` of ``phosphene.roles`` reads
    and checks. With ``own_size`` image files keep their size, whatever the model's input size is. An input
    may be passed instead of those that it ``replaces``, and of the model, where no other input needs it.
    """

    name: str
    own_size: bool = False
    replaces: tuple[str, ...] = ()


class Reference(FrozenModel):
    """A source: paper, book or report."""

    key: str
    title: str
    authors: str
    year: int
    url: str


class Input(FrozenModel):
    """One positional input of a method: its name, its role and the inputs that it can replace.

    ``default`` is read where nothing is passed; None: the default of the role.
    """

    name: str
    role: str
    required: bool = True
    own_size: bool = False
    replaces: tuple[str, ...] = ()
    default: Any = None

    def value(self, passed: Any) -> Any:
        """What is passed, or ``default`` for None."""
        return self.default if passed is None else passed


class MethodSpec(FrozenModel):
    """Everything a method declares. ``model_dump(mode="json")`` is what ``phosphene show --json`` prints."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*$")
    family: str
    title: str
    summary: str
    description: str
    inputs: tuple[Input, ...]
    params: type[BaseModel] = Field(exclude=True)
    returns: str
    references: tuple[Reference, ...] = ()
    invariants: tuple[Annotated[SerializeAsAny[Invariant], BeforeValidator(Invariant.from_json)], ...] = ()
    relations: tuple[Annotated[SerializeAsAny[Relation], BeforeValidator(Relation.from_json)], ...] = ()
    #: Checks that the method is not to meet, by name, each with the reason.
    exempt: dict[str, str] = {}
    needs: tuple[Need, ...] = ()
    cost: Cost | None = None
    tags: tuple[str, ...] = ()
    batch_independent: bool = True
    oracle: Callable[[], None] | None = Field(default=None, exclude=True)
    quick: dict[str, Any] = {}
    demo: dict[str, Any] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def params_schema(self) -> dict[str, Any]:
        """JSON schema of the parameters."""
        return self.params.model_json_schema()

    @property
    def short_name(self) -> str:
        """The name without its family."""
        return self.name.split(".")[1]

    def input(self, role: str) -> Input | None:
        """The input with this role, if the method takes one."""
        for declared in self.inputs:  # no generator, whose items are a Python call each
            if declared.role == role:
                return declared
        return None

    def replaced_inputs(self, inputs: Mapping[str, Any]) -> set[str]:
        """Names of the inputs that others replace: a data set by its features, and then the model as well.

        The model is needed as long as another input is not replaced. Raises InputError where an input is
        passed together with its replacement.
        """
        replacing: list[str] = []
        replaced: set[str] = set()
        for i in self.inputs:
            if i.replaces and inputs.get(i.name) is not None:
                replacing.append(i.name)
                replaced.update(i.replaces)
        if not replaced:
            return replaced
        remaining = [i for i in self.inputs if i.name not in replaced and not i.replaces]
        if all(i.role == "model" for i in remaining):
            replaced |= {i.name for i in remaining}
        if any(inputs.get(name) is not None for name in replaced):
            names = " and ".join(replacing)
            others = " and ".join(i.name for i in self.inputs if i.name in replaced)
            raise InputError(
                f"{self.short_name} takes {names}, computed before, or {others}, from which features are "
                f"computed: leave out {names}, or {others}"
            )
        return replaced

    def recorded_inputs(self, inputs: Mapping[str, Any]) -> list[Input]:
        """The inputs that a result records: all but the model, and but those that others replace."""
        recorded = [i for i in self.inputs if i.role != "model"]
        for i in self.inputs:
            if i.replaces:
                names = (i.name, *i.replaces)
                recorded = [j for j in recorded if j.name not in names or inputs[j.name] is not None]
        return recorded

    def demonstration(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs and the parameters in ``demo``, with the inputs' defaults that are the method's own."""
        names = {i.name for i in self.inputs}
        defaults = {i.name: i.default for i in self.inputs if i.default is not None}
        inputs = defaults | {name: value for name, value in self.demo.items() if name in names}
        return inputs, {name: value for name, value in self.demo.items() if name not in names}

    @model_validator(mode="after")
    def _names_exist(self) -> MethodSpec:
        fields = self.params.model_fields
        declared: tuple[DeclaredCondition, ...] = (*self.invariants, *self.relations)
        used = [(condition.kind, condition.parameters()) for condition in declared]
        used += [("quick", {*self.quick}), ("demo", {*self.demo} - {i.name for i in self.inputs})]
        used += [("cost", self.cost.names())] if self.cost else []
        for where, names in used:
            for name in names - fields.keys():
                raise UnknownName(f"parameter (used in {where})", name, fields, f"method '{self.name}'")
        return self

    @model_validator(mode="after")
    def _exemptions_have_reasons(self) -> MethodSpec:
        for check, reason in self.exempt.items():
            if len(reason.split()) < 3:
                raise PluginError(
                    f"method '{self.name}' is exempt from {check!r} for the reason {reason!r}: "
                    "write a sentence, such as 'windows start at the top left corner'"
                )
        return self
