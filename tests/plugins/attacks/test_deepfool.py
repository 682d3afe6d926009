"""DeepFool: distance to the boundary of a linear model times its overshoot, and early stopping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.testing.observation import count_passes

deepfool = methods["attacks.deepfool"]


def linear(classes: int = 6, size: int = 4) -> tuple[Model, Tensor]:
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(3 * size * size, classes).double()
    layer.weight.data = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
    layer.bias.data.zero_()
    images = 0.5 + 0.02 * torch.randn(8, 3, size, size, generator=generator, dtype=torch.float64)
    return load_model(nn.Sequential(nn.Flatten(), layer), input_size=(3, size, size)), images


def nearest_boundary(model: Model, images: Tensor, dual: float) -> Tensor:
    weight, logits = model.module[1].weight.detach(), model(images).detach()
    labels = logits.argmax(1)[:, None]
    distances = (logits.gather(1, labels) - logits) / (weight - weight[labels]).norm(dual, dim=2)
    return distances.scatter(1, labels, torch.inf).amin(1)


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("linf", 1.0)])
@pytest.mark.parametrize("overshoot", [0.001, 0.02, 0.5])
def test_linear_model_is_crossed_by_exactly_the_overshoot(norm: str, dual: float, overshoot: float) -> None:
    model, images = linear()
    result = deepfool(model, images, model(images).argmax(1), norm=norm, overshoot=overshoot)
    assert result.success.all()
    expected = (1 + overshoot) * nearest_boundary(model, images, dual)
    torch.testing.assert_close(result.distance(norm), expected, rtol=1e-9, atol=0)


def test_class_outside_the_candidates_is_ignored() -> None:
    """The boundary of the third class is nearest, at a tenth of the distance to the second's."""
    weight = torch.tensor([[1.0, 0, 0], [0.9, 0.2, 0], [0.5, 0, 50]], dtype=torch.float64)
    layer = nn.Linear(3, 3, bias=False).double()
    layer.weight.data = weight
    model = load_model(nn.Sequential(nn.Flatten(), layer), input_size=(3, 1, 1))
    images = torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
    two, three = (deepfool(model, images, torch.tensor([0]), candidates=k) for k in (2, 3))
    assert (two.after.item(), three.after.item()) == (1, 2)
    assert three.distance("l2") < 0.2 * two.distance("l2")


def test_finished_images_take_no_more_passes() -> None:
    """On a linear model one step each: a forward pass before and after it, a backward pass for each rival."""
    model, images = linear()
    labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 6
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    with count_passes(model.module) as passes:
        deepfool(model, images, labels)
    # Eight images, five of them again with a gradient, and again after the step.
    assert passes.forward == 8 + 5 + 5
    assert passes.backward == 5 * 5


def test_image_on_the_boundary_crosses_it() -> None:
    model, images = linear(classes=2)
    weight = model.module[1].weight.detach()
    model.module[1].bias.data = -weight @ images[0].flatten()  # both logits are 0 on the first image
    result = deepfool(model, images[:1], model(images[:1]).argmax(1))
    assert result.success.all() and 0 < result.distance("l2") < 1e-3
