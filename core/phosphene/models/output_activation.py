"""Networks that return probabilities instead of logits: a softmax or a sigmoid as their last step."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..precision import to_float64

#: The function that a network ends in; "" for logits, and where it cannot be determined.
OutputActivation = Literal["", "softmax", "sigmoid"]

#: Steps of autograd after which probabilities are probabilities: of shapes and precision, p and 1 - p.
_STEPS = (
    *("Alias", "AsStrided", "Clone", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "Squeeze", "T"),
    *("ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
    *("Cat", "Clamp", "ClampMax", "ClampMin", "Rsub", "Stack"),
)


def output_activation(output: Tensor) -> OutputActivation:
    """The function that returned ``output``, a tensor on the graph, by the steps that autograd recorded."""
    node = output.grad_fn
    while node is not None:
        step = node.name().partition("Backward")[0]
        if step in ("Softmax", "Sigmoid", "Hardsigmoid"):
            return "softmax" if step == "Softmax" else "sigmoid"
        if step not in _STEPS:
            return ""
        node = next((input_node for input_node, _ in node.next_functions if input_node is not None), None)
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
        f"a class where they are positive. {_return_logits('sigmoid')}"
    )


def _return_logits(activation: OutputActivation) -> str:
    """What to do instead."""
    inverse = "log" if activation == "softmax" else "logit"
    return (
        f"Return the logits: replace the {activation} by nn.Identity or leave it out; where no probability "
        f"is rounded to 0 or 1, load_model(..., output=torch.{inverse}) computes them"
    )


def warning_for_attacks(activation: OutputActivation) -> str:
    """What an attack that follows a gradient reports about a model that returns probabilities."""
    return (
        f"the model returns the probabilities of a {activation}, whose gradient vanishes where they are near "
        "0 or 1: an attack without success does not mean that the network is robust. "
        f"{_return_logits(activation)}"
    )
