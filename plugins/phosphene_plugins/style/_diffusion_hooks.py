"""Diffusion features: record the outputs of a denoiser's layers, and replace them in other passes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from phosphene import ModelError, UnknownName
from phosphene.generative import Denoiser
from phosphene.hooks import Tap

#: predict(x, t): what a denoiser's network predicts of x at a time step t.
Predict: TypeAlias = Callable[[Tensor, int], Tensor]

#: Layer outputs, by time step and layer name.
LayerOutputs: TypeAlias = dict[int, dict[str, Tensor]]


def _layers(denoiser: Denoiser) -> list[tuple[str, nn.Module]]:
    """Layers of the network that predicts noise, by name, without those of a pipeline's autoencoder."""
    return [(name, layer) for name, layer in denoiser.named_modules() if not name.startswith("autoencoder.")]


def self_attention_layers(denoiser: Denoiser) -> list[str]:
    """Names of the self-attention layers: modules with to_q, to_k and to_v that take no text."""
    return [
        name
        for name, layer in _layers(denoiser)
        if all(hasattr(layer, f"to_{projection}") for projection in "qkv")
        and not getattr(layer, "is_cross_attention", False)
    ]


def query_layer(denoiser: Denoiser, attention: str) -> str:
    """Name of the layer whose output is the queries of an attention layer: the normalization, if any."""
    normalized = getattr(denoiser.get_submodule(attention), "norm_q", None) is not None
    return f"{attention}.{'norm_q' if normalized else 'to_q'}"


def residual_blocks(denoiser: Denoiser) -> list[str]:
    """Names of the residual blocks, which diffusers calls ``resnets.N``."""
    return [name for name, _ in _layers(denoiser) if re.search(r"resnets\.\d+$", name)]


def finer_up_blocks(layers: list[str]) -> list[str]:
    """The layers in the finer two thirds of the UNet's up blocks; all layers where none is in an up block."""
    matches = {name: re.search(r"up_blocks\.(\d+)", name) for name in layers}
    blocks = {name: int(match[1]) for name, match in matches.items() if match}
    numbers = sorted(set(blocks.values()))
    finer = numbers[len(numbers) // 3 :]
    return [name for name, block in blocks.items() if block in finer] or layers


def select_layers(available: list[str], requested: list[str] | None, kind: str) -> list[str]:
    """The requested layers; default: the finer up blocks.

    Raises ModelError where the denoiser has no layer of this kind, UnknownName for a layer it does not have.
    """
    if not available:
        raise ModelError(f"this diffusion model has no {kind}")
    for name in requested or ():
        if name not in available:
            raise UnknownName(kind, name, available, "this diffusion model")
    return requested or finer_up_blocks(available)


def record_outputs(denoiser: Denoiser, layers: Iterable[str], outputs: LayerOutputs) -> Predict:
    """predict(x, t) that also stores the layers' outputs in ``outputs``."""
    modules = {name: denoiser.get_submodule(name) for name in layers}

    def predict(x: Tensor, t: int) -> Tensor:
        with Tap(modules) as tap:
            output = denoiser.predict(x, t)
            outputs[t] = {name: tap[name] for name in modules}
        return output

    return predict


def replace_outputs(
    denoiser: Denoiser, replacements: Mapping[str, Callable[[int, Tensor], Tensor]]
) -> Predict:
    """predict(x, t) in which each layer's output is replaced by ``replacements[name](t, output)``."""
    modules: dict[str, nn.Module] = {name: denoiser.get_submodule(name) for name in replacements}

    def predict(x: Tensor, t: int) -> Tensor:
        with Tap(modules, replace={name: (1, partial(f, t)) for name, f in replacements.items()}):
            return denoiser.predict(x, t)

    return predict
