"""Image parametrizations: pixels, a Fourier spectrum, a decoder's code."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError


class Parametrization(ABC):
    """What is optimised in an image's stead."""

    #: The leaf to optimise, (N, ...), requiring gradients; row i makes image i.
    parameter: Tensor

    @abstractmethod
    def image(self) -> Tensor:
        """The images (N, C, H, W) that the parameter stands for, in [0, 1], on the graph."""

    def penalty(self) -> Tensor | None:
        """What the parameter itself costs, (N,), on the graph, beside what the images do; None: nothing."""
        return None

    def project(self) -> None:  # noqa: B027  (most parametrisations have nothing to project)
        """Bring the parameter back to where it is allowed; called after every step."""

    def assign(self, images: Tensor) -> None:
        """Set the parameter so that `image` gives these images (N, C, H, W)."""
        raise InputError(f"{type(self).__name__} cannot take pixels, so nothing may edit them.")


class PixelImage(Parametrization):
    """The pixels themselves, clipped into [0, 1] after every step: projected ascent.

    init: (N, C, H, W) in [0, 1], copied. Raises InputError for another shape or range.
    """

    def __init__(self, init: Tensor) -> None:
        self.parameter = _checked(init).requires_grad_()

    def image(self) -> Tensor:
        return self.parameter

    @torch.no_grad()
    def project(self) -> None:
        self.parameter.clamp_(0, 1)

    @torch.no_grad()
    def assign(self, images: Tensor) -> None:
        self.parameter.copy_(images).clamp_(0, 1)


#: Square root of the covariance of ImageNet's colours, published with lucid (Olah et al. 2017).
_COLOUR_SQRT = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class FourierImage(Parametrization):
    """A spectrum whose frequencies are weighed like a natural image's, squashed by a sigmoid.

    image = sigmoid(M irfft2(s / max(f, 1/max(H, W))^decay) / 4), with s the spectrum
    (N, C, H, W//2 + 1), f in cycles per pixel, the orthonormal transform, and M the colour
    covariance's square root over its largest column norm (the identity unless C is 3).
    init: (N, C, H, W) of any size, met exactly where pixels lie in [1e-4, 1 - 1e-4]; errors as above.
    Source: Olah, Mordvintsev, Schubert, "Feature Visualization", Distill 2017.
    """

    def __init__(self, init: Tensor, *, decay: float = 1.0) -> None:
        count, channels, height, self.width = _checked(init).shape
        # rfftfreq has the W//2 + 1 columns irfft reads, also where W is odd
        down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
        across = torch.fft.rfftfreq(self.width, dtype=torch.float64)
        frequency = torch.hypot(down, across).clamp_min(1 / max(height, self.width))
        self.scale = (frequency**-decay).to(init)
        mix = torch.eye(channels, dtype=torch.float64)
        if channels == 3:
            mix = torch.tensor(_COLOUR_SQRT, dtype=torch.float64)
            mix /= mix.norm(dim=0).max()
        self.mix, self.unmix = mix.to(init), torch.linalg.inv(mix).to(init)
        self.parameter = init.new_zeros(count, channels, *self.scale.shape, 2).requires_grad_()
        self.assign(init)

    def image(self) -> Tensor:
        spectrum = self.scale * torch.view_as_complex(self.parameter)
        # one dimension at a time: what irfft2 makes of a spectrum that no real image has differs
        # between FFT libraries
        columns = torch.fft.ifft(spectrum, dim=-2, norm="ortho")
        signal = torch.fft.irfft(columns, n=self.width, dim=-1, norm="ortho") / 4
        return torch.einsum("ij,njhw->nihw", self.mix, signal).sigmoid()

    @torch.no_grad()
    def assign(self, images: Tensor) -> None:
        signal = torch.einsum("ij,njhw->nihw", self.unmix, torch.logit(images, eps=1e-4)) * 4
        self.parameter.copy_(torch.view_as_real(torch.fft.rfft2(signal, norm="ortho") / self.scale))


class LatentImage(Parametrization):
    """The code of a decoder: image = decode(z), where z is no farther than ``bound`` from 0 in any number.

    z: (N, ...), copied; decode: codes -> images (N, C, H, W), clipped into [0, 1]. Costs l2 ||z||^2, minus
    the logarithm of the prior N(0, I) up to its weight. Raises InputError for codes that are no floats.
    Source: Nguyen et al., "Synthesizing the preferred inputs for neurons in neural networks via deep
    generator networks", 2016.
    """

    def __init__(
        self, z: Tensor, decode: Callable[[Tensor], Tensor], *, l2: float = 0.0, bound: float = math.inf
    ) -> None:
        if z.ndim < 2 or z.numel() == 0 or not z.is_floating_point():
            raise InputError(f"Needs float codes (N, ...), got {tuple(z.shape)} {z.dtype}.")
        self.decode, self.l2, self.bound = decode, l2, bound
        self.parameter = z.detach().clone().clamp_(-bound, bound).requires_grad_()

    def image(self) -> Tensor:
        return self.decode(self.parameter).clamp(0, 1)

    def penalty(self) -> Tensor | None:
        return self.l2 * self.parameter.square().flatten(1).sum(1) if self.l2 else None

    @torch.no_grad()
    def project(self) -> None:
        self.parameter.clamp_(-self.bound, self.bound)


def _checked(images: Tensor) -> Tensor:
    """A copy of the images, which must be such."""
    if images.ndim != 4 or images.numel() == 0 or not images.is_floating_point():
        raise InputError(f"Needs floats (N, C, H, W), got {tuple(images.shape)} {images.dtype}.")
    if not bool(((images >= -1e-6) & (images <= 1 + 1e-6)).all()):  # NaN fails this, too
        raise InputError("Pixels must lie in [0, 1].")
    return images.detach().clone(memory_format=torch.contiguous_format).clamp_(0, 1)
