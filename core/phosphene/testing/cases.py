"""Cases: small calls of a method, drawn from its schema alone, each with a repr that can be run."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..builtin.scenes import draw_scenes
from ..errors import InputError, PhospheneError
from ..images.color import resize
from ..models import Model
from ..models.unit_centers import unit_centers
from ..roles import ROLES, InputRole, SampleRequest, model_for_inputs
from ..runs.saved_results import load_result
from ..spec.expressions import LENGTHS
from .networks import CLASSES, image_size, make_network, network_names

if TYPE_CHECKING:
    from ..registry.method import Method
    from ..results import Result

IMAGE_KINDS = ("scenes", "noise", "flat", "binary", "black")
#: The environment variable with the device that the kit's networks are on, such as "cuda"; default: the CPU.
DEVICE_VARIABLE = "PHOSPHENE_DEVICE"
#: Cases of more forward and backward passes than this are too slow to be drawn.
MOST_PASSES = 600
#: The largest number of pixels that is drawn for a parameter, such as the side of an image.
LARGEST_SIDE = 96
#: Images in the data set of a case.
DATASET_SIZE = 6
#: The roles of optional inputs that ``Case.optional`` passes.
OPTIONAL_ROLES = ("other_model", "masks", "start", "guide")


def make_images(kind: str, count: int, channels: int, size: tuple[int, int]) -> Tensor:
    """``count`` different images (N, C, H, W) in [0, 1], the same in every call."""
    return _images(kind, count, channels, size).clone()


@functools.lru_cache(64)
def _images(kind: str, count: int, channels: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (count, channels, *size)
    match kind:
        case "scenes":
            scenes = torch.stack([resize(s, size) for s in draw_scenes(count, seed=5).images]).clamp(0, 1)
            return scenes[:, :channels] if channels <= 3 else scenes[:, :1].expand(shape).contiguous()
        case "noise":
            return torch.rand(shape, generator=generator)
        case "flat":
            return torch.linspace(0.5, 1, count)[:, None, None, None].expand(shape).contiguous()
        case "binary":
            return torch.rand(shape, generator=generator).round()
        case "black":
            return torch.zeros(shape)
    raise InputError(f"there is no kind of image {kind!r}; there are {', '.join(IMAGE_KINDS)}")


@dataclass(frozen=True)
class Case:
    """One small call: a network, images, a target, and parameters beside the method's ``quick`` ones.

    ``pictures``: the kind of images. ``size``: height and width; default: the network's. ``double``: in
    double precision, where differences are not rounding. ``precision``: "float16" or "bfloat16".
    ``dataset``: how many images a data set has. ``optional``: a second model, masks and images that may be
    left out are passed, too.
    """

    network: str = "gap"
    pictures: str = "scenes"
    count: int = 2
    size: tuple[int, int] | None = None
    target: Any = None
    double: bool = False
    precision: str | None = None
    dataset: int = DATASET_SIZE
    optional: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != getattr(_DEFAULT, f.name))
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def __hash__(self) -> int:
        return hash(repr(self))

    def model(self, *, recorded: bool = True) -> Model:
        """A new network; runs of a case never share one.

        ``recorded``: its structure, attention and centers are those of an equal network, recorded once.
        """
        precision = self.precision or ("float64" if self.double else None)
        device = os.environ.get(DEVICE_VARIABLE)
        model = _new_model(self.network, precision, device)
        if recorded:
            model._cache = _recorded_model(self.network, precision, device)._cache.of_copy()
        return model

    def inputs(self, method: Method[..., Any], model: Model) -> dict[str, Any]:
        """Every input of the method."""
        inputs: dict[str, Any] = {}
        for declared in method.spec.inputs:
            needed = declared.required or (declared.role in OPTIONAL_ROLES and self.optional)
            request = replace(self.request(model, inputs), required=needed)
            inputs[declared.name] = ROLES[declared.role].sample(request)
        return inputs

    def request(self, model: Model, inputs: Mapping[str, Any] = {}) -> SampleRequest:
        """What a role needs for a sample value; ``inputs`` are the samples of the inputs before it."""
        size = self.size or image_size(model)
        return SampleRequest(
            model=model_for_inputs(model, inputs),
            inputs=inputs,
            load_result=load_result,
            count=self.count,
            size=size,
            draw=lambda count, channels: make_images(self.pictures, count, channels, size),
            target=self.target,
            dataset_size=self.dataset,
            classes=CLASSES,
        )

    def arguments(self, method: Method[..., Any]) -> dict[str, Any]:
        """The parameters: the method's quick ones, a seed where it has one, and the case's."""
        seeded = {} if method.seed is None else {method.seed: 7}
        return seeded | dict(method.spec.quick) | dict(self.params)

    def run(self, method: Method[..., Any], model: Model | None = None, **changed: Any) -> Result:
        """Call the method on this case."""
        model = model or self.model()
        return method(**(self.inputs(method, model) | self.arguments(method) | changed))

    def simpler(self) -> Iterator[Case]:
        """The same case with one property set to its default, the most informative first."""
        default = _DEFAULT
        properties = ("network", "pictures", "size", "target", "double", "precision", "dataset")
        for name in (*properties, "optional"):
            if getattr(self, name) != getattr(default, name):
                yield replace(self, **{name: getattr(default, name)})
        for count in range(1, self.count):
            yield replace(self, count=count)
        for name in self.params:
            yield replace(self, params={n: v for n, v in self.params.items() if n != name})


_DEFAULT = Case()


# --- which cases -----------------------------------------------------------------------------


def _new_model(network: str, precision: str | None, device: str | None) -> Model:
    model = make_network(network)
    if precision is not None:
        model.module.to(getattr(torch, precision))
    if device is not None:
        model.module.to(device)
    return model


@functools.cache
def _recorded_model(network: str, precision: str | None, device: str | None) -> Model:
    """One instance of a network, used only for what is recorded about it at its own size."""
    model = _new_model(network, precision, device)
    size = image_size(model)
    with suppress(PhospheneError):  # a network that cannot be read, which methods have to refuse
        sized = model.at_size((model.input_size[0], *size))
        sized.attention_layers  # noqa: B018
        for layer in {*sized.structure.stages, sized.structure.last_map} - {None}:
            unit_centers(sized, str(layer), size)
    return model


@functools.cache
def _network(name: str) -> Model:
    """One instance of a network, used only to read its sizes."""
    return make_network(name)


@functools.cache
def _size_and_layers(network: str) -> tuple[tuple[int, int], list[str]]:
    """A network's image size and layer names."""
    model = make_network(network)
    return image_size(model), list(model.layers)


