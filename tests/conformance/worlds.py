"""What the conformance tests run every method on: two models, tiny inputs, and ways to look on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Method, Model, load_model, methods
from phosphene.inputs import ROLES
from phosphene.results import Result

#: From the entry points' metadata alone: a plugin that cannot be loaded fails its tests, it does not vanish.
NAMES = sorted(methods)
SEED = 7
#: What a person would have said instead of the defaults, to keep the runs small.
SMALL = {"images": "builtin:scenes/3", "dataset": "builtin:scenes/24"}


class Awkward(nn.Module):
    """A small classifier with what breaks careless hooks, left in train mode with uneven flags.

    In-place, functional and reused ReLUs, batch norm, a grouped and a dilated convolution, a frozen
    weight, a gradient left over from training and a hook of its owner's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.dropout = nn.Dropout(0.5)
        self.conv3 = nn.Conv2d(12, 16, 3, stride=2, padding=2, dilation=2)
        self.bn3 = nn.BatchNorm2d(16)
        self.conv4 = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(16, 10)
        self.conv2.weight.requires_grad = False
        self.bn1.eval()
        self.classifier.weight.grad = torch.ones_like(self.classifier.weight)
        self.conv3.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.dropout(F.relu(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        x = F.relu_(self.conv4(x))
        return self.classifier(torch.flatten(self.pool(x), 1))


def awkward() -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = Awkward().double()
        for norm in (module.bn1, module.bn3):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.0, 0.3)
    return load_model(module, input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.25] * 3)


def bundled() -> Model:
    return load_model("builtin:shapes-vgg")


WORLDS = {"bundled": bundled, "awkward": awkward}


def inputs_of(method: Method[..., Any], model: Model | None) -> dict[str, Any]:
    """Every input of a method, made as ``phosphene.run`` makes it, with few and small pictures."""
    made: dict[str, Any] = {}
    for declared in method.spec.inputs:
        given = model if declared.role == "model" else SMALL.get(declared.role)
        value = ROLES[declared.role].make(given, model, made)
        if declared.role in ("texture", "styles"):
            value = value[:2, :, :32, :32].contiguous()
        made[declared.name] = value
    return made


def params_of(method: Method[..., Any]) -> dict[str, Any]:
    """The parameters that make a test call fast, seeded where the method draws anything."""
    seeded = {"seed": SEED} if "seed" in method.spec.params.model_fields else {}
    return seeded | method.spec.quick


def quick_run(method: Method[..., Any], inputs: Mapping[str, Any], **more: Any) -> Result:
    result = method(**inputs, **(params_of(method) | more))
    assert isinstance(result, Result)
    return result


@cache
def first_run(name: str, world: str) -> tuple[Model, dict[str, Any], Result]:
    """A model, inputs and what the method made of them; shared by tests that only look."""
    method, model = methods[name], WORLDS[world]()
    inputs = inputs_of(method, model)
    return model, inputs, quick_run(method, inputs)


# --- looking on ------------------------------------------------------------------------------


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a result or an input, networks' weights included, with where it was found."""
    match value:
        case Tensor():
            yield path, value
        case Result():
            for name, field in value.fields():
                yield from tensors_in(field, name)
        case nn.Module():
            for name, tensor in value.state_dict().items():
                yield f"{path}.{name}", tensor
        case Mapping():
            for name, item in value.items():
                yield from tensors_in(item, f"{path}.{name}")
        case tuple() | list():
            for number, item in enumerate(value):
                yield from tensors_in(item, f"{path}[{number}]")


def plain_in(value: Any) -> Any:
    """A result or value without its tensors and networks: what must come out equal by ``==``."""
    match value:
        case Result():
            return {name: plain_in(field) for name, field in value.fields()}
        case Tensor() | nn.Module():
            return "..."
        case Mapping():
            return {name: plain_in(item) for name, item in value.items()}
        case tuple() | list():
            return [plain_in(item) for item in value]
    return value


def assert_same_bits(first: Any, second: Any) -> None:
    """Two results (or inputs) alike to the last bit, their words and numbers included."""
    assert plain_in(first) == plain_in(second)
    pairs = zip(tensors_in(first), tensors_in(second), strict=True)
    for (path, one), (other_path, other) in pairs:
        assert path == other_path
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other.cpu()), f"{path} differs"


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything about a network that a method must leave as it was."""
    hooks = {
        (name, kind): list(getattr(part, kind))
        for name, part in module.named_modules()
        for kind in vars(part)
        if kind.endswith("_hooks")
    }
    named = {n: (p.data_ptr(), p.requires_grad, p.dtype, p.device) for n, p in module.named_parameters()}
    return {
        "weights": {n: t.detach().clone() for n, t in module.state_dict().items()},
        "parameters": named,
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "training": {n: part.training for n, part in module.named_modules()},
        "classes": {n: type(part) for n, part in module.named_modules()},
        "hooks": hooks,
    }


def assert_same_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for what, old in before.items():
        if what in ("weights", "gradients"):
            assert old.keys() == after[what].keys()
            for name, value in old.items():
                assert (value is None) == (after[what][name] is None), f"{what} of {name} changed"
                assert value is None or torch.equal(value, after[what][name]), f"{what} of {name} changed"
        else:
            assert old == after[what], f"{what} changed"


@dataclasses.dataclass
class Traffic:
    """What went through a network: passes begun, and images forward and backward through its first layer."""

    passes: int = 0
    forward: int = 0
    backward: int = 0


@contextmanager
def traffic(module: nn.Module) -> Iterator[Traffic]:
    seen = Traffic()
    first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))

    def begun(*_: Any) -> None:
        seen.passes += 1

    def forward(_: nn.Module, args: Any, output: Tensor) -> None:
        rows = len(output)
        seen.forward += rows

        def backward(_: Tensor) -> None:
            seen.backward += rows

        if output.requires_grad:
            output.register_hook(backward)

    handles = [module.register_forward_pre_hook(begun), first.register_forward_hook(forward)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fused(module: nn.Module, calls: int, error: BaseException) -> Iterator[None]:
    """Inside, the first convolution raises ``error`` at its ``calls``-th call."""
    first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    left = calls

    def burn(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error

    handle = first.register_forward_hook(burn)
    try:
        yield
    finally:
        handle.remove()
