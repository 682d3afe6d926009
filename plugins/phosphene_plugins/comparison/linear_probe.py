"""Linear probes: how well a linear classifier reads the classes from each layer, Alain and Bengio 2016."""

from __future__ import annotations

import warnings
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, fork_random_state, hookimpl, load_model, method
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, InvariantTo, UnitRange, size

from ._layer_features import ProbedLayers, classified_features
from ._probe_result import ProbeAccuracy, confusion_matrix


def _oracle() -> None:
    """Classes that a linear function of the pixels separates are read from them, and not from its square."""
    difference_layer = nn.Linear(2, 2)
    network = nn.Sequential(nn.Flatten(), difference_layer, _Square(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        difference_layer.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        difference_layer.bias.zero_()
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 1, 2))
    draw = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(80, 1, 1, 2, generator=draw, dtype=torch.float64)
    difference = images[:, 0, 0, 0] - images[:, 0, 0, 1]
    images[:, 0, 0, 0] += 0.2 * difference.sign()
    labels = ["left" if value > 0 else "right" for value in difference.tolist()]
    result = linear_probe(
        model, TensorDataset(images, labels), layers=["0", "1", "2"], held_out=0.5, seed=0, strength=1e-4
    )
    assert result.accuracy[:2].tolist() == [1.0, 1.0] and result.best == "0" and result.count == 40
    assert result.classes == ("left", "right") and int(result.confusion.sum()) == 40
    assert int(result.confusion.diagonal().sum()) == 40  # of the best layer
    # |x1 - x2| is the same for both classes: chance, within four standard errors.
    assert abs(float(result.accuracy[2]) - 0.5) < 4 * (0.25 / 40) ** 0.5
    assert result.train_accuracy is not None and result.train_accuracy[1] == 1
    numbers = torch.tensor([label == "right" for label in labels]).long()
    with fork_random_state():
        torch.manual_seed(0)
        test = _held_out_rows(numbers, 0.5, 2)
    squares = model.features(images, "2").detach()
    shares = _fit(squares, numbers, test, 1e-4)
    own, hits = shares[torch.arange(80), numbers], shares.argmax(1) == numbers
    assert result.probability is not None
    torch.testing.assert_close(result.probability[2], own[test].mean())
    assert float(result.accuracy[2]) == float(hits[test].double().mean())
    assert float(result.train_accuracy[2]) == float(hits[~test].double().mean())
    few = TensorDataset(images[[0, 1, *range(10, 30)]][:8], [labels[0], labels[0]] + ["other"] * 6)
    assert linear_probe(model, few, layers=["0"], seed=0).count == 3  # 1 of 2 and 2 of 6
    _counts_of_held_out_images()
    _fit_is_stationary()
    # Large weights cost more than errors do: every image gets the more frequent class.
    is_left = torch.tensor([label == "left" for label in labels])
    rows = (is_left | (torch.arange(80) < 40)).nonzero()[:, 0].tolist()
    data = TensorDataset(images[rows], [labels[row] for row in rows])
    strong = linear_probe(model, data, layers=["1"], held_out=0.5, seed=0, strength=1e6)
    assert strong.chance == float(is_left.sum()) / len(rows) > 0.6
    assert (strong.confusion[:, 1] == 0).all() and (strong.confusion[:, 0] > 0).all()


def _counts_of_held_out_images() -> None:
    """The rounded share of each class, at least one image and not all."""
    numbers = torch.tensor([0, 2, 2, 0, 0, 1, 1, 0, 2, 0, 2, 0, 2, 0])  # 7, 2 and 5 images
    for share, counts in ((0.25, [2, 1, 1]), (0.95, [6, 1, 4])):
        assert torch.bincount(numbers[_held_out_rows(numbers, share, 3)], minlength=3).tolist() == counts


