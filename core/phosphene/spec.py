"""What a method says of itself: inputs, parameters, references, cost and promises, as data."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    computed_field,
    model_validator,
)

from .errors import InputError, UnknownName
from .registry import extensions

#: What a method may need of a model or of the world.
Need = Literal["gradients", "gap_head", "dataset", "training", "generator", "relu"]


@dataclass(frozen=True)
class Role:
    """Marks what an input is, or a parameter that is more than a value (``layer``, ``seed``).

    Runners then know how to make and check it: ``Annotated[Tensor, Role("images")]``. With ``own_size``
    picture files keep the size they have, whatever size the model was trained on.
    """

    name: str
    own_size: bool = False


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Reference(_Frozen):
    """A source: paper, book or report."""

    key: str
    title: str
    authors: str
    year: int
    url: str


class Input(_Frozen):
    """One positional input of a method: its name and its role."""

    name: str
    role: str
    required: bool = True
    own_size: bool = False


class Cost(_Frozen):
    """How many images go forward and backward through the model, as expressions.

    The names in an expression are the method's parameters and ``images`` (how many are given, or
    made), ``height``, ``width`` (pixels), ``dataset`` (its size, of two their sum), ``styles`` (how many),
    ``stages`` (the model's) and ``channels`` (of the layer that a parameter names, else of the last with
    places; where a parameter ``channels`` lists some, how many, and None where it is None); ``ceil``,
    ``len``, ``min`` and ``max`` are known, and ``a or b`` is b where a is None.
    """

    forward: str
    backward: str = "0"

    def of(self, params: Mapping[str, Any], **sizes: Any) -> tuple[int, int]:
        """The two numbers for given parameters and sizes; a size hides a parameter of its name."""
        names = {**_FUNCTIONS, **params, **sizes}
        return (_evaluate(self.forward, names), _evaluate(self.backward, names))

    def names(self) -> set[str]:
        """The parameters it speaks of."""
        return self._all_names() - {*_FUNCTIONS, *_SIZES}

    def speaks_of(self, size: str) -> bool:
        """Whether it depends on this size, which the model must be asked for: "channels" or "stages"."""
        return size in self._all_names()

    def _all_names(self) -> set[str]:
        nodes = ast.walk(ast.parse(f"({self.forward}), ({self.backward})"))
        return {node.id for node in nodes if isinstance(node, ast.Name)}


_SIZES = ("images", "height", "width", "dataset", "styles", "stages", "channels")
_FUNCTIONS: dict[str, Any] = {"ceil": math.ceil, "len": len, "min": min, "max": max}
_ARITHMETIC = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.BoolOp, ast.Or),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv),
)


def _evaluate(expression: str, names: dict[str, Any]) -> int:
    tree = ast.parse(expression, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC):
            raise InputError(f"cost expression {expression!r}: {ast.unparse(node)!r} is no arithmetic")
    try:
        return math.ceil(eval(compile(tree, "cost", "eval"), {"__builtins__": {}}, names))
    except (NameError, TypeError, ArithmeticError) as error:
        raise InputError(f"cost expression {expression!r}: {error}") from error


class Invariant(_Frozen):
    """A promise about a result. Subclass it, give it a ``kind`` and a ``check``, and it exists.

    ``when`` names a parameter under which the promise holds: ``"x"`` where it is true or given,
    ``"x in a, b"`` where it is one of these words, ``"not ..."`` where that is not so.
    """

    kinds: ClassVar[dict[str, type[Invariant]]] = {}
    kind: str
    when: str | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise TypeError(f"{cls.__name__} needs a kind: Literal['...'] = '...'")
        owner = Invariant.kinds.get(kind, cls).__module__
        if owner != cls.__module__:
            raise TypeError(f"{cls.__name__} needs another kind: {kind!r} is one of {owner}")
        Invariant.kinds[kind] = cls

    def parameters(self) -> set[str]:
        """Names of the method's parameters that this promise speaks of."""
        return {self._condition()[0]} if self.when else set()

    def applies(self, params: Mapping[str, Any]) -> bool:
        """Whether the promise is made under these parameters."""
        if self.when is None:
            return True
        name, words = self._condition()
        holds = params[name] in words if words else bool(params[name])
        return holds is not self.when.startswith("not ")

    def _condition(self) -> tuple[str, list[str]]:
        """The parameter that ``when`` names, and the words that it may be; none where any will do."""
        name, _, words = (self.when or "").removeprefix("not ").partition(" in ")
        return name, words.split(", ") if words else []

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        """Raise AssertionError where the promise is broken."""
        raise NotImplementedError(f"{type(self).__name__} must define check()")


