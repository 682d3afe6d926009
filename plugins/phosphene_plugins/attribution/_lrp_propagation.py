"""Layer-wise relevance propagation as a modified gradient: R = x dS/dx at every tensor x of a network.

Every call whose gradient does not divide relevance in this way is rewritten. Factors that do not carry
relevance themselves (attention probabilities, gates, the standard deviation of a norm) are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from phosphene import Model, ModelError, at_least_float32, scores
from phosphene.hooks import calling_module, is_backward, multi_head_attention, read_rectifier, run_backward
from phosphene.models import without_optimized

from ._lrp_layers import LayerRules
from ._lrp_rules import LinearLayer

#: CP-LRP: attention probabilities and gates are constants. AttnLRP: they have relevance as well.
AttentionRule = Literal["cp_lrp", "attn_lrp"]
AttentionOption = Annotated[
    AttentionRule,
    Field(
        description="cp_lrp: attention probabilities and gates have no relevance; attn_lrp: both factors of "
        "a product have half"
    ),
]

#: Calls that need no rule: their ordinary gradient already divides R = x dS/dx in proportion to the inputs
#: (ReLU, pooling, sums, reshaping).
_PROPORTIONAL = {
    *("relu", "boolean_dispatch", "mean", "sum", "add", "iadd", "radd", "sub", "isub", "rsub", "neg"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "amax", "max"),
    *(
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "maximum",
        "fmax",
        "amin",
        "min",
        "minimum",
        "fmin",
    ),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("cat", "concat", "stack", "chunk", "split", "tensor_split", "split_with_sizes", "unbind"),
    *("flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "permute", "transpose", "t"),
    *("swapaxes", "swapdims", "moveaxis", "movedim", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("getitem", "get", "select", "index_select", "narrow", "gather", "diagonal", "repeat", "tile"),
    *("repeat_interleave", "pad", "roll", "flip", "rot90", "unfold", "fold", "masked_fill", "where"),
    *("channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "interpolate", "upsample"),
    *("clone", "contiguous", "to", "type_as", "float", "double", "half", "bfloat16"),
    *("requires_grad", "alias", "detach"),
}
#: Element-wise functions with f(0) = 0: all relevance of f(x) goes to x.
_ACTIVATIONS = {
    *("gelu", "silu", "mish", "hardswish", "leaky_relu", "elu", "celu", "selu", "prelu", "tanh", "hardtanh"),
    *("softsign", "pow", "square", "abs"),
}
#: Functions of the pixels that scale other tensors and have no relevance: gates and the divisors of norms.
_FACTORS = {
    *("sigmoid", "hardsigmoid", "erf", "rsqrt", "sqrt", "var", "std", "norm", "linalg_norm"),
    *("linalg_vector_norm", "reciprocal", "rtruediv", "rdiv"),
}
#: Functions that read only the shape or type of their second input.
_SHAPED_AS = {"expand_as", "view_as", "reshape_as", "type_as", "to"}
#: Products and quotients. Of two factors with relevance each has half.
_MATRIX_PRODUCTS = {"matmul", "mm", "bmm", "rmatmul"}
_PRODUCTS = {"mul", "imul", "rmul", "multiply", "einsum", "addcmul", "baddbmm", *_MATRIX_PRODUCTS}
_QUOTIENTS = {"div", "truediv", "itruediv", "true_divide"}
_DROPOUT = {"dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout"}
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}


class RelevancePropagation(TorchFunctionMode):
    """Inside its block, every call's gradient is such that relevance is input times gradient, R = x dS/dx.

    rules: the rule of each convolution and linear layer.
    attention: how relevance passes attention and gates.
    fold_tapped: whether a batch norm is folded into a layer whose output is tapped, so that this output
        has no relevance itself.
    """

    def __init__(
        self,
        model: Model,
        rules: LayerRules,
        attention: AttentionRule = "cp_lrp",
        *,
        fold_tapped: bool = True,
    ) -> None:
        super().__init__()
        self.fold_tapped = fold_tapped
        self.rules = rules
        self.attention = attention
        self.model = model
        #: The last convolution or linear layer and its output: a batch norm that follows is folded into it.
        self.last_layer: LinearLayer | None = None
        self.last_output: Any = None
        #: The inputs u and x of the layers with a rule for pixels; see ``InputRule``.
        self.pixel_inputs: list[tuple[Tensor, Tensor]] = []
        self._names = {id(module): name for name, module in model.layers.items()}
        self._first_name = ""
        self._first_input: Tensor | None = None
        # Values: the name of the function that computed the factor.
        self._factors = WeakTensorKeyDictionary()
        self._activations = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_backward(func):
            return run_backward(self, func, args, kwargs)
        name = getattr(func, "__name__", "").partition(".")[0].strip("_")  # "relu.default" is "relu"
        dependent = _dependent(args[:1] if name in _SHAPED_AS else (args, kwargs))
        if not dependent:
            return self._constant(func(*args, **kwargs), args, kwargs)
        factor = next((self._factors[t] for t in _tensors((args, kwargs)) if t in self._factors), None)
        if factor is not None and name not in _PRODUCTS | _QUOTIENTS | {"scaled_dot_product_attention"}:
            raise self._no_rule(factor, "outside of a product")
        if name == "multi_head_attention_forward":
            with self:
                return multi_head_attention(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attend(func, args, kwargs)
        if name == "softmax" and dependent[0].ndim >= 3:
            if self.attention == "attn_lrp":  # the gradient of softmax is its first-order Taylor expansion
                return func(*args, **kwargs)
            return self._factor("softmax", func(*args, **kwargs))
        if name in _LINEAR:
            return self._linear(func, args, kwargs)
        if name == "addmm" or (name in _MATRIX_PRODUCTS and self._is_linear(args, kwargs)):
            return self._matrix_product(name, func, args, kwargs)
        if name == "batch_norm":
            return self._batch_norm(func, args, kwargs)
        if name in _NORMS:
            return _NORMS[name](*args, **kwargs)
        if name == "normalize":
            x = args[0] if args else kwargs["input"]
            return x * _share(func, x, args, kwargs)
        if name == "cosine_similarity":
            return _cosine_similarity(*args, **kwargs)
        if name in _FACTORS or (name == "pow" and not _is_power(args, kwargs)):
            return self._factor(name, func(*args, **kwargs))
        if name == "var_mean":
            variance, mean = func(*args, **kwargs)
            return self._factor(name, variance), mean
        if (rectifier := read_rectifier(func, args, kwargs)) is not None:
            if rectifier.upper is None:
                return self._activation(func(*args, **kwargs))
            # Above the upper bound the gradient is 0, but relevance is passed on.
            x = rectifier.input
            share = torch.where(x > 0, x.clamp(max=rectifier.upper) / x, 0).detach()
            return self._activation(x.mul_(share) if rectifier.in_place else x * share)
        if name in _ACTIVATIONS and _maps_zero_to_zero(name, args, kwargs):
            x, in_place = dependent[0], _is_in_place(func, args, kwargs)
            share = _share(func, x, args, kwargs)
            return self._activation(x.mul_(share) if in_place else x * share)
        if name in _PRODUCTS:
            return self._product(name, func, args, kwargs)
        if name in _QUOTIENTS:
            return self._quotient(func, args, kwargs)
        result = func(*args, **kwargs)
        if not _dependent(result) or self._is_proportional(name, args, kwargs):
            # A tap clones the layer's output.
            if name == "clone" and args[0] is self.last_output and self.fold_tapped:
                self.last_output = result
            if name == "clone" and args[0] in self._activations:
                self._activations[result] = True
            return result
        raise self._no_rule(name)

    def _no_rule(self, name: str, where: str = "") -> ModelError:
        layer = calling_module(self._names)
        caller = f"its layer {layer!r}" if layer else "this network"
        return ModelError(
            f"LRP has no rule for {name!r}{where and ' '}{where}, which {caller} calls: "
            "use integrated_gradients or gradient_x_input, which take any differentiable network"
        )

    def _is_proportional(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether a call's own gradient divides relevance in proportion to its inputs."""
        if name in _DROPOUT:
            return not _by_name(("input", "p", "training"), args, kwargs).get("training", True)
        return name in _PROPORTIONAL

    # --- factors without relevance ------------------------------------------------------------------

    def _factor(self, name: str, value: Tensor) -> Tensor:
        """The value of a factor without relevance."""
        value = value.detach()
        self._factors[value] = name
        return value

    def _constant(self, result: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call that no pixel has a gradient by; a factor if one of its inputs is."""
        if len(self._factors):
            names = [self._factors[t] for t in _tensors((args, kwargs)) if t in self._factors]
            for tensor in _tensors(result) if names else ():
                if tensor.is_floating_point():
                    self._factors[tensor] = names[0]
        return result

    def check_score(self, score: Tensor) -> None:
        """Raises ModelError for a score on which no pixel has relevance."""
        if score in self._factors:
            raise self._no_rule(self._factors[score], "outside of a product")
        if not score.requires_grad:
            raise self.model.no_gradient()
        if self.last_layer is None:
            raise ModelError(
                "LRP needs a convolution or a linear layer below the target: use gradient_x_input"
            )
        self.rules.check_use()

    def network(self) -> AbstractContextManager[None]:
        """Inside, passes run through the network itself, if rules are chosen by its layers' names."""
        return without_optimized() if self.rules.names_layers else nullcontext()

    def read(self, output: Tensor, pixels: Tensor, gradient: Tensor | None = None) -> Tensor:
        """The relevance (N, C, H, W) of the pixels for an output, weighted by ``gradient``.

        That of the network's input x, pixels minus the model's mean, is x dS/dx.
        """
        leaves = [pixels, *(u for u, _ in self.pixel_inputs)]
        slope, *divided = torch.autograd.grad(
            output, leaves, gradient, allow_unused=True, retain_graph=gradient is not None or len(leaves) > 1
        )
        parts = [(x, relevance) for (_, x), relevance in zip(self.pixel_inputs, divided, strict=True)]
        parts = [(x, relevance) for x, relevance in parts if relevance is not None]
        if slope is None and not parts:
            raise self.model.no_gradient("the target does not depend on it")
        mean, std = (t.to(pixels)[:, None, None] for t in (self.model.mean, self.model.std))
        total = torch.zeros_like(pixels) if slope is None else (pixels.detach() - mean) * slope
        for x, relevance in parts:
            # From the layer's input to the pixels, through padding and 1 / std.
            (moved,) = torch.autograd.grad(x, pixels, relevance, retain_graph=True)
            total = total + moved * std
        return total

    # --- activations, products ----------------------------------------------------------------------

    def _activation(self, result: Tensor) -> Tensor:
        self._activations[result] = True
        return result

    def _product(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A product; of several tensors with relevance each has an equal share.

        With CP-LRP an activation that is multiplied by another tensor is a gate, without relevance.
        """
        # The addend of a product may be one of its factors as well.
        addend = args[: int(name in ("addcmul", "baddbmm"))]
        args = args[len(addend) :]
        factors = _dependent((args, kwargs))
        if len(factors) < 2:
            return func(*addend, *args, **kwargs)
        shares = {id(t): 1 / len(factors) for t in factors}
        gates = [t for t in factors if t in self._activations]
        if self.attention == "cp_lrp" and len(factors) == 2 and len(gates) == 1:
            shares = {id(t): float(t is not gates[0]) for t in factors}
        overwritten = (*addend, *args)[0] if _is_in_place(func, args, kwargs) else None
        divided = {key: _scale_gradient(t, shares[key]) for key, t in {id(t): t for t in factors}.items()}
        result = func(*addend, *_replace(args, divided), **_replace(kwargs, divided))
        return result if overwritten is None else overwritten.copy_(result)

    def _quotient(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A quotient; the divisor is a factor without relevance."""
        divisor = _by_name(("input", "other"), args, kwargs)["other"]
        if not isinstance(divisor, Tensor) or not divisor.requires_grad:
            return func(*args, **kwargs)
        constant = {id(divisor): divisor.detach()}
        result = func(*_replace(args, constant), **_replace(kwargs, constant))
        return result if result.requires_grad else self._factor("division", result)

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Scaled dot-product attention, A v with A = softmax(q k^T)."""
        call = _by_name(("query", "key", "value", "attn_mask", "dropout_p"), args, kwargs)
        query, key, value = call.pop("query"), call.pop("key"), call.pop("value")
        if call.get("dropout_p"):
            raise self._no_rule("dropout")
        if self.attention == "cp_lrp":
            output = func(query.detach(), key.detach(), value, **call)
            return output if _dependent(output) else self._factor("softmax", output)
        # Half of the relevance of A v to each, and half of that of q k^T, where both depend on pixels.
        products = len(_dependent((query, key)))
        share = 1 / max(1, products) / (2 if value.requires_grad else 1)
        value = _scale_gradient(value, 0.5 if products else 1)
        output = func(_scale_gradient(query, share), _scale_gradient(key, share), value, **call)
        return output

    # --- layers -------------------------------------------------------------------------------------

    def _linear(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        arguments = _by_name(("input", "weight", "bias"), args, kwargs)
        x, weight, bias = arguments.pop("input"), arguments.pop("weight"), arguments.pop("bias", None)
        options = {name: value for name, value in arguments.items() if name in kwargs}

        def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            output: Tensor = func(x, weight, bias, *args[3:], **options)
            return output

        return self._propagate(LinearLayer(function, x, weight, bias))

    def _is_linear(self, args: Any, kwargs: Any) -> bool:
        """Whether a product is x W with a weight W."""
        weight = [*args, *kwargs.values()][1]
        return weight.ndim == 2 and not weight.requires_grad and weight not in self._factors

    def _matrix_product(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        """x W, or b + x W, as a linear layer."""
        bias, x, weight = [None, *args, *kwargs.values()][-3:] if name != "addmm" else args[:3]
        if weight.requires_grad or name == "addmm" and (len(args) > 3 or kwargs):
            raise self._no_rule(name)
        return self._propagate(LinearLayer(F.linear, x, weight.T, bias))

    def _propagate(self, layer: LinearLayer) -> Tensor:
        name = calling_module(self._names)
        if self._first_input is None:
            self._first_name, self._first_input = name, layer.x
        reads_pixels = name == self._first_name if name else layer.x is self._first_input
        self.last_layer = layer
        self.last_rule = self.rules.choose(name, layer, reads_pixels)
        self.last_output = self._apply()
        output: Tensor = self.last_output
        return output

    def _apply(self) -> Tensor:
        assert self.last_layer is not None
        if callable(self.last_rule):
            return self.last_rule(self.last_layer)
        x = self.last_layer.x
        u = torch.zeros_like(x).requires_grad_()
        self.pixel_inputs.append((u, x))
        return self.last_rule.divide(self.last_layer, u)

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
        self.last_layer = LinearLayer(layer.function, layer.x, weight, offset)
        return self._apply()


def relevance_of_pixels(propagation: RelevancePropagation, images: Tensor, target: Any) -> Tensor:
    """The relevance (N, C, H, W) of each pixel for a target."""
    pixels = images.detach().clone().requires_grad_()
    with propagation.network(), propagation:
        score = scores(propagation.model, pixels, target)
        propagation.check_score(score)
        return propagation.read(score.sum(), pixels)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """x1 . x2 / (|x1| |x2|), whose norms have no relevance; of two inputs with relevance each has half."""
    share = 0.5 if x1.requires_grad and x2.requires_grad else 1
    first, second = (
        _scale_gradient(x, share) / x.detach().norm(dim=dim, keepdim=True).clamp(min=eps) for x in (x1, x2)
    )
    return (first * second).sum(dim)


def _standardized(
    x: Tensor, dims: tuple[int, ...], eps: float, weight: Tensor | None, bias: Tensor | None, center: bool
) -> Tensor:
    """(x - mean) / std * weight + bias over some axes, whose standard deviation has no relevance."""
    centered = x - x.mean(dims, keepdim=True) if center else x
    power = at_least_float32(centered.detach()).square().mean(dims, keepdim=True)
    result = centered * (power + eps).rsqrt().to(x)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _standardized(input, dims, eps, weight, bias, center=True)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _standardized(input, dims, eps, weight, None, center=False)


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    groups = input.unflatten(1, (num_groups, -1))
    result = _standardized(groups, tuple(range(2, groups.ndim)), eps, None, None, center=True).flatten(1, 2)
    weight, bias = (None if t is None else t.view(-1, *[1] * (input.ndim - 2)) for t in (weight, bias))
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if use_input_stats:
        return _group_norm(input, input.shape[1], weight, bias, eps)
    # Affine: the gradient divides relevance already.
    return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


_NORMS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
}


def _scale_gradient(x: Tensor, share: float) -> Tensor:
    """x, whose gradient is multiplied by ``share``."""
    return x if share == 1 else x * share + x.detach() * (1 - share)


def _share(func: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """f(x) / x, and 0 where x is 0, as a constant."""
    # A copy, which a call in place may overwrite.
    constant = {id(x): x.detach().clone()}
    value = func(*_replace(args, constant), **_replace(kwargs, constant))
    return torch.where(x != 0, value / x, 0).detach()


def _is_power(args: Any, kwargs: Any) -> bool:
    """Whether a call is x to a power of at least 1, with derivatives everywhere; others are divisors."""
    call = _by_name(("input", "exponent"), args, kwargs)
    base, exponent = call.get("input", call.get("self")), call["exponent"]
    depends = isinstance(base, Tensor) and base.requires_grad
    return depends and isinstance(exponent, (int, float)) and exponent >= 1


def _maps_zero_to_zero(name: str, args: Any, kwargs: Any) -> bool:
    if name != "hardtanh":
        return True
    bounds = _by_name(("input", "min_val", "max_val", "inplace"), args, kwargs)
    return bounds.get("min_val", -1) <= 0 <= bounds.get("max_val", 1)


def _is_in_place(func: Any, args: Any, kwargs: Any) -> bool:
    own: str = getattr(func, "__name__", "").partition(".")[0]
    if own.startswith("__"):
        return own in ("__imul__", "__iadd__", "__isub__", "__itruediv__", "__ipow__")
    return own.endswith("_") or kwargs.get("inplace") is True or any(value is True for value in args[1:])


def _by_name(names: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, args, strict=False)) | kwargs


def _tensors(value: Any) -> list[Tensor]:
    """The tensors inside a value."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _dependent(value: Any) -> list[Tensor]:
    """The tensors inside a value that depend on the pixels."""
    return [tensor for tensor in _tensors(value) if tensor.requires_grad]


def _replace(value: Any, by_id: dict[int, Tensor]) -> Any:
    """A value with other tensors in it."""
    if isinstance(value, Tensor):
        return by_id.get(id(value), value)
    if isinstance(value, dict):
        return {key: _replace(item, by_id) for key, item in value.items()}
    return type(value)(_replace(item, by_id) for item in value) if type(value) in (tuple, list) else value
