"""Drawing with a model: image parametrisations, regularisers, transforms and the ascent loop.

Everything that synthesises an image shares this: class visualisation, inversion, dreams, textures,
style. A technique brings its objective, one number per image; the rest is here. Images are
(N, C, H, W) in [0, 1], and no image of a batch ever sees another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .bars import progress
from .checkpoints import Piece
from .errors import DivergenceError, InputError, UnknownName
from .interrupts import stoppable

PerImage = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> numbers (N,)
Transform = Callable[[Tensor, Generator], Tensor]
AfterStep = Callable[[Tensor, Tensor, int], Tensor]
Optimizer = Literal["adam", "sgd", "normalized-sgd", "lbfgs"]


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


def _generator(seed: int | None) -> Generator:
    """A generator on the CPU, so that a seed means the same on every device."""
    generator = Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    return generator


def _colour(center: float | Tensor, images: Tensor) -> Tensor:
    """A number or a colour (C,) as something that broadcasts against (N, C, H, W)."""
    return torch.as_tensor(center, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


def noise(
    shape: Iterable[int], *, seed: int | None, mean: float | Tensor = 0.5, sd: float | Tensor = 0.1
) -> Tensor:
    """Gaussian noise images (N, C, H, W), clipped into [0, 1]: the usual start.

    All images of the batch get the same noise, so that a batch gives what its images give alone.
    mean, sd: a number or a colour (C,) each; of the mean's precision, on its device.
    """
    count, *size = shape
    draw = torch.randn(1, *size, generator=_generator(seed)).to(torch.as_tensor(mean))
    return (_colour(mean, draw) + _colour(sd, draw) * draw).clamp(0, 1).repeat(count, 1, 1, 1)


#: What stands in for hidden pixels.
Baseline = Literal["grey", "zero", "mean", "blur", "noise"]


def baseline(images: Tensor, kind: Baseline, *, sigma: float, seed: int | None = None) -> Tensor:
    """What stands in for hidden pixels, (N, C, H, W) like the images.

    Mid-grey, zero (black), each picture's mean colour, its blur by ``sigma`` pixels, or noise about
    mid-grey, the same for all images.
    """
    match kind:
        case "grey":
            return torch.full_like(images, 0.5)
        case "zero":
            return torch.zeros_like(images)
        case "mean":
            return images.mean((2, 3), keepdim=True).expand_as(images)
        case "blur":
            return gaussian_blur(images, sigma)
        case "noise":
            return noise(images.shape, seed=seed, sd=0.3).to(images)
    raise UnknownName("baseline", kind, get_args(Baseline))


def l2_penalty(images: Tensor, center: float | Tensor = 0.5) -> Tensor:
    """||I - center||^2 of each image (N,), center a number or a colour (C,): the seed's (lecture 21.6.1)."""
    return (images - _colour(center, images)).square().sum((1, 2, 3))


def total_variation(images: Tensor, beta: float = 2.0) -> Tensor:
    """Sum of (dx^2 + dy^2)^(beta/2) over channels and the (H-1) x (W-1) corners: (N,), beta > 0.

    Differentiable everywhere; where an image is flat the gradient is 0, also for beta < 2.
    Source: Mahendran and Vedaldi 2015 (lecture 21.9).
    """
    corner = images[..., :-1, :-1]
    square = (images[..., :-1, 1:] - corner).square() + (images[..., 1:, :-1] - corner).square()
    steep = square > 0
    # the root's slope at 0 is infinite: keep flat corners out of it, on the way back as well
    power = torch.where(steep, square, 1) ** (beta / 2)
    return torch.where(steep, power, 0).sum((1, 2, 3))


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur (N, C, H, W) by a Gaussian of sigma >= 0 pixels: SciPy's ``gaussian_filter(mode="reflect")``."""
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


def clip_smallest(
    images: Tensor, percentile: float, center: float | Tensor = 0.5, *, gradient: Tensor | None = None
) -> Tensor:
    """Set the pixels that matter least to center: (N, C, H, W) -> the same.

    A pixel matters by its norm ||x - center|| over the channels or, given the objective's gradient g
    (N, C, H, W), by its contribution |sum_c (x - center) g|; those below that percentile (0 to 100)
    of their own image go. Source: Yosinski et al. 2015.
    """
    away = images - _colour(center, images)
    size = away.norm(dim=1, keepdim=True)
    if gradient is not None:
        size = (away * gradient).sum(1, keepdim=True).abs()
    least = torch.quantile(size.flatten(1), percentile / 100, dim=1).view(-1, 1, 1, 1)
    return torch.where(size < least, _colour(center, images), images)


