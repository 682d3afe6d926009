"""Windowed forward passes against forward passes of full images, for the oracle of occlusion."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._windowed_forward import WindowedImages, _Windowed

#: Positions of windows of side 4 in images of 24 x 20 pixels: one inside, two at borders, and one cut.
_WINDOWS = [
    (slice(top, min(top + 4, 24)), slice(left, min(left + 4, 20)))
    for top, left in ((8, 7), (0, 16), (20, 2), (22, 18))
]

Operation = Callable[[Tensor], Tensor]


def operations() -> tuple[list[Operation], list[Operation]]:
    """Operations that are local, and operations that are not or reach everything."""
    torch.manual_seed(0)
    weight, pointwise = torch.rand(4, 4, 3, 3).double(), torch.rand(4, 4, 1, 1).double()
    tall, wide, grouped = torch.rand(4, 4, 5, 1), torch.rand(4, 4, 20, 20), torch.rand(4, 2, 3, 3)
    norm, branch = nn.BatchNorm2d(4).double().eval(), nn.Conv2d(4, 4, 3, padding=1).double()
    bias, by_position = torch.rand(4, 1, 1).double(), torch.rand(20).double()
    local: list[Operation] = [
        lambda x: F.conv2d(x, weight, bias.flatten()),
        lambda x: F.conv2d(x, weight, padding=1),
        lambda x: F.conv2d(x, weight, stride=2, padding=1),
        lambda x: F.conv2d(x, weight, stride=(1, 3), padding=(2, 1), dilation=(2, 1)),
        lambda x: F.conv2d(x, tall.double(), padding=(2, 0)),
        lambda x: F.conv2d(x, grouped.double(), padding=1, groups=2),
        lambda x: F.conv2d(F.conv2d(x, weight, padding=1), weight, stride=2),
        lambda x: F.conv2d(x, pointwise, stride=2),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(-x, 3, 1, 1),
        lambda x: F.max_pool2d(x, (2, 3), 3, ceil_mode=True),
        lambda x: F.max_pool2d(x, 2, 1, 0, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 3, 1, count_include_pad=False, divisor_override=5),
        lambda x: F.relu_(x * 2 - 0.5),
        lambda x: norm(3 - x) + bias,
        lambda x: x.detach().clone().add_(bias).sigmoid(),
        lambda x: F.relu(branch(x)) + x,
        lambda x: torch.cat([x, branch(x)], 1),
        lambda x: torch.cat([branch(x), x], -3),
        lambda x: F.conv2d(x, weight) * F.conv2d(x, 2 * weight),
    ]
    everywhere: list[Operation] = [
        lambda x: F.conv2d(x, wide.double(), padding=(8, 9)),
        lambda x: F.conv_transpose2d(x, weight),
        lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda x: F.batch_norm(x, None, None, training=True) if len(x) == 1 else x.flip(-1),
        lambda x: x * by_position,
        lambda x: bias.expand(1, 4, 24, 20) - x,
        lambda x: torch.cat([x, x], 2),
        lambda x: torch.cat([x, torch.ones(len(x), 1, 24, 20).double()], 1),
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: x + x.transpose(0, 1).sum(1)[0, 0, 0],
        lambda x: x.flatten(2).cumsum(2),
    ]
    return local, everywhere


def windows_equal_full_forward_passes() -> None:
    """Each operation returns what it does for full images; a local one computes the box that changes."""
    local, everywhere = operations()
    for image in (torch.rand(4, 24, 20).double(), torch.rand(24, 20, 4).double().permute(2, 0, 1)):
        # Larger by 5, so that a window changes every maximum over it.
        replacement = image + 5
        full = image[None].repeat(4, 1, 1, 1)
        for row, (rows, columns) in zip(full, _WINDOWS, strict=True):
            row[:, rows, columns] = replacement[:, rows, columns]
        if image.stride(0) == 1:
            full = full.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            for operation in (*local, *everywhere) if image.is_contiguous() else local[:12]:
                source = WindowedImages(image, replacement, _WINDOWS)
                if operation in local:
                    box = _largest_change(operation(full) - operation(image[None]))
                for indices in ([0], [1, 2, 3]):
                    result, reference = operation(source.batch(indices)), operation(full[indices])
                    is_windowed = isinstance(result, _Windowed) and result.dense_values is None
                    assert is_windowed == (operation in local)
                    if isinstance(result, _Windowed):
                        assert not is_windowed or result.crops.shape[2:] == box
                        result = result.materialize()
                    assert result.stride() == reference.stride() or not image.is_contiguous()
                    torch.testing.assert_close(result, reference)
                assert (operation in local) == (not source.nonlocal_operations) or operation is everywhere[0]


def _largest_change(changes: Tensor) -> tuple[int, int]:
    """The largest height and width of the boxes of what is not 0, over all images (N, C, H, W)."""
    changed = changes.abs().amax(1) > 1e-9
    lines = changed.any(2), changed.any(1)
    sizes = [[int(line.nonzero().max() - line.nonzero().min()) + 1 for line in axis] for axis in lines]
    return max(sizes[0]), max(sizes[1])
