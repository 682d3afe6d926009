"""Networks that return probabilities instead of logits: a softmax or a sigmoid as their last step."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..precision import to_float64

#: The function that a network ends in; "" for logits, and where it cannot be determined.
OutputActivation = Literal["", "softmax", "sigmoid"]

#: Steps of autograd that change the shape or the precision of a tensor, not its values.
_RESHAPES = (
    *("Alias", "AsStrided", "Clone", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "Squeeze", "T"),
    *("ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
)


def output_activation(output: Tensor) -> OutputActivation:
    """The function that returned ``output``, a tensor on the graph, by the steps that autograd recorded."""
    node = output.grad_fn
    while node is not None:
        step = node.name().partition("Backward")[0]
        if step in ("Softmax", "Sigmoid"):
            return "softmax" if step == "Softmax" else "sigmoid"
        if step not in _RESHAPES:
            return ""
        node = node.next_functions[0][0]
    return ""


def may_be_probabilities(output: Tensor) -> bool:
    """Whether all values lie in [0, 1]."""
    return output.numel() > 0 and bool(((output >= 0) & (output <= 1)).all())


def sums_to_one(output: Tensor) -> bool:
    """Whether the values (N, K) of each image, of two classes or more, sum to 1."""
    if output.ndim != 2 or output.shape[1] < 2:
        return False
    return bool(((to_float64(output).sum(1) - 1).abs() < 1e-5).all())


def probabilities_instead_of_logits(name: str, task: str, activation: OutputActivation) -> str:
    """The message for a network of task "binary" or "multilabel" that returns probabilities."""
    if activation == "softmax":
        return (
            f"{name} ends in a softmax: it returns probabilities of exclusive classes, and task {task!r} "
            "is for logits; load it with task='classification'"
        )
    return (
        f"{name} ends in a sigmoid: it returns probabilities, and task {task!r} is for logits, which predict "
        "a class where they are positive; load_model(..., output=lambda p: p.logit(1e-6)) computes the logits"
    )


def warning_for_attacks(activation: OutputActivation) -> str:
    """What an attack on a model that returns probabilities reports."""
    inverse = "p.log()" if activation == "softmax" else "p.logit(1e-6)"
    return (
        f"the model returns the probabilities of a {activation}, whose gradient vanishes where they are near "
        "0 or 1: an attack without success does not mean that the network is robust; "
        f"load_model(..., output=lambda p: {inverse}) computes logits"
    )
