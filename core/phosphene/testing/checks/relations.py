"""Checks of relations: the declared ones exactly, and ready-made ones of methods that declare none."""

from __future__ import annotations

import dataclasses
import functools
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from unittest import SkipTest

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...data.datasets import TensorDataset
from ...errors import PhospheneError, UnknownName
from ...registry.lookup import methods
from ...results import Attribution
from ...roles import ROLES
from ...spec.relations import Localizes, Relation, Transform, baseline_of, transformed
from ...targets import scores
from ..cases import Case
from ..observation import mean_rank_correlation, record_structure, tensors_in
from ..symmetric_networks import (
    RELATION_NETWORKS,
    TRANSFORMERS,
    RelationNetwork,
    normalized_inside,
    recorded_relation_network,
    relation_network,
)

if TYPE_CHECKING:
    from .base import AnyMethod

from .base import MAP_PER_PIXEL, Check, register_check

#: Parameters whose names contain one of these words determine the start of a path to the image.
_BASELINE_WORDS = ("baseline", "reference")
_STEP_WORDS = ("steps", "points", "n_steps", "num_steps")
#: Rank correlation with a wrongly transformed map, and how much smaller that with the right one has to be.
_CORRELATION, _MARGIN = 0.9, 0.3
#: What the name of a parameter contains that sets a grid, which need not be symmetric in the image.
_GRID_WORDS = ("window", "stride", "patch", "kernel", "cell", "grid", "block", "segment", "size", "tile")
#: The largest difference of a map that has to flip exactly, as a fraction of its norm.
_LARGEST_ERROR = 0.05
#: Steps of a path method, and the largest error of its sum as a fraction of the change of the score.
_STEPS, _COMPLETE = 32, 4e-3
#: What the name or the description of a path method contains.
_PATH_METHOD = r"integral|integrat|\bpath\b|axiomatic"


