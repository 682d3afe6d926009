"""How the bundled generators are trained: AdamW on a cosine, and the average of the weights on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm


def fit_averaged(
    network: nn.Module, loss: Callable[[], Tensor], *, steps: int, rate: float, ema: float, name: str
) -> list[float]:
    """Minimise what ``loss`` says of a new batch in every step; returns what it said.

    The network ends in eval mode with its averaged weights, of which each step keeps the share ``ema``.
    """
    network.to(memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema))
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, max(steps, 2), pct_start=0.1)
    losses = []
    for _ in tqdm(range(steps), name, unit="batch", mininterval=1.0):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(network)
        losses.append(value.item())
    network.load_state_dict(average.module.state_dict())
    network.to(memory_format=torch.contiguous_format).eval()
    return losses
