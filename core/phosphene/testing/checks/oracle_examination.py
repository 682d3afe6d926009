"""Checks of a method's oracle: it calls the method, and it fails for results that are wrong in known ways."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import PhospheneError
from ...spec.relations import InvariantTo
from ..cases import Case, properties_of
from ..observation import input_tensors, tensors_in

if TYPE_CHECKING:
    from ...results import Result
    from .base import AnyMethod

from .base import ORACLE_PASSES, register_check
from .oracle_calls import OracleCall, answer_calls, recorded_calls
from .relations import RelationCalls


def _exempt(check: str) -> Callable[[AnyMethod], str | None]:
    """The reason why an oracle is not examined by this check: the author's, or that there is none."""

    def reason(method: AnyMethod) -> str | None:
        if method.spec.oracle is None:
            return "it has no oracle"
        exempt: Mapping[str, str] = getattr(method.spec, "exempt", {})
        return exempt.get(check)

    return reason


@register_check(
    "method",
    "The oracle calls the method, with a model that normalizes pixels where the method takes one.",
    "the oracle: call the method in it, on phosphene.testing.linear_model or load_model(..., mean=, std=)",
    _exempt("oracle_calls_method"),
    requires=ORACLE_PASSES,
)
def oracle_calls_method(method: AnyMethod) -> None:
    calls = recorded_calls(method)
    assert calls, "the oracle never calls the method"
    name = method.spec.input("model")
    models = [call.inputs[name.name] for call in calls] if name and method.spec.input("images") else []
    normalized = any((model.mean != 0).any() or (model.std != 1).any() for model in models)
    assert not models or normalized or _is_independent_of_normalization(method), (
        "every model in the oracle has mean 0 and std 1, on which pixels and normalized pixels are the same"
    )


def _is_independent_of_normalization(method: AnyMethod) -> bool:
    """Whether models with the same logits that normalize outside or inside the network have equal results."""
    relation = InvariantTo("normalization")
    for network in relation.network_names():
        try:
            relation.check(RelationCalls.start(method, network, Case().arguments(method)))
        except (PhospheneError, AssertionError):
            return False
    return True


@register_check(
    "method",
    "The oracle's calls differ in what a method can confuse: steps, parameters, sizes of content and style.",
    "the oracle: call the method with several steps, with different values of such parameters, and with a "
    "style of another size than the content",
    _exempt("oracle_calls_are_varied"),
    requires=ORACLE_PASSES,
)
def oracle_calls_are_varied(method: AnyMethod) -> None:
    calls, schemas = recorded_calls(method), properties_of(method.spec.params_schema)
    values = {
        name: [call.params.get(name, schema.get("default")) for call in calls]
        for name, schema in schemas.items()
        if name != method.seed
    }
    problems = []
    counted = method.spec.cost.names() if method.spec.cost else set()
    for name, schema in schemas.items():
        several = schema.get("type") == "integer" and schema.get("default", 1) > 1
        if several and name in counted and all(value == 1 for value in values[name]):
            problems.append(f"{name} is 1 in each call: what a second of them does is not tested")
    numbers = [name for name in values if _is_number(schemas[name])]
    # Those that no call sets have no value of the oracle's own.
    own = [name for name in numbers if any(value != schemas[name].get("default") for value in values[name])]
    for first, second in itertools.combinations(own, 2):
        same_kind = _without_text(schemas[first]) == _without_text(schemas[second])
        if same_kind and values[first] == values[second]:
            problems.append(f"{first} and {second} are equal in each call, which cannot tell them apart")
    sizes = [_image_sizes(method, call) for call in calls]
    if method.spec.input("styles") and all(len(set(of_call)) == 1 < len(of_call) for of_call in sizes):
        problems.append("the style has the content's size in each call: either one may be the divisor")
    assert not problems, "; ".join(problems)


def _image_sizes(method: AnyMethod, call: OracleCall) -> list[tuple[int, ...]]:
    """Height and width of content and styles."""
    inputs = [call.inputs.get(i.name) for i in method.spec.inputs if i.role in ("images", "styles")]
    return [tuple(value.shape[-2:]) for value in inputs if isinstance(value, Tensor)]


def _is_number(schema: Mapping[str, Any]) -> bool:
    return any(branch.get("type") in ("integer", "number") for branch in schema.get("anyOf", [schema]))


