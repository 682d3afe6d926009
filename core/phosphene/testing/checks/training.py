"""Checks of methods that train a network: the loss falls, and more steps change the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...errors import PhospheneError
from ...results import TrainedNetwork
from ..candidates import larger_parameters
from ..cases import Case
from .base import register_check

if TYPE_CHECKING:
    from .base import AnyMethod

#: Losses of fewer steps than this say nothing about a trend.
FEWEST_STEPS = 8
#: Forward and backward passes of the longer training.
LIMIT = 3000


def _no_training(method: AnyMethod) -> str | None:
    return None if issubclass(method.result, TrainedNetwork) else "it trains no network"


def _trained(method: AnyMethod, case: Case) -> Any:
    try:
        return case.run(method)
    except PhospheneError:
        return None


def _accepted_case(method: AnyMethod) -> Case | None:
    for network in ("gap", "shapes-vgg", "functional", "tokens"):
        case = Case(network, dataset=12)
        if _trained(method, case) is not None:
            return case
    return None


@register_check(
    "method",
    "Training lowers its loss and changes the network's weights.",
    "the sign of the loss, optimizer.step() and zero_grad(), which parameters are optimized",
    _no_training,
    exemptible=True,
)
def training_lowers_the_loss(method: AnyMethod) -> None:
    if (case := _accepted_case(method)) is None:
        return
    # A schedule that makes the task harder may raise the loss in one length of the training.
    complaints: list[str] = []
    for limit in (LIMIT, 3 * LIMIT):
        longer = replace(case, params=larger_parameters(method, case, limit))
        result = _trained(method, longer)
        if result is None:
            continue
        losses = result.losses.double().flatten()
        assert losses.isfinite().all(), f"the losses are not finite: {losses.tolist()[:5]} ..."
        if len(losses) >= FEWEST_STEPS:
            quarter = max(2, len(losses) // 4)
            first, last = float(losses[:quarter].mean()), float(losses[-quarter:].mean())
            if last < first or last < float(losses[0]):
                complaints = []
            else:
                complaints.append(f"the loss went from {first:.4g} to {last:.4g} in {len(losses)} steps")
        shorter = _trained(method, case)
        if shorter is not None and len(shorter.losses) != len(losses):
            weights = [dict(r.network.named_parameters()) for r in (shorter, result)]
            if weights[0].keys() == weights[1].keys() and weights[0]:
                same = [
                    n
                    for n, w in weights[0].items()
                    if w.shape == weights[1][n].shape and torch.equal(w, weights[1][n])
                ]
                assert len(same) < len(weights[0]), (
                    f"all weights are the same after {len(shorter.losses)} and {len(losses)} steps"
                )
        if not complaints:
            return
    assert not complaints, "; ".join(complaints)