def _fit_is_stationary() -> None:
    """Where the gradient is 0, W = sum_i (y_i - p_i) z_i' / strength: log p - W z is b up to a constant."""
    draw = torch.Generator().manual_seed(1)
    numbers, train = torch.arange(36) % 3, torch.arange(36) < 24
    features = torch.randn(36, 3, generator=draw, dtype=torch.float64)
    features[:, 0] += numbers
    features = features * torch.tensor([1.0, 5, 0]) + 3  # the third is constant
    shares = _fit(features, numbers, ~train, 0.5)
    deviation = features[train].std(0, correction=0) + torch.tensor([0, 0, 1])
    z = (features - features[train].mean(0)) / deviation
    errors = (nn.functional.one_hot(numbers) - shares)[train]
    intercepts = shares.log() - z @ (errors.T @ z[train] / 0.5).T
    intercepts = intercepts - intercepts.mean(1, keepdim=True)
    torch.testing.assert_close(intercepts, intercepts[:1].expand(36, 3), atol=1e-2, rtol=0)
    torch.testing.assert_close(errors.sum(0), torch.zeros(3).double(), atol=1e-2, rtol=0)


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@method(
    family="comparison",
    references=[
        Reference(
            key="alain2016",
            title="Understanding intermediate layers using linear classifier probes",
            authors="Alain, Bengio",
            year=2016,
            url="https://arxiv.org/abs/1610.01644",
        )
    ],
    invariants=[UnitRange(field="accuracy")],
    relations=[InvariantTo("normalization", tolerance=0.2)],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    quick={"held_out": 0.5},
    demo={"dataset": "builtin:scenes/400"},
)
def linear_probe(
    model: Model,
    dataset: Dataset,
    *,
    layers: ProbedLayers = None,
    held_out: Annotated[
        float, Field(gt=0, lt=1, description="share of each class's images that the accuracy is of")
    ] = 0.25,
    strength: Annotated[
        float,
        Field(gt=0, le=1e9, description="weight of the squared norm of the classifier's weights"),
    ] = 1.0,
    seed: Seed = None,
) -> ProbeAccuracy:
    """Linear probe: accuracy of a linear classifier of each layer's features, on held-out images.

    min over W, b of sum_i cross-entropy(W z_i + b, y_i) + strength/2 ||W||^2

    with z_i the layer's output for image i, averaged over its positions and scaled to mean 0 and deviation 1
    over the training images, and y_i its class. Multinomial logistic regression by scikit-learn; of two
    classes W is one row, that of their difference. A random part ``held_out`` of every class, at least one
    image, is not trained on. What a layer's probe gains over the layer before it, the network has made
    linearly accessible; a probe does not say that the network uses it. For transfer to new classes pass a
    data set of these: its classes need not be the model's.

    Returns:
        ``accuracy``, ``train_accuracy`` and ``probability`` of the class (L,) by layer; ``confusion`` (K,
        K) of the best layer; ``chance``.

    Raises:
        InputError: a data set without classes, or a class with a single image.
        ModelError: a layer's output does not have one row per image.

    Example::
        from phosphene import run

        result = run("linear_probe", dataset="builtin:scenes/48", seed=0)
        result.accuracy  # one for each stage
        result.best

    Source:
        Alain and Bengio 2016, section 3.
    """
    names = layers or list(model.stages)
    features, labels = classified_features(model, dataset, names, "linear probe")
    classes = sorted(set(labels))
    numbers = torch.tensor([classes.index(label) for label in labels])
    sizes = torch.bincount(numbers)
    if (sizes < 2).any():
        name = classes[int(sizes.argmin())]
        raise InputError(f"class {name!r} has a single image: a probe needs one to train on and one to test")
    test = _held_out_rows(numbers, held_out, len(classes))
    accuracies, train_accuracies, probabilities, predictions = [], [], [], []
    for name in names:
        shares = _fit(features[name], numbers, test, strength)
        predicted = shares.argmax(1)
        hits = predicted == numbers
        accuracies.append(float(hits[test].double().mean()))
        train_accuracies.append(float(hits[~test].double().mean()))
        probabilities.append(float(shares.gather(1, numbers[:, None])[test].mean()))
        predictions.append(predicted)
    best = predictions[max(range(len(names)), key=lambda n: accuracies[n])]

    def convert(values: list[float]) -> Tensor:
        return torch.tensor(values, device=model.device, dtype=model.dtype)

    return ProbeAccuracy(
        layers=tuple(names),
        accuracy=convert(accuracies),
        train_accuracy=convert(train_accuracies),
        probability=convert(probabilities),
        classes=tuple(classes),
        confusion=confusion_matrix(numbers[test], best[test], len(classes)).to(model.device),
        chance=float(sizes.max()) / len(labels),
        count=int(test.sum()),
        classifier="linear probe",
    )


def _held_out_rows(numbers: Tensor, share: float, classes: int) -> Tensor:
    """A random share of every class's images, at least one and not all, (N,) bool."""
    test = torch.zeros(len(numbers), dtype=torch.bool)
    for number in range(classes):
        rows = (numbers == number).nonzero()[:, 0]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        test[rows[torch.randperm(len(rows))[:count]]] = True
    return test


def _fit(features: Tensor, numbers: Tensor, test: Tensor, strength: float) -> Tensor:
    """The probability of every class (N, K) by logistic regression on those that are not held out."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # slow to import

    train = features[~test].double()
    deviation = train.std(0, correction=0)
    # equivalent mutants: of a feature that is constant in training the weight is 0
    scaled = (features.double() - train.mean(0)) / torch.where(deviation > 0, deviation, 1)
    estimator = LogisticRegression(C=1 / strength, max_iter=1000)
    with warnings.catch_warnings():  # the accuracy after 1,000 steps is the probe's
        # equivalent mutants: a warning changes no result
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(scaled[~test].numpy(), numbers[~test].numpy())
    return torch.from_numpy(estimator.predict_proba(scaled.numpy()))


@hookimpl
def phosphene_methods():
    return [linear_probe]
