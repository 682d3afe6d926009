"""Layer-wise relevance propagation: the score handed back from layer to layer, each keeping the sum."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from phosphene import Method, ModelError, Reference, hookimpl, input_gradient, load_model, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, size

#: ReLU and what shares relevance out in proportion to what came in, as the gradient does.
_PASSING = {
    *("relu", "max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("mean", "sum", "add", "iadd", "radd", "sub", "isub", "neg", "cat", "concat", "stack", "chunk", "split"),
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "movedim", "expand"),
    *("getitem", "get", "select", "narrow", "gather", "diagonal", "unbind", "repeat_interleave", "pad"),
    *("channel_shuffle", "pixel_shuffle", "clone", "contiguous", "to", "type_as", "float", "double"),
    *("requires_grad", "alias", "detach", "einsum"),
}
#: Of two factors, or of a quotient, only one may carry relevance.
_PRODUCTS = {"mul", "imul", "rmul", "multiply"}
_SCALING = _PRODUCTS | {"div", "truediv", "itruediv", "true_divide"}
_DROPOUT = {"dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout"}
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}
#: Calls that are or may be a ReLU6, whose ceiling passes relevance too.
_CAPPED: dict[str, dict[str, Any]] = {
    "relu6": {"input": None, "inplace": None},
    "hardtanh": {"input": None, "min_val": -1, "max_val": 1, "inplace": None},
    **dict.fromkeys(("clamp", "clip"), {"input": None, "min": "none", "max": "none"}),
}

Rule = Literal["epsilon", "gamma", "composite"]


def without_biases_it_is_gradient_times_input() -> None:
    """A ReLU and max-pooling network without biases, epsilon -> 0: x dS/dx, summing to the logit."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, bias=False)
    network = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 3 * 3, 2, bias=False))
    model = load_model(network.double(), input_size=(3, 12, 12))
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    for index in (0, 1):
        maps = lrp(model, images, index, epsilon=0).maps
        torch.testing.assert_close(maps, (images * input_gradient(model, images, index)).sum(1))
        torch.testing.assert_close(maps.sum((1, 2)), model(images)[:, index].detach())


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
    oracle=without_biases_it_is_gradient_times_input,
    demo={"rule": "composite"},
)
def lrp(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    rule: Annotated[
        Rule, Field(description="of the layers; composite: gamma for convolutions, epsilon for the rest")
    ] = "epsilon",
    epsilon: Annotated[float, Field(ge=0, le=1, description="added to what relevance is divided by")] = 1e-6,
    gamma: Annotated[
        float, Field(ge=0, le=1000, description="how much supporting parts are favoured")
    ] = 0.25,
) -> Attribution:
    """Hand the score back from layer to layer, to each input by its part in the output.

    R_i = sum_j x_i w'_ij / (z'_j + epsilon sign z'_j) R_j,  z' = sum_i x_i w'_ij + b'_j,  M = sum_c R_c

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, H, W), raw and signed: the relevance of what the
    network itself is given, pixels less the model's mean. On a network without biases the map sums to
    the score, but for what ``epsilon`` absorbs. "epsilon": w' = w. "gamma": w' = w + gamma max(w, 0) and
    likewise b', where z_j and x_i are positive; where one of them is negative it favours the negative
    weights, where both are the positive again, so that it is what speaks for z_j that counts.

    Convolutional and linear layers follow the rule, however they are called, a batch norm right after
    one folded into it; ReLU, ReLU6, pooling, sums, eval dropout, other batch norms and reshaping pass
    relevance on in proportion. ModelError, by name, for anything else on the way (softmax, GELU,
    SiLU, layer norm, attention, gates).

    Source: Bach et al. 2015, equation 58; Montavon et al. 2019, section 10.2.
    """
    with _Relevance(rule, epsilon, gamma) as rewrite:
        gradient = input_gradient(model, images, target)
    if not rewrite.caught:
        raise ModelError("LRP found no convolution and no linear layer on the way: use gradient_x_input")
    given = images - model.mean.to(images)[:, None, None]
    maps = (given * gradient).sum(1)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")


