"""The first training of the bundled networks whose predictions are proven: Adam on the cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from phosphene.builtin.networks import normalize


def fit_by_cross_entropy(
    kind: type[nn.Module], images: Tensor, labels: Tensor, *, steps: int, batch: int, lr: float, seed: int
) -> nn.Module:
    """A new network after ``steps`` steps of Adam, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), kind.__name__, unit="batch", mininterval=1.0):
        rows = torch.randint(len(images), (batch,), generator=generator)
        loss = F.cross_entropy(network(normalize(images[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()
