"""Layouts: how a layer's output is read as maps (channels first, channels last, tokens on the patch grid)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

#: Rows and columns of the blocks of the image that are changed one at a time.
BLOCKS = 3

#: Modules whose outputs of four axes torch defines as (N, C, h, w).
_CHANNELS_FIRST = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm,
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Dropout2d,
    nn.LocalResponseNorm, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip

Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The axes of a layer's output, and of tokens their grid.

    axes: "NChw", "NhwC", "NTC" (tokens) or "NCT" (tokens on the last axis).
    grid: (h, w) of tokens at the image size at which it was recorded; else (0, 0).
    before, after: number of tokens without a position (class and register tokens) before and after the
        patch tokens.
    """

    axes: Literal["NChw", "NhwC", "NTC", "NCT"]
    grid: Grid = (0, 0)
    before: int = 0
    after: int = 0

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in the layer's output."""
        return 1 if self.axes in ("NChw", "NCT") else len(self.axes) - 1

    def fits(self, features: Tensor) -> bool:
        """Whether features have these axes; of tokens also their number, which fixes the grid."""
        if features.ndim != len(self.axes):
            return False
        tokens = self.before + self.grid[0] * self.grid[1] + self.after
        return features.ndim == 4 or features.shape[self.axes.index("T")] == tokens

    def maps(self, features: Tensor) -> Tensor:
        """(N, C, h, w), a view of the features."""
        if self.axes == "NChw":
            return features
        if self.axes == "NhwC":
            return features.permute(0, 3, 1, 2)
        tokens = features if self.axes == "NCT" else features.transpose(1, 2)
        return tokens[:, :, self.before : tokens.shape[2] - self.after].unflatten(2, self.grid)


# --- layouts from the responses to changes of the image -------------------------------------------------


class Responses:
    """How strongly each position of tensors responds to a change of each block of the image.

    A position of the axes (i, ...) responds by the squared norm of its change, minus the mean change of all
    positions: what attention or a squeeze-and-excitation adds to all positions alike does not count.
    """

    def __init__(self, originals: Mapping[str, Tensor]) -> None:
        self.originals = originals
        #: By pass, tensor and axes of its positions.
        self.changes: list[dict[tuple[str, tuple[int, ...]], Tensor]] = []
        #: By tensor and axis, the positions that any block changes.
        self.responding: dict[tuple[str, int], Tensor] = {}

    def start_pass(self) -> None:
        """Begin the pass of the next block."""
        self.changes.append({})

    def add(self, name: str, value: Tensor) -> None:
        """Record the change of a tensor in this pass; of a layer that runs several times the last counts."""
        if value.shape != self.originals[name].shape:
            return  # its shape depends on the image: not a map
        change = (value.detach() - self.originals[name].detach())[0].float()
        for axes in ((0,), (1,)) if change.ndim == 2 else ((0, 1), (1, 2)):
            other = tuple(axis for axis in range(change.ndim) if axis not in axes)
            if change.ndim == 2:
                responds = change.abs().amax(other) > 0
                self.responding[name, axes[0]] = self.responding.get((name, axes[0]), False) | responds
            deviation = change - change.mean(axes, keepdim=True)
            self.changes[-1][name, axes] = deviation.square().sum(other).flatten()

    def correlation(self, name: str, axes: tuple[int, ...], grid: Grid, before: int = 0) -> float:
        """How well the positions of a grid follow the image: a correlation along each axis, the smaller one.

        It is between a position's row (column) and the mean row (column) of the blocks, weighted by the
        position's response to each, relative to the mean response of the position and to that of the block.
        A map that lies off by a part of a cell, as that of a padded convolution does, has the same
        correlation. -1 where the tensor was not computed in every pass.
        """
        recorded = [changes[name, axes] for changes in self.changes if (name, axes) in changes]
        if len(recorded) != BLOCKS**2:
            return -1.0
        h, w = grid
        responses = torch.stack(recorded).cpu().double()[:, before : before + h * w]
        responses = responses / responses.mean(0).clamp(min=1e-300)
        responses = responses / responses.mean(1, keepdim=True).clamp(min=1e-300)
        responses = (responses / responses.sum(0).clamp(min=1e-300)).cpu()
        centers = torch.arange(BLOCKS, dtype=torch.float64)
        correlations = []
        for axis, count in enumerate(grid):
            if count > 1:
                by_block = responses.view(BLOCKS, BLOCKS, h, w).sum(1 - axis)
                mean_block = torch.einsum("b,bhw->hw", centers, by_block)
                index = torch.arange(count, dtype=torch.float64)
                index = index[:, None].expand(h, w) if axis == 0 else index.expand(h, w)
                pair = torch.stack([mean_block.flatten(), index.flatten()])
                correlations.append(float(torch.corrcoef(pair)[0, 1].nan_to_num()))
        return min(correlations, default=-1.0)


