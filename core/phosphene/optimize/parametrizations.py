"""Image parametrizations: pixels, Fourier spectrum, phases of a spectrum, latent code of a decoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..precision import at_least_float32


class Parametrization(ABC):
    """A differentiable map from a parameter, which is optimized, to images.

    Implement ``image``; ``penalty``, ``project`` and ``assign`` where they apply.
    """

    #: Leaf tensor (N, ...) that requires gradients; row i belongs to image i alone.
    parameter: Tensor

    @abstractmethod
    def image(self) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of the current parameter, on the autograd graph."""

    def penalty(self) -> Tensor | None:
        """Penalty on the parameter itself, (N,), on the autograd graph, or None."""
        return None

    def project(self) -> None:  # noqa: B027  (most parametrizations are unconstrained)
        """Project the parameter onto its constraints, in place; called after every step."""

    def assign(self, images: Tensor) -> None:
        """Set the parameter so that ``image`` returns these images (N, C, H, W)."""
        name = type(self).__name__
        raise InputError(f"{name} cannot be set from pixels, so its images cannot be edited between steps")


class PixelImage(Parametrization):
    """Pixels, clipped to [0, 1] after every step: projected gradient ascent.

    Args:
        init: images (N, C, H, W) in [0, 1], copied; of half precision in float32, which small steps need.

    Raises:
        InputError: another shape, type or range.
    """

    def __init__(self, init: Tensor) -> None:
        self.parameter = at_least_float32(_copy_images(init)).requires_grad_()

    def image(self) -> Tensor:
        return self.parameter

    @torch.no_grad()
    def project(self) -> None:
        self.parameter.clamp_(0, 1)

    @torch.no_grad()
    def assign(self, images: Tensor) -> None:
        self.parameter.copy_(images).clamp_(0, 1)


#: Square root of the color covariance of ImageNet, published with lucid (Olah et al. 2017).
_COLOR_COVARIANCE_SQRT = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class FourierImage(Parametrization):
    """Fourier spectrum with decorrelated colors, scaled to the 1/f amplitudes of natural images.

    image = sigmoid(M irfft2(s / max(f, 1/max(H, W))^decay) / 4)

    with the spectrum s (N, C, H, W//2 + 1), the frequency f in cycles per pixel, the orthonormal transform,
    and M the square root of the color covariance over its largest column norm (the identity unless C is 3).

    Args:
        init: images (N, C, H, W) in [0, 1]; represented exactly where pixels lie in [1e-4, 1 - 1e-4].
        decay: exponent of the frequency; 1 is the spectrum of natural images.
        opacity: the last channel is no color but an opacity, whose spectrum is not mixed with the others.

    Raises:
        InputError: another shape, type or range.

    Source:
        Olah, Mordvintsev, Schubert, "Feature Visualization", Distill 2017.
    """

    def __init__(self, init: Tensor, *, decay: float = 1.0, opacity: bool = False) -> None:
        count, channels, height, self.width = _copy_images(init).shape
        # In half precision there is no Fourier transform on the CPU: at least single precision, then rounded.
        self.dtype = init.dtype
        init = at_least_float32(init)
        self.scale = (fourier_frequencies(height, self.width) ** -decay).to(init)
        mix = color_mix(channels, opacity=opacity)
        self.mix, self.unmix = mix.to(init), torch.linalg.inv(mix).to(init)
        self.parameter = init.new_zeros(count, channels, *self.scale.shape, 2).requires_grad_()
        self.assign(init)

    def image(self) -> Tensor:
        spectrum = self.scale * torch.view_as_complex(self.parameter)
        # One dimension at a time: for a spectrum that is not Hermitian, as during optimization, irfft2
        # differs between FFT libraries.
        columns = torch.fft.ifft(spectrum, dim=-2, norm="ortho")
        signal = torch.fft.irfft(columns, n=self.width, dim=-1, norm="ortho") / 4
        return torch.einsum("ij,njhw->nihw", self.mix, signal).sigmoid().to(self.dtype)

    @torch.no_grad()
    def assign(self, images: Tensor) -> None:
        logits = torch.logit(images.to(self.parameter.dtype), eps=1e-4)
        signal = torch.einsum("ij,njhw->nihw", self.unmix, logits) * 4
        self.parameter.copy_(torch.view_as_real(torch.fft.rfft2(signal, norm="ortho") / self.scale))


def fourier_frequencies(height: int, width: int) -> Tensor:
    """Frequencies (H, W//2 + 1) of ``rfft2``, cycles per pixel, at least 1/max(H, W), in double precision."""
    # The W//2 + 1 columns that irfft reads, for odd W, too: a further one would never get a gradient.
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64)
    return torch.hypot(vertical, horizontal).clamp_min(1 / max(height, width))


def color_mix(channels: int, *, opacity: bool = False) -> Tensor:
    """M (C, C) of ``FourierImage``, in double precision; an opacity, the last channel, is not mixed."""
    if opacity:
        return torch.block_diag(color_mix(channels - 1), torch.ones(1, 1, dtype=torch.float64))
    if channels != 3:
        return torch.eye(channels, dtype=torch.float64)
    mix = torch.tensor(_COLOR_COVARIANCE_SQRT, dtype=torch.float64)
    return mix / mix.norm(dim=0).max()


