"""Vectors of a logistic regression, groups of concepts and gradients of shifts, by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phosphene import Class, InputError, TensorDataset, load_model

from ._pooled_activations import PooledGradients, by_concept, fit_vector


def vectors_are_of_their_definition() -> None:
    """Differences of means, minima of the logistic loss, and points that do not differ."""
    draw = torch.Generator().manual_seed(0)
    concept, random = torch.randn(6, 2, generator=draw) + 1, 2 * torch.randn(3, 2, generator=draw)
    vector, offset = fit_vector(concept, random, "mean_difference", 1.0)
    shift = concept.double().mean(0) - random.double().mean(0)
    torch.testing.assert_close(vector, shift / shift.norm())
    # Both means are as far from the boundary.
    sides = [float(rows.double().mean(0) @ vector) - offset for rows in (concept, random)]
    assert abs(sides[0] + sides[1]) < 1e-12 < sides[0]
    for strength in (0.3, 20.0):
        _is_minimum_of_logistic_loss(concept, random, strength)
    for classifier in ("mean_difference", "linear"):
        vector, offset = fit_vector(torch.ones(3, 2), torch.ones(2, 2), classifier, 1.0)
        assert vector.tolist() == [0, 0] and offset == 0
    _groups_have_two_images()
    _gradients_are_of_shifts()


def _is_minimum_of_logistic_loss(concept: Tensor, random: Tensor, strength: float) -> None:
    """strength / 2 |w|^2 + sum_i c_i log(1 + exp(-y_i (w . z_i + b))), with z centered and of deviation 1."""
    unit, offset = fit_vector(concept, random, "linear", strength)
    x = torch.cat([concept, random]).double()
    scale = (x - x.mean(0)).norm(dim=1).square().mean().sqrt()
    y = torch.tensor([1.0] * len(concept) + [0.0] * len(random)).double()
    # Both kinds have the same total weight.
    weights = torch.where(y > 0, len(x) / 2 / len(concept), len(x) / 2 / len(random))
    variables = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [variables], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (x - x.mean(0)) / scale @ variables[:2] + variables[2]
        losses = nn.functional.binary_cross_entropy_with_logits(logits, y, weights, reduction="sum")
        total = losses + strength / 2 * variables[:2].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    w, b = variables.detach()[:2], variables.detach()[2]
    torch.testing.assert_close(unit, w / w.norm(), rtol=0, atol=1e-3)
    # w . (x - mean) / scale + b = 0 at the boundary.
    assert abs(offset - float((w @ x.mean(0) - b * scale) / w.norm())) < 2e-3


def _groups_have_two_images() -> None:
    rows = torch.arange(10.0).view(5, 2)
    images = torch.zeros(5, 3, 2, 2)
    groups = by_concept(rows, ["b", "a", "b", "b", "a"], TensorDataset(images))
    assert list(groups) == ["a", "b"] and groups["a"].tolist() == [[2, 3], [8, 9]]
    assert groups["b"].tolist() == [[0, 1], [4, 5], [6, 7]]
    ((name, group),) = by_concept(rows, [], TensorDataset(images)).items()
    assert name == "concept" and torch.equal(group, rows)
    refusal = ""
    try:
        by_concept(rows[:3], ["b", "a", "b"], TensorDataset(images))
    except InputError as error:
        refusal = str(error)
    assert refusal == "concept 'a' has 1 image; a vector needs at least 2"


def _gradients_are_of_shifts() -> None:
    """The change of a score by a small shift of a channel at all positions, for each image in its order."""
    layers = nn.Conv2d(3, 2, 1), nn.Tanh(), nn.Conv2d(2, 2, (2, 3), bias=False)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    for layer in (layers[0], layers[2]):
        nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))
        if layer.bias is not None:
            nn.init.constant_(layer.bias, 0.3)
    model = load_model(network, input_size=(3, 4, 5), mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.rand(5, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = PooledGradients(model, "0", Class(1)).run(TensorDataset(images), 2)
    with torch.no_grad():
        for channel in range(2):
            shift = 1e-4 * torch.eye(2, dtype=torch.float64)[channel, :, None, None]
            scores = [network[1:](network[0](images) + sign * shift)[:, 1] for sign in (1, -1)]
            difference = (scores[0] - scores[1]) / 2e-4
            torch.testing.assert_close(gradients[:, channel].double(), difference, rtol=1e-5, atol=1e-6)
