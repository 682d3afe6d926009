"""Interval bound propagation: boxes of pictures through the network, and what cannot happen inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.roles import Images
from phosphene.roles import Model as ModelInput
from phosphene.spec import Cost, Nonnegative, param, size

from ._bound_propagation import Carried, NoRule, Rule, batch_norm_scale, carry, undropped
from ._certificates import Certificates, rounded_down


class Interval(Carried):
    """All tensors from ``lower`` to ``upper``; ``affine`` is what a linear layer made it of."""

    what: ClassVar[str] = "interval bounds"
    rules: ClassVar[Mapping[str, Rule]] = {}

    def __init__(
        self, lower: Tensor, upper: Tensor, affine: tuple[Interval, Tensor, Any] | None = None
    ) -> None:
        self.lower, self.upper, self.affine = lower, upper, affine

    @classmethod
    def about(cls, middle: Tensor, radius: Tensor, affine: Any = None) -> Interval:
        """From its middle and how far it goes to either side."""
        return cls(middle - radius, middle + radius, affine)

    @property
    def middle(self) -> Tensor:
        """Half-way between the two ends."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """How far it goes to either side."""
        return (self.upper - self.lower) / 2

    def representative(self) -> Tensor:
        return self.lower

    def clone(self) -> Interval:
        return Interval(self.lower.clone(), self.upper.clone())


def _monotone(func: Callable[..., Tensor], x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """What never falls where its input rises keeps the ends: activations, pooling, reshaping."""
    if kwargs.get("negative_slope", 0) < 0:
        raise NoRule(f"interval bounds have no rule for {func.__name__} with a negative slope")
    return Interval(func(x.lower, *args, **kwargs), func(x.upper, *args, **kwargs))


def _linear(
    func: Callable[..., Tensor], x: Interval, weight: Tensor, bias: Any = None, *rest: Any, **kwargs: Any
) -> Interval:
    """W m + b and |W| r: exact for one layer, in the interval's own precision."""
    if not isinstance(x, Interval) or not isinstance(weight, Tensor):
        raise NoRule(
            f"interval bounds have no rule for {func.__name__} with weights that depend on the picture"
        )
    weight, bias = weight.to(x.lower), None if bias is None else bias.to(x.lower)
    spread = func(x.radius, weight.abs(), None, *rest, **kwargs)
    affine = (x, weight, bias) if func.__name__ == "linear" else None
    return Interval.about(func(x.middle, weight, bias, *rest, **kwargs), spread, affine)


def _batch_norm(
    func: Callable[..., Tensor], x: Interval, mean: Any, var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Interval:  # fmt: skip
    if training or var is None:
        raise NoRule("interval bounds have no rule for a batch norm that has no statistics of its own")
    mean, var, weight, bias = (None if t is None else t.to(x.lower) for t in (mean, var, weight, bias))
    scale = batch_norm_scale(var, weight, eps).abs().view(1, -1, *[1] * (x.dim() - 2))
    return Interval.about(func(x.middle, mean, var, weight, bias, False, momentum, eps), x.radius * scale)


def _add(func: Any, x: Any, other: Any) -> Interval:
    (low, high), (more, most) = _ends(x), _ends(other)
    return Interval(low + more, high + most)


def _subtract(func: Any, x: Any, other: Any) -> Interval:
    (low, high), (more, most) = _ends(x), _ends(other)
    return Interval(low - most, high - more)


def _scale(func: Callable[..., Tensor], x: Any, other: Any) -> Interval:
    if func.__name__.startswith("mul") and not isinstance(x, Interval):
        x, other = other, x
    if isinstance(other, Interval) or not isinstance(x, Interval):
        raise NoRule(
            f"interval bounds have no rule for {func.__name__} of two things that depend on the picture"
        )
    ends = func(x.lower, other), func(x.upper, other)
    return Interval(torch.minimum(*ends), torch.maximum(*ends))


def _ends(value: Any) -> tuple[Any, Any]:
    return (value.lower, value.upper) if isinstance(value, Interval) else (value, value)


def _cat(func: Callable[..., Tensor], parts: Any, *args: Any, **kwargs: Any) -> Interval:
    lower, upper = zip(*map(_ends, parts), strict=True)
    return Interval(func(lower, *args, **kwargs), func(upper, *args, **kwargs))


#: Activations that never fall, poolings and averages, and what only moves values about.
MONOTONE = (
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "sigmoid", "tanh", "softplus", "clamp"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax"),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "pad"),
    *("getitem", "expand"),
)
Interval.rules = {
    **dict.fromkeys(MONOTONE, _monotone),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _linear),
    **dict.fromkeys(("mul", "div"), _scale),
    **{"batch_norm": _batch_norm, "add": _add, "sub": _subtract, "cat": _cat, "dropout": undropped},
}


