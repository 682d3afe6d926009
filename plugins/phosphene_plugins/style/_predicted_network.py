"""The network of ``predicted_style_fit``: a predictor of normalizations, and a style network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from phosphene import InputError
from phosphene.results import Panel, TrainedNetwork

from ._style_network import StyleNetwork


class StylePredictor(nn.Module):
    """Style images (S, 3, H, W) in [0, 1] of any size -> ``outputs`` numbers (S, outputs).

    Convolutions with stride two; means and standard deviations over the positions of the pixels and of every
    layer; two linear layers. The last one is zero at first, so that all styles start equal.
    """

    # Saved weights depend on the names down, encode and predict.
    def __init__(self, width: int, bottleneck: int, outputs: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2) for a, b in pairwise(widths))
        self.encode = nn.Linear(2 * sum(widths), bottleneck)
        self.predict = nn.Linear(bottleneck, outputs)
        nn.init.zeros_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)

    def forward(self, styles: Tensor) -> Tensor:
        x = styles - 0.5
        statistics = [_mean_and_deviation(x)]
        for layer in self.down:
            x = layer(F.pad(x, (1,) * 4, mode="replicate")).relu()
            statistics.append(_mean_and_deviation(x))
        return self.predict(self.encode(torch.cat(statistics, 1)).relu())


def _mean_and_deviation(maps: Tensor) -> Tensor:
    """Mean and standard deviation over the positions of maps (S, C, h, w): (S, 2 C)."""
    flat = maps.flatten(2)
    deviation = (flat.var(2, correction=0) + 1e-5).sqrt()
    return torch.cat([flat.mean(2), deviation], 1)


class PredictedStyleNetwork(nn.Module):
    """Style images s and images x -> T(x; gamma(s), beta(s)), by a ``StylePredictor`` and a ``StyleNetwork``.

    The predictor returns the difference of each gamma and beta from those of the style network, which are
    trained as well.

    Source: Ghiasi et al. 2017, sections 2.1 and 2.2, with other statistics than those of Inception-v3.
    """

    # Saved weights depend on the names transfer and predictor.
    def __init__(self, width: int, blocks: int, predictor_width: int, bottleneck: int) -> None:
        super().__init__()
        #: The constructor's arguments, saved with the weights.
        self.config: dict[str, Any] = {
            "width": width, "blocks": blocks, "predictor_width": predictor_width, "bottleneck": bottleneck,
        }  # fmt: skip
        self.transfer = StyleNetwork(1, width, blocks)
        parameters = self.transfer.named_parameters()
        #: Names and sizes of the transfer network's gamma and beta.
        self.normalization = {
            name: parameter.shape[1]
            for name, parameter in parameters
            if name.endswith((".norm.gamma", ".norm.beta"))
        }
        self.predictor = StylePredictor(predictor_width, bottleneck, sum(self.normalization.values()))

    def predict(self, styles: Tensor) -> Tensor:
        """All gamma and beta (S, P) of styles (S, 3, H, W)."""
        own = self.transfer.state_dict(keep_vars=True)
        return torch.cat([own[name] for name in self.normalization], 1) + self.predictor(styles)

    def stylize(self, images: Tensor, parameters: Tensor) -> Tensor:
        """T(x; gamma, beta) of images (N, 3, H, W), each with its own gamma and beta (N, P)."""
        parts = parameters.split(list(self.normalization.values()), 1)
        # Not len(images), which an exported program would fix.
        one_each = torch.eye(images.shape[0], device=images.device, dtype=images.dtype)
        replaced = dict(zip(self.normalization, parts, strict=True))
        stylized: Tensor = functional_call(self.transfer, replaced, (images, one_each))
        return stylized

    def forward(self, images: Tensor, style: Tensor) -> Tensor:
        """Images (N, 3, H, W), each in the style of an image of ``style`` (N, 3, H', W')."""
        return self.stylize(images, self.predict(style))


@dataclass(frozen=True, eq=False, kw_only=True)
class PredictedStyle(TrainedNetwork):
    """The result of ``predicted_style_fit``: ``network`` is a style predictor and a style network.

    ``contents`` (P, C, H, W) and ``styles`` (P, C, h, w) are the images and the styles of the previews; None
    in results of earlier versions.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        **TrainedNetwork.shapes,
        "contents": "P C H W",
        "styles": "P C h w",
    }

    groups_per_row: ClassVar[int] = 2

    contents: Tensor | None = None
    styles: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        """Each content, its style and the preview."""
        if self.contents is None or self.styles is None:
            return super().panels()
        rows = zip(self.contents, self.styles, self.previews, self.labels, strict=True)
        return [
            [Panel(content), Panel(style, "style"), Panel(preview, label, is_output=True)]
            for content, style, preview, label in rows
        ]

    def export_network(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """A network from ``images`` (N, 3, H, W) and a ``style`` (N, 3, H', W') each to stylized images."""
        generator = torch.Generator().manual_seed(0)
        weight = next(self.network.parameters())
        sizes = {"images": (64, 96), "style": (56, 80)}
        return self.network, {
            name: torch.rand(2, 3, *sides, generator=generator).to(weight) for name, sides in sizes.items()
        }


def require_predicted_style(stylizer: TrainedNetwork) -> PredictedStyleNetwork:
    """The stylizer's network. Raises InputError where it is not a ``PredictedStyleNetwork``."""
    if not isinstance(stylizer.network, PredictedStyleNetwork):
        raise InputError(
            f"predicted_style applies a network of predicted_style_fit, not one of {stylizer.method}"
        )
    return stylizer.network