class WithinBall(Invariant):
    """Every adversarial image stays within ``radius`` of its original, in ``norm``."""

    kind: Literal["within_ball"] = "within_ball"
    radius: str
    norm: str

    def parameters(self) -> set[str]:
        return super().parameters() | {self.radius, self.norm}

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        radius, norm = params[self.radius], params[self.norm]
        delta = (result.adversarial.double() - result.images.double()).flatten(1)
        order = {"linf": math.inf, "l2": 2.0, "l1": 1.0}[norm]
        worst = float(delta.norm(order, dim=1).max())
        # A rounding of x + delta at pixel scale; norms sum it over the pixels.
        slack = 1e-6 * delta.shape[1] ** (1 / order)
        assert worst <= radius + slack, f"{worst} is outside the ball of radius {radius} ({norm})"


class UnitRange(Invariant):
    """Every value in ``field`` is in [0, 1]."""

    kind: Literal["unit_range", "pixel_range"] = "unit_range"
    field: str = "maps"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        values = getattr(result, self.field)
        low, high = float(values.min()), float(values.max())
        assert 0 <= low <= high <= 1, f"{self.field} lies in [{low}, {high}]"


class PixelRange(UnitRange):
    """Every picture in ``field`` has all its pixels in [0, 1]."""

    kind: Literal["pixel_range"] = "pixel_range"
    field: str = "images"


class Nonnegative(Invariant):
    """No value in ``field`` is below zero."""

    kind: Literal["nonnegative"] = "nonnegative"
    field: str = "maps"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        low = float(getattr(result, self.field).min())
        assert low >= 0, f"{self.field} goes down to {low}"


class SameShape(Invariant):
    """``field`` has the shape of the input images."""

    kind: Literal["same_shape"] = "same_shape"
    field: str = "images"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        got, want = tuple(getattr(result, self.field).shape), tuple(inputs["images"].shape)
        assert got == want, f"{self.field} has shape {got}, the images {want}"


class MapPerPixel(Invariant):
    """``field`` has one value for every pixel of every input image: (N, H, W)."""

    kind: Literal["map_per_pixel"] = "map_per_pixel"
    field: str = "maps"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        got, want = tuple(getattr(result, self.field).shape), tuple(inputs["images"][:, 0].shape)
        assert got == want, f"{self.field} has shape {got}, the images' pixels {want}"


def _promise(value: Any) -> Any:
    """A promise out of its JSON; a plugin's kinds exist once its extension is loaded."""
    if not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    if kind not in Invariant.kinds:
        extensions.manager.hook.phosphene_invariants()
    if kind not in Invariant.kinds:
        raise UnknownName("invariant kind", kind, Invariant.kinds)
    return Invariant.kinds[kind].model_validate(value)


class MethodSpec(_Frozen):
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
    invariants: tuple[Annotated[SerializeAsAny[Invariant], BeforeValidator(_promise)], ...] = ()
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
        return next((i for i in self.inputs if i.role == role), None)

    def demonstration(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``demo`` says of the inputs, and of the parameters."""
        inputs = {i.name: self.demo[i.name] for i in self.inputs if i.name in self.demo}
        return inputs, {name: value for name, value in self.demo.items() if name not in inputs}

    @model_validator(mode="after")
    def _names_exist(self) -> MethodSpec:
        known = self.params.model_fields
        spoken = [(invariant.kind, invariant.parameters()) for invariant in self.invariants]
        spoken += [("quick", {*self.quick}), ("demo", {*self.demonstration()[1]})]
        spoken += [("cost", self.cost.names())] if self.cost else []
        for where, names in spoken:
            for name in names - known.keys():
                raise UnknownName(f"parameter ({where} speaks of it)", name, known, f"method '{self.name}'")
        return self