def changed_blocks(image: Tensor) -> Iterator[Tensor]:
    """Copies of an image (1, C, H, W), in each of which one block is replaced by its negative."""
    size = image.shape[-2:]
    edges = [[n * i // BLOCKS for i in range(BLOCKS + 1)] for n in size]
    mean = image.mean((2, 3), keepdim=True)
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            changed = image.clone()
            block = changed[..., top:bottom, left:right]
            block.copy_(2 * mean - block)
            yield changed


def certain_layouts(
    modules: Mapping[str, nn.Module], values: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Layout]:
    """The layouts of outputs with four axes that follow from the types of modules and the grids of these."""
    layouts: dict[str, Layout] = {}
    maps = {n: tuple(v.shape[1:]) for n, v in values.items() if v.ndim == 4 and len(v) == 1}
    convolutions = [n for n in maps if isinstance(modules[n], _CHANNELS_FIRST)]
    grids = {maps[n][1:] for n in convolutions}
    grids |= {tuple(inputs[n].shape[2:]) for n in convolutions if n in inputs and inputs[n].ndim == 4}
    for name, (a, b, c) in maps.items():
        if name in convolutions:
            layouts[name] = Layout("NChw")
        elif ((b, c) in grids) != ((a, b) in grids):
            layouts[name] = Layout("NChw" if (b, c) in grids else "NhwC")
    return layouts


def uncertain_outputs(values: Mapping[str, Tensor], certain: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The tensors whose layouts can be decided only from their responses to changes of the image."""
    return {
        name: value
        for name, value in values.items()
        if name not in certain and value.ndim in (3, 4) and len(value) == 1 and value.numel() > 1
    }


def proven_layouts(
    responses: Responses, grids: Iterable[Grid], size: Grid
) -> tuple[dict[str, Layout], frozenset[str]]:
    """Layouts of tensors whose positions respond to the blocks of the image that they lie in.

    And the tensors that respond, but not by position. ``grids`` are those of the network's other maps: patch
    tokens lie on the grid of a convolution, or on one of a half, a quarter, ... of its resolution. ``size``
    is the image's (H, W). Tokens that no block changes (class tokens before the first attention) have no
    position; all layers with the same number of tokens have them at the same indices.
    """
    grids = _downsampled([size, *grids])
    #: Tokens before and after the patches by number of tokens.
    fixed: dict[int, tuple[int, int]] = {}
    for responds in responses.responding.values():
        unchanged = ~responds
        if unchanged.any() and responds.any():
            positions = responds.nonzero().flatten()
            first, last = int(positions[0]), int(positions[-1])
            if bool(responds[first : last + 1].all()):
                fixed.setdefault(len(responds), (first, len(responds) - 1 - last))
    layouts: dict[str, Layout] = {}
    not_maps: set[str] = set()
    for name, original in responses.originals.items():
        shape = tuple(original.shape[1:])
        hypotheses = list(_hypotheses(shape, grids, fixed, size))
        correlations = [_correlation(responses, name, layout) for layout in hypotheses]
        if not hypotheses:
            continue
        best = max(range(len(hypotheses)), key=correlations.__getitem__)
        height, width = hypotheses[best].maps(original).shape[2:]
        proven = correlations[best] >= _required_correlation(height * width)
        if (
            len(shape) == 3
            and shape[:2] in grids
            and shape[1:] in grids
            and not (proven and height * width >= 9)
        ):
            # Either reading is a grid of this network, and without evidence channels are first, as usual.
            layouts[name] = Layout("NChw")
        elif proven:
            layouts[name] = hypotheses[best]
        elif height * width >= 16 and 0 != correlations[best] < 0.5:
            not_maps.add(name)
    return layouts, frozenset(not_maps)


def _required_correlation(count: int) -> float:
    """The correlation that so many positions must reach, which by chance they do not.

    By chance it has a standard deviation of 1 / sqrt(count) along each axis. Maps of all kinds of networks
    have 0.85 or more, those of deep networks with random weights that mix all tokens less; tokens in another
    order (windows or mask units, one after the other) have less than 0.5, latents and queries about 0.
    """
    return 0.95 if count < 9 else min(0.8, max(0.6, 5 / count**0.5))


def _correlation(responses: Responses, name: str, layout: Layout) -> float:
    axes = {"NChw": (1, 2), "NhwC": (0, 1), "NTC": (0,), "NCT": (1,)}[layout.axes]
    height, width = layout.maps(responses.originals[name]).shape[2:]
    return responses.correlation(name, axes, (height, width), layout.before)


def _hypotheses(
    shape: tuple[int, ...], grids: Sequence[Grid], fixed: Mapping[int, tuple[int, int]], size: Grid
) -> Iterator[Layout]:
    """Layouts that an output of this shape (without the batch axis) could have, the likeliest first."""
    if len(shape) == 3:
        yield Layout("NChw")
        yield Layout("NhwC")
        return
    for axes, tokens in zip(("NTC", "NCT"), shape, strict=True):
        for before, after in dict.fromkeys((fixed.get(tokens, (0, 0)), (0, 0), *fixed.values())):
            patches = tokens - before - after
            if patches < 2:
                continue
            # A network that cuts patches without a convolution has no grid that is known beforehand.
            matching = [grid for grid in grids if grid[0] * grid[1] == patches]
            for grid in matching or _rectangles(patches, size):
                yield Layout(axes, grid, before, after)  # type: ignore[arg-type]


def _downsampled(grids: Iterable[Grid]) -> list[Grid]:
    """Grids, and those of half, a quarter, ... of their resolution, rounded down or up."""
    result = list(dict.fromkeys(grids))
    for h, w in result:
        for halves in ((h // 2, w // 2), (-(-h // 2), -(-w // 2))):
            if min(halves) >= 1 and halves not in result:
                result.append(halves)
    return result


def _rectangles(count: int, size: Grid) -> list[Grid]:
    """Grids of so many cells that are at most four times as long as wide in pixels, the squarest first."""
    divisors = [h for h in range(1, math.isqrt(count) + 1) if count % h == 0]
    stretch: dict[Grid, float] = {}
    for h in {*divisors, *(count // h for h in divisors)}:
        ratio = h * size[1] * h / (count * size[0])  # width to height of a cell in pixels
        stretch[h, count // h] = max(ratio, 1 / ratio)
    return sorted((grid for grid, ratio in stretch.items() if ratio <= 4), key=stretch.__getitem__)
