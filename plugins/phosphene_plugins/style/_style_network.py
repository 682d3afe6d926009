"""The network of fast style: convolutions whose instance norms know the styles, and nothing else does."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError
from phosphene.results import TrainedNetwork

#: What a style network is normalised by; "instance" and "batch" know one style.
Norm: TypeAlias = Literal["conditional", "instance", "batch"]


class ConditionalInstanceNorm(nn.Module):
    """IN(x; s) = gamma^(s) (x - mu) / sigma + beta^(s), with mu and sigma of each image and channel.

    ``mix`` (N, S) says how much of each style an image gets: gamma and beta are mixed linearly.
    """

    def __init__(self, styles: int, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(styles, channels))
        self.beta = nn.Parameter(torch.zeros(styles, channels))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        gamma, beta = (mix @ self.gamma)[:, :, None, None], (mix @ self.beta)[:, :, None, None]
        x = F.instance_norm(x)
        # Its time is memory's: in place, but where a gradient wants what was there.
        return (gamma * x if torch.is_grad_enabled() else x.mul_(gamma)).add_(beta)


class BatchNorm(nn.BatchNorm2d):
    """BN(x) = gamma (x - mu) / sigma + beta, with mu and sigma of each channel over a batch of images.

    Trained, it takes running means of those it saw. There is one style, whatever ``mix`` says.
    """

    def forward(self, x: Tensor, mix: Tensor | None = None) -> Tensor:
        return super().forward(x)


class StyledConv(nn.Module):
    """Nearest upsampling, reflection padding, convolution, normalisation."""

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

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.upsample) if self.upsample > 1 else x
        return self.norm(self.conv(F.pad(x, (self.padding,) * 4, mode="reflect")), mix)


class StyleNetwork(nn.Module):
    """Down by four, residual blocks, up by four: pictures (N, 3, H, W) in [0, 1] and mix (N, S) -> pictures.

    On the way up each resolution gets back what it was on the way down, without which a short
    training loses the content's edges. ``norm`` "instance" is "conditional" with one style.
    """

    def __init__(self, styles: int, width: int, blocks: int, norm: Norm = "conditional") -> None:
        super().__init__()
        #: What it was built from.
        self.config: dict[str, Any] = {"styles": styles, "width": width, "blocks": blocks, "norm": norm}
        conv, one, two, four = partial(StyledConv, styles, norm), width, 2 * width, 4 * width
        self.down = nn.ModuleList([conv(3, one, 9), conv(one, two, stride=2), conv(two, four, stride=2)])
        self.residual = nn.ModuleList(
            nn.ModuleDict({"first": conv(four, four), "second": conv(four, four)}) for _ in range(blocks)
        )
        self.up = nn.ModuleList([conv(four, two, upsample=2), conv(two, one, upsample=2)])
        self.paint = conv(one, 3, 9)
        self._begin_with_edges()

    @torch.no_grad()
    def _begin_with_edges(self) -> None:
        """Blocks that add nothing yet and wide filters that look at their centre: both blur otherwise."""
        window = torch.exp(-torch.arange(-4, 5).square() / 2)
        window *= 3 / window.norm()  # the filters' size stays
        for name, parameter in self.named_parameters():
            if name.endswith(("second.norm.gamma", "second.norm.weight")):
                nn.init.zeros_(parameter)
            elif name in ("down.0.conv.weight", "paint.conv.weight"):
                parameter.mul_(window * window[:, None])

    def forward(self, images: Tensor, mix: Tensor) -> Tensor:
        x, finer = images, []
        for layer in self.down:
            x = layer(x, mix).relu_()
            finer.append(x)
        for block in self.residual:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["second"](block["first"](x, mix).relu_(), mix)
        for layer, skipped in zip(self.up, finer[-2::-1], strict=True):
            x = layer(x, mix)[:, :, : skipped.shape[2], : skipped.shape[3]]  # odd sides
            x = (x + skipped).relu_()
        return self.paint(x, mix).sigmoid_()


def new_to(network: StyleNetwork, styles: int) -> StyleNetwork:
    """A network for so many other styles: the same convolutions, frozen, and mean scales and shifts, free."""
    made = StyleNetwork(**network.config | {"styles": styles, "norm": "conditional"})
    known = network.state_dict()
    made.load_state_dict({n: t.mean(0).expand(styles, -1) if _per_style(n) else t for n, t in known.items()})
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(_per_style(name))
    return made


def joined(network: StyleNetwork, other: StyleNetwork) -> StyleNetwork:
    """A frozen network with the styles of one and then those of another that has the same convolutions."""
    styles = network.config["styles"] + other.config["styles"]
    made = StyleNetwork(**network.config | {"styles": styles, "norm": "conditional"})
    known, more = network.state_dict(), other.state_dict()
    rows = {n: torch.cat([t, more[n].to(t)]) if _per_style(n) else t.clone() for n, t in known.items()}
    made.load_state_dict(rows, assign=True)  # in the first one's precision, and where it is
    return made.eval().requires_grad_(False)


def _per_style(name: str) -> bool:
    """Whether the parameters (S, C) of that name have a row for each style."""
    return name.endswith((".norm.gamma", ".norm.beta"))


def paintable(images: Tensor) -> Tensor:
    """The images, or an InputError where the network cannot take them."""
    shape = tuple(images.shape)
    if shape[1] != 3 or min(shape[2:]) < 8:
        raise InputError(f"a style network takes (N, 3, H, W) of 8 pixels a side or more, not {shape}")
    return images


def network_of(stylizer: TrainedNetwork) -> StyleNetwork:
    """Its style network, or an InputError where it has another."""
    if not isinstance(stylizer.network, StyleNetwork):
        raise InputError(f"a style network of fast_style_fit is needed, not one of {stylizer.method}")
    return stylizer.network


def conditional_norm_is_instance_norm() -> None:
    """With one style it is F.instance_norm's affine; between two styles it is linear."""
    random = torch.Generator().manual_seed(0)
    norm = ConditionalInstanceNorm(2, 5).double()
    nn.init.normal_(norm.gamma, generator=random)
    nn.init.normal_(norm.beta, generator=random)
    x = torch.randn(3, 5, 6, 7, dtype=torch.float64, generator=random)
    mixes = torch.tensor([[1, 0], [0, 1], [0.3, 0.7]], dtype=torch.float64)
    one, other, both = (norm(x, mix.expand(3, -1)) for mix in mixes)
    affine = F.instance_norm(x, weight=norm.gamma[0], bias=norm.beta[0])
    assert (one - affine).abs().max() < 1e-12, "one style is not instance norm"
    assert (both - (0.3 * one + 0.7 * other)).abs().max() < 1e-12, "a blend is not linear"
