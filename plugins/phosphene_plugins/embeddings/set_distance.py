"""Set distance: how far the pictures of one folder are from those of another, to a model."""

import torch
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, Nonnegative, size

from ._features import FeatureLayer, at_least, embedded, principal_components
from ._set_distance_result import SetDistance

#: Rows of a kernel matrix that are summed at once.
_ROWS = 1024


def _oracle() -> None:
    """One feature: (mean - mean')^2 + (s - s')^2; and the kernel distance summed by hand."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    first, second = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4, 0.9])
    sets = [TensorDataset(x[:, None, None, None].expand(-1, 1, 2, 2)) for x in (first, second)]
    found = set_distance(model, *sets)
    frechet = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert torch.allclose(found.frechet, frechet, atol=1e-6)
    inside = 1.03**3 - 2 * sum((1 + a * b) ** 3 for a in (0.1, 0.3) for b in (0.2, 0.4, 0.9)) / 6
    other = (1.08**3 + 1.18**3 + 1.36**3) / 3
    assert abs(float(found.kernel) - inside - other) < 1e-5


@method(
    family="embeddings",
    references=[
        Reference(
            key="heusel2017",
            title="GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
            authors="Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter",
            year=2017,
            url="https://arxiv.org/abs/1706.08500",
        ),
        Reference(
            key="binkowski2018",
            title="Demystifying MMD GANs",
            authors="Binkowski, Sutherland, Arbel, Gretton",
            year=2018,
            url="https://arxiv.org/abs/1801.01401",
        ),
    ],
    invariants=[Nonnegative(field="frechet")],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    demo={"other": "builtin:biased-scenes", "layer": "features.2"},
)
def set_distance(
    model: Model,
    dataset: Dataset,
    other: Dataset,
    *,
    layer: FeatureLayer = None,
) -> SetDistance:
    """Measure how far two sets of pictures are apart in a model's features: drawn from real, say.

    Fréchet = ||m - m'||^2 + tr(S + S' - 2 (S S')^1/2)

    Kernel = mean_(i != j) k(x_i, x_j) + mean_(i != j) k(x'_i, x'_j) - 2 mean_(i, j) k(x_i, x'_j)

    with x what the classifier is given, or a named ``layer`` averaged over its places, m and S the mean and
    covariance over a set, and k(x, y) = (x . y / D + 1)^3. The Fréchet distance takes the features for
    Gaussian and is too large for small sets; the kernel distance (squared MMD) has no such bias, and is
    0 on average, at times below, for two sets of the same kind. Both in double precision. The numbers
    are the given model's: they compare only with others of the same model and layer, and are the
    published FID and KID with no other network than theirs. InputError for a set of one picture.
    """
    at_least(dataset, 2, "a covariance")
    at_least(other, 2, "a covariance")
    found = (
        embedded(model, dataset, layer, name="first set"),
        embedded(model, other, layer, name="second set"),
    )
    first, second = (part.features.double() for part in found)
    points, _ = principal_components(torch.cat([part.features for part in found]), 2)
    if points.shape[1] < 2:
        points = torch.cat([points, torch.zeros_like(points)], 1)
    return SetDistance(
        frechet=_frechet(first, second).to(points),
        kernel=_kernel_distance(first, second).to(points),
        points=(points[: len(first)].clone(), points[len(first) :].clone()),
        means=torch.stack([_mean(part.thumbnails) for part in found]),
        samples=(_some(found[0]), _some(found[1])),
        names=(dataset.uri or "first set", other.uri or "second set"),
    )


def _frechet(first: Tensor, second: Tensor) -> Tensor:
    """With S = A^T A and S' = B^T B the root's trace is the sum of A B^T's singular values.

    So no covariance is squared or inverted, and sets smaller than D do no harm; A is the triangle of the
    centred, scaled features.
    """
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (first, second)]
    variances = sum(root.square().sum() for root in roots)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance: Tensor = (first.mean(0) - second.mean(0)).square().sum() + variances - 2 * shared
    return distance.clamp(min=0)


def _kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy, a block of rows at a time."""

    def total(x: Tensor, y: Tensor) -> Tensor:
        parts = [(rows @ y.T / x.shape[1] + 1).pow(3).sum() for rows in x.split(_ROWS)]
        return torch.stack(parts).sum()

    def within(x: Tensor) -> Tensor:
        diagonal = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return (total(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return within(first) + within(second) - 2 * total(first, second) / (len(first) * len(second))


def _mean(thumbnails: Tensor) -> Tensor:
    return thumbnails.float().mean(0).round().to(torch.uint8)


def _some(found: Embedding, most: int = 40) -> Tensor:
    """An even choice of a set's thumbnails."""
    count = min(most, len(found.ids))
    return found.thumbnails[[n * len(found.ids) // count for n in range(count)]]


@hookimpl
def phosphene_methods():
    return [set_distance]
