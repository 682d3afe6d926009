"""Interval bound propagation (IBP): certified linf radius from intervals carried through the network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import ModelError, Reference, float64_device, hookimpl, load_model, method, progress_bar
from phosphene.roles import Images
from phosphene.roles import Model as ModelInput
from phosphene.spec import Cost, Equivariant, InvariantTo, Monotone, Nonnegative, ScalesWith, param, size
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
from ._certificates_oracle import certificates_have_their_closed_forms

#: A search of the radius in which the relations' networks have proven radii.
_SEARCH = {"eps": 1e-3, "halvings": 8}


class Interval(BoundTensor):
    """All tensors between ``lower`` and ``upper``, elementwise.

    ``affine`` is (input interval, weight, bias) where a linear layer produced it, so that a margin of its
    outputs can be bounded exactly.
    """

    description: ClassVar[str] = "interval bounds"
    rules: ClassVar[Mapping[str, Rule]] = {}

    def __init__(
        self, lower: Tensor, upper: Tensor, affine: tuple[Interval, Tensor, Any] | None = None
    ) -> None:
        self.lower, self.upper, self.affine = lower, upper, affine

    @classmethod
    def from_center(cls, center: Tensor, radius: Tensor, affine: Any = None) -> Interval:
        """[center - radius, center + radius]."""
        return cls(center - radius, center + radius, affine)

    @property
    def center(self) -> Tensor:
        """(lower + upper) / 2."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """(upper - lower) / 2."""
        return (self.upper - self.lower) / 2

    def example_tensor(self) -> Tensor:
        return self.lower

    def clone(self) -> Interval:
        return Interval(self.lower.clone(), self.upper.clone())


def _monotone(func: Callable[..., Tensor], x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """[f(l), f(u)] for a nondecreasing f: activations, pooling, reshaping."""
    if kwargs.get("negative_slope", 0) < 0:
        raise UnsupportedOperation(f"interval bounds have no rule for {func.__name__} with a negative slope")
    return Interval(func(x.lower, *args, **kwargs), func(x.upper, *args, **kwargs))


def _linear(
    func: Callable[..., Tensor], x: Interval, weight: Tensor, bias: Any = None, *rest: Any, **kwargs: Any
) -> Interval:
    """Center W m + b, radius |W| r for linear layers and convolutions: exact for one layer."""
    if not isinstance(x, Interval) or not isinstance(weight, Tensor):
        raise UnsupportedOperation(
            f"interval bounds have no rule for {func.__name__} with weights that depend on the image"
        )
    weight, bias = weight.to(x.lower), None if bias is None else bias.to(x.lower)
    radius = func(x.radius, weight.abs(), None, *rest, **kwargs)
    affine = (x, weight, bias) if func.__name__ == "linear" else None
    return Interval.from_center(func(x.center, weight, bias, *rest, **kwargs), radius, affine)


def _batch_norm(
    func: Callable[..., Tensor], x: Interval, mean: Any, var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Interval:  # fmt: skip
    """A linear map of each channel by its running statistics."""
    if training or var is None:
        raise UnsupportedOperation("interval bounds have no rule for a batch norm without running statistics")
    mean, var, weight, bias = (None if t is None else t.to(x.lower) for t in (mean, var, weight, bias))
    scale = batch_norm_scale(var, weight, eps).abs().view(1, -1, *[1] * (x.dim() - 2))
    center = func(x.center, mean, var, weight, bias, False, momentum, eps)
    return Interval.from_center(center, x.radius * scale)


def _add(func: Any, x: Any, other: Any) -> Interval:
    (x_lower, x_upper), (other_lower, other_upper) = _ends(x), _ends(other)
    return Interval(x_lower + other_lower, x_upper + other_upper)


def _subtract(func: Any, x: Any, other: Any) -> Interval:
    (x_lower, x_upper), (other_lower, other_upper) = _ends(x), _ends(other)
    return Interval(x_lower - other_upper, x_upper - other_lower)


def _scale(func: Callable[..., Tensor], x: Any, other: Any) -> Interval:
    """Product or quotient with a constant, of either sign."""
    if func.__name__.startswith("mul") and not isinstance(x, Interval):
        x, other = other, x
    if isinstance(other, Interval) or not isinstance(x, Interval):
        raise UnsupportedOperation(
            f"interval bounds have no rule for {func.__name__} of two values that depend on the image"
        )
    ends = func(x.lower, other), func(x.upper, other)
    return Interval(torch.minimum(*ends), torch.maximum(*ends))


def _ends(value: Any) -> tuple[Any, Any]:
    """Lower and upper end of an interval or a constant."""
    return (value.lower, value.upper) if isinstance(value, Interval) else (value, value)


def _concatenate(func: Callable[..., Tensor], parts: Any, *args: Any, **kwargs: Any) -> Interval:
    lower, upper = zip(*map(_ends, parts), strict=True)
    return Interval(func(lower, *args, **kwargs), func(upper, *args, **kwargs))


#: Nondecreasing operations: activations, pooling and averages, reshaping.
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
    **{
        "batch_norm": _batch_norm,
        "add": _add,
        "sub": _subtract,
        "cat": _concatenate,
        "dropout": dropout_rule,
    },
}


def pixel_box(images: Tensor, eps: Tensor | float) -> tuple[Tensor, Tensor]:
    """Lower and upper end of the linf ball of radius ``eps`` around each image, within [0, 1]."""
    return (images - eps).clamp(min=0), (images + eps).clamp(max=1)


def worst_case_margins(
    model: ModelInput,
    images: Tensor,
    labels: Tensor,
    eps: Tensor | float,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """Lower bounds (N, K) of z_y - z_k over the box of radius ``eps``, y the ``labels``; inf for k = y.

    A final linear layer is folded into the difference of its rows, which is exact for that layer.
    ``precision`` float32 is enough for training only: it rounds a small box away, and everything would be
    proven.
    """
    # equivalent mutants: only a device without double precision is replaced
    device = float64_device(images.device) if precision == torch.float64 else images.device
    if device != images.device:
        # equivalent mutants: as above
        model = model.copy()
        model.module.to(device)
    images, labels = images.to(device).to(precision), labels.to(device)
    mean, std = (t.to(images)[:, None, None] for t in (model.mean, model.std))
    lower, upper = ((end - mean) / std for end in pixel_box(images, eps))
    logits: Interval = propagate(model, Interval(lower, upper))
    if logits.affine is None:
        own = logits.lower.gather(1, labels[:, None])
        margins = own - logits.upper
    else:
        features, weight, bias = logits.affine
        offset = weight.new_zeros(len(weight)) if bias is None else bias
        rows = []
        for center, radius, label in zip(features.center, features.radius, labels.tolist(), strict=True):
            difference = weight[label] - weight
            rows.append(difference @ center - difference.abs() @ radius + offset[label] - offset)
        margins = torch.stack(rows)
    return margins.scatter(1, labels[:, None], torch.inf)


def exact_on_a_linear_model() -> None:
    """On a linear model the margin is z_y - z_k - eps |w_y - w_k|_1, and the radius where the first is 0."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    model = linear_model(weight.view(4, 3, 2, 2), bias=[0.1, -0.2, 0.3, 0.0])
    images = 0.3 + 0.4 * torch.rand(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    logits = model(images)
    labels = logits.argmax(1)
    gaps = (logits.gather(1, labels[:, None]) - logits).scatter(1, labels[:, None], torch.inf)
    dual_norms = (weight[labels][:, None] - weight).abs().sum(2)
    torch.testing.assert_close(worst_case_margins(model, images, labels, 0.01), gaps - 0.01 * dual_norms)
    exact = (gaps / dual_norms).amin(1).detach()
    result = interval_bounds(model, images, eps=0.3, halvings=40)
    torch.testing.assert_close(result.radius, exact)
    assert torch.equal(result.labels, labels)
    radius = float(exact.min()) / 2
    assert interval_bounds(model, images, eps=radius, halvings=0).radius.tolist() == [radius] * 3
    # With fewer halvings it is the multiple of eps / 2^halvings below.
    result = interval_bounds(model, images, eps=0.3, halvings=3)
    torch.testing.assert_close(result.radius, (exact / 0.0375).floor() * 0.0375)
    assert worst_case_margins(model, images, labels, 0.01, torch.float32).dtype == torch.float32
    constant = linear_model(torch.zeros(3, 1, 2, 2))
    assert not interval_bounds(constant, torch.rand(2, 1, 2, 2), eps=0.1, halvings=0).radius.any()
    assert worst_case_margins(constant, images[:, :1].float(), labels * 0, 0.1).dtype == torch.float64


def hidden_layer_in_closed_form() -> None:
    """Two layers: center and radius after W1 and ReLU, then exact margins, or those of the sigmoids."""
    generator = torch.Generator().manual_seed(1)
    first, last = nn.Linear(6, 5).double(), nn.Linear(5, 3, bias=False).double()
    for parameter in (first.weight, first.bias, last.weight):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    layers = [nn.Flatten(), first, nn.ReLU(), last]
    options: dict[str, Any] = {"input_size": (1, 2, 3), "mean": [0.4], "std": [0.3]}
    images = torch.rand(2, 1, 2, 3, generator=generator, dtype=torch.float64)
    images[0, 0, 0, :2] = torch.tensor([0.02, 0.97])  # the box ends at 0 and 1
    labels = torch.tensor([2, 0])
    lower, upper = (((images + end * 0.1).clamp(0, 1) - 0.4).flatten(1) / 0.3 for end in (-1, 1))
    center, radius = first((lower + upper) / 2), (upper - lower) / 2 @ first.weight.abs().mT
    lower, upper = (center - radius).relu(), (center + radius).relu()
    rows = last.weight[labels][:, None] - last.weight
    margins = (rows * ((lower + upper) / 2)[:, None] - rows.abs() * ((upper - lower) / 2)[:, None]).sum(2)
    margins = margins.scatter(1, labels[:, None], torch.inf)
    model = load_model(nn.Sequential(*layers), **options)
    torch.testing.assert_close(worst_case_margins(model, images, labels, 0.1), margins)
    center, radius = last((lower + upper) / 2), (upper - lower) / 2 @ last.weight.abs().mT
    own = (center - radius).sigmoid().gather(1, labels[:, None])
    margins = (own - (center + radius).sigmoid()).scatter(1, labels[:, None], torch.inf)
    model = load_model(nn.Sequential(*layers, nn.Sigmoid()), **options)
    torch.testing.assert_close(worst_case_margins(model, images, labels, 0.1), margins)


def logits_are_read_from_any_output() -> None:
    """The first (N, K) of a list, a mapping or an object is the logits; an output without one is refused."""
    linear = nn.Linear(6, 3).double()
    network = nn.Sequential(nn.Flatten(), linear)
    images = torch.rand(2, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, model = torch.tensor([2, 0]), load_model(network, input_size=(1, 2, 3))
    margins = worst_case_margins(model, images, labels, 0.1)
    outputs: list[Callable[[Any], Any]] = [
        lambda z: [z[:, None], "loss", z],
        lambda z: {"features": z[:, None], "scores": (z, z + 1.0)},
        lambda z: SimpleNamespace(features=z + 1.0, logits=z),
    ]
    for output in outputs:
        hook = network.register_forward_hook(lambda module, inputs, z: output(z))  # noqa: B023
        torch.testing.assert_close(worst_case_margins(model, images, labels, 0.1), margins)
        hook.remove()
    network.register_forward_hook(lambda module, inputs, z: (z[:, None], "loss"))
    try:
        raise AssertionError(worst_case_margins(model, images, labels, 0.1))
    except ModelError:
        pass


def single_operations_are_exact() -> None:
    """The bounds after one operation are its extremes over the corners of the box."""
    generator = torch.Generator().manual_seed(2)
    lower = torch.rand(1, 2, 2, 2, generator=generator, dtype=torch.float64) - 0.6
    ends = torch.stack([lower, lower + torch.rand(lower.shape, generator=generator, dtype=torch.float64)])
    choices = torch.tensor([*itertools.product((0, 1), repeat=lower.numel())]).view(-1, *lower.shape[1:])
    corners = torch.where(choices == 1, ends[1], ends[0])
    norm, conv = nn.BatchNorm2d(2, eps=0.1).double().eval(), nn.Conv2d(2, 4, 2, 2, 1, 1, 2).double()
    for tensor in (norm.running_mean, norm.weight, norm.bias, conv.weight, conv.bias):
        assert tensor is not None
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    norm.running_var = torch.tensor([0.3, 2.0], dtype=torch.float64)
    plain = nn.BatchNorm2d(2, affine=False).double().eval()
    operations: list[Callable[[Any], Any]] = [norm, plain, conv, nn.LeakyReLU(0.2), nn.Dropout().eval()]
    operations += [lambda x: -0.5 * x, lambda x: x / -4, lambda x: torch.mul(3.0, x), lambda x: x * 2]
    operations += [lambda x: x[:, :1] + x[:, 1:], lambda x: 1.5 + x, lambda x: x[:, :1] - x[:, 1:]]
    operations += [lambda x: x - 0.3, lambda x: torch.cat([x[:, 1:], -2 * x[:, :1]], 1)]
    for operation in operations:
        bounds, values = operation(Interval(ends[0].clone(), ends[1].clone())), operation(corners).detach()
        torch.testing.assert_close(bounds.lower.detach(), values.amin(0, True))
        torch.testing.assert_close(bounds.upper.detach(), values.amax(0, True))
    divisor: Any = Interval(ends[0], ends[1])
    try:
        raise AssertionError(f"1 / x became {torch.div(torch.ones(1), divisor)}")
    except UnsupportedOperation:
        pass
    Interval(ends[0], ends[1]).relu_()
    assert torch.equal(ends[0], lower), "an operation in place changed a tensor of the caller"


def exact_where_it_has_to_be() -> None:
    """Exact on linear models, after every single operation, and in closed form behind a hidden layer."""
    certificates_have_their_closed_forms()
    exact_on_a_linear_model()
    hidden_layer_in_closed_form()
    logits_are_read_from_any_output()
    single_operations_are_exact()


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
    relations=[
        *(Equivariant(t, fields=("radius",), where=_SEARCH) for t in ("hflip", "vflip", "transpose")),
        *(
            InvariantTo(change, fields=("radius",), where=_SEARCH)
            for change in ("batch_order", "logit_shift", "normalization")
        ),
        ScalesWith("logits", power=0, fields=("radius",), where=_SEARCH),
        Monotone("eps", values=(1e-5, 1e-4, 1e-3), measure="radius", where={"halvings": 20}),
    ],
    cost=Cost(forward=size.images * (param.halvings + 2)),
    tags=["certificate"],
    oracle=exact_where_it_has_to_be,
    quick={"halvings": 4},
    demo={"model": "builtin:shapes-certified", "images": "builtin:scenes/8"},
)
def interval_bounds(
    model: ModelInput,
    images: Images,
    *,
    eps: Annotated[float, Field(gt=0, le=1, description="largest radius to prove")] = 8 / 255,
    halvings: Annotated[int, Field(ge=0, le=60, description="bisection steps of the radius search")] = 16,
) -> Certificates:
    """Interval bound propagation (IBP): certified linf radius of each prediction.

    [W m + b - |W| r, W m + b + |W| r]   for a linear layer on [m - r, m + r]

    Intervals of pixels, the linf ball within [0, 1], are propagated layer by layer. The prediction y is
    proven where the lower bound of z_y - z_k is positive for all k. The last linear layer is folded into
    that difference, so the bound is exact for a linear model, z_y - z_k - eps |w_y - w_k|_1. The radius is
    searched by bisection up to ``eps``; with 0 ``halvings`` only ``eps`` itself is tested.

    Intervals ignore correlations between the inputs of a layer, so they widen with depth: for a deep network
    that was not trained with IBP almost nothing is proven, which does not mean that it is not robust.
    Supported: linear layers and convolutions, batch norm, monotone activations, pooling, sums,
    concatenation, reshaping.
    Bounds are computed in double precision and hold for the network's exact function, not for the rounding of
    a pass in single precision.

    Returns:
        ``radius`` (N,) in linf, 0 where nothing is proven; ``labels`` (N,) the predicted classes.

    Raises:
        ModelError: an operation without a rule, by name, or a model behind a defense.

    Example::
        from phosphene import run

        result = run("interval_bounds", images="builtin:scenes/2", eps=1e-6)
        result.radius  # (2,)

    Source: Gowal et al. 2018, section 3.
    """
    labels = model(images).argmax(1)
    proven = torch.zeros(len(images), dtype=torch.float64, device=float64_device(images.device))
    limit = torch.full_like(proven, eps)
    for step in progress_bar(range(halvings + 1), "halving the radius"):
        radius = limit if step == 0 else (proven + limit) / 2
        margins = worst_case_margins(model, images, labels, radius[:, None, None, None])
        holds = (margins > 0).all(1)
        proven, limit = torch.where(holds, radius, proven), torch.where(holds, limit, radius)
    return Certificates.build(
        model, images, labels, proven, norm="linf", subject=f"interval bounds of {model.name}"
    )


@hookimpl
def phosphene_methods():
    return [interval_bounds]
