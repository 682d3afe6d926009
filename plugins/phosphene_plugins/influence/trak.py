"""TRAK: influence of training images by a linear model of projected gradients, Park et al. 2023."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
)
from phosphene.data import Batch, LabelRows, Rows, State
from phosphene.roles import Checkpoint, Checkpoints, Dataset, Images, Labels, Model, Seed
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, maximum, size
from phosphene.training import class_indices

from ._influence_result import TrainingInfluence, training_influence
from ._weight_gradients import (
    Count,
    WeightLayers,
    copy_at,
    image_gradients,
    require_class_labels,
    weights_of,
)

#: The damping without a value of its own, in mean eigenvalues of the kernel.
RELATIVE_DAMPING = 0.01
#: Nonzero numbers of the projection for each weight.
NONZEROS = 4
#: The most numbers of gradients without a projection: 2 GB in double precision.
MAX_NUMBERS = 2**28


def exact_kernel_of_a_linear_layer() -> None:
    """Without a projection, values are those of the gradients' kernel; with one, they are close to them."""
    draw = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    settings: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": (3, 2, 2)}
    model = load_model(network, **settings)
    images = torch.rand(62, 3, 2, 2, generator=draw, dtype=torch.float64)
    numbers = torch.randint(3, (60,), generator=draw)
    data, labels = TensorDataset(images[:60], [str(int(n)) for n in numbers]), torch.tensor([2, 0])
    states = [
        {n: 0.3 * torch.randn(t.shape, generator=draw).double() for n, t in network.state_dict().items()}
        for _ in range(2)
    ]
    features = F.pad(model.normalize(images).flatten(1), (0, 1), value=1.0)
    classes = torch.cat([numbers, labels])
    halves, misses = [], []
    for state in states:
        shares = (features[:, :-1] @ state["1.weight"].T + state["1.bias"]).softmax(1)
        own = shares.gather(1, classes[:, None])
        # f = log p_y / (1 - p_y): df/dz_y = 1, df/dz_c = -p_c / (1 - p_y).
        slopes = (-shares / (1 - own)).scatter(1, classes[:, None], 1.0)
        gradients = (slopes[:, :, None] * features[:, None]).flatten(1)
        gram = gradients[:60].T @ gradients[:60] + 0.7 * torch.eye(39).double()
        halves.append(gradients[60:] @ torch.linalg.inv(gram) @ gradients[:60].T)
        misses.append(1 - own[:60, 0])
    exact = (halves[0] + halves[1]) / 2 * (misses[0] + misses[1]) / 2
    options: dict[str, Any] = {"damping": 0.7, "seed": 0}
    checkpoints = tuple(map(Checkpoint, states))
    result = trak(model, images[60:], data, labels, checkpoints, dimensions=None, **options)
    torch.testing.assert_close(result.values, exact)
    assert torch.equal(result.proponent_images, images[result.proponents])
    assert torch.equal(result.opponent_images, images[result.opponents])
    # A count sketch on as many dimensions as the kernel's rank preserves it up to collisions.
    sketched = trak(model, images[60:], data, labels, checkpoints, dimensions=4096, **options).values
    assert float((sketched - exact).norm() / exact.norm()) < 0.1
    # With the default damping, and fewer gradients than weights: the dual form of the same equation.
    few = TensorDataset(images[:20], [str(int(n)) for n in numbers[:20]])
    model = load_model(network, weights=states[1], **settings)
    with torch.no_grad():
        part = gradients[:20].T @ gradients[:20]
        added = 0.01 * part.trace() / 20
        inverse = torch.linalg.inv(part + added * torch.eye(39).double())
        expected = gradients[60:] @ inverse @ gradients[:20].T * misses[1][:20]
    with max_batch(19):  # one image is left over
        result = trak(model, images[60:], few, labels, dimensions=None, seed=0)
    torch.testing.assert_close(result.values, expected)
    assert result.classes == tuple(few.classes or ())
    # Of the last of two layers alone, whose inputs are the hidden units.
    deeper = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = load_model(deeper, **settings)
    with torch.no_grad():
        hidden = F.pad(deeper[:3](model.normalize(images)), (0, 1), value=1.0)
        shares = model(images).softmax(1)
        own = shares.gather(1, classes[:, None])
        slopes = (-shares / (1 - own)).scatter(1, classes[:, None], 1.0)
        gradients = (slopes[:, :, None] * hidden[:, None]).flatten(1)
        inverse = torch.linalg.inv(gradients[:60].T @ gradients[:60] + 0.7 * torch.eye(15).double())
        expected = gradients[60:] @ inverse @ gradients[:60].T * (1 - own[:60, 0])
    result = trak(model, images[60:], data, labels, dimensions=None, layers=["3"], **options)
    torch.testing.assert_close(result.values, expected)