@dataclass
class RelationCalls:
    """The calls of one relation on one network; the protocol is ``phosphene.spec.Calls``."""

    method: AnyMethod
    setting: RelationNetwork
    inputs: dict[str, Any]
    params: dict[str, Any]
    result: Any = field(default=None, repr=False)

    @classmethod
    def start(cls, method: AnyMethod, network: str, params: Mapping[str, Any]) -> RelationCalls:
        """The first call of a method on one of the networks. Raises what the method raises."""
        setting = recorded_relation_network(network)
        calls = cls(method, setting, _sample_inputs(method, setting), method.validate(params))
        calls.result = calls()
        return calls

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether the result depends on random numbers: torch draws some, or another seed changes it."""
        return draws_random_numbers(self.method, self.model, self.inputs, self.params, self.result)

    @property
    def network(self) -> str:
        """The network's name."""
        return self.setting.name

    @property
    def model(self) -> Any:
        """The model of the first call."""
        return self.setting.model

    @property
    def ignored(self) -> Tensor | None:
        """The pixels on which no score depends, (H, W)."""
        return self.setting.ignored

    @property
    def regions(self) -> Tensor | None:
        """The pixels of each image that its predicted class depends on, (N, H, W)."""
        return self.setting.regions

    def __call__(
        self, *, inputs: Mapping[str, Any] = {}, params: Mapping[str, Any] = {}, model: Any = None
    ) -> Any:
        """The method's result with some inputs, parameters or the model replaced."""
        changed = self.inputs | dict(inputs)
        if model is not None and (declared := self.method.spec.input("model")) is not None:
            changed[declared.name] = model
        return self.method(**changed, **(self.params | dict(params)))

    def repeated(self, count: int) -> list[Any]:
        """The results under ``count`` seeds; the one result where no seed changes it."""
        if self.method.seed is None or not self.is_random:
            return [self.result]
        return [self.result, *(self(params={self.method.seed: n}) for n in range(1, count))]

    def scores(self, images: Tensor) -> Tensor:
        """The target's score S (N,) of images."""
        declared = self.method.spec.input("target")
        target = self.inputs[declared.name] if declared else self.setting.target
        with torch.no_grad():
            return scores(self.model, images, target)

    def logits(self, images: Tensor) -> Tensor:
        """The model's logits (N, K) of images."""
        with torch.no_grad():
            return self.model(images)

    def rescaled(self, *, scale: float = 1.0, shift: float = 0.0) -> Any:
        """A copy of the model whose logits are ``scale`` times the model's plus ``shift``."""
        setting = relation_network(self.setting.name)
        head = [part for part in setting.model.module.modules() if isinstance(part, nn.Linear)][-1]
        with torch.no_grad():
            head.weight.mul_(scale)
            bias = torch.zeros(head.out_features).to(head.weight) if head.bias is None else head.bias
            head.bias = nn.Parameter(scale * bias + shift)
        return setting.model

    def normalized_inside(self) -> Any:
        """A model with the same logits and no normalization: its network's first layer normalizes."""
        return normalized_inside(relation_network(self.setting.name).model)

    def transformed(self, transform: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The spatial inputs (images, masks, textures, a data set's images), each transformed."""
        changed: dict[str, Any] = {}
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.ndim >= 3:
                changed[name] = transform(value)
            elif isinstance(value, TensorDataset):
                objects = None if value.objects is None else transform(value.objects)
                changed[name] = dataclasses.replace(value, images=transform(value.images), objects=objects)
        return changed

    def permuted(self, axis: Literal["batch", "dataset"]) -> tuple[dict[str, Any], Tensor]:
        """The inputs with the rows of the batch or of the data set in another order, and that order."""
        if axis == "dataset":
            name = next(i.name for i in self.method.spec.inputs if i.role == "dataset")
            dataset = self.inputs[name]
            order = torch.arange(len(dataset)).roll(2)
            rows: dict[str, Any] = {"images": dataset.images[order]}
            if dataset.objects is not None:
                rows["objects"] = dataset.objects[order]
            if dataset.classes is not None:
                rows["classes"] = [dataset.classes[i] for i in order.tolist()]
            return {name: dataclasses.replace(dataset, **rows)}, order
        order = torch.arange(len(self.setting.images)).roll(1)
        changed = {
            i.name: self.inputs[i.name][order]
            for i in self.method.spec.inputs
            if ROLES[i.role].per_image and isinstance(self.inputs[i.name], Tensor)
        }
        return changed, order

    def other(self, name: str, params: Mapping[str, Any] = {}) -> Any:
        """The result of another registered method on the same inputs."""
        reference = methods[name]
        shared = {i.name: self.inputs[i.name] for i in reference.spec.inputs if i.name in self.inputs}
        if (declared := reference.spec.input("target")) is not None and declared.name not in shared:
            shared[declared.name] = self.setting.target
        seeded = {} if reference.seed is None else {reference.seed: 7}
        return reference(**shared, **(seeded | dict(params)))


def _sample_inputs(method: AnyMethod, setting: RelationNetwork) -> dict[str, Any]:
    """Every input of the method: the network's images, its target, and samples for the other roles."""
    images = setting.images
    case = Case(count=len(images), size=(images.shape[2], images.shape[3]), target=setting.target)
    inputs: dict[str, Any] = {}
    for declared in method.spec.inputs:
        if declared.role == "model":
            inputs[declared.name] = setting.model
            continue
        request = case.request(setting.model, inputs)
        draw = functools.partial(_rows, images)
        request = dataclasses.replace(request, draw=draw, required=declared.required)
        if declared.role == "images":
            inputs[declared.name] = images
        else:
            inputs[declared.name] = ROLES[declared.role].sample(request)
    return inputs


def _rows(images: Tensor, count: int, channels: int) -> Tensor:
    """``count`` images, repeated with other intensities where there are fewer."""
    repeated = torch.cat([images * 0.9**n for n in range(-(-count // len(images)))])[:count]
    return repeated if channels == images.shape[1] else repeated[:, :1].expand(-1, channels, -1, -1)


# --- declared relations ----------------------------------------------------------------------


def relation_check(relation: Relation) -> Check:
    """The check of a declared relation, on each of its networks."""

    def check_relation(method: AnyMethod) -> None:
        params = _arguments(method) | relation.where
        if not relation.applies(method.validate(params)):
            raise SkipTest(f"it applies when {relation.when}: set the parameter by where=")
        _on_networks(method, relation, params)

    return Check(
        name=str(relation),
        promise=(type(relation).__doc__ or relation.kind).strip().partition("\n")[0],
        hint=f"the spec declares {type(relation).__name__}: correct the arithmetic, or the declaration",
        on="method",
        function=check_relation,
        requires=MAP_PER_PIXEL if relation.kind in ("equivariant", "localizes") else {},
    )


def _arguments(method: AnyMethod) -> dict[str, Any]:
    """The quick parameters, and a seed where the method has one."""
    return Case().arguments(method)


def _on_networks(method: AnyMethod, relation: Relation, params: Mapping[str, Any]) -> None:
    """Check a relation on its networks. Raises SkipTest where the method refuses all of them.

    Where it refuses all that are not transformers, it is checked on the transformers that replace them.
    """
    refusals: dict[str, str] = {}
    names = relation.network_names()
    transformers = [] if relation.networks else [TRANSFORMERS[name] for name in names if name in TRANSFORMERS]
    for name in names:
        if name not in RELATION_NETWORKS:  # a mistake of the declaration, not a refusal of the method
            raise UnknownName("network for relations", name, RELATION_NETWORKS)
    tested = (*names, *dict.fromkeys(transformers))
    for name in tested:
        if name in transformers and len(refusals) < len(names):
            break
        try:
            calls = RelationCalls.start(method, name, params)
        except PhospheneError as refusal:
            refusals[name] = str(refusal)
            continue
        try:
            relation.check(calls)
        except AssertionError as error:
            values = ", ".join(f"{n}={v!r}" for n, v in calls.params.items())
            shape = tuple(calls.setting.images.shape)
            raise AssertionError(
                f"{error}\non relation_network({name!r}), its images {shape} and target "
                f"{calls.setting.target}{f', with {values}' if values else ''}"
            ) from error
        if relation.one_network:
            return
    if len(refusals) == len(tested):
        raise SkipTest(f"it refused the networks {', '.join(tested)}: {'; '.join(refusals.values())}")


# --- ready-made relations of undeclared methods -------------------------------------------------


def maps_images_of_a_model(method: AnyMethod) -> str | None:
    """Why the ready-made relations of attributions do not apply to a method, or None."""
    if method.result is not Attribution or not (method.spec.input("model") and method.spec.input("images")):
        return "it is no attribution of a model's images"
    if not method.spec.batch_independent:
        return "it declares that its images depend on each other (batch_independent=False)"
    return None


def _declares(method: AnyMethod, kind: str) -> str | None:
    declared = any(relation.kind == kind for relation in method.spec.relations)
    return f"it declares {kind} itself, which is tested exactly" if declared else None


@register_check(
    "method",
    "Its map is larger where the object of the score is.",
    "a map that is transposed, flipped, shuffled, negated or of another image; (h, w) swapped in a reshape",
    lambda method: maps_images_of_a_model(method) or _declares(method, "localizes"),
    exemptible=True,
    requires=MAP_PER_PIXEL,
)
def localizes(method: AnyMethod) -> None:
    params = method.validate(_arguments(method))
    baselines = [params[name] for name in params if any(word in name for word in _BASELINE_WORDS)]
    if "white" in text_of(method) or any(value == 1 or value == "white" for value in baselines):
        raise SkipTest("against a white baseline, bright pixels count against the score")
    if not method.spec.input("target") and method.spec.input("labels"):
        raise SkipTest("it explains a loss, not a score")
    if re.search(_AGAINST, text_of(method)) and _zero_on_halves(method, params):
        raise SkipTest("nothing speaks against the score of its networks: its map is 0")
    _on_networks(method, Localizes(), params)


#: Words for a map of what makes the score smaller.
_AGAINST = r"\bagainst\b|counter|negative (evidence|contribution|influence|part)|contradict|inhibit|suppress"


def _zero_on_halves(method: AnyMethod, params: Mapping[str, Any]) -> bool:
    try:
        return not RelationCalls.start(method, "halves", params).result.maps.any()
    except PhospheneError:
        return False


def text_of(method: AnyMethod) -> str:
    """A method's name, title, summary and description in lower case."""
    spec = method.spec
    return " ".join((spec.name, spec.title, spec.summary, spec.description)).lower()


def prose_of(method: AnyMethod) -> str:
    """A method's summary and description in lower case."""
    return f"{method.spec.summary} {method.spec.description}".lower()


def prose_in_one_line(method: AnyMethod) -> str:
    """``prose_of`` without line breaks."""
    return " ".join(prose_of(method).split())


@register_check(
    "method",
    "The map of a flipped or transposed image is the flipped or transposed map.",
    "the axes of the map: (h, w) swapped, reversed or shifted",
    lambda method: maps_images_of_a_model(method) or _declares(method, "equivariant"),
    exemptible=True,
    requires=MAP_PER_PIXEL,
)
def equivariant(method: AnyMethod) -> None:
    tested = 0
    transforms: tuple[Transform, ...] = ("hflip", "vflip", "transpose")
    for transform in transforms:
        for head in ("gap", "flat", "tokens"):
            try:
                calls = RelationCalls.start(method, f"{transform}-{head}", _arguments(method))
            except PhospheneError:
                continue
            if calls.is_random:
                raise SkipTest("it draws random numbers, which do not flip with the image")
            tested += 1
            height, width = calls.result.maps.shape[-2:]
            images = calls.inputs["images"]
            if transform == "transpose" and height != width and images.shape[-1] == images.shape[-2]:
                break  # a grid that a parameter sets, of more rows than columns for square images as well
            _assert_equivariant(calls, transform)
            break  # the others are for methods that refuse the pooled head
    if not tested:
        raise SkipTest("it refused the symmetric networks")


class RandomDraws(TorchDispatchMode):
    """Counts a method's random operations of torch, those of a generator included, in a block.

    The images on which ``phosphene.models`` compares a network with its optimized copy, and with which it
    records a network's structure, are not the method's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
        # Attention draws for its dropout only.
        no_dropout = "dropout_p" in names and not arguments.get("dropout_p")
        if torch.Tag.nondeterministic_seeded in func.tags and not no_dropout:
            frames = [frame for frame, _ in traceback.walk_stack(None)]
            positions = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
            if not any(
                module.startswith("phosphene.models.optimized_copy")
                or (module == "phosphene.models.model" and function == "_noise")
                for module, function in positions
            ):
                self.count += 1
                value = func(*args, **(kwargs or {}))
                self.record(func.name(), value)
                return value
        return func(*args, **(kwargs or {}))

    def record(self, name: str, value: Any) -> None:
        """Called with the name and the output of each random operation."""


def draws_random_numbers(
    method: AnyMethod, model: Any, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any
) -> bool:
    """Whether a call's result depends on random numbers: torch draws some, or another seed changes it."""
    record_structure(model, inputs)  # draws an image, which is not the method's
    with RandomDraws() as draws:
        method(**inputs, **params)
    if draws.count or method.seed is None:
        return draws.count > 0
    other = method(**inputs, **(dict(params) | {method.seed: 8}))
    pairs = zip(tensors_in(result), tensors_in(other), strict=True)
    return any(not torch.equal(one, another) for (_, one), (_, another) in pairs)


def _assert_equivariant(calls: RelationCalls, transform: Transform) -> None:
    """Fail where another transformation explains the map of the transformed images clearly better.

    A window grid or a blur with borders does not flip exactly, so the correlation alone does not decide.
    """
    maps = calls.result.maps.double()
    moved = calls(inputs=calls.transformed(lambda tensor: transformed(tensor, transform))).maps.double()
    expected = transformed(maps, transform)
    assert moved.shape == expected.shape, (
        f"maps has the shape {tuple(moved.shape)} for images under {transform!r}, not {tuple(expected.shape)}"
    )
    if _is_exact(calls.method):
        error = float((moved - expected).norm() / expected.norm().clamp(min=1e-12))
        assert error < _LARGEST_ERROR, (
            f"the maps of the images under {transform!r} differ from the transformed maps by {error:.1%} of "
            "their norm: a gradient's map without a grid of windows, in double precision, does not"
            f"\non relation_network({calls.network!r})"
        )
    right = mean_rank_correlation(moved, expected)
    wrong = {what: mean_rank_correlation(moved, maps_) for what, maps_ in _reversals(expected, transform)}
    likely = max(wrong, key=wrong.__getitem__)
    assert wrong[likely] < max(_CORRELATION, right + _MARGIN), (
        f"the maps of the images under {transform!r} have rank correlation {right:.2f} with the transformed "
        f"maps, and {wrong[likely]:.2f} with the transformed maps {likely}\n"
        f"on relation_network({calls.network!r})"
    )


def _is_exact(method: AnyMethod) -> bool:
    """Whether the map has to flip exactly: it is computed from gradients and no parameter sets a grid.

    At a baseline of one color pools and ReLUs have ties, which rounding decides. Images of several passes
    may be changed by patterns of their own, which do not flip.
    """
    names = method.spec.params.model_fields
    if method.spec.cost is not None and method.spec.cost.names() & set(names):
        return False
    grid = any(word in name for name in names for word in (*_GRID_WORDS, *_BASELINE_WORDS))
    path = re.search(rf"{_PATH_METHOD}|baseline", text_of(method)) is not None
    return "gradients" in method.spec.needs and not grid and not path


def _reversals(maps: Tensor, transform: Transform) -> Iterator[tuple[str, Tensor]]:
    """The maps under the other reversals. The untransformed maps are not among them: a pattern that does not
    depend on the image, as of a few fixed masks, explains them."""
    if transform != "hflip":
        yield "flipped horizontally", maps.flip(-1)
    if transform != "vflip":
        yield "flipped vertically", maps.flip(-2)
    yield "rotated by 180 degrees", maps.flip(-1, -2)
    yield "negated", -maps


def _path_parameters(method: AnyMethod) -> tuple[str, str] | None:
    """The names of the parameters for the steps and for the baseline of a path method."""
    names = list(method.spec.params.model_fields)
    steps = [n for n in names if n in _STEP_WORDS]
    baselines = [n for n in names if any(word in n for word in _BASELINE_WORDS)]
    return (steps[0], baselines[0]) if steps and baselines else None


def _is_no_path_method(method: AnyMethod) -> str | None:
    if (reason := maps_images_of_a_model(method) or _declares(method, "complete")) is not None:
        return reason
    return None if _path_parameters(method) else "it has no steps and no baseline"


@register_check(
    "method",
    "The map of a path method sums to the change of the score from the baseline to the image.",
    "weights and positions of the steps (a left sum misses the end), the factor x - b, the baseline itself",
    _is_no_path_method,
    exemptible=True,
)
def complete(method: AnyMethod) -> None:
    names = _path_parameters(method)
    assert names is not None
    steps, baseline = names
    params = _arguments(method) | {steps: _STEPS}
    value = method.validate(params)[baseline]
    calls = RelationCalls.start(method, "curved", params)
    images = calls.inputs["images"]
    start = baseline_of(images, value)
    if start is None:
        raise SkipTest(f"{baseline}={value!r} is no number, 'zero', 'gray', 'mean' or 'white'")
    if calls.is_random:
        raise SkipTest("it draws random numbers: its sum is exact in the mean only")
    change = calls.scores(images) - calls.scores(start)
    error = calls.result.maps.double().flatten(1).sum(1) / change - 1
    if not re.search(_PATH_METHOD, text_of(method)) and float(error.abs().min()) > 0.3:
        raise SkipTest("its map does not nearly sum to the change of the score: it is no path method")
    # A left sum has the first slope once too often and the last one too rarely, a right sum the other way.
    slopes = [(calls.scores(at + 1e-5 * (images - start)) - calls.scores(at)) * 1e5 for at in (start, images)]
    left_error = (slopes[0] - slopes[1]) / (2 * _STEPS * change)
    beyond = torch.where(left_error * error > 0, error.abs(), error.abs() - 1.2 * left_error.abs())
    worst = int(beyond.argmax())
    assert float(beyond[worst]) <= _COMPLETE, (
        f"with {steps}={_STEPS} and {baseline}={value!r} the map of image {worst} sums to "
        f"{float(1 + error[worst]):.4f} times S(x) - S(b), a left sum to {float(1 + left_error[worst]):.4f} "
        f"times; a difference of {_COMPLETE} is allowed, and the error of a right sum\n"
        f"on relation_network('curved')"
    )