class _Relevance(TorchFunctionMode):
    """Makes the gradient of every call its relevance by its input: R = x dS/dx all the way down."""

    def __init__(self, rule: Rule, epsilon: float, gamma: float) -> None:
        super().__init__()
        self.rule, self.epsilon, self.gamma = rule, epsilon, gamma
        self.caught = 0
        #: The last layer's output, and the call that made it: a batch norm may follow.
        self.last: tuple[Any, Any, Any] = (None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place, name = name.endswith("_") and not name.endswith("__"), name.strip("_")
        carrying = _count_carrying((args, kwargs))
        if carrying and (name in _LINEAR or name == "batch_norm"):
            return (
                self._layer(func, args, kwargs) if name in _LINEAR else self._batch_norm(func, args, kwargs)
            )
        if carrying and name in _CAPPED:
            given = dict(zip(_CAPPED[name], args, strict=False)) | kwargs
            bounds = [given.get(n, usual) for n, usual in _CAPPED[name].items() if usual is not None] or [
                0,
                6,
            ]
            x, (low, high) = given["input"], bounds
            if low == 0 and isinstance(high, (int, float)):
                share = torch.where(x > 0, x.clamp(max=high) / x, 0).detach()
                return x.mul_(share) if in_place or given.get("inplace") else x * share
        result = func(*args, **kwargs)
        if not carrying or not _count_carrying(result) or self._passes(name, args, kwargs, carrying):
            if name == "clone" and args[0] is self.last[0]:  # as a tap passes a layer's output on
                self.last = (result, *self.last[1:])
            return result
        raise ModelError(
            f"LRP has no rule for {name!r}, which this network calls: "
            "use integrated_gradients or gradient_x_input, which take any differentiable network"
        )

    def _passes(self, name: str, args: Any, kwargs: Any, carrying: int) -> bool:
        """Whether a call's own gradient shares relevance out as it should."""
        if name in _SCALING:
            return carrying == 1 and (name in _PRODUCTS or _count_carrying(args[1:]) == 0)
        if name in _DROPOUT:
            return not (dict(zip(("input", "p", "training"), args, strict=False)) | kwargs).get(
                "training", True
            )
        return name in _PASSING

    def _layer(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        rest = {name: value for name, value in given.items() if name in kwargs}

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            output: Tensor = func(x, weight, bias, *args[3:], **rest)
            return output

        dense = weight.ndim == 2
        self.caught += 1
        output = self._ruled(apply, x, weight, bias, dense)
        self.last = (output, apply, (x, weight, bias, dense))
        return output

    def _ruled(self, apply: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dense: bool) -> Tensor:
        """What the layer gives, with the rule's gradient: sum_j w' z_j / (z'_j + epsilon sign z'_j)."""
        by_epsilon = self.rule == "epsilon" or (self.rule == "composite" and dense)
        if by_epsilon:  # one call gives both what is carried and, with the bias, z
            carried = apply(x, weight, None)
            z = carried.detach()
            z = z if bias is None else z + bias.view(-1, *[1] * (0 if dense else z.ndim - 2))
        else:
            z = apply(x.detach(), weight, bias)

        def share(denominator: Tensor, where: Tensor) -> Tensor:
            divided = z / torch.where(denominator < 0, denominator - self.epsilon, denominator + self.epsilon)
            return torch.where(where & (denominator != 0), divided, 0)

        if by_epsilon:
            carried = carried * share(z, z != 0)
        else:
            up, down = (weight + self.gamma * side for side in (weight.clamp(min=0), weight.clamp(max=0)))
            above, below = torch.where(x >= 0, x, 0), torch.where(x < 0, x, 0)
            for_it = apply(above, up, None) + apply(below, down, None)
            against = apply(above, down, None) + apply(below, up, None)
            biases: list[Any] = [0, 0]
            if bias is not None:
                shape = (-1, *[1] * (z.ndim - 2)) if not dense else (-1,)
                biases = [(bias + self.gamma * b).view(shape) for b in (bias.clamp(min=0), bias.clamp(max=0))]
            carried = for_it * share(for_it.detach() + biases[0], z > 0)
            carried = carried + against * share(against.detach() + biases[1], z < 0)
        return carried - carried.detach() + z

    def _batch_norm(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        mean, variance = given["running_mean"], given["running_var"]
        if given.get("training") or mean is None or variance is None:
            raise ModelError("LRP has no rule for 'batch_norm' by the batch's own statistics")
        if given["input"] is not self.last[0]:
            return func(*args, **kwargs)  # affine: its gradient shares relevance out already
        _, apply, (x, weight, bias, dense) = self.last
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        scale = scale if given.get("weight") is None else scale * given["weight"]
        offset = -mean if bias is None else bias - mean
        offset = offset * scale if given.get("bias") is None else offset * scale + given["bias"]
        return self._ruled(apply, x, weight * scale.view(-1, *[1] * (weight.ndim - 1)), offset, dense)


def _count_carrying(value: Any) -> int:
    """How many tensors in there are on the way from the pixels."""
    if isinstance(value, Tensor):
        return int(value.requires_grad)
    if isinstance(value, dict):
        value = value.values()
    return sum(map(_count_carrying, value)) if isinstance(value, (tuple, list, type({}.values()))) else 0


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [lrp]
