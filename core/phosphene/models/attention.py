"""``attention_maps``: the attention probabilities of a model's transformer blocks."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from ..errors import ModelError, UnknownName
from ..hooks import RecordAttention
from .model import Model


@overload
def attention_maps(model: Model, images: Tensor, layer: None = None) -> dict[str, Tensor]: ...
@overload
def attention_maps(model: Model, images: Tensor, layer: str) -> Tensor: ...


def attention_maps(model: Model, images: Tensor, layer: str | None = None) -> Tensor | dict[str, Tensor]:
    """Attention probabilities softmax(Q K^T / sqrt(d)) of images, in one forward pass.

    They are on the graph, so that they have gradients with respect to images that require them. Fused and
    unfused attention and ``torch.nn.MultiheadAttention`` are read in the same way. ``images`` (N, C, H, W)
    in [0, 1]; ``layer`` is the name of a module that computes attention.

    Returns:
        (N, heads, T, T): row i is the distribution over the tokens that token i attends to. Without a
        ``layer`` a dictionary of them by layer, in the order they run; layers with attention inside windows,
        which is no map per image, are left out.

    Raises:
        ModelError: the model computes no attention, or the layer's is inside windows.
        UnknownName: the layer computes no attention.

    Example::
        from phosphene import attention_maps, load_model, read_images

        model = load_model("timm:vit_tiny_patch16_224", pretrained=False)
        maps = attention_maps(model, read_images("builtin:scenes/2", model))
        maps["blocks.0.attn"].shape  # (2, 3, 197, 197)

    Source:
        Vaswani et al. 2017, section 3.2.1.
    """
    with model.guard(), RecordAttention(model.layers) as recording:
        # Not model(images), which may run an optimized copy with modules of its own.
        model._run(images)
    maps = recording.maps
    if not maps:
        raise ModelError(f"{model.name} computes no attention")
    if layer is None:
        return {name: values for name, values in maps.items() if len(values) == len(images)}
    if layer not in maps:
        raise UnknownName("attention layer", layer, maps, model.name)
    if len(maps[layer]) != len(images):
        raise ModelError(
            f"{layer} of {model.name} computes attention inside windows, so it has no map per image"
        )
    return maps[layer]
