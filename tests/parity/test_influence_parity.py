"""TracIn against captum, whose TracInCP is the product of all weights' gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from captum.influence import TracInCP
from torch import nn
from torch.utils.data import TensorDataset as Pairs

from phosphene import TensorDataset, load_model, methods


def test_tracin_equals_captums() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 4)
    ).double()
    states = [{n: torch.randn_like(t) * 0.3 for n, t in network.state_dict().items()} for _ in range(2)]
    images, classes = torch.rand(12, 3, 8, 8, dtype=torch.float64), torch.randint(4, (12,))

    def load(module: nn.Module, state: dict[str, torch.Tensor]) -> float:
        module.load_state_dict(state)
        return 0.3

    pairs = Pairs(images[:9], classes[:9])
    captum = TracInCP(
        network, pairs, states, checkpoints_load_func=load, loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=4,
    )  # fmt: skip
    expected = captum.influence((images[9:], classes[9:]), show_progress=False)
    data = TensorDataset(images[:9], [str(int(n)) for n in classes[:9]])
    model = load_model(network, input_size=(3, 8, 8))
    result = methods["tracin"](model, images[9:], data, classes[9:], states, learning_rates=[0.3, 0.3])
    torch.testing.assert_close(result.values, expected, rtol=1e-12, atol=1e-12)
    assert F.cross_entropy(model(images[9:]), classes[9:]) > 0
