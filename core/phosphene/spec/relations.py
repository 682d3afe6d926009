"""Relations: how a method's results change with its inputs, tested by calling the method again.

An ``Invariant`` is a condition on one result. A ``Relation`` compares the results of several calls: of a
flipped image, of scaled logits, of more steps. Most wrong arithmetic breaks one: integrated gradients with a
left sum do not add up to the change of the score, a shifted map does not flip with its image, Grad-CAM of
another layer differs from CAM before a pooled head.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field, field_serializer, field_validator

from ..errors import InputError, UnknownName
from .declared_condition import DeclaredCondition

if TYPE_CHECKING:
    from torch import Tensor

#: What a result may be invariant to; see ``InvariantTo``.
Change = Literal["logit_shift", "normalization", "batch_order", "dataset_order"]
#: A transformation of images and maps that acts on their last two axes.
Transform = Literal["hflip", "vflip", "transpose", "shift"]


class Calls(Protocol):
    """A call of a method on one of the kit's networks, its result, and further calls on changed inputs.

    ``network`` is the network's name, ``model`` the model, ``inputs`` and ``params`` the arguments,
    ``result`` the result. ``ignored`` (H, W) marks the pixels that the score does not depend on, ``regions``
    (N, H, W) those of the object in each image; both are None where the network has no such pixels.
    """

    @property
    def network(self) -> str: ...
    @property
    def model(self) -> Any: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def result(self) -> Any: ...
    @property
    def ignored(self) -> Tensor | None: ...
    @property
    def regions(self) -> Tensor | None: ...

    def __call__(
        self, *, inputs: Mapping[str, Any] = {}, params: Mapping[str, Any] = {}, model: Any = None
    ) -> Any:
        """The method's result with some inputs, parameters or the model replaced."""

    def repeated(self, count: int) -> list[Any]:
        """The results under ``count`` seeds; the one result where no seed changes it."""

    def scores(self, images: Tensor) -> Tensor:
        """The target's score S (N,) of images."""

    def logits(self, images: Tensor) -> Tensor:
        """The model's logits (N, K) of images."""

    def rescaled(self, *, scale: float = 1.0, shift: float = 0.0) -> Any:
        """A copy of the model whose logits are ``scale`` times the model's plus ``shift``."""

    def normalized_inside(self) -> Any:
        """A model with the same logits and no normalization: its network's first layer normalizes."""

    def transformed(self, transform: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The spatial inputs (images, masks, textures, a data set's images), each transformed."""

    def permuted(self, axis: Literal["batch", "dataset"]) -> tuple[dict[str, Any], Tensor]:
        """The inputs with the rows of the batch or of the data set in another order, and that order."""

    def other(self, name: str, params: Mapping[str, Any] = {}) -> Any:
        """The result of another registered method on the same inputs."""


class Relation(DeclaredCondition):
    """A condition on the results of several calls. Subclass it with a ``kind`` and a ``check``.

    ``where``: parameters of the calls, beside the method's quick ones: ``where={"random_start": False}``.
    ``when``: limits it to some values of a parameter, as for an ``Invariant``. ``fields``: the result's
    fields that are compared, by default every tensor with at least three axes. ``tolerance``: the largest
    difference, as a fraction of the largest expected value; calls are in double precision. ``networks``: the
    kit's networks that it is tested on, by default those that the relation needs; see
    ``phosphene.testing.relation_network``.
    """

    kinds: ClassVar[dict[str, type[Relation]]] = {}
    #: The networks that it is tested on by default.
    default_networks: ClassVar[tuple[str, ...]] = ("gap", "flat")
    #: Whether the first network that the method accepts is enough.
    one_network: ClassVar[bool] = False
    where: dict[str, Any] = {}
    fields: tuple[str, ...] | None = None
    tolerance: float = Field(default=1e-7, gt=0)
    networks: tuple[str, ...] | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @field_validator("where")
    @classmethod
    def _as_in_json(cls, where: dict[str, Any]) -> dict[str, Any]:
        return {n: list(v) if isinstance(v, tuple) else v for n, v in where.items()}

    def parameters(self) -> set[str]:
        """Names of the method's parameters that it depends on."""
        return super().parameters() | {*self.where}

    def network_names(self) -> tuple[str, ...]:
        """The kit's networks that it is tested on."""
        return self.networks or self.default_networks

    def check(self, calls: Calls) -> None:
        """Raise AssertionError where it is not met."""
        raise NotImplementedError(f"{type(self).__name__} must define check()")

    def __str__(self) -> str:
        """As it is declared: ``equivariant(transform='hflip')``."""
        own = [name for name in type(self).model_fields if name not in Relation.model_fields]
        values = self.model_dump(include={*own, "where", "fields", "tolerance", "networks"})
        changed = self.model_dump(exclude_defaults=True)
        settings = [
            f"{n}={values[n]!r}" for n in (*own[1:], *Relation.model_fields) if n in values.keys() & changed
        ]
        settings = [repr(values[name]) for name in own[:1]] + settings
        if self.when is not None:
            settings.append(f"when={self.when}")
        return f"{self.kind}({', '.join(settings)})"


class Equivariant(Relation):
    """The result of a transformed image is the transformed result: M(T x) = T M(x).

    Tested on networks that are exactly symmetric under the transformation. "hflip", "vflip" and "transpose"
    hold for every map whose grid is symmetric: a window grid is where the windows divide the image. "shift"
    is circular, by a multiple of the total stride; maps that are enlarged or blurred have borders and do not
    shift. Named ``fields`` with fewer than three axes, such as radii or losses, stay the same.

    Example::

        relations=[Equivariant("hflip"), Equivariant("transpose", where={"window": 4, "stride": 4})]
    """

    kind: Literal["equivariant"] = "equivariant"
    transform: Transform

    def __init__(self, transform: Transform, **settings: Any) -> None:
        super().__init__(transform=transform, **settings)

    def network_names(self) -> tuple[str, ...]:
        heads = ("gap",) if self.transform == "shift" else ("gap", "flat")
        return self.networks or tuple(f"{self.transform}-{head}" for head in heads)

    def check(self, calls: Calls) -> None:
        def move(tensor: Tensor) -> Tensor:
            return transformed(tensor, self.transform)

        moved = _values(calls(inputs=calls.transformed(move)), self.fields)
        for name, before in _values(calls.result, self.fields).items():
            what = f"{name} of the images under {self.transform!r}, against the transformed {name}"
            expected = move(before) if before.ndim >= 3 else before
            assert_equal(moved.get(name), expected, self.tolerance, what)


class LinearIn(Relation):
    """The result of the target a S1 + b S2 is a times that of S1 plus b times that of S2.

    Holds for gradients and for what is linear in them; not for an absolute value, a ReLU or a maximum, which
    ``fields=("signed_maps",)`` avoids where the result has them.

    Example::

        relations=[LinearIn("target")]
    """

    kind: Literal["linear_in"] = "linear_in"
    input: Literal["target"]

    def __init__(self, input: Literal["target"], **settings: Any) -> None:
        super().__init__(input=input, **settings)

    def check(self, calls: Calls) -> None:
        a, b = 1.7, -0.6
        first, second, both = (
            _values(calls(inputs={self.input: target}), self.fields)
            for target in (1, 2, lambda logits: a * logits[:, 1] + b * logits[:, 2])
        )
        for name in first:
            if name == "images":
                continue
            what = f"{name} of {a} S1 - {-b} S2, against {a} times that of S1 minus {-b} times that of S2"
            assert_equal(both.get(name), a * first[name] + b * second[name], self.tolerance, what)


class Complete(Relation):
    """The map sums to the change of the score from the baseline to the image: sum M = S(x) - S(b).

    ``baseline``: name of the parameter that determines b (its value is a number, "zero", "gray", "mean" or
    "white"), or a number, the value of every pixel. The ``tolerance``, a fraction of the largest change, is
    larger than the error of midpoint, trapezoid and Gauss-Legendre sums at 16 steps and smaller than that of
    left and right sums at 64, on the network "curved", whose gradient along the line changes by more than
    half.

    Example::

        relations=[Complete("baseline", where={"steps": 32, "baseline": "gray"})]
    """

    default_networks = ("curved", "curved-gap")
    kind: Literal["complete"] = "complete"
    baseline: str | float
    fields: tuple[str, ...] | None = ("maps",)
    tolerance: float = Field(default=4e-3, gt=0)

    def __init__(self, baseline: str | float, **settings: Any) -> None:
        super().__init__(baseline=baseline, **settings)

    def parameters(self) -> set[str]:
        return super().parameters() | ({self.baseline} if isinstance(self.baseline, str) else set())

    def check(self, calls: Calls) -> None:
        images = calls.inputs["images"]
        value = calls.params[self.baseline] if isinstance(self.baseline, str) else self.baseline
        start = baseline_of(images, value)
        assert start is not None, (
            f"{self.baseline}={value!r} is no number, 'zero', 'gray', 'mean' or 'white': set it by where="
        )
        change = calls.scores(images) - calls.scores(start)
        for name, maps in _values(calls.result, self.fields).items():
            total = maps.flatten(1).sum(1)
            what = f"the sum of {name} against S(x) - S(b), with b from {self.baseline}={value!r}"
            assert_equal(total, change, self.tolerance, what)


class Monotone(Relation):
    """A measure of the result does not fall as a parameter grows over ``values``.

    ``measure``: "loss" (mean cross entropy of ``adversarial`` with the labels; of a targeted attack its
    negative), "success" (the fraction of successful examples), "distance" (mean L2 norm of the perturbation),
    or a field, whose mean is taken. ``falls``: it does not rise instead. The ``tolerance`` is in units of the
    measure.

    Example::

        relations=[Monotone("eps", values=(0.01, 0.03, 0.1), measure="loss")]
    """

    kind: Literal["monotone"] = "monotone"
    parameter: str
    values: tuple[float, ...] = Field(min_length=2)
    measure: str
    falls: bool = False
    tolerance: float = Field(default=1e-6, gt=0)

    def __init__(self, parameter: str, **settings: Any) -> None:
        super().__init__(parameter=parameter, **settings)

    def parameters(self) -> set[str]:
        return super().parameters() | {self.parameter}

    def check(self, calls: Calls) -> None:
        measured = [_measure(calls, calls(params={self.parameter: v}), self.measure) for v in self.values]
        pairs = list(zip(measured, measured[1:], strict=False))
        worst = max(before - after if not self.falls else after - before for before, after in pairs)
        listed = ", ".join(
            f"{m:.6g} at {self.parameter}={v}" for m, v in zip(measured, self.values, strict=True)
        )
        assert worst <= self.tolerance, (
            f"{self.measure} {'rises' if self.falls else 'falls'} as {self.parameter} grows: {listed}"
        )
        # Of a few images the same fraction may succeed at every value.
        assert self.measure == "success" or max(measured) > min(measured), (
            f"{self.measure} does not depend on {self.parameter}: {listed}"
        )


class Agrees(Relation):
    """The result equals that of another method, or a function of the call, under the parameters ``where``.

    ``reference``: the name of a registered method, or a callable ``(calls) -> Tensor`` that computes the
    first of ``fields``. ``other``: the other method's parameters. ``rectified``: the ReLU of the fields is
    compared. ``proportional``: they agree up to a positive factor for each image.

    Example::

        relations=[Agrees("attribution.gradient_x_input", where={"steps": 3}, networks=("homogeneous",))]
    """

    kind: Literal["agrees"] = "agrees"
    reference: str | Callable[..., Any]
    other: dict[str, Any] = {}
    fields: tuple[str, ...] | None = ("maps",)
    rectified: bool = False
    proportional: bool = False

    def __init__(self, reference: str | Callable[..., Any], **settings: Any) -> None:
        super().__init__(reference=reference, **settings)

    @field_serializer("reference")
    def _reference_as_text(self, reference: str | Callable[..., Any]) -> str:
        if isinstance(reference, str):
            return reference
        return f"{reference.__module__}:{getattr(reference, '__qualname__', type(reference).__name__)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Agrees) and self.model_dump() == other.model_dump()

    def check(self, calls: Calls) -> None:
        text = self._reference_as_text(self.reference)
        if isinstance(self.reference, str):
            if ":" in self.reference:
                raise InputError(f"{text} was read from JSON: a function is tested from the loaded method")
            expected = _values(calls.other(self.reference, self.other), self.fields)
        else:
            (field,) = self.fields or ("maps",)
            expected = {field: self.reference(calls)}
        for name, actual in _values(calls.result, self.fields).items():
            reference = expected[name]
            if self.rectified:
                actual, reference = actual.relu(), reference.relu()
            if self.proportional:
                actual, reference = _unit_norm(actual), _unit_norm(reference)
            assert_equal(actual, reference, self.tolerance, f"{name} against that of {text}")


class Converges(Relation):
    """Results at n, 2n, 4n and 8n converge: |R(2n) - R(n)| falls by 2 ** ``order`` at each doubling.

    ``start``: the first n. The rate is the mean over two doublings; ``slack`` is how much smaller it may be.
    A left sum has order 1, midpoint and trapezoid sums have order 2. Differences below ``tolerance`` have
    converged.

    Example::

        relations=[Converges("steps", start=4, order=2)]
    """

    default_networks = ("curved",)
    kind: Literal["converges"] = "converges"
    parameter: str
    start: int = Field(default=4, ge=1)
    order: float = Field(default=1.0, gt=0)
    slack: float = 0.3

    def __init__(self, parameter: str, **settings: Any) -> None:
        super().__init__(parameter=parameter, **settings)

    def parameters(self) -> set[str]:
        return super().parameters() | {self.parameter}

    def check(self, calls: Calls) -> None:
        results = [_values(calls(params={self.parameter: self.start * 2**k}), self.fields) for k in range(4)]
        for name, last in results[-1].items():
            if name == "images":
                continue
            size = max(float(last.abs().max()), 1e-30)
            steps = [
                float((b[name] - a[name]).abs().max()) / size
                for a, b in zip(results, results[1:], strict=False)
            ]
            listed = ", ".join(f"{step:.3g}" for step in steps)
            assert steps[0] > 0, f"{name} does not depend on {self.parameter}"
            if steps[2] <= self.tolerance:
                continue
            rate = math.log2(steps[0] / steps[2]) / 2
            assert rate >= self.order - self.slack, (
                f"{name} at {self.parameter}={self.start}, doubled three times, changes by {listed} of its "
                f"largest value: order {rate:.2f}, {self.order} is declared"
            )


class ScalesWith(Relation):
    """Logits (or pixels) times c change the result by the factor c ** ``power``.

    Under "logits" the last linear layer is scaled: gradients have power 1, their squares 2, a normalized map
    0; gradients of a probability or of a loss have no power. Under "images" the network has no biases and no
    normalization, and its ReLUs are scaled with the pixels: gradients have power 0, input times gradient 1.

    Example::

        relations=[ScalesWith("logits", power=1)]
    """

    kind: Literal["scales_with"] = "scales_with"
    quantity: Literal["logits", "images"]
    power: float

    def __init__(self, quantity: Literal["logits", "images"], *, power: float, **settings: Any) -> None:
        super().__init__(quantity=quantity, power=power, **settings)

    def network_names(self) -> tuple[str, ...]:
        return self.networks or (("homogeneous",) if self.quantity == "images" else self.default_networks)

    def check(self, calls: Calls) -> None:
        factor = 0.7
        if self.quantity == "logits":
            scaled = calls(model=calls.rescaled(scale=factor))
        else:
            scaled = calls(inputs={"images": factor * calls.inputs["images"]})
        after = _values(scaled, self.fields)
        for name, before in _values(calls.result, self.fields).items():
            if name == "images":
                continue
            what = (
                f"{name} with {self.quantity} times {factor}, against {factor} ** {self.power:g} times {name}"
            )
            assert_equal(after.get(name), factor**self.power * before, self.tolerance, what)


class ZeroWhen(Relation):
    """The result is 0 where the score does not depend on the image.

    "constant": on a network with the same logits for every image the map is 0 everywhere. "ignored": at the
    positions that the score does not depend on, while it depends on the others. Gradients and drops of the
    score have both properties, Grad-CAM only the first: its weights are means over the map.

    Example::

        relations=[ZeroWhen("ignored")]
    """

    kind: Literal["zero_when"] = "zero_when"
    condition: Literal["constant", "ignored"]
    fields: tuple[str, ...] | None = ("maps",)

    def __init__(self, condition: Literal["constant", "ignored"], **settings: Any) -> None:
        super().__init__(condition=condition, **settings)

    def network_names(self) -> tuple[str, ...]:
        return self.networks or (("constant",) if self.condition == "constant" else ("half-blind",))

    def check(self, calls: Calls) -> None:
        for name, values in _values(calls.result, self.fields).items():
            expected = values * 0
            if self.condition == "ignored":
                assert calls.ignored is not None, f"the network {calls.network!r} ignores no pixel"
                # The cells of the map whose pixels are all ignored.
                expected = values * (_at_size(calls.ignored[None], values) < 1)
                assert values.abs().max() > 0, f"{name} is 0 at the other positions as well"
            # Differences of equal scores are not 0 but their rounding errors.
            rounding = _ROUNDING * max(1.0, float(calls.scores(calls.inputs["images"]).abs().max()))
            if self.condition == "constant" and values.abs().max() <= rounding:
                continue
            what = f"{name}, which is to be 0 where the score does not depend on the image"
            assert_equal(values, expected, self.tolerance, what)


class InvariantTo(Relation):
    """The result does not change with something that it must not depend on.

    "logit_shift": a constant added to all logits. "normalization": whether pixels are normalized by the model
    or by the network's first layer, which no map in units of pixels depends on. "batch_order": the order of
    the images in the batch; rows permute. "dataset_order": the order of the data set; the rows of fields with
    one row for each of its images permute.

    Example::

        relations=[InvariantTo("logit_shift")]
    """

    kind: Literal["invariant_to"] = "invariant_to"
    change: Change

    def __init__(self, change: Change, **settings: Any) -> None:
        super().__init__(change=change, **settings)

    def check(self, calls: Calls) -> None:
        before = _values(calls.result, self.fields)
        if self.change == "logit_shift":
            order, after = None, _values(calls(model=calls.rescaled(shift=0.8)), self.fields)
        elif self.change == "normalization":
            order, after = None, _values(calls(model=calls.normalized_inside()), self.fields)
        else:
            changed, order = calls.permuted("batch" if self.change == "batch_order" else "dataset")
            after = _values(calls(inputs=changed), self.fields)
        for name, values in before.items():
            if (
                order is not None
                and values.ndim
                and len(values) == len(order)
                and self._permutes(calls, name)
            ):
                values = values[order]
            what = f"{name} after a change of the {self.change.replace('_', ' ')}, against that before"
            assert_equal(after.get(name), values, self.tolerance, what)

    def _permutes(self, calls: Calls, name: str) -> bool:
        """Whether the rows of a field are of the images of the batch, and not as many by chance."""
        shapes, per_image = calls.result.shapes, calls.result.per_image
        if self.change != "batch_order" or name not in shapes or not per_image:
            return True
        first_axis = shapes[name].split()[:1]
        return any(shapes[other].split()[:1] == first_axis for other in per_image if other in shapes)


class Localizes(Relation):
    """The map is larger on the half of the image that the score depends on than on the other half.

    The network has a class for each half of the image (left, right, top, bottom), which the object in that
    half activates, and each image's target is the class of its object. The contrast is measured on the
    difference D of two maps, of the object in a half and in the opposite half, in which a pattern that is the
    same for all images cancels: with D's mean subtracted, its sum over the half minus that over the opposite
    half, divided by the sum of |D|. It is near 1 for correct methods, about 0 for a shuffled, transposed or
    constant map, and near -1 for a negated or flipped one.

    Example::

        relations=[Localizes()]
    """

    default_networks = ("halves", "halves-gap")
    one_network = True
    kind: Literal["localizes"] = "localizes"
    fields: tuple[str, ...] | None = ("maps",)
    contrast: float = 0.3

    def check(self, calls: Calls) -> None:
        regions = calls.regions
        assert regions is not None, f"the network {calls.network!r} has no regions"
        results = [_values(result, self.fields) for result in calls.repeated(5)]
        for name in results[0]:
            maps = functools.reduce(operator.add, (values[name] for values in results)) / len(results)
            inside = _at_size(regions, maps)
            for halves, first in (("left and right", 0), ("top and bottom", 2)):
                difference = maps[first] - maps[first + 1]
                assert difference.std() > 1e-12, f"{name} is the same for objects in the {halves} halves"
                difference = difference - difference.mean()
                side = inside[first] - inside[first + 1]
                measured = float((difference * side).sum() / difference.abs().sum())
                assert measured >= self.contrast, (
                    f"{name} is not larger where the object is, in the {halves} halves: contrast "
                    f"{measured:.2f}, at least {self.contrast} is expected (about 0: shuffled, transposed or "
                    "independent of the image; negative: negated or flipped)"
                )


# --- transformations and comparisons ---------------------------------------------------------


def transformed(tensor: Tensor, transform: Transform) -> Tensor:
    """A tensor (..., H, W) flipped, transposed, or shifted circularly by a third of each side."""
    match transform:
        case "hflip":
            return tensor.flip(-1)
        case "vflip":
            return tensor.flip(-2)
        case "transpose":
            return tensor.mT.contiguous()
        case "shift":
            return tensor.roll((tensor.shape[-2] // 3, tensor.shape[-1] // 3), (-2, -1))
    raise UnknownName("transform", transform, ("hflip", "vflip", "transpose", "shift"))


def baseline_of(images: Tensor, value: Any) -> Tensor | None:
    """The baseline images of a parameter's value; None for a value without a common meaning."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return images * 0 + float(value)
    names = {"black": 0.0, "zero": 0.0, "zeros": 0.0, "gray": 0.5, "grey": 0.5, "white": 1.0}
    if isinstance(value, str) and value in names:
        return images * 0 + names[value]
    return images.mean((2, 3), keepdim=True).expand_as(images) if value == "mean" else None


#: The largest rounding error of a result in double precision, as a fraction of the score.
_ROUNDING = 1e-12


def assert_equal(actual: Any, expected: Tensor, tolerance: float, what: str) -> None:
    """Assert that the largest difference is within a fraction of the largest expected value."""
    assert actual is not None, f"{what}: it has no such field"
    shapes = tuple(actual.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"{what}: the shape is {shapes[0]}, not {shapes[1]}"
    difference = (actual.double() - expected.double()).abs()
    largest = float(difference.max())
    size = max(float(expected.abs().max()), float(actual.abs().max())) or 1.0
    if largest <= tolerance * size:
        return
    position = (difference == largest).nonzero()[0].tolist() if difference.ndim else []
    values = float(actual[tuple(position)]), float(expected[tuple(position)])
    raise AssertionError(
        f"{what}: the largest difference is {largest:.4g} ({largest / size:.2g} of the largest value, "
        f"{tolerance:g} is allowed), at {position}: {values[0]:.6g}, not {values[1]:.6g}"
    )


def _values(result: Any, fields: tuple[str, ...] | None) -> dict[str, Tensor]:
    """The tensors of some fields in double precision; by default all with at least three axes."""
    if fields is not None:
        for name in fields:
            if not hasattr(result, name):
                raise UnknownName("field", name, [n for n, _ in result.fields()], type(result).__name__)
    named = dict(result.fields()) if fields is None else {name: getattr(result, name) for name in fields}
    tensors = dict(_tensors(named))
    return {n: t.double() for n, t in tensors.items() if fields is not None or t.ndim >= 3}


def _tensors(named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from torch import Tensor

    for name, value in named.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (tuple, list)):
            yield from _tensors({f"{name}[{index}]": item for index, item in enumerate(value)})


def _unit_norm(values: Tensor) -> Tensor:
    norms = values.flatten(1).norm(dim=1).clamp(min=1e-30)
    return values / norms.view(-1, *[1] * (values.ndim - 1))


def _at_size(regions: Tensor, values: Tensor) -> Tensor:
    """Masks (N, H, W) at the size of a map (..., h, w): which fraction of each cell they cover."""
    from torch.nn.functional import adaptive_avg_pool2d

    size = (int(values.shape[-2]), int(values.shape[-1]))
    return adaptive_avg_pool2d(regions[:, None].double(), size)[:, 0]


def _measure(calls: Calls, result: Any, measure: str) -> float:
    match measure:
        case "loss":
            log_probabilities = calls.logits(result.adversarial).log_softmax(1)
            loss = -log_probabilities.gather(1, result.labels[:, None]).mean()
            return float(-loss if getattr(result, "targeted", False) else loss)
        case "success":
            return float(result.success.double().mean())
        case "distance":
            return float((result.adversarial - result.images).flatten(1).norm(dim=1).mean())
    (values,) = _values(result, (measure,)).values()
    return float(values.mean())
