"""What a diffusion model's layers give for one picture, kept and put into its passes on another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor, nn

from phosphene import ModelError, UnknownName
from phosphene.generative import Denoiser
from phosphene.hooks import Tap

#: The noise in x at a time t.
Eps = Callable[[Tensor, int], Tensor]


#: What layers gave, by time and name.
Memory = dict[int, dict[str, Tensor]]


def attention_layers(denoiser: Denoiser) -> list[str]:
    """The layers in which every place looks at every other: with to_q, to_k and to_v, and no text."""
    return [
        name
        for name, layer in denoiser.named_modules()
        if all(hasattr(layer, f"to_{part}") for part in "qkv")
        and not getattr(layer, "is_cross_attention", False)
    ]


def residual_blocks(denoiser: Denoiser) -> list[str]:
    """The residual blocks, as diffusers names them."""
    return [name for name, _ in denoiser.named_modules() if re.search(r"resnets\.\d+$", name)]


def finer(layers: list[str]) -> list[str]:
    """Those on the way up, without its coarsest third; all, where nothing is named as a way up."""
    stages = {name: int(found[1]) for name in layers if (found := re.search(r"up_blocks\.(\d+)", name))}
    numbers = sorted(set(stages.values()))
    kept = numbers[len(numbers) // 3 :]
    return [name for name, number in stages.items() if number in kept] or layers


def chosen(denoiser: Denoiser, known: list[str], asked: list[str] | None, what: str) -> list[str]:
    """The layers asked for, else the finer ones; ModelError where the denoiser has none of the kind."""
    if not known:
        raise ModelError(f"this diffusion model has no {what}")
    for name in asked or ():
        if name not in known:
            raise UnknownName(what, name, known, "this diffusion model")
    return asked or finer(known)


def watched(denoiser: Denoiser, layers: Iterable[str], memory: Memory) -> Eps:
    """eps(x, t) that keeps what the layers give."""
    modules = {name: denoiser.get_submodule(name) for name in layers}

    def eps(x: Tensor, t: int) -> Tensor:
        with Tap(modules) as tap:
            noise = denoiser.eps(x, t)
            memory[t] = {name: tap[name] for name in modules}
        return noise

    return eps


def injected(denoiser: Denoiser, changes: Mapping[str, Callable[[int, Tensor], Tensor]]) -> Eps:
    """eps(x, t) with what each layer gives changed: by a function of the time and of the layer's output."""
    modules: dict[str, nn.Module] = {name: denoiser.get_submodule(name) for name in changes}

    def eps(x: Tensor, t: int) -> Tensor:
        with Tap(modules, replace={name: (1, partial(change, t)) for name, change in changes.items()}):
            return denoiser.eps(x, t)

    return eps
