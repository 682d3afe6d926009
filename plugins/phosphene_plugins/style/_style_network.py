"""The network of fast style transfer: convolutions and conditional instance normalization."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError
from phosphene.results import TrainedNetwork

#: Normalization layers of a style network; "instance" and "batch" have one style.
Norm: TypeAlias = Literal["conditional", "instance", "batch"]


class ConditionalInstanceNorm(nn.Module):
    """Conditional instance normalization: gamma^(s) (x - mu) / sigma + beta^(s), of each image and channel.

    ``blend_weights`` (N, S) are the weights of the styles for each image: gamma and beta are mixed linearly.

    Source: Dumoulin et al. 2017, equation 5.
    """

    def __init__(self, styles: int, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(styles, channels))
        self.beta = nn.Parameter(torch.zeros(styles, channels))

    def forward(self, x: Tensor, blend_weights: Tensor) -> Tensor:
        gamma, beta = ((blend_weights @ p)[:, :, None, None] for p in (self.gamma, self.beta))
        x = F.instance_norm(x)
        # Memory bandwidth limits this layer: in place, except where the backward pass needs the old values.
        return (gamma * x if torch.is_grad_enabled() else x.mul_(gamma)).add_(beta)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization, which has one style: ``blend_weights`` are ignored."""

    def forward(self, x: Tensor, blend_weights: Tensor | None = None) -> Tensor:
        return super().forward(x)


class StyledConv(nn.Module):
    """Nearest upsampling, reflection padding, convolution, normalization."""

    def __init__(
        self,
        styles: int,
        norm: Norm,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        upsample: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
        self.norm = BatchNorm(outputs) if norm == "batch" else ConditionalInstanceNorm(styles, outputs)
        self.upsample, self.padding = upsample, kernel // 2

    def forward(self, x: Tensor, blend_weights: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.upsample) if self.upsample > 1 else x
        return self.norm(self.conv(F.pad(x, (self.padding,) * 4, mode="reflect")), blend_weights)


class StyleNetwork(nn.Module):
    """Image transformation network: images (N, 3, H, W) in [0, 1], blend weights (N, S) -> stylized images.

    Downsampling by four, residual blocks, upsampling by four. The downsampling path's features are added to
    the upsampling path's at each resolution: without these skip connections a short training loses the
    content's edges. ``norm`` "instance" is "conditional" with one style.

    Source: Johnson et al. 2016, section 3.1, with the normalization of Dumoulin et al. 2017.
    """

    # Saved weights depend on the names down, residual, up and paint.
    def __init__(self, styles: int, width: int, blocks: int, norm: Norm = "conditional") -> None:
        super().__init__()
        #: The constructor's arguments, saved with the weights.
        self.config: dict[str, Any] = {"styles": styles, "width": width, "blocks": blocks, "norm": norm}
        conv = partial(StyledConv, styles, norm)
        full, half, quarter = width, 2 * width, 4 * width  # channels at each resolution
        self.down = nn.ModuleList(
            [conv(3, full, 9), conv(full, half, stride=2), conv(half, quarter, stride=2)]
        )
        self.residual = nn.ModuleList(
            nn.ModuleDict({"first": conv(quarter, quarter), "second": conv(quarter, quarter)})
            for _ in range(blocks)
        )
        self.up = nn.ModuleList([conv(quarter, half, upsample=2), conv(half, full, upsample=2)])
        self.paint = conv(full, 3, 9)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Zero residual blocks and 9 x 9 filters weighted towards their center: both would blur otherwise."""
        window = torch.exp(-torch.arange(-4, 5).square() / 2)
        window *= 3 / window.norm()  # preserves the variance of the filters
        for name, parameter in self.named_parameters():
            if name.endswith(("second.norm.gamma", "second.norm.weight")):
                nn.init.zeros_(parameter)
            elif name in ("down.0.conv.weight", "paint.conv.weight"):
                parameter.mul_(window * window[:, None])

    def forward(self, images: Tensor, blend_weights: Tensor) -> Tensor:
        x, skips = images, []
        for layer in self.down:
            x = layer(x, blend_weights).relu_()
            skips.append(x)
        for block in self.residual:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["second"](block["first"](x, blend_weights).relu_(), blend_weights)
        for layer, skip in zip(self.up, skips[-2::-1], strict=True):
            x = _crop(layer(x, blend_weights), skip.shape[2], skip.shape[3])  # for odd sides
            x = (x + skip).relu_()
        return self.paint(x, blend_weights).sigmoid_()


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left (height, width) of feature maps (N, C, H, W)."""
    if torch.compiler.is_exporting():  # a view would be exported for the sizes that need no cropping only
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[:, :, :height, :width]


def network_for_new_styles(network: StyleNetwork, styles: int) -> StyleNetwork:
    """A network for other styles: the same convolutions, frozen, and trainable gamma and beta.

    These start at the mean of the network's gamma and beta over its styles.
    """
    new = StyleNetwork(**network.config | {"styles": styles, "norm": "conditional"})
    old_state = network.state_dict()
    new.load_state_dict(
        {n: t.mean(0).expand(styles, -1) if _is_per_style(n) else t for n, t in old_state.items()}
    )
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(_is_per_style(name))
    return new


def concatenate_styles(network: StyleNetwork, other: StyleNetwork) -> StyleNetwork:
    """A frozen network with the styles of two networks that have the same convolutions, in order."""
    styles = network.config["styles"] + other.config["styles"]
    both = StyleNetwork(**network.config | {"styles": styles, "norm": "conditional"})
    first, second = network.state_dict(), other.state_dict()
    state = {n: torch.cat([t, second[n].to(t)]) if _is_per_style(n) else t.clone() for n, t in first.items()}
    both.load_state_dict(state, assign=True)  # assign: with the first network's dtype and device
    return both.eval().requires_grad_(False)


def _is_per_style(name: str) -> bool:
    """Whether a parameter (S, C) of this name has a row for each style."""
    return name.endswith((".norm.gamma", ".norm.beta"))


def check_images(images: Tensor) -> Tensor:
    """Return the images. Raises InputError for a shape that a style network does not accept."""
    shape = tuple(images.shape)
    if shape[1] != 3 or min(shape[2:]) < 8:
        raise InputError(f"a style network takes (N, 3, H, W) of 8 pixels a side or more, not {shape}")
    return images


def require_style_network(stylizer: TrainedNetwork) -> StyleNetwork:
    """The stylizer's network. Raises InputError where it is not a ``StyleNetwork``."""
    if not isinstance(stylizer.network, StyleNetwork):
        raise InputError(f"a style network of fast_style_fit is needed, not one of {stylizer.method}")
    return stylizer.network