def kernel_of_gradients(calls: Calls) -> Tensor:
    """The values from gradients of all weights by ``backward``, and the inverse of their kernel."""
    images, data = calls.inputs["images"], calls.inputs["dataset"]
    halves, misses = [], []
    for checkpoint in calls.inputs["checkpoints"]:
        copied = calls.model.copy()
        copied.module.load_state_dict(dict(checkpoint.weights))
        copied.module.requires_grad_(True)
        rows, shares = [], []
        for image, label in (
            *zip(images, calls.inputs["labels"].tolist(), strict=True),
            *zip(data.images, map(int, data.classes), strict=True),
        ):
            copied.module.zero_grad()
            with torch.enable_grad():
                probability = copied(image[None]).softmax(1)[0, label]
                (probability / (1 - probability)).log().backward()
            rows.append(torch.cat([w.grad.flatten() for w in copied.module.parameters()]))
            shares.append(probability.detach())
        gradients, count = torch.stack(rows), len(images)
        gram = gradients[count:] @ gradients[count:].T
        gram = gram + calls.params["damping"] * torch.eye(len(gram)).to(gram)
        halves.append(gradients[:count] @ gradients[count:].T @ torch.linalg.inv(gram))
        misses.append(1 - torch.stack(shares)[count:])
    return torch.stack(halves).mean(0) * torch.stack(misses).mean(0)


@method(
    family="influence",
    title="TRAK",
    references=[
        Reference(
            key="park2023",
            title="TRAK: Attributing Model Behavior at Scale",
            authors="Park, Georgiev, Ilyas, Leclerc, Madry",
            year=2023,
            url="https://arxiv.org/abs/2303.14186",
        ),
        Reference(
            key="kane2014",
            title="Sparser Johnson-Lindenstrauss Transforms",
            authors="Kane, Nelson",
            year=2014,
            url="https://arxiv.org/abs/1012.1577",
        ),
    ],
    relations=[
        Agrees(kernel_of_gradients, fields=("values",), where={"dimensions": None, "damping": 0.5}),
        InvariantTo("logit_shift", fields=("values",)),
    ],
    needs=["gradients", "dataset"],
    cost=Cost(
        forward=maximum(1, size.checkpoints) * (size.images + 2 * size.dataset),
        backward=maximum(1, size.checkpoints) * (size.images + size.dataset),
    ),
    oracle=exact_kernel_of_a_linear_layer,
    quick={"k": 2, "dimensions": 64},
    demo={"dataset": "builtin:scenes/400"},
)
def trak(
    model: Model,
    images: Images,
    dataset: Dataset,
    labels: Labels,
    checkpoints: Checkpoints = None,
    *,
    dimensions: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="length of the projected gradients; None: no projection"),
    ] = 1024,
    damping: Annotated[
        float | None,
        Field(gt=0, le=1e12, description="lambda; default: a hundredth of the kernel's mean eigenvalue"),
    ] = None,
    layers: WeightLayers = None,
    k: Count = 5,
    seed: Seed = None,
) -> TrainingInfluence:
    """TRAK: influence of training images on the log-odds of a class, by a linear model of gradients.

    values = mean_t [ phi_t(x)' (Phi_t' Phi_t + lambda I)^-1 phi_t(x_i) ] * mean_t [ 1 - p_t(y_i | x_i) ]

    phi_t(x) = P' df(x, y; w_t)/dw,  f = log p(y | x) / (1 - p(y | x))

    with the rows of Phi_t the training images' phi_t, w_t the weights of checkpoint t, and P a random
    projection with four nonzero numbers for each weight, the same for all images, which preserves inner
    products on average. The network is replaced by a logistic regression on its gradients, whose
    leave-one-out formula this is. Checkpoints of independent trainings average the noise of a single one.
    With fewer training images than ``dimensions`` and a small lambda, every image is fitted by itself.

    Returns:
        ``values`` (N, M) of M training images; ``proponents`` and ``opponents`` (N, k), their indices.

    Raises:
        InputError: a data set without classes; too many weights and images for gradients without projection.
        UnknownName: a class of the data set that is no class of the model.
        ModelError: checkpoints that do not fit the model; ``layers`` without weights.

    Example::
        from phosphene import run

        data = {"images": "builtin:scenes/2", "dataset": "builtin:scenes/24"}
        result = run("trak", **data, dimensions=256, k=3, seed=0)
        result.values.shape  # (2, 24)

    Source:
        Park et al. 2023, section 3.2, equation 13, with lambda; projection: Kane and Nelson 2014,
        section 1.2.
    """
    require_class_labels(model, dataset)
    assert isinstance(seed, int)  # the call drew one
    count = sum(weight.numel() for weight in weights_of(model, layers))
    if dimensions is None and count * len(dataset) > MAX_NUMBERS:
        raise InputError(
            f"gradients of {count:,} weights for {len(dataset):,} images take too much memory without a "
            "projection: set dimensions, or name layers"
        )
    projection = None if dimensions is None else _Projection.draw(count, dimensions, seed, model.device)
    kernels, misses, classes = [], [], ()
    for state in checkpoints or (None,):
        network = copy_at(model, state)
        weights = weights_of(network, layers)
        gradients = image_gradients(network, weights, images, labels, log_odds)
        queries = torch.stack([_project(gradient, projection) for gradient in gradients])
        rows = _Features(network, layers, projection).run(dataset, batch_size(model))
        kernels.append(_fit(queries.cpu().double(), rows["features"].tensor().double(), damping))
        misses.append(rows["misses"].tensor().double())
        classes = rows["classes"].labels()
    values = torch.stack(kernels).mean(0) * torch.stack(misses).mean(0)
    return training_influence(model, images, labels, dataset, classes, values, k, "TRAK")


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y / (1 - p_y): the class's logit minus the logarithm of the others' summed exponentials."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return (own[:, 0] - others).sum()


