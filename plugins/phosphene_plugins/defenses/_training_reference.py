"""A plain training loop on a small network, with which the oracles of the trainings compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from phosphene import Model, TensorDataset, load_model, max_batch
from phosphene.training import TrainedModel

STEPS, BATCH, PART, LR, SEED = 3, 4, 2, 0.1, 3
#: The options of that training: of seven images the last two are held out.
SHORT_TRAINING: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "lr": LR, "held_out": 0.3, "seed": SEED}

#: ``loss(trained, images, labels, progress)``: the loss of each image, (n,).
PlainLoss = Callable[[Model, Tensor, Tensor, float], Tensor]


def sample_training(*hidden: nn.Module) -> tuple[Model, TensorDataset]:
    """A network with the layers ``hidden`` after its first linear one, and seven images with labels."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), *hidden, nn.Linear(3, 3)).double().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = 0.2 + 0.6 * torch.rand(7, 1, 2, 2, generator=generator, dtype=torch.float64)
    model = load_model(network, input_size=(1, 2, 2), mean=[0.4], std=[0.5])
    return model, TensorDataset(images, ["0", "2", "1", "0", "1", "2", "0"])


def train_plainly(
    model: Model, dataset: TensorDataset, loss: PlainLoss, optimizer: Any, *, labels: Tensor | None = None
) -> tuple[Model, Tensor]:
    """A trained copy of the model and the losses (steps,), at a rate that falls linearly to zero.

    ``labels``: default: the data set's. Each batch of four is passed in two parts.
    """
    trained, losses = model.copy(), []
    assert dataset.classes is not None
    labels = torch.tensor([*map(int, dataset.classes)]) if labels is None else labels
    permutations = [torch.randperm(5, generator=torch.Generator().manual_seed(SEED + n)) for n in range(3)]
    order = torch.cat(permutations)
    descent = optimizer(trained.module.requires_grad_(True).parameters(), lr=LR)
    for step in range(STEPS):
        torch.manual_seed(SEED + step)
        descent.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        descent.zero_grad()
        total = 0.0
        for rows in order[step * BATCH : (step + 1) * BATCH].split(PART):
            value = loss(trained, dataset.images[rows], labels[rows], step / STEPS).sum() / BATCH
            value.backward()
            total += value.item()
        descent.step()
        losses.append(total)
    trained.module.eval()
    return trained, torch.tensor(losses, dtype=torch.float64)


def assert_trained_plainly(
    train: Callable[[], TrainedModel],
    model: Model,
    dataset: TensorDataset,
    loss: PlainLoss,
    optimizer: Any,
    *,
    labels: Tensor | None = None,
) -> tuple[TrainedModel, Model]:
    """Assert that ``train()`` has the losses and the final logits of the plain loop; returns both results."""
    sizes: list[int] = []
    record = register_module_forward_pre_hook(lambda layer, inputs: sizes.append(len(inputs[0])))
    with max_batch(PART):
        result = train()
    record.remove()
    assert max(sizes) == PART
    trained, losses = train_plainly(model, dataset, loss, optimizer, labels=labels)
    torch.testing.assert_close(result.losses, losses)
    torch.testing.assert_close(result.model()(dataset.images), trained(dataset.images))
    held_out = dataset.images[5:]
    assert dataset.classes is not None
    expected = torch.tensor([*map(int, dataset.classes)]) if labels is None else labels
    accuracy = trained(held_out).argmax(1).eq(expected[5:]).double().mean()
    torch.testing.assert_close(result.curves["clean"][-1], accuracy)
    assert result.evaluation_steps.tolist() == [*range(STEPS + 1)]
    torch.testing.assert_close(result.previews[::3], held_out)
    return result, trained