def gram(features: Tensor) -> Tensor:
    """Gram matrices G = F F^T / (H W) of features (N, C, H, W): (N, C, C), scaled as in Gatys's code."""
    return torch.einsum("nchw,ndhw->ncd", features, features) / features[0, 0].numel()


def jitter(images: Tensor, generator: Generator, *, pixels: int) -> Tensor:
    """Roll all images by one random shift of up to so many pixels each way."""
    down, across = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
    return torch.roll(images, (down, across), (-2, -1))


#: Pictures of this side are convolved faster with their channels last.
_LARGE = 96
#: After so many steps in which nothing at all has changed, nothing will.
_FLAT = 10


class Ascent(NamedTuple):
    """What came of it: images (N, C, H, W), and the objective (steps, N) as each step found it.

    ``frames`` (F, N, C, H, W), bytes, are the images on the way, where they were asked for.
    """

    images: Tensor
    scores: Tensor
    frames: Tensor | None = None


class _Point(NamedTuple):
    """The problem at one setting of the parameters; the loss is what goes down."""

    scores: Tensor
    loss: Tensor
    pixel_gradient: Tensor  # of the objective alone
    gradient: Tensor  # of the loss, by the parameter


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
    frames: int = 0,
    seed: int | None = None,
) -> Ascent:
    """Change an image, step by step, until an objective is large (or small): I <- I + lr grad.

    objective: images (N, C, H, W) -> scores (N,), each of its own image only; it is maximised, less the
    regularizer's penalties (N,) and the parametrisation's own, or, if not ``maximize``, minimised together
    with them.
    optimizer: "sgd" is the plain step above, "normalized-sgd" divides each image's gradient by its root
    mean square, "adam" is Adam, and "lbfgs" a quasi-Newton step whose length, lr at first (natural: 1),
    is quartered until the loss falls; it takes no transform.
    transform: (images, generator) -> what the objective sees of them, drawn anew every step.
    after_step: (images, pixel gradient of the objective, step) -> images, edits between steps.
    frames: how many images to keep on the way, evenly spread over the steps; the last is the result.

    A batch gives what its images give alone, and the same seed the same image. Inside ``run``, Ctrl-C ends
    it after the step it is at, and with ``out`` what is done is kept, to go on from.

    Raises DivergenceError if the objective or its gradient is no longer finite, if an image cannot start
    because its gradient is zero at every pixel, or if ten steps have not changed its objective at all;
    InputError if steps, lr or what the objective returns make no sense.
    Source: Simonyan et al. 2014, lecture 21.6.
    """
    if steps < 1 or not (lr > 0 and math.isfinite(lr)):
        raise InputError(f"Needs steps >= 1 and lr > 0, got {steps} and {lr}.")
    if optimizer not in get_args(Optimizer):
        raise UnknownName("optimizer", optimizer, get_args(Optimizer))
    if optimizer == "lbfgs" and transform is not None:
        raise InputError("L-BFGS needs the same objective at every step: no transform, or adam.")
    generator = _generator(seed)

    def evaluate() -> _Point:
        with torch.enable_grad():
            images = image.image()
            seen = images if transform is None else transform(images, generator)
            if min(seen.shape[2:]) >= _LARGE:
                seen = seen.contiguous(memory_format=torch.channels_last)
            scores, pixel_gradient = _per_image(objective, seen, images, "objective")
            loss, total = (-scores, -pixel_gradient) if maximize else (scores, pixel_gradient)
            if regularizer is not None:
                penalty, its_gradient = _per_image(regularizer, images, images, "regularizer")
                loss, total = loss + penalty, total + its_gradient
            (gradient,) = torch.autograd.grad(images, image.parameter, total)
            if (cost := image.penalty()) is not None:
                loss = loss + cost.detach()
                gradient = gradient + torch.autograd.grad(cost.sum(), image.parameter)[0]
        return _Point(scores, loss, pixel_gradient, gradient)

    update = (_Lbfgs if optimizer == "lbfgs" else _FirstOrder)(image, lr, evaluate, optimizer)
    piece = Piece()
    scores: list[Tensor] = []
    film: list[Tensor] = []
    if state := piece.state:
        generator.set_state(state.pop("generator"))
        # Adam counts its steps on the CPU
        state = {n: t if n == "step" else t.to(image.parameter.device) for n, t in state.items()}
        scores, film = list(state.pop("scores")), list(state.pop("frames", ()))
        with torch.no_grad():
            image.parameter.copy_(state.pop("parameter"))
        update.recall(state)

    def take() -> None:
        film.append((image.image().detach() * 255).round().byte())

    def keep() -> None:
        done = {"parameter": image.parameter.detach(), "scores": torch.stack(scores)} | update.memory()
        done |= {"frames": torch.stack(film)} if film else {}
        kept = {name: value.clone() for name, value in done.items()}
        piece.keep(generator=generator.get_state(), **kept)

    point: _Point | None = None
    asleep = torch.tensor(not scores, device=image.parameter.device).repeat(len(image.parameter))
    doing, named = ("Ascending", "objective") if maximize else ("Descending", "loss")
    standing = lambda: f"{named} {float(scores[-1].mean()):.4g}"
    with stoppable() as stop:
        early = stop.asked  # by then, what it starts from is not what it would be
        for step in progress(range(len(scores), steps), doing, note=standing):
            point = point or evaluate()
            _check(point, step, lr)
            scores.append(point.scores)
            if step < _FLAT:
                asleep = asleep & _dead(point, maximize)
                # a random change may hide a unit from its start, but not every time
                if transform is None or step == min(_FLAT, steps) - 1:
                    _check_start(asleep)
            gradient = point.pixel_gradient
            point = update(point)
            if after_step is not None:
                image.assign(after_step(image.image().detach(), gradient, step))
                point = None
            if step == _FLAT - 1:
                _check_flat(torch.stack(scores), maximize)
            if len(film) < len(scores) * min(frames, steps) // steps:
                take()
            if not early and (stop.asked or piece.due() or len(scores) == steps):
                keep()
            if stop.asked and len(scores) < steps:
                if frames:
                    take()
                stop.told = stop.told or f"after {len(scores)} of {steps} steps"
                break
    return Ascent(image.image().detach().clone(), torch.stack(scores), torch.stack(film) if film else None)