def _without_text(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter's schema says of its values: type, bounds and default."""
    return {key: value for key, value in schema.items() if key not in ("title", "description")}


# --- spoiled results ---------------------------------------------------------------------------


def _rows_are_among(rows: Tensor, source: Tensor) -> bool:
    """Whether each row of a tensor is a row of the other one: copies of input images."""
    if rows.ndim < 2 or rows.shape[1:] != source.shape[1:] or rows.dtype != source.dtype:
        return False
    return all(any(torch.equal(row, other) for other in source) for row in rows)


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and bool(tensor.min() >= 0) and bool(tensor.max() <= 1)


def _negate(tensor: Tensor) -> Tensor:
    return 1 - tensor if _is_image(tensor) else -tensor


def _scale(tensor: Tensor) -> Tensor:
    return (1.05 * tensor).clamp(max=1) if _is_image(tensor) else 1.05 * tensor


def _shuffle(tensor: Tensor) -> Tensor:
    """The positions of a map, or the elements of a vector or matrix, in a random order."""
    rows = tensor.flatten(-2) if tensor.ndim >= 3 else tensor.reshape(-1)
    count = rows.shape[-1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if torch.equal(order, torch.arange(count)):  # by chance, of few elements
        order = order.flip(0)
    return rows[..., order.to(tensor.device)].view(tensor.shape)


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous() if _is_square(tensor) else tensor


def _is_square(tensor: Tensor) -> bool:
    return tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] > 1


def _roll(tensor: Tensor) -> Tensor:
    return tensor.roll(1, -1 if tensor.ndim >= 3 else 0) if tensor.ndim else tensor


@dataclass
class _Spoiler:
    """Changes the numbers of results; ``changed`` and ``unchanged`` are the names of fields."""

    change: Callable[[Tensor], Tensor]
    #: The tensors of this kind that the change leaves as they are have no values that could show it.
    applies: Callable[[Tensor], bool]
    changed: set[str] = field(default_factory=set)
    unchanged: set[str] = field(default_factory=set)
    #: The fields that are networks.
    networks: set[str] = field(default_factory=set)

    def result(self, result: Result, inputs: Mapping[str, Any]) -> Result:
        """The result with all its numbers changed, except sources of an input."""
        values = dict(result.fields())
        self.networks |= {name for name, value in values.items() if isinstance(value, nn.Module)}
        sources = [tensor for _, tensor in tensors_in(inputs)] + [*input_tensors(inputs).values()]
        changed = {name: self.value(value, name, sources) for name, value in values.items()}
        return dataclasses.replace(result, **changed)

    def value(self, value: Any, name: str, sources: list[Tensor]) -> Any:
        match value:
            case Tensor():
                is_copy = any(_rows_are_among(value, source) for source in sources)
                return value if is_copy else self.tensor(value, name)
            case nn.Module():
                module = copy.deepcopy(value)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.copy_(self.tensor(parameter.detach(), name))
                return module
            case float():
                return float(self.tensor(torch.tensor(value, dtype=torch.float64), name))
            case list() | tuple() if value and all(isinstance(item, float) for item in value):
                changed = self.tensor(torch.tensor(value, dtype=torch.float64), name).tolist()
                return type(value)(changed) if type(value) in (list, tuple) else value
            case list() | tuple() if type(value) in (list, tuple):
                return type(value)(self.value(item, name, sources) for item in value)
            case Mapping():
                return {key: self.value(item, name, sources) for key, item in value.items()}
        return value

    def tensor(self, tensor: Tensor, name: str) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        changed = self.change(tensor)
        # Values that are equal up to rounding are no other ones at other positions.
        rounding = 1e-6 * float(tensor.abs().max())
        if not torch.allclose(changed, tensor, rtol=1e-5, atol=rounding, equal_nan=True):
            self.changed.add(name)
        elif self.applies(tensor) and tensor.ndim == 3:  # images may be flat
            self.unchanged.add(name)
        return changed


_SPOILS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], bool], str]] = {
    "zeroed": (torch.zeros_like, lambda tensor: True, "all its numbers are zero"),
    "negated": (_negate, lambda tensor: True, "all its numbers are zero"),
    "scaled": (_scale, lambda tensor: True, "all its numbers are zero"),
    "shuffled": (_shuffle, lambda tensor: tensor.ndim >= 3 and tensor.shape[-1] > 1, "it is constant"),
    "rolled": (_roll, lambda tensor: tensor.ndim >= 3 and tensor.shape[-1] > 1, "it is constant"),
    "transposed": (_transpose, _is_square, "the network and the images are symmetric"),
}


def _spoil_check(name: str, promise: str) -> None:
    def check_oracle(method: AnyMethod) -> None:
        calls = recorded_calls(method)
        change, applies, why = _SPOILS[name]
        spoiler, count = _Spoiler(change, applies), 0

        def answer(run: Callable[[], Result], inputs: dict[str, Any], params: dict[str, Any]) -> Result:
            nonlocal count
            call = calls[count] if count < len(calls) else None
            count += 1
            # The recorded result, unless an earlier spoiled one has changed what the oracle asks for.
            same = call is not None and _same_arguments(method, call, inputs, params)
            result = call.result if call is not None and same else run()
            return spoiler.result(result, inputs)

        assert method.spec.oracle is not None
        with answer_calls(method, answer):
            try:
                method.spec.oracle()
            except Exception:
                return
        # Of a training the network is the result: losses and previews illustrate it.
        changed = spoiler.changed & spoiler.networks if spoiler.networks else spoiler.changed
        fields = ", ".join(sorted(spoiler.changed if changed else ()))
        assert not fields, f"the oracle passes for a result that is wrong: {fields} {name}"
        fields = ", ".join(sorted(() if spoiler.networks else spoiler.unchanged))
        assert not fields, f"on the oracle's inputs {fields} is the same when it is {name}: {why}"

    check_oracle.__name__ = f"oracle_rejects_{name}"
    hint = "the oracle: compare the result's values, on a network and images without symmetry"
    exempt = _exempt(check_oracle.__name__)
    register_check("method", promise, hint, exempt, requires=ORACLE_PASSES)(check_oracle)


def _same_arguments(
    method: AnyMethod, call: OracleCall, inputs: Mapping[str, Any], params: Mapping[str, Any]
) -> bool:
    before, now = method.record_inputs(call.inputs), method.record_inputs(inputs)
    one, other = dict(tensors_in(before)), dict(tensors_in(now))
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return same and repr(call.params) == repr(dict(params))


for _name, _promise in (
    ("zeroed", "The oracle fails for a result whose numbers are zero."),
    ("negated", "The oracle fails for a result whose numbers have the opposite sign."),
    ("scaled", "The oracle fails for a result that is larger by 5 %."),
    ("shuffled", "The oracle fails for a result whose values are at other positions."),
    ("rolled", "The oracle fails for a result that is shifted by one pixel."),
    ("transposed", "The oracle fails for a result whose rows are its columns."),
):
    _spoil_check(_name, _promise)
