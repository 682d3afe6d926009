"""Lipschitz bounds: how far apart logits can get, layer by layer, and what margin that makes safe."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method
from phosphene.roles import Images, Model
from phosphene.spec import Cost, Nonnegative, size

from ._bound_propagation import Carried, NoRule, Rule, batch_norm_scale, carry, undropped
from ._certificates import Certificates, rounded_down

#: So many multiplications are worth doing at once; of large matrices fewer are looked at together.
_AT_ONCE = 2**20
#: The norms found so far, by the weights' digest and what else they depend on: every batch asks again.
_known: dict[tuple[object, ...], float] = {}


class Bounded(Carried):
    """Activations of which is known that they move at most ``bound`` times as far (l2) as the pixels.

    ``example`` are one picture's, of which only the shape matters.
    """

    what: ClassVar[str] = "Lipschitz bounds"
    rules: ClassVar[Mapping[str, Rule]] = {}

    def __init__(self, example: Tensor, bound: float) -> None:
        self.example, self.bound = example, bound

    def representative(self) -> Tensor:
        return self.example

    def clone(self) -> Bounded:
        return Bounded(self.example.clone(), self.bound)


def spectral_norm(
    weight: Tensor, size: tuple[int, int], *, dilation: tuple[int, int] = (1, 1), groups: int = 1
) -> float:
    """The most by which a convolution (O, I / groups, h, w) lengthens maps of ``size``, or a little more.

    Never less than the largest singular value, whatever its stride and zero padding: on a torus as large as
    the map and the kernel together it is a part of the circular convolution, whose singular values are
    those of its (O, I) matrix at each frequency. Source: Sedghi, Gupta & Long 2019.
    """
    bits = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    key = (hashlib.sha256(bits).digest(), weight.dtype, weight.shape, size, dilation, groups)
    if key not in _known:
        _known[key] = _circular_norm(weight.detach(), size, dilation, groups)
    return _known[key]


def _circular_norm(weight: Tensor, size: tuple[int, int], dilation: tuple[int, int], groups: int) -> float:
    lengths = [d * (n - 1) + 1 for d, n in zip(dilation, weight.shape[2:], strict=True)]
    kernel = weight.new_zeros(*weight.shape[:2], *lengths, dtype=torch.float64)
    kernel[..., :: dilation[0], :: dilation[1]] = weight.double()
    torus = [side + length - 1 for side, length in zip(size, lengths, strict=True)]
    at_frequencies = torch.fft.rfft2(kernel, s=torus).permute(2, 3, 0, 1).flatten(0, 1)
    square = 0.0
    for matrices in at_frequencies.chunk(groups, dim=1):
        matrices = matrices if matrices.shape[1] < matrices.shape[2] else matrices.mH
        # No norm exceeds Frobenius's, here of A A': where that is large comes first, and most never do.
        products = matrices @ matrices.mH
        at_once = max(16, _AT_ONCE // matrices.shape[1] ** 3)
        limits, order = torch.linalg.matrix_norm(products).sort(descending=True)
        for limit, chosen in zip(limits.split(at_once), order.split(at_once), strict=True):
            if float(limit[0]) <= square:
                break
            square = max(square, float(torch.linalg.eigvalsh(products[chosen])[:, -1].max()))
    return math.sqrt(square)


def _contraction(func: Callable[..., Tensor], x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    """What brings nothing further apart: most activations, and what only moves values about."""
    if kwargs.get("mode", "constant") != "constant":
        raise NoRule(f"Lipschitz bounds have no rule for padding by {kwargs['mode']}")
    steepest = max(1.0, abs(kwargs.get("negative_slope", 0)), abs(kwargs.get("alpha", 0)))
    return Bounded(func(x.example, *args, **kwargs), steepest * x.bound)


def _part(func: Callable[..., Tensor], x: Bounded, place: Any) -> Bounded:
    places = place if isinstance(place, tuple) else (place,)
    if not all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in places):
        raise NoRule("Lipschitz bounds have no rule for places that are listed, for one may be taken twice")
    return Bounded(func(x.example, place), x.bound)


def _convolution(
    func: Callable[..., Tensor], x: Bounded, weight: Tensor, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Bounded:  # fmt: skip
    apart = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    size = (x.shape[-2], x.shape[-1])
    norm = spectral_norm(weight, size, dilation=(apart[0], apart[-1]), groups=groups)
    return Bounded(func(x.example, weight, bias, stride, padding, dilation, groups), x.bound * norm)


def _linear(func: Callable[..., Tensor], x: Bounded, weight: Tensor, bias: Any = None) -> Bounded:
    norm = float(torch.linalg.matrix_norm(weight.detach().double(), 2))
    return Bounded(func(x.example, weight, bias), x.bound * norm)


def _average(func: Callable[..., Tensor], x: Bounded, *args: Any, **kwargs: Any) -> Bounded:
    """Sums with weights that are not negative: |A|^2 <= the largest row sum times the largest column sum."""
    with torch.enable_grad():
        ones = torch.ones_like(x.example).requires_grad_()
        rows = func(ones, *args, **kwargs)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    norm = math.sqrt(float(rows.detach().max()) * float(columns.max()))
    return Bounded(func(x.example, *args, **kwargs), x.bound * norm)


def _max_pool(
    func: Callable[..., Tensor], x: Bounded, kernel_size: Any, stride: Any = None, *args: Any, **kwargs: Any
) -> Bounded:
    """Each value counts in as many windows as it lies in."""
    sides = [(n, n) if isinstance(n, int) else tuple(n) for n in (kernel_size, stride or kernel_size)]
    windows = math.prod(math.ceil(length / step) for length, step in zip(*sides, strict=True))
    return Bounded(func(x.example, kernel_size, stride, *args, **kwargs), x.bound * math.sqrt(windows))


def _batch_norm(
    func: Callable[..., Tensor], x: Bounded, mean: Any, var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Bounded:  # fmt: skip
    if training or var is None:
        raise NoRule("Lipschitz bounds have no rule for a batch norm that has no statistics of its own")
    norm = float(batch_norm_scale(var, weight, eps).detach().abs().max())
    return Bounded(func(x.example, mean, var, weight, bias, False, momentum, eps), x.bound * norm)


def _add(func: Callable[..., Tensor], x: Any, other: Any) -> Bounded:
    values = [v.example if isinstance(v, Bounded) else v for v in (x, other)]
    return Bounded(func(*values), sum(v.bound for v in (x, other) if isinstance(v, Bounded)))


def _cat(func: Callable[..., Tensor], parts: Any, *args: Any, **kwargs: Any) -> Bounded:
    values = [part.example if isinstance(part, Bounded) else part for part in parts]
    bounds = [part.bound for part in parts if isinstance(part, Bounded)]
    return Bounded(func(values, *args, **kwargs), math.hypot(*bounds))


Bounded.rules = {
    **dict.fromkeys(("relu", "relu6", "hardtanh", "leaky_relu", "elu", "sigmoid", "tanh"), _contraction),
    **dict.fromkeys(("softplus", "clamp", "pad", "flatten", "reshape", "view", "permute"), _contraction),
    **dict.fromkeys(("transpose", "squeeze", "unsqueeze", "contiguous"), _contraction),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d", "mean", "sum"), _average),
    **{"conv2d": _convolution, "linear": _linear, "max_pool2d": _max_pool, "batch_norm": _batch_norm},
    **{"add": _add, "sub": _add, "cat": _cat, "getitem": _part, "dropout": undropped},
}


def bound_of(model: Model, images: Tensor) -> float:
    """How many times as far (l2) as pictures of this size the logits can move; ModelError without a rule."""
    logits: Bounded = carry(model, Bounded(model.normalize(images[:1]), 1 / float(model.std.min())))
    return logits.bound


def is_the_distance_to_a_plane() -> None:
    """Of two classes with opposite weights the radius is the distance to the plane between them."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.6, -0.8, 0, 0], [-0.6, 0.8, 0, 0]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2), std=[0.5])
    images = torch.tensor([[[[0.9, 0.3], [0.5, 0.5]]], [[[0.3, 0.8], [0.0, 1.0]]]], dtype=torch.float64)
    torch.testing.assert_close(lipschitz(model, images).radius, (images.flatten(1) @ linear.weight[0]).abs())


