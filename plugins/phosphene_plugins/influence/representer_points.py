"""Representer points: a logit as a sum over training images, Yeh et al. 2018."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    DivergenceError,
    Fold,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    to_float64,
)
from phosphene.data import Batch, LabelRows, Rows, State
from phosphene.hooks import Tap
from phosphene.roles import Dataset, Images, Labels, Model
from phosphene.spec import Calls, Cost, InvariantTo, Relation, assert_equal, size
from phosphene.training import label_index

from ._influence_result import training_influence
from ._representer_result import RepresenterInfluence
from ._weight_gradients import Count, require_class_labels

#: The largest gradient of the loss, by the gradient at weights of 0, at which the layer is fitted.
TOLERANCE = 1e-9


def sums_to_the_fitted_logit() -> None:
    """The values sum to the logit of the optimum, that a general optimizer reaches from the same loss."""
    draw = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    settings: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": (3, 2, 2)}
    model = load_model(network, **settings)
    images = torch.rand(32, 3, 2, 2, generator=draw, dtype=torch.float64)
    numbers = torch.randint(3, (30,), generator=draw)
    data, labels = TensorDataset(images[:30], [str(int(n)) for n in numbers]), torch.tensor([2, 0])
    with torch.no_grad():
        hidden, logits = network[:3](model.normalize(images)), model(images)
    scale = hidden[:30].square().sum(1).mean().sqrt()
    features = F.pad(hidden / scale, (0, 1), value=1.0)
    for fit in ("predictions", "classes"):
        goal = logits[:30].softmax(1) if fit == "predictions" else torch.eye(3).double()[numbers]
        weight = torch.zeros(3, 5, dtype=torch.float64)
        for _ in range(30):  # Newton's method with the Hessian of all weights
            shares = (features[:30] @ weight.T).softmax(1)
            gradient = (shares - goal).T @ features[:30] / 30 + 2 * 0.02 * weight
            outputs = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None]
            hessian = torch.einsum("nkl,ni,nj->kilj", outputs, features[:30], features[:30]).reshape(15, 15)
            hessian = hessian / 30 + 2 * 0.02 * torch.eye(15).double()
            weight = weight - torch.linalg.solve(hessian, gradient.flatten()).view(3, 5)
        alphas = (goal - (features[:30] @ weight.T).softmax(1)) / (2 * 0.02 * 30)
        expected = alphas[:, labels].T * (features[30:] @ features[:30].T)
        with max_batch(29):  # one image is left over
            result = representer_points(model, images[30:], data, labels, fit=fit, strength=0.02, k=3)
        torch.testing.assert_close(result.values, expected, rtol=1e-6, atol=1e-8)
        own = (features[30:] @ weight.T).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(result.scores, own, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(result.model_scores, logits[30:].gather(1, labels[:, None])[:, 0])
        same = (features[:30] @ weight.T).argmax(1) == logits[:30].argmax(1)
        assert abs(result.agreement - float(same.double().mean())) < 1e-9
        assert result.classes == tuple(str(n) for n in numbers.tolist())
    assert torch.equal(result.proponent_images, images[result.proponents])
    assert torch.equal(result.opponent_images, images[result.opponents])
    # Without classes, those that the model predicts.
    result = representer_points(model, images[30:], TensorDataset(images[:30]), labels)
    assert result.classes == tuple(f"class {n}" for n in logits[:30].argmax(1).tolist())
    # Equal logits are those of weights 0, without a step.
    for parameter in network[3].parameters():
        parameter.data.zero_()
    assert not representer_points(model, images[30:], data, labels).values.any()


class SumsToScore(Relation):
    """The values of all training images sum to the score of the fitted layer."""

    kind: Literal["sums_to_score"] = "sums_to_score"

    def check(self, calls: Calls) -> None:
        result = calls.result
        assert_equal(result.values.sum(1), result.scores, self.tolerance, "the sum of values against scores")


@method(
    family="influence",
    references=[
        Reference(
            key="yeh2018",
            title="Representer Point Selection for Explaining Deep Neural Networks",
            authors="Yeh, Kim, Yen, Ravikumar",
            year=2018,
            url="https://arxiv.org/abs/1811.09720",
        )
    ],
    relations=[
        SumsToScore(tolerance=1e-6),
        InvariantTo("logit_shift", fields=("values",), tolerance=1e-5),
        InvariantTo("normalization", fields=("values",), tolerance=1e-5),
    ],
    needs=["dataset"],
    cost=Cost(forward=2 * size.images + size.dataset),
    oracle=sums_to_the_fitted_logit,
    quick={"k": 2, "strength": 0.1},
    demo={"dataset": "builtin:scenes/400"},
)
def representer_points(
    model: Model,
    images: Images,
    dataset: Dataset,
    labels: Labels,
    *,
    fit: Annotated[
        Literal["predictions", "classes"],
        Field(description="what the layer is fitted to: the model's probabilities, or the classes"),
    ] = "predictions",
    strength: Annotated[
        float, Field(ge=1e-6, le=1e6, description="lambda, the weight of the layer's squared norm")
    ] = 0.003,
    k: Count = 5,
) -> RepresenterInfluence:
    """Representer points: the logit of a class as a sum over training images.

    S(x) = sum_i alpha_i f(x_i) . f(x),  alpha_i = -1 / (2 lambda M)  dL(x_i, t_i) / dS(x_i)

    at the optimum W of  1/M sum_i L(x_i, t_i) + lambda ||W||^2,  S(x) = W f(x)

    with f(x) the input of the model's last linear layer, divided by its root mean square norm, and a constant
    1 for the bias, L the cross-entropy and t_i the model's own probabilities for training image i, or its
    class. A new last layer W is fitted, since the model's is at no optimum with a penalty; ``model_scores``
    and ``agreement`` say how far it is from the model. A proponent has features in the direction of the
    image's and more of the class than W predicts, or features in the opposite direction and less of it.

    Returns:
        ``values`` (N, M) of M training images, which sum to ``scores`` (N); ``model_scores`` (N);
        ``proponents`` and ``opponents`` (N, k), their indices; ``agreement``.

    Raises:
        InputError: ``fit="classes"`` of a data set without classes.
        ModelError: the model has no linear classifier.
        DivergenceError: the layer cannot be fitted to the precision that the equation needs.

    Example::
        from phosphene import run

        result = run("representer_points", images="builtin:scenes/2", dataset="builtin:scenes/48", k=3)
        result.values.sum(1)  # result.scores

    Source:
        Yeh et al. 2018, theorem 3.1 and section 3.2.
    """
    if model.row_by_row:
        raise InputError("labels must be classes: the fitted layer has the model's classes")
    if fit == "classes":
        require_class_labels(model, dataset)
    parts = images.split(batch_size(model))
    queries = torch.cat([to_float64(model.embed(part)) for part in parts])
    own = torch.cat([to_float64(model(part)) for part in parts]).cpu().gather(1, labels.cpu()[:, None])[:, 0]
    rows = _FeaturesAndLogits(model).run(dataset, batch_size(model))
    features, logits, names = (rows[name] for name in ("features", "logits", "classes"))
    features, logits, names = features.tensor().double(), logits.tensor().double(), names.labels()
    if fit == "classes" and len(names) < len(dataset):
        raise InputError("some images of the data set have no class")
    if fit == "classes":
        goal = F.one_hot(torch.tensor([label_index(model, name) for name in names]), logits.shape[1]).double()
    else:
        goal = logits.softmax(1)
    scale = features.square().sum(1).mean().sqrt()
    scale = scale if scale > 0 else torch.ones_like(scale)
    features = F.pad(features / scale, (0, 1), value=1.0)
    queries = F.pad(queries.cpu() / scale, (0, 1), value=1.0)
    weight = _fit(features, goal, strength)
    fitted = features @ weight.T
    alphas = (goal - fitted.softmax(1)) / (2 * strength * len(dataset))
    chosen = labels.cpu()
    values = alphas[:, chosen].T * (queries @ features.T)
    predicted = logits.argmax(1)
    classes = names if len(names) == len(dataset) else tuple(map(model.class_name, predicted.tolist()))
    influence = training_influence(model, images, labels, dataset, classes, values, k, "representer points")
    fields = {f.name: getattr(influence, f.name) for f in dataclasses.fields(influence)}
    scores = (queries @ weight.T).gather(1, chosen[:, None])[:, 0]
    return RepresenterInfluence(
        **fields,
        scores=scores.to(model.device, model.dtype),
        model_scores=own.to(model.device, model.dtype),
        agreement=float((fitted.argmax(1) == predicted).double().mean()),
    )


@dataclass
class _FeaturesAndLogits(Fold[State]):
    """The input of the last linear layer (M, D), the logits (M, K) and the classes, where all have one."""

    model: Model
    title: str = "features"

    def start(self) -> State:
        return {"features": Rows(), "logits": Rows(), "classes": LabelRows()}

    def update(self, state: State, batch: Batch) -> State:
        name = self.model.structure.classifier
        assert name is not None  # embed has refused a model without one
        with Tap({name: self.model.layers[name]}, inputs=True) as tap:
            logits = self.model(batch.images.to(self.model.device))
        state["features"].write(batch.indices[0], tap[name].flatten(1))
        state["logits"].write(batch.indices[0], logits)
        if (labels := batch.labels) is not None:
            state["classes"].write_labels(batch.indices[0], labels)
        return state


def _fit(features: Tensor, goal: Tensor, strength: float) -> Tensor:
    """The weights (K, D) of least cross-entropy plus ``strength`` times their squared norm.

    A trust-region Newton method, since values depend on the gradient of the loss divided by lambda.
    """
    from scipy.optimize import minimize  # slow to import

    count, shape = len(features), (goal.shape[1], features.shape[1])

    def shares(flat: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        weight = torch.from_numpy(flat).view(shape)
        return weight, features @ weight.T

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight, logits = shares(flat)
        errors = logits.softmax(1) - goal
        value = -(goal * logits.log_softmax(1)).sum() / count + strength * weight.square().sum()
        gradient = errors.T @ features / count + 2 * strength * weight
        return float(value), gradient.flatten().numpy()  # equivalent mutants: SciPy converts tensors

    def curvature(flat: NDArray[np.float64], vector: NDArray[np.float64]) -> NDArray[np.float64]:
        change = torch.from_numpy(vector).view(shape)
        p, along = shares(flat)[1].softmax(1), features @ change.T
        outputs = p * along - p * (p * along).sum(1, keepdim=True)
        # equivalent mutants: the curvature decides how fast the minimum is reached, not where it is
        return (outputs.T @ features / count + 2 * strength * change).flatten().numpy()

    start = np.zeros(shape[0] * shape[1])
    first = float(np.linalg.norm(loss(start)[1]))
    if first == 0:
        return torch.zeros(shape, dtype=torch.float64)
    options: dict[str, Any] = {"gtol": TOLERANCE * first, "maxiter": 1000}
    result = minimize(loss, start, jac=True, hessp=curvature, method="trust-ncg", options=options)
    remaining = float(np.linalg.norm(loss(result.x)[1]))
    if not remaining <= 100 * TOLERANCE * first:
        raise DivergenceError(
            f"the layer cannot be fitted: its gradient is {remaining / first:.1g} of that at the start; "
            f"raise strength (now {strength:g})"
        )
    return torch.from_numpy(result.x).view(shape)


@hookimpl
def phosphene_methods():
    return [representer_points]