def declared_cost(method: Method[..., Any], case: Case) -> tuple[int, int] | None:
    """The declared forward and backward passes of a case; None where the method declares no cost."""
    if method.spec.cost is None:
        return None
    try:
        params = method.validate(case.arguments(method))
        return method.spec.cost.evaluate(params, **sizes(method, case))
    except PhospheneError:
        return None


@functools.cache
def _sample_length(role: InputRole, case: Case) -> int:
    """The length of a role's sample for a case."""
    return len(role.sample(case.request(_network(case.network))))


def sizes(method: Method[..., Any], case: Case) -> dict[str, int]:
    """The sizes that a cost expression may refer to, for this case."""
    height, width = case.size or _size_and_layers(case.network)[0]
    sizes = {"images": case.count, "height": height, "width": width, **dict.fromkeys(LENGTHS, 0)}
    for role in (ROLES[declared.role] for declared in method.spec.inputs):
        if role.size_name:
            sizes[role.size_name] += _sample_length(role, replace(case, params={}))
    of_the_model = ("channels", "stages", "attention_layers", "attention_heads")
    if (cost := method.spec.cost) is None or not any(map(cost.depends_on, of_the_model)):
        return sizes
    params = method.validate(case.arguments(method))
    model = _network(case.network)
    return sizes | method.sizes(model if model.size_known else model.at_size((3, height, width)), params)


