"""Drawing with a model: image parametrisations, regularisers, transforms and the ascent loop.

Everything that synthesises an image shares this: class visualisation, inversion, dreams, textures,
style. A technique brings its objective, one number per image; the rest is here. Images are
(N, C, H, W) in [0, 1], and no image of a batch ever sees another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .errors import DivergenceError, InputError, UnknownName
from .progress import progress

PerImage = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> numbers (N,)
Transform = Callable[[Tensor, Generator], Tensor]
AfterStep = Callable[[Tensor, Tensor, int], Tensor]
Optimizer = Literal["adam", "sgd", "normalized-sgd", "lbfgs"]

# ------------------------------------------------------------------ parametrisations


class Parametrization(ABC):
    """What is optimised in an image's stead; dimension 0 of every parameter is the image."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """The leaf tensors to optimise, each (N, ...), requiring gradients."""

    @abstractmethod
    def image(self) -> Tensor:
        """The images (N, C, H, W) they stand for, in [0, 1], on the graph."""

    def project(self) -> None:  # noqa: B027  (most parametrisations have nothing to project)
        """Bring the parameters back to where they are allowed; called after every step."""

    def assign(self, images: Tensor) -> None:
        """Set the parameters so that `image` gives these images (N, C, H, W)."""
        raise InputError(f"{type(self).__name__} cannot take pixels, so nothing may edit them.")


class PixelImage(Parametrization):
    """The pixels themselves, clipped into [0, 1] after every step: projected ascent.

    init: (N, C, H, W) in [0, 1], copied. Raises InputError for another shape or range.
    """

    def __init__(self, init: Tensor) -> None:
        if init.ndim != 4 or init.numel() == 0 or not init.is_floating_point():
            raise InputError(f"Needs floats (N, C, H, W), got {tuple(init.shape)} {init.dtype}.")
        if not bool(((init >= -1e-6) & (init <= 1 + 1e-6)).all()):  # NaN fails this, too
            raise InputError("Pixels must lie in [0, 1].")
        self.pixels = init.detach().clone().clamp_(0, 1).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.pixels]

    def image(self) -> Tensor:
        return self.pixels

    @torch.no_grad()
    def project(self) -> None:
        self.pixels.clamp_(0, 1)

    @torch.no_grad()
    def assign(self, images: Tensor) -> None:
        self.pixels.copy_(images).clamp_(0, 1)


