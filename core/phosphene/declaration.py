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
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, get_args

import torch
from pydantic import ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo
from torch import Tensor

from .batching import batch_size
from .errors import InputError, PluginError, UnknownName
from .inputs import ROLES
from .results import Provenance, Result
from .spec import Cost, Input, Invariant, LayerMark, MethodSpec, Need, Reference, Role, SeedMark
from .targets import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from .models import Model

#: Torch's own generator is one for all threads, so seeded calls take turns.
_seeding = threading.RLock()

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
    quick: Mapping[str, Any] | None = None,
    demo: Mapping[str, Any] | None = None,
) -> Callable[[Callable[P, R]], Method[P, R]]:
    """Make a ``Method`` of a typed function: its signature is its schema, its docstring its documentation.

    Positional parameters are inputs, annotated with a role of ``phosphene.types``; keyword-only
    ones are parameters, annotated for pydantic; the return annotation is a result type.

    title: the name as papers write it ("Grad-CAM"), where it is not the function's in words.
    oracle: a function that raises AssertionError unless the method gives the known right answer.
    network: builds the network that a training method trains, from its saved configuration.
    quick, demo: parameters that make a test call fast, or the gallery's picture telling.
    """

    def decorate(function: Callable[P, R]) -> Method[P, R]:
        name = function.__name__
        inputs, fields, result = _read_signature(function)
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
            inputs=inputs,
            params=create_model(f"{name}_params", __config__=config, **fields),
            returns=result.__name__,
            references=tuple(references),
            invariants=tuple(invariants),
            needs=tuple(needs),
            cost=cost,
            tags=tuple(tags),
            batch_independent=batch_independent,
            oracle=oracle,
            quick=dict(quick or {}),
            demo=dict(demo or {}),
        )
        return Method(function, spec, result, network)

    return decorate


#: What ``run`` itself takes beside a method's inputs and parameters.
_RUN_WORDS = {"name", "out", "device", "batch_size", "progress", "executor"}


def _read_signature(
    function: Callable[..., Any],
) -> tuple[tuple[Input, ...], dict[str, Any], type[Any]]:
    # Not get_type_hints: it would resolve the forward references inside the roles as well.
    signature = inspect.signature(function, eval_str=True)
    inputs: list[Input] = []
    fields: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name in _RUN_WORDS:
            raise TypeError(f"{function.__name__}: {name!r} means something to run(); choose another name")
        annotation = parameter.annotation
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (annotation, default)
            continue
        roles = [a for a in get_args(annotation) if isinstance(a, Role)]
        if not roles:
            raise TypeError(f"{function.__name__}: input {name!r} needs a role (phosphene.types.Images, ...)")
        if roles[0].name not in ROLES:
            raise UnknownName("input role", roles[0].name, ROLES)
        inputs.append(
            Input(name=name, role=roles[0].name, required=parameter.default is inspect.Parameter.empty)
        )
    result = signature.return_annotation
    if not (isinstance(result, type) and issubclass(result, Result)):
        raise TypeError(f"{function.__name__} must say which result type it returns, not {result!r}")
    return tuple(inputs), fields, result


def _marked(field: FieldInfo, mark: type) -> bool:
    """Whether a mark stands in a parameter's annotation, also inside ``X | None`` and ``list[X]``."""

    def within(annotation: Any) -> bool:
        return isinstance(annotation, mark) or any(map(within, get_args(annotation)))

    return any(isinstance(m, mark) for m in field.metadata) or within(field.annotation)


