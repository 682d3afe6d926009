"""TracIn: influence of training images by products of loss gradients at checkpoints, Pruthi et al. 2020."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, batch_size, hookimpl, load_model, method
from phosphene.roles import Checkpoint, Checkpoints, Dataset, Images, Labels, Model
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, maximum, size

from ._influence_result import TrainingInfluence, training_influence
from ._weight_gradients import (
    Count,
    GradientProducts,
    WeightLayers,
    copy_at,
    image_gradients,
    require_class_labels,
    unit_scale,
    weights_of,
)


def _oracle() -> None:
    """For a linear layer, the product of gradients is (p - y) . (p' - y') (h . h' + 1), the bias included."""
    draw = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=(3, 2, 2))
    images = torch.rand(9, 3, 2, 2, generator=draw, dtype=torch.float64)
    numbers = torch.randint(3, (7,), generator=draw)
    data = TensorDataset(images[:7], [str(int(number)) for number in numbers])
    states = [
        {n: 0.3 * torch.randn(t.shape, generator=draw).double() for n, t in network.state_dict().items()}
        for _ in range(2)
    ]
    features, labels = model.normalize(images).flatten(1), torch.tensor([2, 0])
    classes = torch.eye(3).double()[torch.cat([numbers, labels])]
    products, cosines = [], []
    for state in states:
        errors = (features @ state["1.weight"].T + state["1.bias"]).softmax(1) - classes
        grams = (errors @ errors.T) * (features @ features.T + 1)
        norms = grams.diagonal().sqrt()
        products.append(grams[7:, :7])
        cosines.append((grams / norms / norms[:, None])[7:, :7])
    checkpoints = tuple(map(Checkpoint, states))
    result = tracin(model, images[7:], data, labels, checkpoints, learning_rates=[0.1, 0.02], k=3)
    expected = 0.1 * products[0] + 0.02 * products[1]
    torch.testing.assert_close(result.values, expected)
    order = expected[0].argsort(descending=True).tolist()
    assert result.proponents[0].tolist() == order[:3] and result.opponents[0].tolist() == order[:-4:-1]
    assert torch.equal(result.opponent_images[1], images[result.opponents[1]])
    assert result.targets == ("class 2", "class 0") and result.classes[0] == str(int(numbers[0]))
    result = tracin(model, images[7:], data, labels, checkpoints, normalize=True)
    torch.testing.assert_close(result.values, cosines[0] + cosines[1])
    # Without checkpoints the model's own weights, at a learning rate of 1.
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], weights=states[0])
    torch.testing.assert_close(tracin(model, images[7:], data, labels).values, products[0])
    # Of the last of two layers alone, whose inputs are the hidden units.
    deeper = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = load_model(deeper, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=(3, 2, 2))
    with torch.no_grad():
        hidden = deeper[:3](model.normalize(images))
        errors = model(images).softmax(1) - classes
        expected = ((errors @ errors.T) * (hidden @ hidden.T + 1))[7:, :7]
    torch.testing.assert_close(tracin(model, images[7:], data, labels, layers=["3"]).values, expected)


def gradient_products(calls: Calls) -> Tensor:
    """The sum over checkpoints of products of the gradients of all weights, each by ``backward``."""
    data, products = calls.inputs["dataset"], []
    for checkpoint in calls.inputs["checkpoints"]:
        copied = calls.model.copy()
        copied.module.load_state_dict(dict(checkpoint.weights))
        copied.module.requires_grad_(True)
        rows = []
        for image, label in (
            *zip(calls.inputs["images"], calls.inputs["labels"].tolist(), strict=True),
            *zip(data.images, map(int, data.classes), strict=True),
        ):
            copied.module.zero_grad()
            with torch.enable_grad():
                (-copied(image[None]).log_softmax(1)[0, label]).backward()
            rows.append(torch.cat([w.grad.flatten() for w in copied.module.parameters()]))
        gradients = torch.stack(rows)
        count = len(calls.inputs["images"])
        products.append(gradients[:count] @ gradients[count:].T)
    return torch.stack(products).sum(0)