#: Square root of the covariance of ImageNet's colours, published with lucid (Olah et al. 2017).
_COLOUR_SQRT = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class FourierImage(Parametrization):
    """A spectrum whose frequencies are weighed like a natural image's, squashed by a sigmoid.

    image = sigmoid(M irfft2(s / max(f, 1/max(H, W))^decay) / 4), with f in cycles per pixel, the
    orthonormal transform, and M the colour covariance's square root over its largest column norm
    (three channels, ``decorrelate=True``; else the identity). The spectrum s (N, C, H, W//2 + 1)
    starts as Gaussian noise of standard deviation sd per real and imaginary part, the same for
    every image of the batch. Every size and any number of channels will do.
    Source: Olah, Mordvintsev, Schubert, "Feature Visualization", Distill 2017.
    Raises InputError for a shape that is not (N, C, H, W).
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        seed: int | None,
        sd: float = 0.01,
        decay: float = 1.0,
        decorrelate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(shape) != 4 or min(shape) < 1:
            raise InputError(f"The shape must be (N, C, H, W), got {tuple(shape)}.")
        count, channels, height, width = shape
        self.size = (height, width)
        # rfftfreq has the W//2 + 1 columns irfft reads, also where W is odd
        down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
        across = torch.fft.rfftfreq(width, dtype=torch.float64)
        frequency = torch.hypot(down, across).clamp_min(1 / max(self.size))
        self.scale = (frequency**-decay).to(device, dtype)
        mix = torch.eye(channels, dtype=torch.float64)
        if decorrelate and channels == 3:
            mix = torch.tensor(_COLOUR_SQRT, dtype=torch.float64)
            mix /= mix.norm(dim=0).max()
        self.mix, self.unmix = mix.to(device, dtype), torch.linalg.inv(mix).to(device, dtype)
        draw = torch.randn((1, channels, *self.scale.shape, 2), generator=_generator(seed)) * sd
        spectrum = draw.to(device, dtype).expand(count, -1, -1, -1, -1)
        self.spectrum = spectrum.clone().requires_grad_()

    @classmethod
    def of(cls, images: Tensor, *, decay: float = 1.0, decorrelate: bool = True) -> FourierImage:
        """The spectrum of given images (N, C, H, W), exact where pixels lie in [1e-4, 1 - 1e-4]."""
        count, channels, height, width = PixelImage(images).pixels.shape  # the same demands
        like: dict[str, Any] = {"device": images.device, "dtype": images.dtype}
        shape = (count, channels, height, width)
        made = cls(shape, seed=0, sd=0, decay=decay, decorrelate=decorrelate, **like)
        made.assign(images)
        return made

    def parameters(self) -> list[Tensor]:
        return [self.spectrum]

    def image(self) -> Tensor:
        spectrum = self.scale * torch.view_as_complex(self.spectrum)
        # one dimension at a time: what irfft2 makes of a spectrum that no real image has differs
        # between FFT libraries
        columns = torch.fft.ifft(spectrum, dim=-2, norm="ortho")
        signal = torch.fft.irfft(columns, n=self.size[1], dim=-1, norm="ortho") / 4
        return torch.einsum("ij,njhw->nihw", self.mix, signal).sigmoid()

    @torch.no_grad()
    def assign(self, images: Tensor) -> None:
        logits = torch.logit(images, eps=1e-4)
        signal = torch.einsum("ij,njhw->nihw", self.unmix, logits) * 4
        self.spectrum.copy_(torch.view_as_real(torch.fft.rfft2(signal, norm="ortho") / self.scale))


def _generator(seed: int | None) -> Generator:
    """A generator on the CPU, so that a seed means the same on every device."""
    generator = Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    return generator


def noise(
    shape: tuple[int, int, int, int],
    *,
    seed: int | None,
    mean: float | Tensor = 0.5,
    sd: float | Tensor = 0.1,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian noise images (N, C, H, W), clipped into [0, 1]: the usual start.

    All images of the batch get the same noise, so that a batch gives what its images give alone.
    mean, sd: a number or a colour (C,) each.
    """
    draw = torch.randn((1, *shape[1:]), generator=_generator(seed)).to(device, dtype)
    return (_colour(mean, draw) + _colour(sd, draw) * draw).clamp(0, 1).expand(shape).clone()


# ------------------------------------------------------------------ regularisers


def _colour(center: float | Tensor, images: Tensor) -> Tensor:
    """A number or a colour (C,) as something that broadcasts against (N, C, H, W)."""
    center = torch.as_tensor(center, dtype=images.dtype, device=images.device)
    return center.view(1, -1, 1, 1) if center.ndim == 1 else center


def l2_penalty(images: Tensor, center: float | Tensor = 0.5) -> Tensor:
    """||I - center||^2 of each image (N,), with center a number or a colour (C,).

    The seed's regulariser is R(I) = -lambda times this (lecture 21.6.1).
    """
    return (images - _colour(center, images)).square().sum((1, 2, 3))