class PhaseImage(Parametrization):
    """Phases of a Fourier spectrum with constant magnitudes.

    image = sigmoid(M irfft2(r exp(i phi)))

    with the magnitudes r (C, H, W//2 + 1), the phases phi, which are optimized, the orthonormal transform and
    the color matrix M of ``FourierImage``. The spectrum stays that of a real image, so every magnitude of
    the image before the sigmoid is r. The coefficients of frequency zero, the mean color, and the others
    that are real keep the sign that they have at the start.

    Args:
        magnitudes: r; the entry of frequency zero is a coefficient, which may be negative.
        phases: initial phases (N, C, H, W//2 + 1), copied: those of the spectra of real images.
        width: W, which the columns determine only up to its parity.

    Raises:
        InputError: shapes that do not belong together, or magnitudes that are not finite and nonnegative.

    Source:
        Fel et al., "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained
        Optimization", 2023, equation 2.
    """

    def __init__(self, magnitudes: Tensor, phases: Tensor, width: int) -> None:
        channels, height, columns = magnitudes.shape if magnitudes.ndim == 3 else (0, 0, 0)
        if phases.ndim != 4 or phases.shape[1:] != magnitudes.shape or columns != width // 2 + 1:
            raise InputError(
                f"magnitudes (C, H, W//2 + 1) of width {width} and phases (N, C, H, W//2 + 1) are needed, "
                f"not phases {tuple(phases.shape)} and {tuple(magnitudes.shape)}"
            )
        nonnegative = magnitudes.clone()
        nonnegative[:, 0, 0] = nonnegative[:, 0, 0].abs()
        if not bool((nonnegative.isfinite() & (nonnegative >= 0)).all()):
            raise InputError("magnitudes must be finite and nonnegative, but at frequency zero")
        self.width, self.dtype = width, phases.dtype
        self.magnitudes = at_least_float32(magnitudes.detach()).to(phases.device)
        self.mix = color_mix(channels).to(self.magnitudes)
        self.parameter = at_least_float32(phases.detach()).clone().requires_grad_()
        self.magnitudes = self.magnitudes.to(self.parameter)
        # The spectrum of a real image is s(-k) = conj s(k): within the columns 0 and, of even widths, W/2
        # phases are antisymmetric in the rows, and where k = -k the coefficient is real.
        mirrored = -torch.arange(height) % height
        self._mirrored = mirrored.to(phases.device)
        self._edges = [0] if width % 2 else [0, columns - 1]
        self._fixed = torch.zeros(height, columns, dtype=torch.bool, device=phases.device)
        for column in self._edges:
            self._fixed[:, column] = self._mirrored == torch.arange(height, device=phases.device)
        initial = self.parameter.detach()
        self._real = torch.where(initial.cos() < 0, math.pi, 0.0).to(initial)
        self._real[:, :, 0, 0] = 0

    def phases(self) -> Tensor:
        """phi (N, C, H, W//2 + 1), those of a real image, on the autograd graph."""
        phases = self.parameter
        edges = phases[..., self._edges]
        antisymmetric = (edges - edges[:, :, self._mirrored]) / 2
        phases = phases.index_copy(3, torch.tensor(self._edges, device=phases.device), antisymmetric)
        return torch.where(self._fixed, self._real, phases)

    def image(self) -> Tensor:
        phases = self.phases()
        spectrum = torch.complex(self.magnitudes * phases.cos(), self.magnitudes * phases.sin())
        columns = torch.fft.ifft(spectrum, dim=-2, norm="ortho")
        signal = torch.fft.irfft(columns, n=self.width, dim=-1, norm="ortho")
        return torch.einsum("ij,njhw->nihw", self.mix, signal).sigmoid().to(self.dtype)

    @staticmethod
    def spectrum(images: Tensor, *, eps: float = 1e-4) -> Tensor:
        """Complex spectra (N, C, H, W//2 + 1) before the sigmoid of images, clipped to [eps, 1 - eps]."""
        logits = torch.logit(at_least_float32(images), eps=eps)
        unmix = torch.linalg.inv(color_mix(images.shape[1])).to(logits)
        return torch.fft.rfft2(torch.einsum("ij,njhw->nihw", unmix, logits), norm="ortho")


class LatentImage(Parametrization):
    """Latent code of a decoder: image = decode(z), clipped to [0, 1], with |z_i| <= bound.

    Its penalty l2 ||z||^2 is the negative log-density of the prior N(0, I), up to a constant and its weight.

    Args:
        z: initial codes (N, ...), copied.
        decode: codes -> images (N, C, H, W).
        l2: weight of the penalty.
        bound: largest absolute value of each component of z.

    Raises:
        InputError: codes that are not floats of at least two dimensions.

    Source:
        Nguyen et al., "Synthesizing the preferred inputs for neurons in neural networks via deep
        generator networks", 2016.
    """

    def __init__(
        self, z: Tensor, decode: Callable[[Tensor], Tensor], *, l2: float = 0.0, bound: float = math.inf
    ) -> None:
        if z.ndim < 2 or z.numel() == 0 or not z.is_floating_point():
            raise InputError(f"codes must be floats (N, ...), not {tuple(z.shape)} {z.dtype}")
        self.decode, self.l2, self.bound = decode, l2, bound
        self.parameter = z.detach().clone().clamp_(-bound, bound).requires_grad_()

    def image(self) -> Tensor:
        return self.decode(self.parameter).clamp(0, 1)

    def penalty(self) -> Tensor | None:
        return self.l2 * self.parameter.square().flatten(1).sum(1) if self.l2 else None

    @torch.no_grad()
    def project(self) -> None:
        self.parameter.clamp_(-self.bound, self.bound)


def _copy_images(images: Tensor) -> Tensor:
    """A copy of images (N, C, H, W) in [0, 1]; InputError for anything else."""
    if images.ndim != 4 or images.numel() == 0 or not images.is_floating_point():
        raise InputError(f"images must be floats (N, C, H, W), not {tuple(images.shape)} {images.dtype}")
    if not bool(((images >= -1e-6) & (images <= 1 + 1e-6)).all()):  # false for NaN, too
        raise InputError("pixels must lie in [0, 1]")
    return images.detach().clone(memory_format=torch.contiguous_format).clamp_(0, 1)