def fixed_cases(method: Method[..., Any], *, all_pairs: bool) -> list[Case]:
    """Every network, every kind of image, odd sizes, one image, each choice of each parameter once."""
    networks = list(network_names())
    cases = [
        Case(network, kind)
        for index, network in enumerate(networks)
        for kind in (IMAGE_KINDS if all_pairs else (IMAGE_KINDS[index % 2],))
    ]
    cases += [Case(pictures=kind) for kind in IMAGE_KINDS]
    cases += [Case(count=1), Case(count=3, size=(21, 27)), Case("functional", "noise", size=(33, 17))]
    if method.spec.input("target"):
        cases += [
            Case(target=1),
            Case("functional", target="conv1[2]"),
            Case("double", target="conv1[2,3,5]"),
        ]
    if any(declared.role in OPTIONAL_ROLES and not declared.required for declared in method.spec.inputs):
        cases.append(Case(pictures="noise", optional=True))
    properties = properties_of(method.spec.params_schema)
    cases += [Case(params={n: choice}) for n, schema in properties.items() for choice in _choices(schema)]
    return list(dict.fromkeys(cases))


@functools.cache
def compared_cases(method: Method[..., Any]) -> list[Case]:
    """Cases in which the results of mutants are compared.

    Two networks, an odd size, and choices of parameters; the others for methods that refuse these.
    """
    every = fixed_cases(method, all_pairs=False)
    first = [Case(), Case("functional", "noise"), Case(pictures="noise", count=3, size=(21, 27))]
    return list(dict.fromkeys([*first, *[case for case in every if case.params][:4], *every]))


def drawn_cases(method: Method[..., Any]) -> st.SearchStrategy[Case]:
    """Cases drawn by hypothesis, parameters within the schema's bounds, edges included.

    Parameters in ``quick`` or in the declared cost stay near their smallest values, to keep calls short.
    """
    schemas = properties_of(method.spec.params_schema)
    costly = set(method.spec.quick) | (method.spec.cost.names() if method.spec.cost else set())

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        network = draw(st.sampled_from(list(network_names())))
        own_size, layers = _size_and_layers(network)
        sizes = st.one_of(st.none(), st.tuples(st.integers(16, 32), st.integers(16, 32)))
        target = None
        if method.spec.input("target"):
            target = draw(st.one_of(st.none(), st.integers(0, CLASSES - 1)))
        params = {}
        for name, schema in schemas.items():
            if draw(st.booleans()):
                if name == method.seed:
                    strategy: st.SearchStrategy[Any] = st.integers(0, 2**63 - 1)
                elif name in method.layers:
                    strategy = _layer_values(schema, layers)
                elif name in costly:
                    strategy = st.sampled_from(
                        _values_near(method.spec.quick.get(name, schema.get("default")), schema)
                    )
                else:
                    strategy = values(_of_small_images(schema))
                params[name] = draw(strategy)
        case = Case(
            network=network,
            pictures=draw(st.sampled_from(IMAGE_KINDS)),
            count=draw(st.integers(1, 3)),
            size=draw(sizes) if own_size[0] <= 32 else None,
            target=target,
            params=params,
        )
        cost = declared_cost(method, case)
        if cost is not None and sum(cost) > MOST_PASSES:
            case = replace(case, params={n: v for n, v in params.items() if n not in costly})
        return case

    return draw_case()


