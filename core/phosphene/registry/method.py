"""``@method`` turns a typed function into a ``Method``: checked, guarded, seeded, with provenance."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
import platform
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, get_args

import torch
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from ..checkpoints import claim_checkpoint
from ..data.datasets import Dataset
from ..errors import InputError, PluginError, UnknownName
from ..graceful_stop import stopped_early_at
from ..models.batch_size import batch_size
from ..models.optimized_copy import allow_optimized
from ..parameter_text import fault_text, value_text
from ..results import Provenance, Result
from ..roles.kinds import PER_IMAGE, ROLES, image_count
from ..spec.cost import Cost
from ..spec.invariants import Invariant
from ..spec.parameter_group import ParameterGroup, gather
from ..spec.spec import MethodSpec, Need, Reference, Role
from ..targets.objectives import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from ..models import Model
from .signature import read_signature

#: Torch's own generator is one for all threads, so seeded calls take turns.
_seeding = threading.RLock()


#: How the record of an input ends that no words can make again.
AS_OBJECT = "given as an object"


P = ParamSpec("P")


R = TypeVar("R", bound="Result")


def method(
    *,
    family: str,
    title: str | None = None,
    references: Sequence[Reference] = (),
    invariants: Sequence[Invariant] = (),
    needs: Sequence[Need] = (),
    cost: Cost | None = None,
    tags: Sequence[str] = (),
    batch_independent: bool = True,
    oracle: Callable[[], None] | None = None,
    network: Callable[..., nn.Module] | None = None,
    defense: Callable[..., Callable[[Tensor], Tensor]] | None = None,
    quick: Mapping[str, Any] = {},
    demo: Mapping[str, Any] = {},
) -> Callable[[Callable[P, R]], Method[P, R]]:
    """Make a ``Method`` of a typed function: its signature is its schema, its docstring its documentation.

    Positional parameters are inputs, annotated with a role of ``phosphene.roles``; keyword-only
    ones are parameters, annotated for pydantic; the return annotation is a result type.

    title: the name as papers write it ("Grad-CAM"), where it is not the function's in words.
    oracle: a function that raises AssertionError unless the method gives the known right answer.
    network: builds the network that a training method trains, from its saved configuration.
    defense: builds the change of the pixels that the method puts before a model, from its parameters.
    quick, demo: parameters that make a test call fast, or the gallery's picture telling; a demo may say
    inputs, too.
    """

    def decorate(function: Callable[P, R]) -> Method[P, R]:
        name = function.__name__
        declared = read_signature(function)
        summary, _, description = (inspect.getdoc(function) or "").partition("\n")
        if not summary:
            raise TypeError(f"{name} needs a docstring: its first line is the summary")
        config = ConfigDict(extra="forbid", frozen=True)
        spec = MethodSpec(
            name=f"{family}.{name}",
            family=family,
            title=title or name.replace("_", " ").capitalize(),
            summary=summary,
            description=description.strip(),
            inputs=declared.inputs,
            params=create_model(f"{name}_params", __config__=config, **declared.fields),
            returns=declared.result.__name__,
            references=tuple(references),
            invariants=tuple(invariants),
            needs=tuple(needs),
            cost=cost,
            tags=tuple(tags),
            batch_independent=batch_independent,
            oracle=oracle,
            quick=dict(quick),
            demo=dict(demo),
        )
        return Method(function, spec, declared.result, network, defense, declared.groups)

    return decorate


@dataclass(eq=False, repr=False)
class Method(Generic[P, R]):
    """A technique: call it like the function it was made of; ``.spec`` says everything about it.

    ``network`` builds the untrained network of a training method from the configuration saved with
    its weights; ``defense`` the change of the pixels that a defence puts before a model, from its
    parameters; ``groups`` are the parameter groups by the argument that holds them; ``distribution`` is who
    brings the method, set by the registry.
    """

    function: Callable[P, R]
    spec: MethodSpec
    result: type[R]
    network: Callable[..., nn.Module] | None = None
    defense: Callable[..., Callable[[Tensor], Tensor]] | None = None
    groups: Mapping[str, type[ParameterGroup]] = field(default_factory=dict)
    distribution: str = "unregistered"

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function)
        #: The parameters that name layers, and the one that seeds it, where it draws anything.
        self.layers = self._parameters(Role("layer"))
        self.seed = next(iter(self._parameters(Role("seed"))), None)

    def _parameters(self, role: Role) -> list[str]:
        """The parameters of a role, wherever it stands in their annotation (``list[X] | None``)."""

        def within(annotation: Any) -> bool:
            return annotation == role or any(map(within, get_args(annotation)))

        fields = self.spec.params.model_fields.items()
        return [name for name, field in fields if role in field.metadata or within(field.annotation)]

    def __repr__(self) -> str:
        return f"<method {self.spec.name}>"

    def validate(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters checked and completed; InputError in one sentence each."""
        known = self.spec.params.model_fields
        for name in params:
            if name not in known:
                raise UnknownName("parameter", name, known, self.spec.short_name)
        try:
            return dict(self.spec.params.model_validate(dict(params)))
        except ValidationError as error:
            faults = (f"{self.spec.short_name}: {fault_text(fault)}" for fault in error.errors())
            raise InputError("; ".join(faults)) from None

    def defend(self, model: Model, **params: Any) -> Model:
        """The model behind this defence, which every attack on it then goes through.

        Raises InputError where the method is none that can stand before a model.
        """
        if self.defense is None:
            raise InputError(f"{self.spec.short_name} is no defence that can stand before a model")
        whole = self.validate(params)
        name = f"{self.spec.short_name}({','.join(f'{n}={value_text(v)}' for n, v in whole.items())})"
        defended = model.defended(self.defense(**whole), name)
        if model.source is not None:  # in front of the name that load_model knows it by
            defended.source = {**model.source, "uri": f"defended:{name}|{model.source['uri']}"}
        return defended

    def check(
        self, inputs: Mapping[str, Any], params: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and parameters as the function gets them; what it cannot work with is refused."""
        whole, checked = self.validate(params), self.check_inputs(inputs)
        if (model := self._model(checked)) is not None:
            whole |= {name: _layer_names(whole[name], model) for name in self.layers}
        return checked, whole

    def check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs checked and brought to the model's device and precision."""
        checked: dict[str, Any] = {}
        for declared in self.spec.inputs:
            if declared.name not in inputs and declared.required:
                raise InputError(f"{self.spec.short_name} needs {declared.name} ({declared.role})")
            check = ROLES[declared.role].check
            checked[declared.name] = check(inputs.get(declared.name), self._model(checked), checked)
        return checked

    def _model(self, inputs: Mapping[str, Any]) -> Model | None:
        declared = self.spec.input("model")
        return inputs.get(declared.name) if declared else None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        names = [i.name for i in self.spec.inputs]
        if len(args) > len(names):
            raise InputError(
                f"{self.spec.short_name} takes {len(names)} inputs ({', '.join(names)}), not {len(args)}; "
                "parameters are given by name"
            )
        inputs: dict[str, Any] = dict(zip(names, args, strict=False))
        if twice := inputs.keys() & kwargs.keys():
            raise InputError(f"{self.spec.short_name} is given {' and '.join(sorted(twice))} twice")
        inputs |= {n: v for n, v in kwargs.items() if n in names}
        # What is made in inference mode can never be differentiated again, and users may want to.
        with torch.inference_mode(False), claim_checkpoint() as checkpoint:
            inputs, params = self.check(inputs, {n: v for n, v in kwargs.items() if n not in names})
            model = self._model(inputs)
            if model is not None and "gradients" in self.spec.needs:
                model.require_gradients()
            if self.seed is not None and params[self.seed] is None:
                drawn = checkpoint.seed if checkpoint else None
                params[self.seed] = secrets.randbits(31) if drawn is None else drawn
            if checkpoint and self.seed is not None:
                checkpoint.seed = params[self.seed]
            started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
            with (
                self._execution_context(model, params),
                allow_optimized(model, sum(self.passes(inputs, params) or ())) as optimized,
            ):
                result, size = self._run(model, inputs, params)
                digest = model.digest if model else None
        kept = self.record_inputs(inputs)
        where = model or next((v for v in inputs.values() if isinstance(v, Tensor)), torch.empty(0))
        provenance = Provenance(
            method=self.spec.name,
            distribution=self.distribution,
            params=self.spec.params(**params).model_dump(mode="json"),
            inputs={n: f"tensor {tuple(v.shape)}" if isinstance(v, Tensor) else v for n, v in kept.items()},
            model={"name": model.name, "digest": digest, "source": model.source, "tuned": optimized.used}
            if model
            else None,
            seed=params[self.seed] if self.seed else None,
            versions=_versions(),
            device=str(where.device),
            dtype=str(where.dtype).removeprefix("torch."),
            batch_size=size,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 4),
            interrupted=stopped_early_at(),
        )
        return dataclasses.replace(result, inputs=kept, provenance=provenance)

    def passes(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[int, int] | None:
        """How many images will go forward and backward, by the declared cost; None where there is none."""
        pictures = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim == 4), None)
        count, _, height, width = (1, 0, 0, 0) if pictures is None else pictures.shape
        dataset = sum(len(v) for v in inputs.values() if isinstance(v, Dataset))
        painted = self.spec.input("styles")
        styles = len(inputs[painted.name]) if painted else 0
        sizes = {"images": count, "height": height, "width": width, "dataset": dataset, "styles": styles}
        if self.spec.cost is None:
            return None
        return self.spec.cost.evaluate(params, **sizes, **self.sizes(self._model(inputs), params))

    def sizes(self, model: Model | None, params: Mapping[str, Any]) -> dict[str, Any]:
        """``channels`` and ``stages`` as the declared cost means them, where it speaks of them."""
        if model is None or (cost := self.spec.cost) is None:
            return {}
        found: dict[str, Any] = {"stages": model.structure.stages} if cost.depends_on("stages") else {}
        if not cost.depends_on("channels"):
            return found
        if (chosen := params.get("channels", "all")) != "all":
            return found | {"channels": None if chosen is None else len(chosen)}
        named = (params[name] for name in self.layers)
        layer = next(filter(None, named), None) or model.last_map
        return found | {"channels": model.map_shape(layer)[0]}

    def record_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs as a result keeps them: a tensor as it is, of all else how a person would write it."""
        return {i.name: _recorded(inputs[i.name]) for i in self.spec.inputs if i.role != "model"}

    @contextmanager
    def _execution_context(self, model: Model | None, params: Mapping[str, Any]) -> Iterator[None]:
        """Model guarded, gradients on or off, randomness seeded and the caller's left alone."""
        with ExitStack() as stack:
            gradients = not {"gradients", "training"}.isdisjoint(self.spec.needs)
            stack.enter_context(torch.set_grad_enabled(gradients))
            if model is not None:
                stack.enter_context(model.guard())
            if self.seed is not None:
                stack.enter_context(_seeding)
                devices = [model.device] if model is not None and model.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(params[self.seed])
            yield

    def _run(
        self, model: Model | None, inputs: dict[str, Any], params: dict[str, Any]
    ) -> tuple[R, int | None]:
        """The function's result, batch by batch where every row of it belongs to one image."""
        function: Callable[..., R] = self.function

        def call(inputs: dict[str, Any]) -> R:
            result = function(**inputs, **gather(params, self.groups))
            if not isinstance(result, self.result):
                raise PluginError(f"{self.spec.name} gave a {type(result).__name__}, not {self.spec.returns}")
            return result

        size = batch_size(model) if model is not None else None
        count = image_count(inputs) or 1
        if size is None or count <= size or not (self.spec.batch_independent and self.result.per_image):
            return call(inputs), size
        results = []
        with claim_checkpoint():  # no batch may go on with what another did
            for start in range(0, count, size):
                some = range(start, min(start + size, count))
                part = {i.name: _select(inputs[i.name], i.role, some) for i in self.spec.inputs}
                results.append(call(part))
        return self.result.concatenate(results), size


def _select(value: Any, role: str, rows: range) -> Any:
    if role in PER_IMAGE and isinstance(value, Tensor):
        return value[rows.start : rows.stop]
    return value.select(rows) if role == "target" else value


def _layer_names(value: Any, model: Model) -> Any:
    """A parameter with every layer that it names checked."""
    match value:
        case None:
            return None
        case str():
            return model.layer_name(value)
        case Mapping():
            return {model.layer_name(layer): item for layer, item in value.items()}
    return type(value)(map(model.layer_name, value))


def _recorded(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, Objective):
        return value.to_json()
    return getattr(value, "uri", None) or f"a {type(value).__name__} {AS_OBJECT}"


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("phosphene", "torch", "torchvision", "timm"):
        with suppress(PackageNotFoundError):  # timm and torchvision are optional to a bare module
            found[name] = version(name)
    return found
