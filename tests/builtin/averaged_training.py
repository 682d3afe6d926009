"""The training loop of the bundled generators: AdamW, one-cycle learning rate, averaged weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

WEIGHT_DECAY = 0.01
WARM_UP = 0.1  # fraction of the steps before the largest learning rate
CLIP_NORM = 1.0


def fit_averaged(
    network: nn.Module, loss: Callable[[], Tensor], *, steps: int, lr: float, ema: float, title: str
) -> list[float]:
    """Minimize ``loss``, which returns the loss of a new batch at every call; returns the losses.

    Afterwards the network is in eval mode with the exponential moving average of its weights, of decay
    ``ema``.
    """
    network.to(memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema))
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(steps, 2), pct_start=WARM_UP)
    losses = []
    for _ in tqdm(range(steps), title, unit="batch", mininterval=1.0):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        losses.append(value.item())
    network.load_state_dict(average.module.state_dict())
    network.to(memory_format=torch.contiguous_format).eval()
    return losses
