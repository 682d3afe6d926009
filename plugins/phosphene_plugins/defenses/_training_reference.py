"""A plain training loop and evaluation on a small network: the reference for the oracles of trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from phosphene import Model, TensorDataset, load_model, max_batch
from phosphene.attacks import project, random_point, steepest
from phosphene.training import MAX_HELD_OUT, TrainedModel

from ._training_evaluation import HeldOutEvaluation, training_cost

STEPS, BATCH, PART, LR, SEED, CHECKPOINTS = 3, 4, 2, 0.1, 3, 2
#: The options of that training: of seven images the last two are held out.
SHORT_TRAINING: dict[str, Any] = {
    "steps": STEPS,
    "batch": BATCH,
    "lr": LR,
    "held_out": 0.3,
    "checkpoints": CHECKPOINTS,
    "seed": SEED,
}

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
    assert_last_checkpoint_is_the_result(result)
    return result, trained


def assert_last_checkpoint_is_the_result(result: TrainedModel) -> None:
    """Assert that the weights of a short training are stored twice, the last time after the last step."""
    assert len(result.checkpoints) == CHECKPOINTS
    torch.testing.assert_close(result.checkpoints[-1], dict(result.network.state_dict()))


def evaluation_by_hand() -> None:
    """Accuracy and previews under ten steps of PGD from one random offset, in batches of two."""
    model, dataset = sample_training(nn.Tanh())
    trained, indices = model.copy(), [1, 2, 4, 6, 5]
    generator = torch.Generator().manual_seed(1)
    for parameter in trained.module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    labels = trained(dataset.images).argmax(1)
    labels[6] = (labels[6] + 1) % 3
    # The images are in single precision, the networks in double precision.
    single = TensorDataset(dataset.images.float(), dataset.classes)
    images, y, eps = single.images[indices].double(), labels[indices], 0.2
    norms: tuple[Literal["linf", "l2"], ...] = ("linf", "l2")
    for norm in norms:
        with max_batch(2):
            evaluation = HeldOutEvaluation(
                model, trained, single, indices, lambda rows: labels[[*rows]], eps=eps, norm=norm
            )
        points = []
        for classifier in (model, trained):
            x = random_point(images, eps, norm, torch.Generator().manual_seed(0))
            for _ in range(10):
                x = x.detach().requires_grad_()
                loss = nn.functional.cross_entropy(classifier(x), y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, x)
                x = project(x.detach() + eps / 4 * steepest(gradient, norm), images, eps, norm)
            points.append(x)
        accuracies = {
            name: float(trained(batch).argmax(1).eq(y).double().mean())
            for name, batch in (("clean", images), ("under PGD-10", points[1]))
        }
        assert evaluation() == accuracies and len({*accuracies.values()}) == 2, accuracies
        previews = evaluation.previews()
        panels = torch.stack([images, *points], 1)[:3].flatten(0, 1)
        torch.testing.assert_close(previews["previews"], panels)
        predictions = [m(x).argmax(1).tolist() for m, x in zip((model, trained), points, strict=True)]
        titles = [
            (f"class {y[n]}", f"before: class {predictions[0][n]}", f"after: class {predictions[1][n]}")
            for n in range(3)
        ]
        assert previews["labels"] == sum(titles, ())


def cost_by_hand() -> None:
    """Passes of a training, of its evaluations on the held-out images, and of the previews."""
    cost = training_cost(3, 2, certificate_passes=1, setup_passes=5)
    # Evaluations: the first, and at most 8 after it; images that are held out, at least one.
    for steps, share, images, evaluations, held_out in (
        (20, 0.25, 10, 9, 3),
        (2, 0.07, 10, 3, 1),
        (2, 0.04, 10, 3, 1 + 10),  # of less than half an image all are evaluated
        (20, 0.5, 10**6, 9, MAX_HELD_OUT),
    ):
        forward, backward = cost.evaluate({"steps": steps, "batch": 4, "held_out": share}, dataset=images)
        assert forward == 3 * 4 * steps + (evaluations * (10 + 2 + 1) + 1) * held_out + 6 * 11 + 5
        assert backward == 2 * 4 * steps + evaluations * 10 * held_out + 6 * 10
