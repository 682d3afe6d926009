"""Lipschitz bound: certified l2 radius from the product of the layers' spectral norms."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, to_float64
from phosphene.roles import Images, Model
from phosphene.spec import Cost, Equivariant, InvariantTo, Nonnegative, ScalesWith, size
from phosphene.testing import linear_model

from ._bound_propagation import (
    BoundTensor,
    Rule,
    UnsupportedOperation,
    batch_norm_scale,
    dropout_rule,
    propagate,
)
from ._certificates import Certificates

#: Multiplications in one batch of eigenvalue problems: of large matrices fewer are solved together.
# equivalent mutants: only how many are solved together
_MAX_MULTIPLICATIONS = 2**20
#: Spectral norms by the digest of the weights and the other arguments: every batch of images needs them
#: again.
_norm_cache: dict[tuple[object, ...], float] = {}


class LipschitzBound(BoundTensor):
    """Activations that change at most ``bound`` times as much (l2) as the pixels.

    ``example`` is a tensor of activations, of which only the shape is used.
    """

    description: ClassVar[str] = "Lipschitz bounds"
    rules: ClassVar[Mapping[str, Rule]] = {}

    def __init__(self, example: Tensor, bound: float) -> None:
        self.example, self.bound = example, bound

    def example_tensor(self) -> Tensor:
        return self.example

    def clone(self) -> LipschitzBound:
        return LipschitzBound(self.example.clone(), self.bound)


@torch.no_grad()
def spectral_norm(
    weight: Tensor, size: tuple[int, int], *, dilation: tuple[int, int] = (1, 1), groups: int = 1
) -> float:
    """An upper bound of the spectral norm of a convolution (O, I / groups, h, w) on feature maps of ``size``.

    It holds for every stride and zero padding: the convolution is a part of the circular one on a torus as
    large as map and kernel together, whose singular values are those of its (O, I) matrix at each frequency.
    Source: Sedghi, Gupta & Long 2019.
    """
    data = weight.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    key = (hashlib.sha256(data).digest(), weight.dtype, weight.shape, size, dilation, groups)
    if key not in _norm_cache:
        _norm_cache[key] = _circular_spectral_norm(weight, size, dilation, groups)
    return _norm_cache[key]


def _circular_spectral_norm(
    weight: Tensor, size: tuple[int, int], dilation: tuple[int, int], groups: int
) -> float:
    extents = [d * (n - 1) + 1 for d, n in zip(dilation, weight.shape[2:], strict=True)]
    weight = to_float64(weight)
    kernel = weight.new_zeros(*weight.shape[:2], *extents)
    kernel[..., :: dilation[0], :: dilation[1]] = weight
    torus = [side + extent - 1 for side, extent in zip(size, extents, strict=True)]
    spectrum = torch.fft.rfft2(kernel, s=torus).permute(2, 3, 0, 1).flatten(0, 1)
    largest = 0.0  # eigenvalue of A A', the square of the singular value
    for matrices in spectrum.chunk(groups, dim=1):
        # equivalent mutants: A A' and A' A have the same largest eigenvalue
        matrices = matrices if matrices.shape[1] < matrices.shape[2] else matrices.mH
        products = matrices @ matrices.mH
        # The Frobenius norm is an upper bound: starting with the largest, most frequencies need no solution.
        # equivalent mutants: only how many are solved together
        max_batch = max(16, _MAX_MULTIPLICATIONS // matrices.shape[1] ** 3)
        # equivalent mutants: the order decides how many are solved, not which eigenvalue is the largest
        upper_bounds, order = torch.linalg.matrix_norm(products).sort(descending=True)
        for bounds, frequencies in zip(upper_bounds.split(max_batch), order.split(max_batch), strict=True):
            if float(bounds[0]) <= largest:
                break
            largest = max(largest, float(torch.linalg.eigvalsh(products[frequencies])[:, -1].max()))
    return math.sqrt(largest)


def _contraction(func: Callable[..., Tensor], x: LipschitzBound, *args: Any, **kwargs: Any) -> LipschitzBound:
    """Activations with a slope of at most 1, or their steepest slope, and reshaping."""
    if kwargs.get("mode", "constant") != "constant":
        raise UnsupportedOperation(f"Lipschitz bounds have no rule for padding by {kwargs['mode']}")
    slope = max(1.0, abs(kwargs.get("negative_slope", 0)), abs(kwargs.get("alpha", 0)))
    return LipschitzBound(func(x.example, *args, **kwargs), slope * x.bound)


def _slice(func: Callable[..., Tensor], x: LipschitzBound, index: Any) -> LipschitzBound:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in parts):
        raise UnsupportedOperation(
            "Lipschitz bounds have no rule for indexing by a list, which may repeat an element"
        )
    return LipschitzBound(func(x.example, index), x.bound)


def _convolution(
    func: Callable[..., Tensor], x: LipschitzBound, weight: Tensor, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> LipschitzBound:  # fmt: skip
    steps = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    size = (x.shape[-2], x.shape[-1])
    norm = spectral_norm(weight, size, dilation=(steps[0], steps[-1]), groups=groups)
    return LipschitzBound(func(x.example, weight, bias, stride, padding, dilation, groups), x.bound * norm)


def _linear(
    func: Callable[..., Tensor], x: LipschitzBound, weight: Tensor, bias: Any = None
) -> LipschitzBound:
    norm = float(torch.linalg.matrix_norm(to_float64(weight.detach()), 2))
    return LipschitzBound(func(x.example, weight, bias), x.bound * norm)


def _average(func: Callable[..., Tensor], x: LipschitzBound, *args: Any, **kwargs: Any) -> LipschitzBound:
    """Weighted sums with weights >= 0: |A|_2^2 <= largest row sum times largest column sum."""
    with torch.enable_grad():
        ones = torch.ones_like(x.example).requires_grad_()
        row_sums = func(ones, *args, **kwargs)
        (column_sums,) = torch.autograd.grad(row_sums.sum(), ones)
    norm = math.sqrt(float(row_sums.detach().max()) * float(column_sums.max()))
    return LipschitzBound(func(x.example, *args, **kwargs), x.bound * norm)


def _max_pool(
    func: Callable[..., Tensor], x: LipschitzBound, kernel_size: Any, stride: Any = None, *args: Any,
    **kwargs: Any,
) -> LipschitzBound:  # fmt: skip
    """The root of the number of windows that a value lies in."""
    sides = [(n, n) if isinstance(n, int) else tuple(n) for n in (kernel_size, stride or kernel_size)]
    # equivalent mutants: both are pairs
    windows = math.prod(math.ceil(length / step) for length, step in zip(*sides, strict=True))
    return LipschitzBound(func(x.example, kernel_size, stride, *args, **kwargs), x.bound * math.sqrt(windows))


def _batch_norm(
    func: Callable[..., Tensor], x: LipschitzBound, mean: Any, var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> LipschitzBound:  # fmt: skip
    """The largest factor of a channel."""
    if training or var is None:
        raise UnsupportedOperation(
            "Lipschitz bounds have no rule for a batch norm without running statistics"
        )
    norm = float(batch_norm_scale(var, weight, eps).detach().abs().max())
    return LipschitzBound(func(x.example, mean, var, weight, bias, False, momentum, eps), x.bound * norm)


def _add(func: Callable[..., Tensor], x: Any, other: Any) -> LipschitzBound:
    """|f + g| <= |f| + |g|."""
    values = [v.example if isinstance(v, LipschitzBound) else v for v in (x, other)]
    return LipschitzBound(func(*values), sum(v.bound for v in (x, other) if isinstance(v, LipschitzBound)))


def _concatenate(func: Callable[..., Tensor], parts: Any, *args: Any, **kwargs: Any) -> LipschitzBound:
    """|(f, g)| <= sqrt(|f|^2 + |g|^2)."""
    values = [part.example if isinstance(part, LipschitzBound) else part for part in parts]
    bounds = [part.bound for part in parts if isinstance(part, LipschitzBound)]
    return LipschitzBound(func(values, *args, **kwargs), math.hypot(*bounds))


LipschitzBound.rules = {
    **dict.fromkeys(("relu", "relu6", "hardtanh", "leaky_relu", "elu", "sigmoid", "tanh"), _contraction),
    **dict.fromkeys(("softplus", "clamp", "pad", "flatten", "reshape", "view", "permute"), _contraction),
    **dict.fromkeys(("transpose", "squeeze", "unsqueeze", "contiguous"), _contraction),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d", "mean", "sum"), _average),
    **{"conv2d": _convolution, "linear": _linear, "max_pool2d": _max_pool, "batch_norm": _batch_norm},
    **{"add": _add, "sub": _add, "cat": _concatenate, "getitem": _slice, "dropout": dropout_rule},
}


def lipschitz_bound(model: Model, images: Tensor) -> float:
    """L with |z(x) - z(x')|_2 <= L |x - x'|_2 for images of this size; ModelError without a rule."""
    inputs = LipschitzBound(model.normalize(images[:1]), 1 / float(model.std.min()))
    logits: LipschitzBound = propagate(model, inputs)
    return logits.bound


def radius_is_the_distance_to_the_decision_boundary() -> None:
    """Of two classes with opposite weights the radius is the distance to the plane between them."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.6, -0.8, 0, 0], [-0.6, 0.8, 0, 0]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2), std=[0.5])
    images = torch.tensor([[[[0.9, 0.3], [0.5, 0.5]]], [[[0.3, 0.8], [0.0, 1.0]]]], dtype=torch.float64)
    distances = (images.flatten(1) @ linear.weight[0]).abs()
    result = lipschitz(model, images)
    torch.testing.assert_close(result.radius, distances)
    torch.testing.assert_close(lipschitz(model, images[:1]).radius, distances[:1])
    assert result.labels.tolist() == [0, 1]
    linear.weight.data *= 0.02
    linear.bias = nn.Parameter(torch.tensor([0.0, 0.2], dtype=torch.float64))
    farthest = torch.full((2,), 2.0, dtype=torch.float64)  # the diameter: root of 4 pixels
    torch.testing.assert_close(lipschitz(model, images).radius, farthest)
    torch.testing.assert_close(lipschitz(linear_model(images.new_zeros(2, 1, 2, 2)), images).radius, farthest)
    torch.testing.assert_close(lipschitz(linear_model(images.new_ones(1, 1, 2, 2)), images).radius, farthest)


def single_operations_have_their_factor() -> None:
    """The factor of each operation: the norm of its Jacobian, or the closed form of its bound."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 6, generator=generator, dtype=torch.float64)
    norm, plain = (nn.BatchNorm2d(4, eps=0.1, affine=affine).double().eval() for affine in (True, False))
    norm.weight.data = torch.tensor([0.3, -2.0, 1.0, 0.1], dtype=torch.float64)
    norm.running_var = torch.tensor([0.9, 1.5, 0.4, 0.1], dtype=torch.float64)
    operations: list[tuple[Callable[[Any], Any], float]] = [
        (nn.ReLU(), 1), (nn.LeakyReLU(-3.0), 3), (nn.LeakyReLU(0.1), 1), (nn.ELU(alpha=2.5), 2.5),
        (norm, 2 / 1.6**0.5), (plain, 1 / 1.1**0.5), (nn.Dropout().eval(), 1), (lambda x: x[:, 1:], 1),
        (lambda x: x + x, 2), (lambda x: x - 1.5, 1), (lambda x: torch.cat([x, x + x, x], 1), 6**0.5),
        (lambda x: x.mean((2, 3)), 24**-0.5), (lambda x: x.sum(1), 2), (lambda x: F.avg_pool2d(x, 2), 0.5),
        (lambda x: F.avg_pool2d(x, 2, 1), 1), (lambda x: F.avg_pool2d(x, 3, 1, 1), 1),
        (nn.MaxPool2d(2), 1), (nn.MaxPool2d(3, 2), 2), (nn.MaxPool2d((3, 2), (2, 1)), 2),
        (nn.Conv2d(4, 4, 1, groups=4, bias=False).double(), 0.0), (nn.Linear(6, 3).double(), 0.0),
    ]  # fmt: skip
    for operation, factor in operations:
        if isinstance(operation, (nn.Conv2d, nn.Linear)):
            weight = torch.randn(operation.weight.shape, generator=generator, dtype=torch.float64)
            operation.weight.data = weight
            factor = float(weight.abs().max() if weight.ndim == 4 else torch.linalg.matrix_norm(weight, 2))
        bound = operation(LipschitzBound(x, 0.7))
        assert math.isclose(bound.bound, 0.7 * factor), (operation, bound.bound, factor)
        torch.testing.assert_close(bound.example, operation(x))
    LipschitzBound(original := x.clone(), 1.0).relu_()
    assert torch.equal(original, x), "an operation in place changed a tensor of the caller"


def convolutions_have_the_norm_of_their_matrix() -> None:
    """The norm of the circular convolution's matrix on a torus as large as map and kernel together."""
    generator = torch.Generator().manual_seed(0)
    for groups, (height, width), dilation in ((1, (3, 2), (1, 1)), (2, (2, 3), (2, 1)), (2, (1, 1), (1, 1))):
        weight = torch.randn(6, 4 // groups, height, width, generator=generator, dtype=torch.float64) / 20
        extents = (dilation[0] * (height - 1), dilation[1] * (width - 1))
        torus = (1, 4, 3 + extents[0], 4 + extents[1])
        units = torch.eye(math.prod(torus), dtype=torch.float64).view(-1, *torus[1:])
        padded = F.pad(units, (0, extents[1], 0, extents[0]), mode="circular")
        matrix = F.conv2d(padded, weight, dilation=dilation, groups=groups).flatten(1)
        expected = float(torch.linalg.matrix_norm(matrix, 2))
        assert math.isclose(spectral_norm(weight, (3, 4), dilation=dilation, groups=groups), expected)
        inputs: Any = LipschitzBound(units[:1, :, :3, :4], 2.0)
        options: Any = (torch.arange(6.0, dtype=torch.float64), (2, 1), (3, 2), dilation, groups)
        bound: Any = F.conv2d(inputs, weight, *options)
        assert math.isclose(bound.bound, 2 * expected)
        torch.testing.assert_close(bound.example, F.conv2d(inputs.example, weight, *options))


def bounds_in_closed_form() -> None:
    """The radius on linear models, and the factor of every operation."""
    radius_is_the_distance_to_the_decision_boundary()
    single_operations_have_their_factor()
    convolutions_have_the_norm_of_their_matrix()


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
    relations=[
        *(Equivariant(transform, fields=("radius",)) for transform in ("hflip", "vflip", "transpose")),
        ScalesWith("logits", power=0, fields=("radius",)),
        InvariantTo("logit_shift", fields=("radius",)),
        InvariantTo("batch_order", fields=("radius",)),
    ],
    cost=Cost(forward=size.images + 1),
    tags=["certificate"],
    oracle=bounds_in_closed_form,
    demo={"model": "builtin:shapes-lipschitz", "images": "builtin:scenes/8"},
)
def lipschitz(model: Model, images: Images) -> Certificates:
    """Lipschitz bound: certified l2 radius from the product of the layers' spectral norms.

    |z(x) - z(x')| <= L |x - x'|,   L = prod_l |W_l|_2 / min std,   R = (z_1st - z_2nd) / (sqrt(2) L)

    with z the logits and |W|_2 the largest singular value of a layer: exact for linear layers, bounded from
    above by the circular convolution for convolutions (power iteration bounds it from below and proves
    nothing). ReLU and similar activations have norm 1, batch norm its largest factor, overlapping max pooling
    the root of the number of overlapping windows; the bounds of branches that are added are added.

    L is attained only if the worst inputs of all layers coincide. For a deep network that was not trained for
    a small L the bound is far above the network's true sensitivity, and the radius close to 0;
    ``lipschitz_fit`` trains for a small L, and ``builtin:shapes-lipschitz`` is a network that it trained.

    Returns:
        ``radius`` (N,) in l2, at most sqrt(C H W), the largest distance of two images; ``labels`` (N,) the
        predicted classes; ``subject`` names L.

    Raises:
        ModelError: an operation without a rule, by name, or a model behind a defense.

    Example::
        from phosphene import run

        result = run("lipschitz", images="builtin:scenes/2")
        result.subject, result.radius  # L, and (2,)

    Source: Tsuzuku et al. 2018, sections 3 and 4; spectral norms Sedghi et al. 2019.
    """
    logits = to_float64(model(images))
    bound = lipschitz_bound(model, images)
    diameter = math.sqrt(images[0].numel())  # no two images are farther apart
    descending = logits.sort(1, descending=True).values
    if descending.shape[1] > 1:
        margin = descending[:, 0] - descending[:, 1]
    else:
        margin = torch.full_like(descending[:, 0], torch.inf)
    if bound:
        radius = (margin / (math.sqrt(2) * bound)).clamp(max=diameter)
    else:  # constant logits
        radius = torch.full_like(margin, diameter)
    subject = f"{model.name}: L = {bound:.3g}"
    return Certificates.build(model, images, logits.argmax(1), radius, norm="l2", subject=subject)


@hookimpl
def phosphene_methods():
    return [lipschitz]
