"""A copy of a vision transformer with a register token, which takes the activations of register neurons.

Source: Jiang, Dravid, Efros, Gandelsman 2025, "Vision Transformers Don't Need Trained Registers", algorithms
1 and 2 (https://arxiv.org/abs/2506.08010).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Model
from phosphene.errors import InputError, ModelError
from phosphene.hooks import replace_output_tensor

from ._blocks import block_of_each_layer
from ._token_norms_result import high_norms
from ._tokens import Tokens, at_size_of, global_tokens


class WithRegister(nn.Module):
    """A block between whose tokens (N, T, C) a register token is appended, or behind which it is removed."""

    def __init__(self, block: nn.Module, *, append: bool, remove: bool) -> None:
        super().__init__()
        self.block, self.append, self.remove = block, append, remove

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.append:
            tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)
        output = self.block(tokens, *args, **kwargs)
        if not self.remove:
            return output
        behind = output[0] if isinstance(output, (tuple, list)) else output
        return replace_output_tensor(output, behind[:, :-1])


class MoveToRegister(nn.Module):
    """The second layer of a perceptron; before it, some neurons are 0 but in the register, the last token.

    There they have the largest value that any token had.
    """

    neurons: Tensor

    def __init__(self, linear: nn.Module, neurons: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("neurons", torch.tensor(list(neurons)))

    def forward(self, hidden: Tensor) -> Tensor:
        moved = torch.zeros_like(hidden[..., self.neurons])
        moved[:, -1] = hidden[..., self.neurons].amax(1)
        output: Tensor = self.linear(hidden.index_copy(2, self.neurons, moved))
        return output


def with_register(model: Model, images: Tensor, *, neurons: int, factor: float) -> nn.Module:
    """A copy of the network in which a register token takes what makes patches' norms high.

    The register neurons are those hidden units of the blocks' perceptrons that are largest on average at the
    patches of high norm, up to the first block behind which most of these patches are.

    Raises:
        InputError: less than one neuron, or a factor that is not above 1.
        ModelError: no patch of the images has a high norm behind any block; blocks without a perceptron; a
            network that does not accept another token.
    """
    if neurons < 1 or not factor > 1:
        raise InputError(f"neurons must be 1 or more and factor above 1, not {neurons} and {factor}")
    model = at_size_of(model, images)
    tokens = global_tokens(model, images, "registers:")
    blocks = list(dict.fromkeys(block_of_each_layer(model, tokens, "registers:").values()))
    duplicate = model.copy()
    with model.guard(), torch.no_grad():
        chosen = _register_neurons(model, images, tokens, blocks, neurons, factor)
        for number, block in enumerate(blocks):
            for linear, units in chosen.items():
                if linear.startswith(f"{block}."):
                    _replace(duplicate.module, linear, lambda part, units=units: MoveToRegister(part, units))
            first, last = number == 0, number == len(blocks) - 1
            _replace(
                duplicate.module,
                block,
                lambda part, first=first, last=last: WithRegister(part, append=first, remove=last),
            )
        network = duplicate.module.to(model.device)
        try:
            network.eval()(model.normalize(images[:1]))
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            raise ModelError(
                f"{model.name} does not accept another token behind its patches: {error}"
            ) from error
    return network


def _register_neurons(
    model: Model, images: Tensor, tokens: Tokens, blocks: Sequence[str], count: int, factor: float
) -> dict[str, list[int]]:
    """By the name of the perceptrons' second layer the hidden units that are moved to the register."""
    norms = [values.norm(dim=2) for values in model.features_of(images, blocks)]
    high = [high_norms(tokens.maps(values), factor).flatten(1) for values in norms]
    most = max(range(len(blocks)), key=lambda n: int(high[n].sum()))
    if not high[most].any():
        raise ModelError(
            f"no patch of {len(images)} images has more than {factor:g} times the median norm behind any "
            f"block of {model.name}, so there is nothing that a register token would take"
        )
    linears = [_second_layer(model, block, tokens) for block in blocks[: most + 1]]
    scores, units = [], []
    for linear, hidden in zip(linears, model.features_of(images, linears, inputs=True), strict=True):
        at_high = hidden[:, tokens.patches][high[most]].abs().mean(0)
        scores.append(at_high)
        units += [(linear, unit) for unit in range(len(at_high))]
    chosen: dict[str, list[int]] = {}
    for index in torch.cat(scores).topk(min(count, len(units))).indices.tolist():
        linear, unit = units[index]
        chosen.setdefault(linear, []).append(unit)
    return chosen


def _second_layer(model: Model, block: str, tokens: Tokens) -> str:
    """The last linear layer of a block from more hidden units to the tokens' width."""
    info = model.structure.layers[block]
    assert info.shape is not None
    names = [
        name
        for name in model.structure.layers
        if name.startswith(f"{block}.")
        and isinstance(part := model.layers[name], nn.Linear)
        and part.out_features == info.shape[1] < part.in_features
    ]
    if not names:
        raise ModelError(
            f"block {block} of {model.name} has no perceptron with more hidden units than tokens"
        )
    return names[-1]


def _replace(network: nn.Module, name: str, wrap: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, wrap(network.get_submodule(name)))
