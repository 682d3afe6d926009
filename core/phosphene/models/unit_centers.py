"""The pixels at which the units of a layer's map are centered, computed by a pass of coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..errors import UnknownName
from ..hooks.attention import windows_first
from ..hooks.tap import StopForward, Tap
from ..images.color import Centers
from . import Model
from .coordinate_pass import (
    Positions,
    coordinate_images,
    copy_on_cpu,
    query_positions,
    unwrap_positions,
    wrap_positions,
)


def unit_centers(model: Model, layer: str, size: Sequence[int]) -> Centers | None:
    """Centers of a layer's units in images of ``size`` (H, W): the y of its rows and the x of its columns.

    In pixels, 0 for the center of the first pixel. The center of a unit is that of its receptive field, as if
    the image extended beyond its borders by the network's own padding: row i of a stack of stride-2
    convolutions with padding 1 is centered at i times the total stride, token i of a grid of patches at
    (i + 1/2) * patch - 1/2. Windows that ceil mode lets extend beyond the padding are centered at what they
    cover. Of branches with different centers it is the mean. Attention, global pooling and gates computed
    from it do not move a unit: what depends on the entire image has no position.

    Returns None where the network's functions do not reveal the positions, as a Fourier transform. Raises
    UnknownName for a layer that does not exist and ModelError for one without a map.

    Example::
        from phosphene import load_model, unit_centers

        y, x = unit_centers(load_model("torchvision:resnet18"), "layer4", (224, 224))
        y  # (0.0, 32.0, 64.0, ..., 192.0); cells that share the image: 15.5, 47.5, ..., 207.5
    """
    name = model.layer_name(layer)
    shape = (model.input_size[0], int(size[0]), int(size[1]))
    computed = model._cache.centers
    if (name, shape) not in computed:
        computed[name, shape] = _centers(model, name, shape)
    return computed[name, shape]


def attention_centers(model: Model, layer: str, size: Sequence[int]) -> Tensor | None:
    """The pixels (y, x) at which the tokens of a layer's attention are centered, (windows, tokens, 2).

    For images of ``size`` (H, W), in double precision on the CPU; NaN for class and register tokens and for
    the padding of windows. ``layer`` is one of ``model.attention_layers``. None where the network's functions
    do not reveal the positions. Raises UnknownName for a layer without attention.

    Example::
        from phosphene import attention_centers, load_model

        model = load_model("timm:swin_tiny_patch4_window7_224", pretrained=False)
        attention_centers(model, "layers.0.blocks.0.attn", (224, 224)).shape  # (64, 49, 2)
    """
    model = model.at_size((model.input_size[0], int(size[0]), int(size[1])))
    attention = model.attention_layers
    if layer not in attention:
        raise UnknownName("attention layer", layer, attention, model.name)
    windows, queries = attention[layer].windows, attention[layer].queries
    axes = []
    for positions in query_positions(model.module, model.input_size):
        values = positions.get(layer)
        if values is None:
            return None
        if values.ndim == 4:
            values = windows_first(values, model._cache.window_axes[layer])[0]
        axes.append(values)
    if not axes:
        return None
    # The heads of a token have the same position.
    centers = torch.stack([axis.nanmean(1) for axis in axes], -1)
    return centers if centers.shape == (windows, queries, 2) and not centers.isnan().all() else None


def _centers(model: Model, layer: str, shape: tuple[int, int, int]) -> Centers | None:
    images, axes = coordinate_images(shape), []
    with torch.inference_mode(False), torch.no_grad():
        for axis, output in enumerate(_outputs(model, layer, images)):
            side, maps = shape[1 + axis], model.maps(output, images[axis], layer)
            if not isinstance(maps, Positions):
                break
            centers = unwrap_positions(maps).nanmean((0, 1, 3 - axis))
            if len(centers) == 1:  # one unit for all pixels of this axis
                centers = centers.new_full((1,), (side - 1) / 2)
            # A network that reverses or mixes the order of its units is not followed.
            if not (centers.isfinite().all() and (centers.diff() >= 0).all()):
                break
            axes.append(tuple(centers.tolist()))
    return (axes[0], axes[1]) if len(axes) == 2 else None


def _outputs(model: Model, layer: str, images: list[Tensor]) -> list[Tensor]:
    """The output of a layer in a pass of each image of coordinates; none where a pass fails."""
    calls = model.for_images(images[0]).structure.layers[layer].calls
    outputs = []
    try:
        network = copy_on_cpu(model.module)
        for image in images:
            with Tap({layer: network.get_submodule(layer)}, stop_after={layer: calls}) as tap:
                with suppress(StopForward):
                    network(wrap_positions(image))
                outputs.append(tap[layer])
    except Exception:  # foreign code may raise anything for tensors whose values it does not expect
        return []
    return outputs