@method(
    family="defenses",
    title="Lipschitz bound",
    references=[
        Reference(
            key="tsuzuku2018",
            title="Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance",
            authors="Tsuzuku, Sato, Sugiyama",
            year=2018,
            url="https://arxiv.org/abs/1802.04034",
        ),
        Reference(
            key="sedghi2019",
            title="The Singular Values of Convolutional Layers",
            authors="Sedghi, Gupta, Long",
            year=2019,
            url="https://arxiv.org/abs/1805.10408",
        ),
    ],
    invariants=[Nonnegative(field="radius")],
    cost=Cost(forward=size.images + 1),
    tags=["certificate"],
    oracle=is_the_distance_to_a_plane,
)
def lipschitz(model: Model, images: Images) -> Certificates:
    """Prove by the product of the layers' norms that the answer stays in an l2 ball.

    |z(x) - z(x')| <= L |x - x'|,   L = prod_l |W_l|_2 / min std,   R = (z_1st - z_2nd) / (sqrt(2) L)

    with z the logits and |W|_2 a layer's largest singular value: exact for linear layers, bounded from above
    by the circular convolution for convolutions (an estimate from below, as power iteration gives, proves
    nothing). ReLU and its like have the norm 1, batch norm that of its largest factor, overlapping max
    pooling the root of how often windows overlap; branches that are added add their bounds. ``radius`` (N,)
    is never more than the farthest picture there is, sqrt(C H W).

    L is what the worst input of each layer could do if all came together; a deep network that was not built
    for it has a bound far above anything that happens, and nearly no radius. Another operation than those
    above and reshaping is refused by its name (ModelError), and so is a model behind a defence. ``images``
    (N, C, H, W) in [0, 1].

    Source: Tsuzuku et al. 2018, sections 3 and 4; the norms Sedghi et al. 2019.
    """
    logits = model(images).double()
    bound = bound_of(model, images)
    farthest = math.sqrt(images[0].numel())
    ordered = logits.sort(1, descending=True).values
    margin = (
        ordered[:, 0] - ordered[:, 1] if ordered.shape[1] > 1 else torch.full_like(ordered[:, 0], torch.inf)
    )
    radius = (
        (margin / (math.sqrt(2) * bound)).clamp(max=farthest) if bound else torch.full_like(margin, farthest)
    )
    labels = logits.argmax(1)
    return Certificates(
        images=images,
        labels=labels,
        names=tuple(map(model.class_name, labels.tolist())),
        radius=rounded_down(radius, images),
        abstained=radius == 0,
        norm="l2",
        subject=f"{model.name}: L = {bound:.3g}",
    )


@hookimpl
def phosphene_methods():
    return [lipschitz]
