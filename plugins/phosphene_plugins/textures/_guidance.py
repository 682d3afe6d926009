"""Guidance maps of texture synthesis: which parts of a sample may appear in which parts of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from phosphene import InputError
from phosphene.images import resize

from ._texture_samples import output_size

#: Weights of R, G and B in the luminance of ITU-R BT.601.
_LUMA = (0.299, 0.587, 0.114)


def guided_size(sample: Tensor, guide: Tensor | None, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the output: ``size``, else the guide's, else the sample's."""
    return output_size(sample if guide is None else guide, size)


def guidance_maps(
    sample: Tensor, sample_guide: Tensor | None, guide: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Guidance maps of the samples (N, G, H, W) and of the outputs (N, G, height, width).

    Without a ``sample_guide`` they are luminances, and the guide's has the mean and the standard deviation
    of the sample's: y <- (y - m) s' / s + m'. Without any guide they have no channels: G = 0.

    Raises InputError for a sample guide without a guide, for guides that do not fit the samples or each
    other.
    """
    if guide is None:
        if sample_guide is not None:
            raise InputError("sample_guide maps the sample: it needs a guide, that of the output")
        return sample[:, :0], sample.new_zeros(len(sample), 0, height, width)
    count = len(sample)
    for name, value in (("guide", guide), ("sample_guide", sample_guide)):
        if value is not None and len(value) not in (1, count):
            raise InputError(f"{name} must be one map, or one for each of {count} samples, not {len(value)}")
    output_map = resize(guide.to(sample), (height, width)).expand(count, -1, -1, -1)
    if sample_guide is None:
        sample_map, output_map = _luminance(sample), _luminance(output_map)
        mean, std = (f(sample_map, (1, 2, 3)).view(-1, 1, 1, 1) for f in (torch.mean, _std))
        own_mean, own_std = (f(output_map, (1, 2, 3)).view(-1, 1, 1, 1) for f in (torch.mean, _std))
        return sample_map, (output_map - own_mean) * (std / own_std.clamp(min=1e-8)) + mean
    if sample_guide.shape[2:] != sample.shape[2:] or sample_guide.shape[1] != guide.shape[1]:
        expected = (guide.shape[1], *sample.shape[2:])
        raise InputError(
            "sample_guide must have the sample's size and the guide's channels, (C, H, W) = "
            f"{expected}, not {tuple(sample_guide.shape[1:])}"
        )
    return sample_guide.to(sample).expand(count, -1, -1, -1), output_map


def _luminance(images: Tensor) -> Tensor:
    """Luminance (N, 1, H, W) of images; the mean of the channels unless there are three."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return torch.einsum("nchw,c->nhw", images, images.new_tensor(_LUMA))[:, None]


def _std(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.std(dims, correction=0)
