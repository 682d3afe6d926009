"""Losses per image that attacks maximize: cross-entropy, margin, difference of logits ratio (DLR)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: ``loss(logits (N, K), labels (N,)) -> (N,)``, large where an attack succeeds.
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the labels."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y: positive where another class wins; with a single class -z_y."""
    label_logit = logits.gather(1, labels[:, None])[:, 0]
    if logits.shape[1] == 1:
        return -label_logit
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - label_logit


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR: (max_{k != y} z_k - z_y) / (z_1st - z_3rd), invariant to the logits' scale (Croce & Hein 2020)."""
    return _divide_by_spread(margin(logits, labels), logits, 2, 2)


def targeted_difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Targeted DLR: (z_t - max_{k != t} z_k) / (z_1st - (z_3rd + z_4th) / 2), t the target class."""
    return _divide_by_spread(-margin(logits, labels), logits, 2, 3)


def _divide_by_spread(margins: Tensor, logits: Tensor, *ranks: int) -> Tensor:
    """Margins over the largest logit minus the mean of those at ``ranks``; unchanged for two classes."""
    if logits.shape[1] < 3:
        return margins
    ordered = logits.sort(dim=1, descending=True).values
    lower = ordered[:, [min(rank, logits.shape[1] - 1) for rank in ranks]].mean(1)
    return margins / (ordered[:, 0] - lower + 1e-12)
