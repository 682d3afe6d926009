"""Layer-wise relevance propagation (LRP) with the epsilon rule, the gamma rule and their composite."""

import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from phosphene import Method, ModelError, Reference, hookimpl, input_gradient, load_model, method
from phosphene.hooks import is_backward, read_rectifier, run_backward
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import (
    Agrees,
    Complete,
    Cost,
    Equivariant,
    InvariantTo,
    LinearIn,
    MapPerPixel,
    ZeroWhen,
    size,
)

from ._lrp_oracle import SIZE, ByFunctions, ByModules, explicit_relevance, model_of
from ._lrp_rules import Composite, Epsilon, Gamma, LinearLayer, Rule
from ._relations import EQUIVARIANT

#: Calls that need no rule: their ordinary gradient already divides R = x dS/dx in proportion to the inputs
#: (ReLU, pooling, sums, reshaping).
_PROPORTIONAL = {
    *("relu", "max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("mean", "sum", "add", "iadd", "radd", "sub", "isub", "neg", "cat", "concat", "stack", "chunk", "split"),
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "movedim", "expand"),
    *("getitem", "get", "select", "narrow", "gather", "diagonal", "unbind", "repeat_interleave", "pad"),
    *("channel_shuffle", "pixel_shuffle", "clone", "contiguous", "to", "type_as", "float", "double"),
    *("requires_grad", "alias", "detach", "einsum"),
}
#: Products and quotients: no rule is needed if only one factor, or the dividend alone, depends on the pixels.
_PRODUCTS = {"mul", "imul", "rmul", "multiply"}
_SCALING = _PRODUCTS | {"div", "truediv", "itruediv", "true_divide"}
_DROPOUT = {"dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout"}
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}
RuleName = Literal["epsilon", "gamma", "composite"]


def equals_explicit_contributions() -> None:
    """R_i = sum_j c_ij / (sum_i c_ij + epsilon) R_j with the contributions c_ij = x_i w_ij.

    The gamma rule multiplies those with the sign of z_j by 1 + gamma. Without biases and epsilon the map is x
    dS/dx, which sums to the score. An operation that divides nothing in proportion is refused.
    """
    torch.manual_seed(0)
    images = torch.rand(4, *SIZE, dtype=torch.float64)
    gammas: dict[RuleName, tuple[float, ...]] = {
        "epsilon": (0, 0, 0), "gamma": (2, 2, 2), "composite": (2, 0, 0),
    }  # fmt: skip
    for network, (rule, gamma) in itertools.product((ByModules(), ByFunctions()), gammas.items()):
        model = model_of(network)
        for index in (0, 1):
            result = lrp(model, images, index, rule=rule, epsilon=0.25, gamma=2)
            expected = explicit_relevance(network, model.normalize(images), index, gamma, 0.25)
            torch.testing.assert_close(result.maps, expected.sum(1))
            assert result.targets == (f"class {index}",) * 4
    layers = nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, bias=False)
    last = nn.ReLU(), nn.Flatten(), nn.Linear(8 * 3 * 3, 2, bias=False)
    # Without a mean, which would be a bias.
    std = [0.25, 0.5, 0.75]
    network_without_biases = nn.Sequential(*layers, *last).double()
    model = load_model(network_without_biases, input_size=(3, 12, 12), mean=[0.0] * 3, std=std)
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    for index in (0, 1):
        maps = lrp(model, images, index, epsilon=0).maps
        torch.testing.assert_close(maps, (images * input_gradient(model, images, index)).sum(1))
        torch.testing.assert_close(maps.sum((1, 2)), model(images)[:, index].detach())
    refused: list[Callable[[Tensor], Tensor]] = [
        F.hardtanh, F.dropout, F.gelu, torch.reciprocal, lambda x: x * x, lambda x: x.mean() / x,
        lambda x: torch.dropout(x, p=0.5, train=True), lambda x: torch.div(torch.ones_like(x), x),
    ]  # fmt: skip
    for call in refused:
        assert _is_refused(nn.Sequential(nn.Conv2d(3, 2, 2), _Call(call), nn.Flatten()))
    assert _is_refused(nn.Sequential(nn.MaxPool2d(3), nn.Flatten()))