@method(
    family="influence",
    title="TracIn",
    references=[
        Reference(
            key="pruthi2020",
            title="Estimating Training Data Influence by Tracing Gradient Descent",
            authors="Pruthi, Liu, Kale, Sundararajan",
            year=2020,
            url="https://arxiv.org/abs/2002.08484",
        )
    ],
    relations=[
        Agrees(gradient_products, fields=("values",)),
        InvariantTo("logit_shift", fields=("values",)),
    ],
    needs=["gradients", "dataset"],
    cost=Cost(
        forward=maximum(1, size.checkpoints) * (size.images + size.dataset),
        backward=maximum(1, size.checkpoints) * (size.images + size.dataset),
    ),
    oracle=_oracle,
    quick={"k": 2},
    demo={"dataset": "builtin:scenes/400"},
)
def tracin(
    model: Model,
    images: Images,
    dataset: Dataset,
    labels: Labels,
    checkpoints: Checkpoints = None,
    *,
    learning_rates: Annotated[
        list[Annotated[float, Field(gt=0, le=1e6)]] | None,
        Field(min_length=1, description="learning rate at each checkpoint; default: 1"),
    ] = None,
    layers: WeightLayers = None,
    normalize: Annotated[
        bool, Field(description="divide gradients by their norm, so that values are sums of cosines")
    ] = False,
    k: Count = 5,
) -> TrainingInfluence:
    """TracIn: influence of training images by products of loss gradients, summed over checkpoints.

    values = sum_t eta_t  dL(x, y; w_t)/dw . dL(x_i, y_i; w_t)/dw

    with L the cross-entropy, (x, y) the explained image and its label, (x_i, y_i) a training image and its
    class, w_t the weights of checkpoint t and eta_t its learning rate. To first order, a step of gradient
    descent on a training image reduces the loss of the explained image by this value: proponents reduce it,
    opponents increase it. Images with a large loss have long gradients and are opponents or proponents of
    many images; ``normalize`` removes their length. Biases are weights as any other.

    ``checkpoints`` are files of weights (.safetensors), folders of trainings, or state dicts; without them
    the model's own weights are the only one. Norms use their running statistics.

    Returns:
        ``values`` (N, M) of M training images; ``proponents`` and ``opponents`` (N, k), their indices.

    Raises:
        InputError: a data set without classes, another number of learning rates than of checkpoints.
        UnknownName: a class of the data set that is no class of the model.
        ModelError: checkpoints that do not fit the model; ``layers`` without weights.

    Example::
        from phosphene import run

        result = run("tracin", images="builtin:scenes/2", dataset="builtin:scenes/24", k=3)
        result.values.shape  # (2, 24)
        result.proponents  # indices of training images, (2, 3)

    Source:
        Pruthi et al. 2020, section 3.2, equation 1.
    """
    require_class_labels(model, dataset)
    states = checkpoints or (None,)
    rates = learning_rates or [1.0] * len(states)
    if len(rates) != len(states):
        raise InputError(f"{len(states)} checkpoints need one learning rate each, not {len(rates)}")
    values, classes = None, ()
    for state, rate in zip(states, rates, strict=True):
        network = copy_at(model, state)
        directions = torch.stack(
            [
                gradient * unit_scale(gradient) if normalize else gradient
                for gradient in image_gradients(network, weights_of(network, layers), images, labels)
            ]
        )
        products = GradientProducts(network, layers, directions, normalize).run(dataset, batch_size(model))
        value = rate * products["products"].tensor().double().T
        values = value if values is None else values + value
        classes = products["classes"].labels()
    assert values is not None
    return training_influence(model, images, labels, dataset, classes, values, k, "TracIn")


@hookimpl
def phosphene_methods():
    return [tracin]
