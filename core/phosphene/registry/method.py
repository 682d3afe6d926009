"""``@method`` turns a typed function into a ``Method``: checked, guarded, seeded, with provenance."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, get_args

import torch
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from ..checkpoints import claim_checkpoint
from ..errors import InputError, ModelError, PluginError, UnknownName, type_name, value_repr
from ..finite_values import NonFiniteResultError, contains_non_finite, defer_checks
from ..graceful_stop import stopped_early_at
from ..hooks.guard import guard
from ..models.arguments import non_finite_weight
from ..models.batch_size import batch_size
from ..models.detections import detection_table
from ..models.optimized_copy import MIN_PASSES, allow_optimized
from ..parameter_text import fault_texts, value_text
from ..results import Embedding, Provenance, Result
from ..roles import ROLES, InputContext, model_for_inputs
from ..spec.cost import Cost
from ..spec.expressions import LENGTHS
from ..spec.invariants import Invariant
from ..spec.parameter_group import ParameterGroup, gather
from ..spec.relations import Relation
from ..spec.spec import Input, MethodSpec, Need, Reference, Role
from ..targets import Objective, ObjectiveClassifier
from ..torch_state import (
    call_and_restore,
    cpu_by_default,
    deterministic_algorithms,
    fork_random_state,
    random_lock,
    seed_generators,
)
from .docstrings import describe_parameter, with_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from ..models import Model
from .signature import admits, holds_bool, read_signature

P = ParamSpec("P")


R = TypeVar("R", bound="Result")


#: Sizes of a model that a cost may depend on.
_MODEL_SIZES = ("stages", "channels", "attention_layers", "attention_heads")


def method(
    *,
    family: str,
    title: str | None = None,
    references: Sequence[Reference] = (),
    invariants: Sequence[Invariant] = (),
    relations: Sequence[Relation] = (),
    exempt: Mapping[str, str] = {},
    needs: Sequence[Need] = (),
    cost: Cost | None = None,
    tags: Sequence[str] = (),
    batch_independent: bool = True,
    oracle: Callable[[], None] | None = None,
    network: Callable[..., nn.Module] | None = None,
    defense: Callable[..., Callable[[Tensor], Tensor]] | None = None,
    quick: Mapping[str, Any] = {},
    demo: Mapping[str, Any] = {},
    defaults: Mapping[str, Any] = {},
) -> Callable[[Callable[P, R]], Method[P, R]]:
    """Decorator that makes a ``Method`` of a typed function: signature -> schema, docstring -> documentation.

    Positional parameters are inputs, annotated with a role of ``phosphene.roles``; keyword-only
    ones are parameters, annotated for pydantic; the return annotation is a result type.

    title: the name as papers write it ("Grad-CAM"), where it differs from the function's name.
    relations: how results change with the inputs ("Equivariant", "Complete", ...), tested by further calls.
    exempt: conformance checks that do not hold, each with the reason; see ``phosphene.testing.CHECKS``.
    oracle: a test on an input with a closed-form answer; raises AssertionError for another result.
    network: builds the network that a training method trains, from its saved configuration.
    defense: builds the change of the pixels that the method puts before a model, from its parameters.
    quick: parameters that make a test call fast.
    demo: parameters, and inputs, of the example in the gallery.
    defaults: what inputs are read from where nothing is passed, by name, if the roles' defaults do not suit.
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
            inputs=_with_defaults(name, declared.inputs, defaults) if defaults else declared.inputs,
            params=create_model(f"{name}_params", __config__=config, **declared.fields),
            returns=declared.result.__name__,
            references=tuple(references),
            invariants=tuple(invariants),
            relations=tuple(relations),
            exempt=dict(exempt),
            needs=tuple(needs),
            cost=cost,
            tags=tuple(tags),
            batch_independent=batch_independent,
            oracle=oracle,
            quick=dict(quick),
            demo=dict(demo),
        )
        return Method(function, spec, declared.result, network, defense, declared.groups, declared.call)

    return decorate


def _with_defaults(method: str, inputs: Sequence[Input], defaults: Mapping[str, Any]) -> tuple[Input, ...]:
    """The inputs with a method's own defaults. Raises UnknownName for what is no input."""
    names = [i.name for i in inputs]
    for name in defaults:
        if name not in names:
            raise UnknownName("input (used in defaults)", name, names, f"method '{method}'")
    return tuple(i.model_copy(update={"default": defaults.get(i.name)}) for i in inputs)