@dataclass(frozen=True)
class _Projection:
    """P: for each of the P weights the ``NONZEROS`` columns (s, P) with a number, and their signs (s, P)."""

    columns: Tensor
    signs: Tensor
    dimensions: int

    @classmethod
    def draw(cls, count: int, dimensions: int, seed: int, device: torch.device) -> _Projection:
        generator = torch.Generator().manual_seed(seed)
        columns = torch.randint(dimensions, (NONZEROS, count), generator=generator, dtype=torch.int32)
        signs = 2 * torch.randint(2, (NONZEROS, count), generator=generator, dtype=torch.int8) - 1
        return cls(columns.to(device), signs.to(device), dimensions)


def _project(gradient: Tensor, projection: _Projection | None) -> Tensor:
    """P' g, (d,); g itself without a projection."""
    if projection is None:
        return gradient
    total = gradient.new_zeros(projection.dimensions)
    for columns, signs in zip(projection.columns, projection.signs, strict=True):
        # equivalent mutants: a sign is its own inverse
        total = total.index_add(0, columns, gradient * signs)
    return total / NONZEROS**0.5


@dataclass
class _Features(Fold[State]):
    """phi (M, d) of the training images, 1 - p of their classes (M), and the classes."""

    model: Model
    layers: Sequence[str] | None
    projection: _Projection | None
    title: str = "gradients"

    def start(self) -> State:
        return {"features": Rows(), "misses": Rows(), "classes": LabelRows()}

    def update(self, state: State, batch: Batch) -> State:
        labels, images = class_indices(self.model, batch), batch.images.to(self.model.device)
        weights = weights_of(self.model, self.layers)
        gradients = image_gradients(self.model, weights, images, labels, log_odds)
        features = [_project(gradient, self.projection) for gradient in gradients]
        with torch.no_grad():
            shares = self.model(images).softmax(1).gather(1, labels[:, None])[:, 0]
        state["features"].write(batch.indices[0], torch.stack(features))
        state["misses"].write(batch.indices[0], 1 - shares)
        state["classes"].write_labels(batch.indices[0], batch.labels or ())
        return state


def _fit(queries: Tensor, features: Tensor, damping: float | None) -> Tensor:
    """phi' (Phi' Phi + lambda I)^-1 Phi' (N, M), in the smaller of both spaces."""
    count, width = features.shape
    small = features.T @ features if width <= count else features @ features.T
    if damping is None:
        damping = RELATIVE_DAMPING * float(small.diagonal().mean())
    # Gradients that are all 0 have a kernel of 0, and so have their values.
    # equivalent mutants: the sum with a matrix in double precision is in double precision
    matrix = small + (damping or 1.0) * torch.eye(len(small), dtype=small.dtype)
    # equivalent mutants: of a square matrix both are the same
    if width <= count:
        return torch.linalg.solve(matrix, queries.T).T @ features.T
    return torch.linalg.solve(matrix, features @ queries.T).T


@hookimpl
def phosphene_methods():
    return [trak]