class _Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _is_refused(network: nn.Module) -> bool:
    try:
        lrp(model_of(network), torch.rand(1, *SIZE, dtype=torch.float64), 0)
    except ModelError:
        return True
    return False


@method(
    family="attribution",
    title="LRP",
    references=[
        Reference(
            key="bach2015",
            title="On Pixel-Wise Explanations for Non-Linear Classifier Decisions by "
            "Layer-Wise Relevance Propagation",
            authors="Bach, Binder, Montavon, Klauschen, Mueller, Samek",
            year=2015,
            url="https://doi.org/10.1371/journal.pone.0130140",
        ),
        Reference(
            key="montavon2019",
            title="Layer-Wise Relevance Propagation: An Overview",
            authors="Montavon, Binder, Lapuschkin, Samek, Mueller",
            year=2019,
            url="https://doi.org/10.1007/978-3-030-28954-6_10",
        ),
    ],
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=equals_explicit_contributions,
    relations=[
        *(
            Complete(0.0, where={"rule": rule, "epsilon": 0}, networks=("homogeneous",), tolerance=1e-6)
            for rule in ("epsilon", "gamma", "composite")
        ),
        Agrees("attribution.gradient_x_input", where={"epsilon": 0}, networks=("homogeneous",)),
        LinearIn("target", where={"epsilon": 0}, networks=("gap",)),
        *EQUIVARIANT,
        *(Equivariant(transform, where={"rule": "gamma"}) for transform in ("hflip", "transpose")),
        InvariantTo("batch_order"),
        ZeroWhen("constant"),
        ZeroWhen("ignored"),
    ],
    demo={"rule": "composite"},
)
def lrp(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    rule: Annotated[
        RuleName,
        Field(description="rule of the layers; composite: gamma for convolutions, epsilon for linear layers"),
    ] = "epsilon",
    epsilon: Annotated[
        float, Field(ge=0, le=1, description="stabilizer added to the magnitude of each denominator")
    ] = 1e-6,
    gamma: Annotated[
        float,
        Field(ge=0, le=1000, description="gamma rule: extra weight of contributions with the output's sign"),
    ] = 0.25,
) -> Attribution:
    """Layer-wise relevance propagation (LRP) with epsilon, gamma or composite rule.

    R_i = sum_j x_i w'_ij / (z'_j + epsilon sign z'_j) R_j,  z' = sum_i x_i w'_ij + b'_j,  M = sum_c R_c

    "epsilon": w' = w. "gamma": w' = w + gamma max(w, 0) where x_i and z_j have the same sign, and w + gamma
    min(w, 0) where they differ, so that contributions with the sign of z_j are favored (b' is as w' for x_i =
    1). On a network without biases the map sums to the score, up to what ``epsilon`` absorbs. The relevance
    is that of the network's input, pixels minus the model's mean.

    Convolutional and linear layers follow the rule, as modules or as functions, with a directly following
    batch norm folded in; ReLU, ReLU6, pooling, sums, dropout in eval mode, other batch norms and reshaping
    pass relevance on in proportion.

    Returns:
        ``maps`` (N, H, W), raw and signed: the relevance of each pixel, summed over channels.

    Raises:
        ModelError, naming the operation, for one without a rule (softmax, GELU, SiLU, layer norm, attention,
        gates), and for a network without convolutional and linear layers.

    Example::
        from phosphene import run

        result = run("lrp", images="builtin:scenes/2", rule="composite")
        result.maps.shape  # (2, 64, 64)

    Source:
        Bach et al. 2015, equation 58; Montavon et al. 2019, section 10.2.
    """
    rules: dict[RuleName, Rule] = {"epsilon": Epsilon(epsilon), "gamma": Gamma(gamma, epsilon)}
    rules["composite"] = Composite(convolution=rules["gamma"], dense=rules["epsilon"])
    with _RelevancePropagation(rules[rule]) as propagation:
        gradient = input_gradient(model, images, target)
    if propagation.last_layer is None:
        raise ModelError("LRP needs a convolution or a linear layer below the target: use gradient_x_input")
    centered = images - model.mean.to(images)[:, None, None]
    maps = (centered * gradient).sum(1)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")