def as_long(parts: Sequence[Tensor]) -> list[Tensor]:
    """Rows (steps, ...) as many as the longest has: where Ctrl-C ended some, the last stands for the rest."""
    steps = torch.arange(max(map(len, parts)))
    return [part[steps.clamp(max=len(part) - 1)] for part in parts]


def in_turn(stages: Sequence[Ascent]) -> Ascent:
    """Ascents that each began where the one before ended, as one; frames get the last one's size."""
    last, films = stages[-1].images, [stage.frames for stage in stages if stage.frames is not None]
    sized = [F.interpolate(f.flatten(0, 1).float(), last.shape[-2:]).byte() for f in films]
    frames = torch.cat(sized).unflatten(0, (-1, len(last))) if sized else None
    return Ascent(last, torch.cat([stage.scores for stage in stages]), frames)


def _per_image(function: PerImage, seen: Tensor, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What a function of what is seen gives, (N,), and its gradient by the images."""
    values = function(seen)
    if values.shape != images.shape[:1]:
        raise InputError(f"The {name} must give one number per image, not {tuple(values.shape)}.")
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is not None:
            return values.detach(), gradient
    raise InputError(f"The {name} does not depend on the images through anything differentiable.")


def _check(point: _Point, step: int, lr: float) -> None:
    finite = (point.loss + point.scores).isfinite() & point.gradient.flatten(1).isfinite().all(1)
    if not finite.all():
        raise DivergenceError(
            f"Step {step}: the objective or its gradient is no longer finite for images "
            f"{(~finite).nonzero().flatten().tolist()}; lower lr (now {lr:g}) or the regularizer's weight."
        )


def _dead(point: _Point, maximize: bool) -> Tensor:
    """Which images (N,) the objective has no slope for; a loss of zero has arrived, not died."""
    dead = (point.pixel_gradient == 0).flatten(1).all(1)
    return dead if maximize else dead & (point.scores != 0)


def _check_start(dead: Tensor) -> None:
    if dead.any():
        raise DivergenceError(
            f"Images {dead.nonzero().flatten().tolist()} cannot start: the objective's gradient is "
            "zero at every pixel (a dead ReLU, or nothing left to gain); try another seed, a start "
            "from noise or another initial image."
        )


def _check_flat(scores: Tensor, maximize: bool) -> None:
    flat = (scores == scores[0]).all(0)
    if not maximize:
        flat &= scores[0] != 0
    if flat.any():
        raise DivergenceError(
            f"The objective of images {flat.nonzero().flatten().tolist()} is flat: {len(scores)} steps have "
            "not changed it at all (saturated, or nothing left to gain); try a larger lr or another start."
        )


class _FirstOrder:
    """One of torch's own optimisers, which treat every number, and so every image, by itself."""

    def __init__(self, image: Parametrization, lr: float, evaluate: Callable[[], _Point], kind: str) -> None:
        self.image, self.kind = image, kind
        self.optimizer = (torch.optim.Adam if kind == "adam" else torch.optim.SGD)([image.parameter], lr)

    def __call__(self, point: _Point) -> None:
        gradient = point.gradient
        if self.kind == "normalized-sgd":
            mean_square = gradient.square().mean(tuple(range(1, gradient.ndim)), keepdim=True)
            gradient = gradient / mean_square.sqrt().clamp_min(1e-30)
        self.image.parameter.grad = gradient
        self.optimizer.step()
        self.image.project()

    def memory(self) -> dict[str, Tensor]:
        """What the next step depends on, beside the parameter."""
        return {n: v for n, v in self.optimizer.state[self.image.parameter].items() if v is not None}

    def recall(self, memory: dict[str, Tensor]) -> None:
        self.optimizer.state[self.image.parameter] = memory


class _Lbfgs:
    """Limited-memory BFGS with backtracking along the projected path (Nocedal and Wright, ch. 7).

    Every image has its own history and step length, while the objective always sees the whole
    batch, so that targets which belong to single images stay with them.
    """

    def __init__(self, image: Parametrization, lr: float, evaluate: Callable[[], _Point], kind: str) -> None:
        self.image, self.lr, self.evaluate = image, lr, evaluate
        self.place = image.parameter.detach().view(len(image.parameter), -1)  # (N, D), the parameter itself
        self.last: tuple[Tensor, Tensor] | None = None
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=10)
        self.curvature = torch.zeros_like(self.place[:, :1])  # 0 where an image has no history
        self.resting = self.curvature != 0
        self.stayed = self.resting
        self.length = torch.full_like(self.curvature, lr)

    def __call__(self, point: _Point) -> _Point:
        here, slope = self.place.clone(), point.gradient.flatten(1)
        heading = self.heading(here, slope)
        waiting = ~self.resting
        length = torch.where(waiting, self.length, 0)
        for _ in range(2):  # the objective is dear: two looks a step, and shorter ones at the next
            self.place.copy_(here + length * heading)
            self.image.project()
            found = self.evaluate()
            gain = (slope * (self.place - here)).sum(1)
            waiting &= ~((gain < 0) & (found.loss <= point.loss + 1e-4 * gain))[:, None]
            length = torch.where(waiting, length / 4, length)
            if not waiting.any():
                break
        waiting &= found.loss.isfinite()[:, None]  # a second number that is none is for the user to hear
        # what did not fall stays where it was
        self.place.copy_(torch.where(waiting, here, self.place))
        rows = [waiting.view(-1, *[1] * (old.ndim - 1)) for old in point]
        found = _Point(*map(torch.where, rows, point, found))
        self.stayed = waiting
        # no length helps these images: they try the bare gradient next, and then rest
        hopeless = waiting & (length < self.lr * 2.0**-12)
        self.length = torch.where(waiting & ~hopeless, length, self.lr)
        self.resting |= hopeless & (self.curvature == 0)
        for history in (self.curvature, *(inverse for *_, inverse in self.pairs)):
            history.masked_fill_(hopeless, 0)
        return found

    def memory(self) -> dict[str, Tensor]:
        """What the next step depends on, beside the parameter."""
        names = ("curvature", "resting", "stayed", "length")
        found = {name: getattr(self, name) for name in names}
        found |= {} if self.last is None else {"here": self.last[0], "slope": self.last[1]}
        pairs = zip(("moved", "bent", "inverse"), zip(*self.pairs, strict=True), strict=False)
        return found | {name: torch.stack(column) for name, column in pairs}

    def recall(self, memory: dict[str, Tensor]) -> None:
        if "here" in memory:
            self.last = memory.pop("here"), memory.pop("slope")
        columns = [memory.pop(name) for name in ("moved", "bent", "inverse") if name in memory]
        self.pairs.extend(zip(*columns, strict=True))
        vars(self).update(memory)

    def heading(self, here: Tensor, slope: Tensor) -> Tensor:
        if self.last is not None:
            moved, bent = here - self.last[0], slope - self.last[1]
            product, norm = (moved * bent).sum(1, True), bent.square().sum(1, True)
            # else the pair is left out, for that image alone; one that stayed moved by rounding at most
            convex = (product > 1e-10 * norm) & ~self.stayed
            self.curvature = torch.where(convex, product / norm, self.curvature)
            self.pairs.append((moved, bent, torch.where(convex, 1 / product, 0)))
            self.resting &= (moved == 0).all(1, True)
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
