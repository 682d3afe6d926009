"""HotFlip: single replacements of tokens, ordered by a first-order estimate of their effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.hooks import layer_hooks


@contextmanager
def embedding_leaves(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each call of an embedding layer inside the block: its tokens, and their vectors as leaves."""
    calls: list[tuple[Tensor, Tensor]] = []

    def cut(module: Any, inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        calls.append((inputs[0], leaf))
        return leaf.clone()  # the network may add to it in place

    with layer_hooks({layer: cut}):
        yield calls


def replacement_trials(
    slope: Tensor, vectors: Tensor, tokens: Tensor, positions: Tensor, excluded: Tensor, count: int
) -> Tensor:
    """At most ``count`` copies of ``tokens`` (L,), each with one token replaced, of the lowest estimates.

    estimate(i, v) = (e_v - e_(w_i)) . ds/de_i,   the estimated change of a score s

    slope: ds/de (L, D). vectors: the embeddings e (V, D) of all tokens. positions: the i that may be
    replaced. excluded: tokens v that replace none. Returns (count, L); (0, L) where no token can be replaced.
    """
    change = slope[positions] @ vectors.T - (slope * vectors[tokens]).sum(1)[positions, None]
    change[:, excluded] = torch.inf
    change.scatter_(1, tokens[positions, None], torch.inf)
    count = min(count, int((change < torch.inf).sum()))
    best = change.flatten().topk(count, largest=False).indices
    trials = tokens.repeat(count, 1)
    trials[torch.arange(count), positions[best // len(vectors)]] = best % len(vectors)
    return trials