class Method(Generic[P, R]):
    """A technique: call it like the function it was made of; ``.spec`` says everything about it."""

    def __init__(
        self,
        function: Callable[P, R],
        spec: MethodSpec,
        result: type[R],
        network: Callable[..., nn.Module] | None,
    ) -> None:
        self.spec = spec
        self.result = result
        #: Builds the untrained network of a training method from the configuration saved with its weights.
        self.network = network
        #: Who brings it: distribution and version, set by the registry.
        self.distribution = "unregistered"
        self._function = function
        fields = spec.params.model_fields
        self._layers = [name for name, field in fields.items() if _marked(field, LayerMark)]
        #: The parameter that seeds it, where it draws anything.
        self.seed = next((name for name, field in fields.items() if _marked(field, SeedMark)), None)
        functools.update_wrapper(self, function)

    def __repr__(self) -> str:
        return f"<method {self.spec.name}>"

    def validate(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters checked and completed; InputError in one sentence each."""
        for name in params:
            if name not in self.spec.params.model_fields:
                raise UnknownName("parameter", name, self.spec.params.model_fields, self.spec.short_name)
        try:
            checked = self.spec.params.model_validate(dict(params))
        except ValidationError as error:
            raise InputError(_sentences(self.spec.short_name, error)) from None
        return {name: getattr(checked, name) for name in self.spec.params.model_fields}

    def check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs checked and brought to the model's device and precision."""
        checked: dict[str, Any] = {}
        model: Model | None = None
        for declared in self.spec.inputs:
            if declared.name not in inputs and declared.required:
                raise InputError(f"{self.spec.short_name} needs {declared.name} ({declared.role})")
            value = inputs.get(declared.name)
            checked[declared.name] = ROLES[declared.role].check(value, model, checked)
            if declared.role == "model":
                model = checked[declared.name]
        return checked

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
        inputs.update({n: v for n, v in kwargs.items() if n in names})
        params = self.validate({n: v for n, v in kwargs.items() if n not in names})
        # What is made in inference mode can never be differentiated again, and users may want to.
        with torch.inference_mode(False):
            checked = self.check_inputs(inputs)
            model = next((checked[i.name] for i in self.spec.inputs if i.role == "model"), None)
            self._resolve_layers(params, model)
            if self.seed is not None and params[self.seed] is None:
                params[self.seed] = secrets.randbits(31)
            started = datetime.datetime.now(datetime.UTC)
            clock = time.perf_counter()
            with self._room(model, params):
                result, size = self._run(model, checked, params)
        # The tensors as they are, and of everything else how it is written.
        kept = {
            i.name: checked[i.name] if isinstance(checked[i.name], Tensor) else _written(checked[i.name])
            for i in self.spec.inputs
            if i.role != "model"
        }
        provenance = Provenance(
            method=self.spec.name,
            distribution=self.distribution,
            params=self.spec.params(**params).model_dump(mode="json"),
            inputs={n: f"tensor {tuple(v.shape)}" if isinstance(v, Tensor) else v for n, v in kept.items()},
            model=model and {"name": model.name, "digest": model.digest, "source": model.source},
            seed=params[self.seed] if self.seed is not None else None,
            versions=_versions(),
            device=str(model.device) if model is not None else "cpu",
            dtype=str(model.dtype).removeprefix("torch.") if model is not None else "float32",
            batch_size=size,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 4),
        )
        return dataclasses.replace(result, inputs=kept, provenance=provenance)

    def _resolve_layers(self, params: dict[str, Any], model: Model | None) -> None:
        for name in self._layers:
            value = params[name]
            if model is None or value is None:
                continue
            if isinstance(value, str):
                params[name] = model.layer_name(value)
            elif isinstance(value, Mapping):
                params[name] = {model.layer_name(k): v for k, v in value.items()}
            else:
                params[name] = type(value)(model.layer_name(v) for v in value)

    @contextmanager
    def _room(self, model: Model | None, params: Mapping[str, Any]) -> Iterator[None]:
        """Model guarded, gradients on or off, randomness seeded and the caller's left alone."""
        with ExitStack() as stack:
            gradients = bool({"gradients", "training"} & set(self.spec.needs))
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
        function: Callable[..., R] = self._function

        def call(inputs: dict[str, Any]) -> R:
            result = function(**inputs, **params)
            if not isinstance(result, self.result):
                raise PluginError(f"{self.spec.name} gave a {type(result).__name__}, not {self.spec.returns}")
            return result

        size = batch_size(model) if model is not None else None
        count = len(images) if isinstance(images := inputs.get("images"), Tensor) else 0
        if size is None or count <= size or not (self.spec.batch_independent and self.result.per_image):
            return call(inputs), size
        results = []
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            results.append(call({i.name: _select(inputs[i.name], i.role, rows) for i in self.spec.inputs}))
        return self.result.concatenate(results), size


def _sentences(name: str, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "missing":
            lines.append(f"{name} needs the parameter {where!r}")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.append(f"{name}: {where}={item['input']!r} {message[0].lower()}{message[1:]}")
    return "; ".join(lines)


def _select(value: Any, role: str, rows: range) -> Any:
    if role in ("images", "labels") and isinstance(value, Tensor):
        return value[rows.start : rows.stop]
    return value.select(rows) if role == "target" else value


def _written(value: Any) -> Any:
    """An input as a person would write it."""
    if isinstance(value, Objective):
        return value.written()
    uri = getattr(value, "uri", None)
    return uri if uri is not None else f"a {type(value).__name__} given as an object"


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("phosphene", "torch", "torchvision", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # timm and torchvision are optional to a bare module
            continue
    return found