class _RelevancePropagation(TorchFunctionMode):
    """Rewrites every call so that relevance is input times gradient, R = x dS/dx, at every layer."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        #: The last convolution or linear layer and its output: a batch norm that follows is folded into it.
        self.last_layer: LinearLayer | None = None
        self.last_output: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_backward(func):
            return run_backward(self, func, args, kwargs)
        name = getattr(func, "__name__", "").partition(".")[0].strip("_")  # "relu.default" is "relu"
        dependent_count = _count_dependent((args, kwargs))
        if dependent_count and name in _LINEAR:
            return self._linear(func, args, kwargs)
        if dependent_count and name == "batch_norm":
            return self._batch_norm(func, args, kwargs)
        rectifier = read_rectifier(func, args, kwargs) if dependent_count else None
        if rectifier is not None and rectifier.upper is not None:
            # Above the upper bound the gradient is 0, but relevance is passed on.
            x = rectifier.input
            share = torch.where(x > 0, x.clamp(max=rectifier.upper) / x, 0).detach()
            return x.mul_(share) if rectifier.in_place else x * share
        result = func(*args, **kwargs)
        if (
            not dependent_count
            or rectifier is not None
            or not _count_dependent(result)
            or self._is_proportional(name, args, kwargs, dependent_count)
        ):
            if name == "clone" and args[0] is self.last_output:  # a tap clones the layer's output
                self.last_output = result
            return result
        raise ModelError(
            f"LRP has no rule for {name!r}, which this network calls: "
            "use integrated_gradients or gradient_x_input, which take any differentiable network"
        )

    def _is_proportional(self, name: str, args: Any, kwargs: Any, dependent_count: int) -> bool:
        """Whether a call's own gradient divides relevance in proportion to its inputs."""
        if name in _SCALING:
            return dependent_count == 1 and (name in _PRODUCTS or _count_dependent(args[1:]) == 0)
        if name in _DROPOUT:
            return not _by_name(("input", "p", "training"), args, kwargs).get("training", True)
        return name in _PROPORTIONAL

    def _linear(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        arguments = _by_name(("input", "weight", "bias"), args, kwargs)
        x, weight, bias = arguments.pop("input"), arguments.pop("weight"), arguments.pop("bias", None)
        options = {name: value for name, value in arguments.items() if name in kwargs}

        def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            output: Tensor = func(x, weight, bias, *args[3:], **options)
            return output

        self.last_layer = LinearLayer(function, x, weight, bias)
        self.last_output = self.rule(self.last_layer)
        output: Tensor = self.last_output
        return output

    def _batch_norm(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        statistics, affine = ("running_mean", "running_var"), ("weight", "bias")
        # torch.batch_norm has another order than torch.nn.functional.batch_norm.
        middle = (*affine, *statistics) if func is torch.batch_norm else (*statistics, *affine)
        arguments = _by_name(("input", *middle, "training", "momentum", "eps"), args, kwargs)
        mean, variance = arguments["running_mean"], arguments["running_var"]
        if arguments.get("training") or mean is None or variance is None:
            raise ModelError("LRP has no rule for 'batch_norm' with the batch's statistics (training mode)")
        if self.last_layer is None or arguments["input"] is not self.last_output:
            output: Tensor = func(*args, **kwargs)  # affine: the gradient divides relevance already
            return output
        layer = self.last_layer
        scale = (variance + arguments["eps"]).rsqrt()
        scale = scale if arguments.get("weight") is None else scale * arguments["weight"]
        offset = -mean if layer.bias is None else layer.bias - mean
        offset = offset * scale if arguments.get("bias") is None else offset * scale + arguments["bias"]
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        return self.rule(LinearLayer(layer.function, layer.x, weight, offset))


def _by_name(names: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, args, strict=False)) | kwargs


def _count_dependent(value: Any) -> int:
    """How many of the tensors inside a value depend on the pixels."""
    if isinstance(value, Tensor):
        return int(value.requires_grad)
    if isinstance(value, dict):
        value = value.values()
    return sum(map(_count_dependent, value)) if isinstance(value, (tuple, list, type({}.values()))) else 0


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [lrp]