def box(images: Tensor, eps: Tensor | float) -> tuple[Tensor, Tensor]:
    """The lowest and the highest pictures within ``eps`` of the images, in [0, 1]."""
    return (images - eps).clamp(min=0), (images + eps).clamp(max=1)


def margins(
    model: ModelInput,
    images: Tensor,
    labels: Tensor,
    eps: Tensor | float,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """(N, K) how far below ``labels``' logit each other one stays in the whole box; inf for the label.

    With a linear layer last, the difference of its rows is taken before the bounds, which is exact for it.
    In single precision, good enough to learn from, a small box would be rounded away, and all proven.
    """
    mean, std = (t.to(images.device, precision)[:, None, None] for t in (model.mean, model.std))
    lower, upper = ((end - mean) / std for end in box(images.to(precision), eps))
    logits: Interval = carry(model, Interval(lower, upper))
    if logits.affine is None:
        own = logits.lower.gather(1, labels[:, None])
        least = own - logits.upper
    else:
        features, weight, bias = logits.affine
        offset = weight.new_zeros(len(weight)) if bias is None else bias
        rows = []
        for middle, radius, label in zip(features.middle, features.radius, labels.tolist(), strict=True):
            apart = weight[label] - weight
            rows.append(apart @ middle - apart.abs() @ radius + offset[label] - offset)
        least = torch.stack(rows)
    return least.scatter(1, labels[:, None], torch.inf)


def is_exact_on_a_linear_model() -> None:
    """On a linear model the margin is z_y - z_k - eps |w_y - w_k|_1, and the radius where the first is 0."""
    linear = nn.Linear(12, 4).double()
    generator = torch.Generator().manual_seed(0)
    linear.weight.data = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2))
    images = 0.3 + 0.4 * torch.rand(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    logits = model(images)
    labels = logits.argmax(1)
    gaps = (logits.gather(1, labels[:, None]) - logits).scatter(1, labels[:, None], torch.inf)
    reach = (linear.weight[labels][:, None] - linear.weight).abs().sum(2)
    torch.testing.assert_close(margins(model, images, labels, 0.01), gaps - 0.01 * reach)
    exact = (gaps / reach).amin(1).detach()
    found = interval_bounds(model, images, eps=0.3, halvings=40)
    torch.testing.assert_close(found.radius, exact)


@method(
    family="defenses",
    title="Interval bound propagation",
    references=[
        Reference(
            key="gowal2018",
            title="On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
            authors="Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli",
            year=2018,
            url="https://arxiv.org/abs/1810.12715",
        )
    ],
    invariants=[Nonnegative(field="radius")],
    cost=Cost(forward=size.images * (param.halvings + 2)),
    tags=["certificate"],
    oracle=is_exact_on_a_linear_model,
    quick={"halvings": 4},
    demo={"eps": 2e-8},
)
def interval_bounds(
    model: ModelInput,
    images: Images,
    *,
    eps: Annotated[float, Field(gt=0, le=1, description="the largest radius asked for")] = 8 / 255,
    halvings: Annotated[int, Field(ge=0, le=60, description="how often the search halves it")] = 16,
) -> Certificates:
    """Prove that the answer stays in an linf box: intervals in, intervals out, layer by layer.

    [W m + b - |W| r, W m + b + |W| r]   for a linear layer on [m - r, m + r]

    The box holds the pictures of [0, 1] within a radius of the image; the answer is proven where even the
    least z_y - z_k is positive for all k. The last linear layer is not bounded but folded into that
    difference, so a linear model's margin is exact, z_y - z_k - eps |w_y - w_k|_1. ``radius`` (N,) is the
    largest up to ``eps`` that ``halvings`` of the range find, 0 where none is proven; 0 halvings ask for
    ``eps`` alone.

    Each layer forgets how its inputs hang together, so the boxes grow with depth: of a deep network that was
    not trained for it next to nothing is proven, which says little about the network. Rules exist for linear
    layers and convolutions, batch norm, monotone activations, pooling, sums, concatenation and reshaping;
    another operation is refused by its name (ModelError), and so is a model behind a defence. Bounds are
    taken in double precision, and are about the network's function, not about how a pass in single precision
    rounds it. ``images`` (N, C, H, W) in [0, 1].

    Source: Gowal et al. 2018, section 3.
    """
    labels = model(images).argmax(1)
    low = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    high = torch.full_like(low, eps)
    for halving in progress_bar(range(halvings + 1), "halving the radius"):
        asked = high if halving == 0 else (low + high) / 2
        proven = (margins(model, images, labels, asked[:, None, None, None]) > 0).all(1)
        low, high = torch.where(proven, asked, low), torch.where(proven, high, asked)
    return Certificates(
        images=images,
        labels=labels,
        names=tuple(map(model.class_name, labels.tolist())),
        radius=rounded_down(low, images),
        abstained=low == 0,
        norm="linf",
        subject=f"interval bounds of {model.name}",
    )


@hookimpl
def phosphene_methods():
    return [interval_bounds]