def total_variation(images: Tensor, beta: float = 2.0) -> Tensor:
    """Sum of (dx^2 + dy^2)^(beta/2) over channels and the (H-1) x (W-1) corners: (N,).

    Differentiable everywhere; where an image is flat the gradient is 0, also for beta < 2.
    Source: Mahendran and Vedaldi 2015 (lecture 21.9). Raises InputError unless beta > 0.
    """
    if not beta > 0:
        raise InputError(f"beta={beta} must be positive.")
    corner = images[..., :-1, :-1]
    square = (images[..., :-1, 1:] - corner).square() + (images[..., 1:, :-1] - corner).square()
    steep = square > 0
    # the root's slope at 0 is infinite: keep flat corners out of it, on the way back as well
    power = torch.where(steep, square, 1) ** (beta / 2)
    return torch.where(steep, power, 0).sum((1, 2, 3))


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur (N, C, H, W) by a Gaussian of sigma pixels, cut at 4 sigma, edges mirrored.

    Equals ``scipy.ndimage.gaussian_filter(truncate=4, mode="reflect")`` of each channel.
    Raises InputError if sigma is negative.
    """
    if not sigma >= 0:
        raise InputError(f"sigma={sigma} must not be negative.")
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets.to(images.dtype) / sigma) ** 2)
    kernel = (weights / weights.sum()).view(1, 1, 1, -1)
    planes = images.reshape(-1, 1, *images.shape[-2:])
    for _ in range(2):  # across, then down, by turning the planes over
        width = planes.shape[-1]
        index = torch.arange(-radius, width + radius, device=images.device) % (2 * width)
        index = torch.minimum(index, 2 * width - 1 - index)
        planes = F.conv2d(planes.index_select(-1, index), kernel).transpose(-2, -1)
    return planes.reshape(images.shape)


def clip_small_norm(images: Tensor, percentile: float, center: float | Tensor = 0.5) -> Tensor:
    """Set the pixels that differ least from center to center: (N, C, H, W) -> the same.

    A pixel's size is its norm ||x - center|| over the channels; those below that percentile (0 to
    100) of their own image go. Source: Yosinski et al. 2015. Raises InputError for the percentile.
    """
    size = torch.linalg.vector_norm(images - _colour(center, images), dim=1, keepdim=True)
    return _clip_smallest(images, size, percentile, center)


def clip_small_contribution(
    images: Tensor, gradient: Tensor, percentile: float, center: float | Tensor = 0.5
) -> Tensor:
    """The same by what a pixel matters: |sum_c (x - center) g|, the objective's first-order loss.

    ``gradient`` (N, C, H, W) is the objective's. Source and errors as for ``clip_small_norm``.
    """
    size = ((images - _colour(center, images)) * gradient).sum(1, keepdim=True).abs()
    return _clip_smallest(images, size, percentile, center)


def _clip_smallest(images: Tensor, size: Tensor, percentile: float, center: float | Tensor) -> Tensor:
    if not 0 <= percentile <= 100:
        raise InputError(f"percentile={percentile} must lie in [0, 100].")
    least = torch.quantile(size.flatten(1), percentile / 100, dim=1).view(-1, 1, 1, 1)
    return torch.where(size < least, _colour(center, images), images)


# ------------------------------------------------------------------ transforms


def jitter(images: Tensor, generator: Generator, *, pixels: int) -> Tensor:
    """Roll all images by one random shift of up to so many pixels each way."""
    down, across = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
    return torch.roll(images, (down, across), (-2, -1))


def random_scale(images: Tensor, generator: Generator, *, low: float, high: float) -> Tensor:
    """Magnify all images about their centre by one random factor in [low, high]; same size."""
    factor = low + (high - low) * float(torch.rand((), generator=generator))
    return _turn(images, 1 / factor, 0.0)


def random_rotate(images: Tensor, generator: Generator, *, degrees: float) -> Tensor:
    """Turn all images about their centre by one random angle of up to so many degrees."""
    angle = math.radians(degrees) * (2 * float(torch.rand((), generator=generator)) - 1)
    return _turn(images, 1.0, angle)


def _turn(images: Tensor, factor: float, angle: float) -> Tensor:
    height, width = images.shape[-2:]
    cos, sin = factor * math.cos(angle), factor * math.sin(angle)
    # grid coordinates run from -1 to 1 either way, so an oblong image needs its proportions
    rows = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    matrix = images.new_tensor([rows]).expand(len(images), -1, -1)
    where = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, padding_mode="reflection", align_corners=False)


def gram(features: Tensor, normalize: Literal["positions", "none", "elements"] = "positions") -> Tensor:
    """Gram matrices G = F F^T of features (N, C, H, W): (N, C, C).

    normalize: "positions" divides by H W (Gatys's texture code), "elements" by C H W (Johnson),
    "none" by nothing (lecture 21.11.2). Raises InputError for another name or shape.
    """
    if features.ndim != 4:
        raise InputError(f"Features are (N, C, H, W), got {tuple(features.shape)}.")
    positions = features.shape[2] * features.shape[3]
    divisors = {"none": 1, "positions": positions, "elements": features.shape[1] * positions}
    if normalize not in divisors:
        raise InputError(f"normalize={normalize!r} must be one of {', '.join(divisors)}.")
    rows = features.flatten(2)
    return rows @ rows.transpose(1, 2) / divisors[normalize]


# ------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class Ascent:
    """What an optimisation came to.

    images: (N, C, H, W) in [0, 1]; scores: (steps, N), the objective alone as each step found it,
    before moving.
    """

    images: Tensor
    scores: Tensor


@dataclass(frozen=True)
class _Point:
    """The problem at one setting of the parameters; the loss is what goes down."""

    scores: Tensor
    loss: Tensor
    pixel_gradient: Tensor  # of the objective alone
    gradients: list[Tensor]  # of the loss, by the parameters


def ascend(
    objective: PerImage,
    image: Parametrization,
    *,
    steps: int,
    lr: float,
    optimizer: Optimizer = "adam",
    maximize: bool = True,
    regularizer: PerImage | None = None,
    transform: Transform | None = None,
    after_step: AfterStep | None = None,
    seed: int | None = None,
) -> Ascent:
    """Change an image, step by step, until an objective is large (or small): I <- I + lr grad.

    objective: images (N, C, H, W) -> scores (N,), each of its own image only.
    maximize: maximise objective - regularizer; if False, minimise objective + regularizer.
    regularizer: images -> penalties (N,), of the images before the transform.
    optimizer: "sgd" is the plain step above, "normalized-sgd" divides each image's gradient by
    its root mean square first, "adam" is Adam, and "lbfgs" a quasi-Newton step whose length, lr
    at first, is halved until the loss falls (natural lr: 1; it takes no transform).
    transform: (images, generator) -> images, drawn anew every step: robustness.
    after_step: (images, pixel gradient of the objective, step) -> images, edits between steps.

    Gradients are taken by the image's parameters only; a model's are never touched. A batch gives
    what its images give alone, and the same seed the same image.
    Source: Simonyan et al. 2014, lecture 21.6. Raises DivergenceError if the objective or its
    gradient is no longer finite, or if an image cannot start because its gradient is zero at every
    pixel; InputError if steps, lr or what the objective returns make no sense.
    """
    if steps < 1 or not (lr > 0 and math.isfinite(lr)):
        raise InputError(f"Needs steps >= 1 and lr > 0, got {steps} and {lr}.")
    if optimizer not in _OPTIMIZERS:
        raise UnknownName("optimizer", optimizer, _OPTIMIZERS)
    if optimizer == "lbfgs" and transform is not None:
        raise InputError("L-BFGS needs the same objective at every step: no transform, or adam.")
    generator = _generator(seed)

    def evaluate() -> _Point:
        with torch.enable_grad():
            images = image.image()
            seen = images if transform is None else transform(images, generator)
            scores, pixel_gradient = _per_image(objective, seen, images, "objective")
            loss, total = (-scores, -pixel_gradient) if maximize else (scores, pixel_gradient)
            if regularizer is not None:
                penalty, its_gradient = _per_image(regularizer, images, images, "regularizer")
                loss, total = loss + penalty, total + its_gradient
            gradients = list(torch.autograd.grad(images, image.parameters(), total))
        return _Point(scores, loss, pixel_gradient, gradients)

    update = _OPTIMIZERS[optimizer](image, lr, evaluate)
    scores: list[Tensor] = []
    point: _Point | None = None
    for step in progress(range(steps), "Ascending" if maximize else "Descending", steps):
        if point is None:
            point = evaluate()
        _check(point, step, lr, maximize)
        scores.append(point.scores)
        gradient = point.pixel_gradient
        point = update(point)
        if after_step is not None:
            image.assign(after_step(image.image().detach(), gradient, step))
            point = None
    return Ascent(image.image().detach().clone(), torch.stack(scores))


def _per_image(function: PerImage, seen: Tensor, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What a function of what is seen gives, (N,), and its gradient by the images."""
    values = function(seen)
    if values.shape != images.shape[:1]:
        raise InputError(
            f"The {name} must give one number per image, ({images.shape[0]},); got {tuple(values.shape)}."
        )
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is not None:
            return values.detach(), gradient
    raise InputError(f"The {name} does not depend on the images through anything differentiable.")


def _check(point: _Point, step: int, lr: float, maximize: bool) -> None:
    finite = point.loss.isfinite() & point.scores.isfinite()
    for gradient in point.gradients:
        finite = finite & gradient.isfinite().flatten(1).all(1)
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise DivergenceError(
            f"Step {step}: the objective or its gradient is no longer finite for images {broken}; "
            f"lower lr (now {lr:g}) or the regularizer's weight."
        )
    dead = (point.pixel_gradient == 0).flatten(1).all(1)
    if not maximize:
        dead &= point.scores != 0  # a loss of zero has arrived, not died
    if step == 0 and dead.any():
        raise DivergenceError(
            f"Images {dead.nonzero().flatten().tolist()} cannot start: the objective's gradient is "
            "zero at every pixel (a dead ReLU, or nothing left to gain); try another seed, a start "
            "from noise or another initial image."
        )


Evaluate = Callable[[], _Point]


class _Sgd:
    normalized = False

    def __init__(self, image: Parametrization, lr: float, evaluate: Evaluate) -> None:
        self.image, self.lr = image, lr

    @torch.no_grad()
    def __call__(self, point: _Point) -> None:
        for parameter, gradient in zip(self.image.parameters(), point.gradients, strict=True):
            if self.normalized:
                size = gradient.flatten(1).square().mean(1).sqrt()
                gradient = gradient / size.clamp_min(1e-30).view(-1, *[1] * (gradient.ndim - 1))
            parameter.sub_(gradient, alpha=self.lr)
        self.image.project()


class _NormalizedSgd(_Sgd):
    normalized = True


class _Adam:
    """Kingma and Ba 2015; as torch.optim.Adam, whose first use imports a second's worth of code."""

    def __init__(self, image: Parametrization, lr: float, evaluate: Evaluate) -> None:
        self.image, self.lr, self.step = image, lr, 0
        self.first = [torch.zeros_like(parameter) for parameter in image.parameters()]
        self.second = [torch.zeros_like(parameter) for parameter in image.parameters()]

    @torch.no_grad()
    def __call__(self, point: _Point) -> None:
        self.step += 1
        state = zip(self.image.parameters(), point.gradients, self.first, self.second, strict=True)
        for parameter, gradient, first, second in state:
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            spread = (second / (1 - 0.999**self.step)).sqrt_().add_(1e-8)
            parameter.addcdiv_(first, spread, value=-self.lr / (1 - 0.9**self.step))
        self.image.project()


class _Lbfgs:
    """Limited-memory BFGS with backtracking along the projected path (Nocedal and Wright, ch. 7).

    Every image has its own history and step length, while the objective always sees the whole
    batch, so that targets which belong to single images stay with them.
    """

    def __init__(self, image: Parametrization, lr: float, evaluate: Evaluate) -> None:
        self.image, self.lr, self.evaluate = image, lr, evaluate
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=10)
        self.last: tuple[Tensor, Tensor] | None = None
        one = image.parameters()[0].detach().flatten(1)[:, :1]
        self.curvature = torch.zeros_like(one)  # (N, 1), 0 where an image has no history
        self.stuck = torch.zeros_like(one, dtype=torch.bool)

    def flat(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().flatten(1) for tensor in tensors], 1)

    def move(self, to: Tensor) -> None:
        parameters = self.image.parameters()
        parts = torch.split(to, [parameter[0].numel() for parameter in parameters], 1)
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.detach().copy_(part.view_as(parameter))
        self.image.project()

    def heading(self, here: Tensor, slope: Tensor) -> Tensor:
        if self.last is not None:
            moved, bent = here - self.last[0], slope - self.last[1]
            product, norm = (moved * bent).sum(1, True), bent.square().sum(1, True)
            convex = product > 1e-10 * norm  # else the pair is left out, for that image alone
            self.curvature = torch.where(convex, product / norm, self.curvature)
            self.pairs.append((moved, bent, torch.where(convex, 1 / product, 0)))
            self.stuck &= (moved == 0).all(1, True)
        self.last = (here, slope)
        result, shares = slope, []
        for moved, bent, inverse in reversed(self.pairs):
            shares.append(inverse * (moved * result).sum(1, True))
            result = result - shares[-1] * bent
        # with no history a step moves no parameter by more than a hundredth
        first = 0.01 / slope.abs().amax(1, True).clamp_min(1e-30)
        result = result * torch.where(self.curvature > 0, self.curvature, first)
        for (moved, bent, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            result = result + moved * (share - inverse * (bent * result).sum(1, True))
        return -result

    def __call__(self, point: _Point) -> _Point:
        here, slope = self.flat(self.image.parameters()), self.flat(point.gradients)
        heading = self.heading(here, slope)
        waiting = ~self.stuck
        length = self.lr * waiting.to(here)
        for _ in range(12):
            self.move(here + length * heading)
            found = self.evaluate()
            gain = (slope * (self.flat(self.image.parameters()) - here)).sum(1)
            falls = (gain < 0) & (found.loss <= point.loss + 1e-4 * gain)
            waiting = waiting & ~falls[:, None]
            if not waiting.any():
                return found
            length = torch.where(waiting, length / 2, length)
        # no length helps these images: they stay, try the bare gradient next, and then rest
        self.stuck |= waiting & (self.curvature == 0)
        self.curvature = self.curvature.masked_fill(waiting, 0)
        for _, _, inverse in self.pairs:
            inverse.masked_fill_(waiting, 0)
        self.move(torch.where(waiting, here, here + length * heading))
        return self.evaluate()


_OPTIMIZERS: dict[
    str,
    Callable[[Parametrization, float, Evaluate], Callable[[_Point], _Point | None]],
] = {"sgd": _Sgd, "normalized-sgd": _NormalizedSgd, "adam": _Adam, "lbfgs": _Lbfgs}