@dataclass(eq=False, repr=False)
class Method(Generic[P, R]):
    """A technique, called like its function; ``spec`` describes it as data.

    ``network`` builds the untrained network of a training method from the configuration saved with its
    weights; ``defense`` builds the change of the pixels that a defense puts before a model, from its
    parameters; ``groups`` are the parameter groups by the argument that holds them; ``signature`` is the one
    that callers see; ``distribution`` is the installed package that the method comes from.
    """

    function: Callable[P, R]
    spec: MethodSpec
    result: type[R]
    network: Callable[..., nn.Module] | None = None
    defense: Callable[..., Callable[[Tensor], Tensor]] | None = None
    groups: Mapping[str, type[ParameterGroup]] = field(default_factory=dict)
    signature: inspect.Signature | None = None
    distribution: str = "unregistered"

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function)
        self.__signature__ = self.signature
        descriptions = {i.name: ROLES[i.role].description for i in self.spec.inputs}
        descriptions |= {n: describe_parameter(f) for n, f in self.spec.params.model_fields.items()}
        self.__doc__ = with_arguments(inspect.getdoc(self.function) or "", descriptions)
        #: The parameters that name layers, and the one that seeds the method, if it is random.
        roles = {
            n: set(_roles_in(f.metadata, f.annotation)) for n, f in self.spec.params.model_fields.items()
        }
        self.layers = [name for name, marks in roles.items() if "layer" in marks]
        self.seed = next((name for name, marks in roles.items() if "seed" in marks), None)

    def __repr__(self) -> str:
        return f"<method {self.spec.name}: {self.spec.summary}>"

    def __get__(self, instance: object, owner: type | None = None) -> Self:
        """Itself. ``help()`` shows signature and docstring only of objects with a ``__get__``."""
        return self

    def validate(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters checked and completed. Raises InputError, one sentence per bad parameter."""
        fields = self.spec.params.model_fields
        for name in params:
            if name not in fields:
                # The inputs, too: images= is the near miss of image=.
                allowed = [*(i.name for i in self.spec.inputs), *fields]
                raise UnknownName("parameter", name, allowed, self.spec.short_name)
            # pydantic takes True for 1, which hides a parameter that was mistaken for a switch.
            kind = fields[name].annotation
            if holds_bool(params[name]) and admits(kind, int, float) and not admits(kind, bool):
                value = f"{name}={value_repr(params[name])}"
                raise InputError(f"{self.spec.short_name}: {value} should be a number, not true or false")
        try:
            return dict(self.spec.params.model_validate(dict(params)))
        except ValidationError as error:
            faults = (f"{self.spec.short_name}: {text}" for text in fault_texts(error.errors(), params))
            raise InputError("; ".join(faults)) from None

    def defend(self, model: Model, **params: Any) -> Model:
        """The model with this defense before it, which every attack on it differentiates or queries.

        Raises InputError for a method that is no input-transforming defense.
        """
        if self.defense is None:
            raise InputError(f"{self.spec.short_name} is no defense that transforms a model's input")
        complete = self.validate(params)
        name = f"{self.spec.short_name}({','.join(f'{n}={value_text(v)}' for n, v in complete.items())})"
        defended = model.defended(self.defense(**complete), name)
        if model.source is not None:
            defended.source = {**model.source, "uri": f"defended:{name}|{model.source['uri']}"}
        return defended

    def check(
        self, inputs: Mapping[str, Any], params: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and parameters as ``execute`` takes them: checked, complete, on the model's device."""
        complete = self.validate(params)
        checked = self.check_inputs(inputs, complete)
        return checked, self.resolve_layers(complete, checked)

    def check_inputs(self, inputs: Mapping[str, Any], params: Mapping[str, Any] = {}) -> dict[str, Any]:
        """The inputs checked, on the model's device and in its precision."""
        checked: dict[str, Any] = {}
        replaced = self.spec.replaced_inputs(inputs)
        for declared in self.spec.inputs:
            if declared.name in replaced:
                checked[declared.name] = None
                continue
            if declared.name not in inputs and declared.required:
                others = [i.name for i in self.spec.inputs if i.replaces]
                can_be_replaced = declared.name in self.spec.replaced_inputs(dict.fromkeys(others, True))
                instead = f", or {' and '.join(others)} instead" if can_be_replaced else ""
                raise InputError(f"{self.spec.short_name} needs {declared.name} ({declared.role}){instead}")
            self.add_checked(checked, declared, inputs.get(declared.name), params)
        return checked

    def add_checked(
        self, checked: dict[str, Any], declared: Input, value: Any, params: Mapping[str, Any]
    ) -> None:
        """Check an input against those before it and add it to them.

        A model without an input size of its own is replaced by its view at the images' size.
        """
        context, role = InputContext(self._model(checked), checked), ROLES[declared.role]
        absent = value is None and not declared.required and role.optional_is_none
        checked[declared.name] = None if absent else role.check(value, context)
        owner = self.spec.input("model")
        if owner is not None and (model := checked.get(owner.name)) is not None:
            checked[owner.name] = model_for_inputs(self._at_size_parameter(model, params), checked)

    def _at_size_parameter(self, model: Model, params: Mapping[str, Any]) -> Model:
        """A model without an input size of its own, at the ``size`` of the images that the method creates.

        For methods without input images, which would otherwise use the default input size.
        """
        side = params.get("size")
        makes_images = all(i.role in ("model", "target", "start") for i in self.spec.inputs)
        if model.size_known or not makes_images or not isinstance(side, int):
            return model
        return model.at_size((model.input_size[0], side, side))

    def resolve_layers(self, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with layer aliases replaced by the model's layer names. Raises UnknownName.

        Raises InputError for a layer where other inputs replace the model.
        """
        if (model := self._model(inputs)) is None:
            for name in self.layers if self.spec.input("model") else ():
                if params[name] is not None:
                    raise InputError(
                        f"{self.spec.short_name}: {name}={value_repr(params[name])} is a layer of a model, "
                        f"and the features are computed already: leave out {name}"
                    )
            return dict(params)
        return {**params, **{name: _layer_names(params[name], model) for name in self.layers}}

    def _model(self, inputs: Mapping[str, Any]) -> Model | None:
        declared = self.spec.input("model")
        return inputs.get(declared.name) if declared else None

    def _modules(self, inputs: Mapping[str, Any]) -> list[nn.Module]:
        """The networks of all models among the inputs."""
        networks = []
        for declared in self.spec.inputs:
            if declared.role in ("model", "other_model") and inputs[declared.name] is not None:
                networks.append(inputs[declared.name].module)
        return networks

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        names = [i.name for i in self.spec.inputs]
        if len(args) > len(names):
            raise InputError(
                f"{self.spec.short_name} takes {len(names)} inputs ({', '.join(names)}), not {len(args)}; "
                "parameters are passed by name"
            )
        inputs: dict[str, Any] = dict(zip(names, args, strict=False))
        if twice := inputs.keys() & kwargs.keys():
            raise InputError(f"{self.spec.short_name} got {' and '.join(sorted(twice))} twice")
        inputs |= {n: v for n, v in kwargs.items() if n in names}
        # Without inference mode, in which the results could never be differentiated.
        with torch.inference_mode(False), cpu_by_default():
            inputs, params = self.check(inputs, {n: v for n, v in kwargs.items() if n not in names})
        return self.execute(inputs, params)

    def execute(self, inputs: Mapping[str, Any], params: Mapping[str, Any], digest: str | None = None) -> R:
        """Run on inputs and parameters that ``check`` returned; they are not checked again.

        ``digest`` is the model's, where it has been computed already.
        """
        return call_and_restore(self._execute, inputs, dict(params), digest)

    def _execute(self, inputs: Mapping[str, Any], params: dict[str, Any], digest: str | None) -> R:
        with torch.inference_mode(False), cpu_by_default(), claim_checkpoint() as checkpoint:
            model = self._model(inputs)
            if model is not None and "gradients" in self.spec.needs:
                model.require_gradients()
            if self.seed is not None and params[self.seed] is None:
                saved = checkpoint.seed if checkpoint else None
                params[self.seed] = secrets.randbits(31) if saved is None else saved
            if checkpoint and self.seed is not None:
                checkpoint.seed = params[self.seed]
            started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
            on_cuda = any(device.type == "cuda" for device in self._devices(inputs))
            gradients = not {"gradients", "training"}.isdisjoint(self.spec.needs)
            with (
                torch.set_grad_enabled(gradients),
                guard(*self._modules(inputs)),
                deterministic_algorithms(on_cuda),
                self._seeded(params),
                allow_optimized(model, self._passes_to_optimize(inputs, params)) as optimized,
                defer_checks(),
            ):
                if checkpoint:  # what was computed before an interruption is a part of the result
                    optimized.used = checkpoint.optimized()
                    checkpoint.optimized = lambda: optimized.used
                result, size = self._run(model, inputs, params)
                self._check_result(result, model)
                detections = self._detections(model, inputs, result, size)
                if model is not None and digest is None:
                    digest = model.digest
        recorded = self.record_inputs(inputs)
        where = model or (self._tensors(inputs) or [torch.empty(0)])[0]
        shapes = {n: f"tensor {tuple(v.shape)}" if isinstance(v, Tensor) else v for n, v in recorded.items()}
        provenance = Provenance(
            method=self.spec.name,
            distribution=self.distribution,
            params=self.spec.params(**params).model_dump(mode="json"),
            inputs=shapes,
            model={
                "name": model.name,
                "digest": digest,
                "source": model.source,
                "input_size": list(model.input_size),
                "optimized_copy": optimized.used,
            }
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
            detections=detections,
        )
        return dataclasses.replace(result, inputs=recorded, provenance=provenance)

    def _detections(
        self, model: Model | None, inputs: Mapping[str, Any], result: Result, size: int | None
    ) -> dict[str, list[Any]]:
        """What a detector finds in the images of the call, and in the adversarial examples of the result."""
        declared = self.spec.input("images")
        if model is None or model.task != "detection" or declared is None:
            return {}
        versions, changed = {"original": inputs[declared.name]}, getattr(result, "adversarial", None)
        if isinstance(changed, Tensor) and changed.shape == versions["original"].shape:
            versions["adversarial"] = changed
        return detection_table(model, versions, size or 1)

    def _check_result(self, result: Result, model: Model | None) -> None:
        """Raise an error that names the first field with NaN or infinity, and its cause where it is known."""
        for name, value in result.fields():
            if contains_non_finite(value):
                message = f"{self.spec.short_name}: {name} of the result is not finite"
                if model is None:
                    raise NonFiniteResultError(message)
                if (weight := non_finite_weight(model.module)) is not None:
                    message += f": the weight {weight!r} of {model.name} contains NaN or infinity"
                    raise ModelError(message)
                half = "; in half precision values overflow early" if model.dtype.itemsize == 2 else ""
                raise NonFiniteResultError(
                    f"{message}; gradients or features of {model.name} may have overflowed{half}"
                )

    def passes(
        self, inputs: Mapping[str, Any], params: Mapping[str, Any], images: int | None = None
    ) -> tuple[int, int] | None:
        """How many images will pass forward and backward by the declared cost; None if none is declared.

        images: their number, where it is not that of the inputs, which are a batch of a stream.
        """
        if self.spec.cost is None:
            return None
        sizes = {"images": 1, "height": 0, "width": 0, **dict.fromkeys(LENGTHS, 0)}
        counted: dict[str, int] = {}
        for declared in self.spec.inputs:
            if inputs.get(declared.name) is not None:
                for size, value in ROLES[declared.role].cost_sizes(inputs[declared.name]).items():
                    if size == "dataset":  # of two data sets the sum
                        value += counted.get(size, 0)
                    counted[size] = value if size == "dataset" else counted.get(size, value)
        if images is not None:
            counted["images"] = images
        return self.spec.cost.evaluate(params, **sizes | counted, **self.sizes(self._model(inputs), params))

    def _passes_to_optimize(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> int:
        """The number of passes that decides whether the optimized copy of the model is used.

        With features that were computed before it is as then: its features differ in the last digits.
        """
        for value in inputs.values():
            if isinstance(value, Embedding) and value.provenance and value.provenance.model:
                return MIN_PASSES if value.provenance.model.get("optimized_copy") else 0
        return sum(self.passes(inputs, params) or ())

    def sizes(self, model: Model | None, params: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of the model that the declared cost depends on."""
        if model is None or (cost := self.spec.cost) is None or not cost.depends_on(*_MODEL_SIZES):
            return {}
        sizes: dict[str, Any] = {"stages": model.structure.stages} if cost.depends_on("stages") else {}
        if cost.depends_on("attention_layers", "attention_heads"):
            attention = model.attention_layers.values()
            sizes["attention_layers"] = len(attention)
            sizes["attention_heads"] = sum(layer.heads for layer in attention)
        if not cost.depends_on("channels"):
            return sizes
        if (chosen := params.get("channels", "all")) != "all":
            return sizes | {"channels": None if chosen is None else len(chosen)}
        named = next(filter(None, (params[name] for name in self.layers)), None)
        if named is None:
            named = model.stages if "layers" in self.layers else model.last_map
        layers = [named] if isinstance(named, str) else named
        return sizes | {"channels": max(model.map_shape(layer)[0] for layer in layers)}

    def record_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs as a result saves them, without the model: tensors, and JSON for all else."""
        return {i.name: ROLES[i.role].record(inputs[i.name]) for i in self.spec.recorded_inputs(inputs)}

    def image_count(self, inputs: Mapping[str, Any]) -> int | None:
        """How many images a call is for; None where no input determines it."""
        for declared in self.spec.inputs:
            if (count := ROLES[declared.role].image_count(inputs[declared.name])) is not None:
                return count
        return None

    @contextmanager
    def _seeded(self, params: Mapping[str, Any]) -> Iterator[None]:
        """Torch seeded, if the method is random; the caller's random states are restored."""
        if self.seed is None:
            yield
            return
        with random_lock, fork_random_state():
            seed_generators(params[self.seed])
            yield

    def _devices(self, inputs: Mapping[str, Any]) -> set[torch.device]:
        """The devices of the model and of the tensors among the inputs."""
        model = self._model(inputs)
        tensors = [tensor.device for tensor in self._tensors(inputs)]
        return {*tensors, *([] if model is None else [model.device])}

    def _tensors(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among the inputs, the features of embeddings included."""
        values = [value.features if isinstance(value, Embedding) else value for value in inputs.values()]
        return [value for value in values if isinstance(value, Tensor)]

    def _run(
        self, model: Model | None, inputs: Mapping[str, Any], params: Mapping[str, Any]
    ) -> tuple[R, int | None]:
        """The function's result and the batch size; computed in batches where each row is of one image."""
        function: Callable[..., R] = self.function

        def run_function(inputs: Mapping[str, Any]) -> R:
            result = function(**inputs, **gather(params, self.groups))
            if not isinstance(result, self.result):
                raise PluginError(f"{self.spec.name} returned {type_name(result)}, not {self.spec.returns}")
            return result

        size = batch_size(model) if model is not None else None
        count = self.image_count(inputs) or 1
        call: Callable[[Mapping[str, Any]], R] = run_function
        labels = self.spec.input("labels")
        if labels is not None and model is not None and isinstance(inputs[labels.name], Objective):
            if not self._runs_in_batches:
                return call(self._on_objectives(model, labels.name, inputs)), 1
            size, call = 1, self._on_objective(model, labels.name, call)
            if count == 1:
                return call(inputs), size
        if size is None or count <= size or not self._runs_in_batches:
            return call(inputs), size
        results = []
        with claim_checkpoint():  # without a checkpoint: no batch may resume from another's progress
            for start in range(0, count, size):
                rows = range(start, min(start + size, count))
                batch = {i.name: ROLES[i.role].select(inputs[i.name], rows) for i in self.spec.inputs}
                results.append(call(batch))
        return self.result.concatenate(results), size

    def _on_objective(
        self, model: Model, labels: str, call: Callable[[Mapping[str, Any]], R]
    ) -> Callable[[Mapping[str, Any]], R]:
        """``call`` for one image and an objective as its label: the model as a classifier of it, label 1."""
        names = {declared.role: declared.name for declared in self.spec.inputs}

        def call_on_objective(inputs: Mapping[str, Any]) -> R:
            image = inputs[names["images"]]
            view = ObjectiveClassifier.view(model, inputs[labels], image)
            label = torch.ones(1, dtype=torch.long, device=image.device)
            return call({**inputs, names["model"]: view, labels: label})

        return call_on_objective

    def _on_objectives(self, model: Model, labels: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs for several images and an objective as label: a classifier of each, labels 1."""
        names = {declared.role: declared.name for declared in self.spec.inputs}
        images = inputs[names["images"]]
        views = ObjectiveClassifier.of_images(model, inputs[labels], images)
        ones = torch.ones(len(images), dtype=torch.long, device=images.device)
        return {**inputs, names["model"]: views, labels: ones}

    @property
    def _runs_in_batches(self) -> bool:
        """Whether the rows of a result depend on their own images alone, so that batches can be joined."""
        return self.spec.batch_independent and bool(self.result.per_image)


def _roles_in(metadata: Sequence[Any], annotation: Any) -> Iterator[str]:
    """Names of the roles in a parameter's annotation, also inside it: ``list[LayerName] | None``."""
    for mark in metadata:
        if isinstance(mark, Role):
            yield mark.name
    for part in get_args(annotation):
        if get_args(part):
            yield from _roles_in(getattr(part, "__metadata__", ()), part)


def _layer_names(value: Any, model: Model) -> Any:
    """A parameter with layer aliases replaced by the model's layer names."""
    match value:
        case None:
            return None
        case str():
            return model.layer_name(value)
        case Mapping():
            return {model.layer_name(layer): item for layer, item in value.items()}
    return type(value)(map(model.layer_name, value))


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("phosphene", "torch", "torchvision", "timm"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