def _of_small_images(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a number of pixels with a maximum of ``LARGEST_SIDE``; any other one unchanged.

    Sides of thousands of pixels, as a method may allow them, need gigabytes and minutes.
    """
    if not re.search(r"\bpixels?\b", schema.get("description", "")):
        return schema

    def limited(branch: Mapping[str, Any]) -> Mapping[str, Any]:
        if branch.get("type") != "integer" or branch.get("maximum", 0) <= LARGEST_SIDE:
            return branch
        return {**branch, "maximum": max(LARGEST_SIDE, branch.get("minimum", 0))}

    if "anyOf" in schema:
        return {**schema, "anyOf": [limited(branch) for branch in schema["anyOf"]]}
    return limited(schema)


def properties_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of the parameters, with references resolved."""

    def resolve(value: Any) -> Any:
        if isinstance(value, Mapping):
            if "$ref" in value:
                return resolve(schema["$defs"][value["$ref"].rpartition("/")[2]])
            return {name: resolve(item) for name, item in value.items()}
        return [resolve(item) for item in value] if isinstance(value, list) else value

    return resolve(schema["properties"]) if "properties" in schema else {}


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    if "anyOf" in schema:
        return [choice for branch in schema["anyOf"] for choice in _choices(branch)]
    if schema.get("type") == "boolean":
        return [False, True]
    if schema.get("type") == "array" and "items" in schema:
        return [[choice] for choice in _choices(schema["items"])]
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


def _values_near(usual: Any, schema: Mapping[str, Any]) -> list[Any]:
    """The usual value, the smallest valid ones, and every choice."""
    values = [usual, *_choices(schema)]
    for branch in schema.get("anyOf", [schema]):
        if branch.get("type") == "integer" and "minimum" in branch:
            values += [branch["minimum"], branch["minimum"] + 1]
        elif branch.get("type") == "number":
            values += [branch[edge] for edge in ("minimum", "maximum") if edge in branch]
    return [v for n, v in enumerate(values) if v not in values[:n]]


def _layer_values(schema: Mapping[str, Any], layers: list[str]) -> st.SearchStrategy[Any]:
    name = st.sampled_from(layers)
    branches: list[st.SearchStrategy[Any]] = []
    for branch in schema.get("anyOf", [schema]):
        match branch.get("type"):
            case "null":
                branches.append(st.none())
            case "array":
                branches.append(st.lists(name, min_size=1, max_size=2, unique=True))
            case "object":
                inside = branch["additionalProperties"]
                branches.append(st.dictionaries(name, values(inside), min_size=1, max_size=2))
            case _:
                branches.append(name)
    return st.one_of(branches)


def values(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """A strategy for the values that a parameter's JSON schema allows, edges often."""
    if "anyOf" in schema:
        return st.one_of([values(branch) for branch in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer":
            low, high = schema.get("minimum"), schema.get("maximum")
            if "exclusiveMinimum" in schema:
                low = schema["exclusiveMinimum"] + 1
            if "exclusiveMaximum" in schema:
                high = schema["exclusiveMaximum"] - 1
            edges = [edge for edge in (low, high) if edge is not None]
            integers = st.integers(low, high)
            return st.one_of(integers, st.sampled_from(edges)) if edges else integers
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum"))
            high = schema.get("maximum", schema.get("exclusiveMaximum"))
            floats = st.floats(
                low,
                high,
                exclude_min="exclusiveMinimum" in schema,
                exclude_max="exclusiveMaximum" in schema,
                allow_nan=False,
                allow_infinity=False,
            )
            edges = [schema[edge] for edge in ("minimum", "maximum") if edge in schema]
            return st.one_of(floats, st.sampled_from(edges)) if edges else floats
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "string":
            return st.from_regex(schema["pattern"]) if "pattern" in schema else st.text("abc.0", min_size=1)
        case "array" if "prefixItems" in schema:
            return st.tuples(*(values(item) for item in schema["prefixItems"])).map(list)
        case "array":
            least = schema.get("minItems", 0)
            most = max(least, min(schema.get("maxItems", 4), 4))
            return st.lists(values(schema["items"]), min_size=least, max_size=most)
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            inside = values(schema["additionalProperties"])
            return st.dictionaries(st.text("abc", min_size=1), inside, max_size=3)
        case "object":
            anything = st.one_of(st.integers(-9, 9), st.booleans(), st.text("abc", min_size=1))
            return st.dictionaries(st.text("abc", min_size=1), anything, max_size=2)
    raise InputError(f"no strategy for a parameter with the schema {dict(schema)}")
