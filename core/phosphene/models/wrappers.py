"""Wrapped networks: their inner module, and why a network cannot be called or differentiated as it is."""

from __future__ import annotations

import inspect

import torch
from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Hooks do not reach into compiled code, and copies on several devices would call every hook several times.
    """
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def is_exported(module: nn.Module) -> bool:
    """Whether it is the module of an exported program (or of torch.fx): one graph of operators."""
    return isinstance(module, torch.fx.GraphModule)


def reason_for_type_error(module: nn.Module) -> str | None:
    """Why a network cannot be called with images alone, if its forward takes other arguments, or none."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)
    ]
    accepts_one = any(p.kind in (*positional, inspect.Parameter.VAR_POSITIONAL) for p in parameters)
    if len(required) > 1:
        others = ", ".join(map(repr, required[1:]))
        return (
            f"is called with images alone, but its forward also needs {others}; pass a module that calls it "
            "with them: class Wrapper(nn.Module), whose forward(self, images) returns "
            f"self.network(images, {', '.join(required[1:])})"
        )
    if not accepts_one:
        return (
            "is called with images, but its forward takes no positional argument; pass a module whose "
            "forward(self, images) calls it"
        )
    return None


def reason_without_gradient(module: nn.Module) -> str | None:
    """Why no gradient flows through a network, where its layers show it."""
    for name, part in module.named_modules():
        if ".quantized" in type(part).__module__ or type(part).__name__.startswith("Quantized"):
            return (
                f"its layer {name!r} is quantized ({type(part).__name__}), which has no gradient; load the "
                "network as it was before it was quantized"
            )
    return None


#: Methods that evaluate the network without its gradient, as messages name them.
WITHOUT_GRADIENTS = "occlusion, rise, and the attacks square and hop_skip_jump need none"
