"""Set distance: Fréchet and kernel distance between two data sets in feature space, as in FID and KID."""

from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method, to_float64
from phosphene.results import Embedding
from phosphene.roles import Dataset, Features, Model
from phosphene.spec import Cost, Nonnegative, Role, size

from ._features import FeatureLayer, load_features, require_images
from ._principal_components import principal_components
from ._relations import NeedsImages, SetFormulas, features_of
from ._set_distance_result import SetDistance

#: Rows of features that are converted to double precision, and rows of a kernel matrix, at once.
# equivalent mutants: the sum of blocks does not depend on their size
ROWS = 4096
#: Sample images of each set in the figure.
SAMPLES = 40


#: Features instead of the second data set.
OtherFeatures = Annotated[Embedding, Role("features", replaces=("other",))]


def _oracle() -> None:
    """With one feature, Fréchet is (m - m')^2 + (s - s')^2; the kernel distance is summed by hand."""
    linear = nn.Linear(1, 2)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    first, second = torch.tensor([0.2, 0.6]), torch.tensor([0.4, 0.6, 0.8])
    sets = [TensorDataset(x[:, None, None, None].expand(-1, 1, 2, 2)) for x in (first, second)]
    result = set_distance(model, sets[0], sets[1])
    frechet = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert torch.allclose(result.frechet, frechet, atol=1e-6)
    within = 1.12**3 - 2 * sum((1 + a * b) ** 3 for a in (0.2, 0.6) for b in (0.4, 0.6, 0.8)) / 6
    other = (1.24**3 + 1.32**3 + 1.48**3) / 3
    assert abs(float(result.kernel) - within - other) < 1e-5
    # Of the logits w x + b the distance is |w|^2 times as large.
    of_logits = set_distance(model, sets[0], sets[1], layer="2").frechet
    assert torch.allclose(of_logits, frechet * linear.weight.square().sum(), atol=1e-6)
    # One feature is one component: its distance from the mean of both sets, 0.52.
    for points, levels in zip(result.points, (first, second), strict=True):
        assert torch.allclose(points, torch.stack([levels - 0.52, 0 * levels], 1), atol=1e-6)
    # The bytes of the mean images, 255 * 0.4 and 255 * 0.6; every second one of 80 sample images.
    assert (result.mean_thumbnails.flatten(1).unique(dim=1) == torch.tensor([[102], [153]])).all()
    many = (torch.arange(80.0) / 255)[:, None, None, None].expand(-1, 1, 2, 2)
    samples, others = set_distance(model, TensorDataset(many), sets[1]).sample_thumbnails
    assert samples[:, 0, 0, 0].tolist() == list(range(0, 80, 2))
    assert others[:, 0, 0, 0].tolist() == [102, 153, 204]
    # Bytes 0, 0 and 2 have the mean 0.67, which is rounded up; names are those of the sets, if they have any.
    dark = TensorDataset((many * 2)[[0, 0, 1]])
    named = set_distance(model, dark, sets[1])
    assert named.mean_thumbnails[0].unique().tolist() == [1]
    assert named.names == ("first set", "second set")
    # Of three features the first two components are returned.
    pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(), nn.Linear(3, 2))
    thirds = torch.rand(9, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    wide = load_model(pool, mean=[0.0], std=[1.0], input_size=(1, 1, 3))
    result = set_distance(wide, TensorDataset(thirds[:4]), TensorDataset(thirds[4:]))
    assert [points.shape for points in result.points] == [(4, 2), (5, 2)]
    assert torch.linalg.matrix_rank(torch.cat(result.points)) == 2
    x, y = thirds[:4, 0, 0].double(), thirds[4:, 0, 0].double()
    kernels = [(a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    means = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    assert abs(float(result.kernel) - float(sum(means) - 2 * kernels[2].mean())) < 1e-6
    # Rounding makes no distance of a set from itself negative.
    assert all(_frechet_distance(a, a) >= 0 for a in (x, y, x[:, :1], y[:, :2], x[:2], y[:3]))
    named_set, loaded = SimpleNamespace(uri="set"), SimpleNamespace(uri="features")
    names: Any = [(named_set, loaded), (None, loaded), (None, None)]
    assert [_name(*each) for each in names] == ["set", "features", None]
    refused = False
    try:
        set_distance(model, sets[0], TensorDataset(many[:1]))
    except InputError:
        refused = True
    assert refused, "one image has no covariance"


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
    relations=[
        SetFormulas(),
        *features_of("kernel"),
        NeedsImages(2),
        NeedsImages(2, input="other"),
    ],
    demo={"other": "builtin:biased-scenes", "layer": "features.2"},
)
def set_distance(
    model: Model | None = None,
    dataset: Dataset | None = None,
    other: Dataset | None = None,
    features: Features | None = None,
    other_features: OtherFeatures | None = None,
    *,
    layer: FeatureLayer = None,
) -> SetDistance:
    """Fréchet and kernel distance (FID, KID) between two data sets in a model's feature space.

    Fréchet = ||m - m'||^2 + tr(S + S' - 2 (S S')^1/2)

    Kernel = mean_(i != j) k(x_i, x_j) + mean_(i != j) k(x'_i, x'_j) - 2 mean_(i, j) k(x_i, x'_j)

    with m and S the mean and covariance of a set's features x, and k(x, y) = (x . y / D + 1)^3. x is the
    input of the model's linear classifier, or the output of ``layer`` averaged over its positions. The
    Fréchet distance assumes Gaussian features and is too large for small sets; the kernel distance (squared
    maximum mean discrepancy) is unbiased: 0 on average for two sets of the same distribution, and at times
    negative. Both are computed in double precision. Values are comparable only for the same model and
    layer; they are the published FID and KID only with the Inception network of those papers.

    Returns:
        ``frechet`` and ``kernel``: scalars. ``points``: two tensors (N, 2) and (M, 2), the sets on their
        common principal components. ``mean_thumbnails`` (2, 3, s, s) and ``sample_thumbnails``, two tensors
        (n, 3, s, s): bytes, for the figure. ``names``: of the two sets.

    Raises:
        InputError: a data set with fewer than two images.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("set_distance", dataset="builtin:scenes/32", other="builtin:biased-scenes/32")
        result.frechet, result.kernel

    Source:
        Heusel et al. 2017, equation 6 (FID); Binkowski et al. 2018, section 4 (KID).
    """
    require_images(dataset, features, 2, "a covariance")
    require_images(other, other_features, 2, "a covariance")
    embeddings = (
        load_features(model, dataset, features, layer, title="features of the first set"),
        load_features(model, other, other_features, layer, title="features of the second set"),
    )
    sizes = [embedding.features.shape[1] for embedding in embeddings]
    if sizes[0] != sizes[1]:
        raise InputError(f"both sets need the same features: the first has {sizes[0]}, the second {sizes[1]}")
    first, second = (embedding.features for embedding in embeddings)
    points, _ = principal_components(torch.cat([embedding.features for embedding in embeddings]), 2)
    if points.shape[1] < 2:
        points = torch.cat([points, torch.zeros_like(points)], 1)
    return SetDistance(
        frechet=_frechet_distance(first, second).to(points),
        kernel=_kernel_distance(first, second).to(points),
        points=(points[: len(first)].clone(), points[len(first) :].clone()),
        mean_thumbnails=torch.stack([_mean_thumbnail(embedding) for embedding in embeddings]),
        sample_thumbnails=(_sample_thumbnails(embeddings[0]), _sample_thumbnails(embeddings[1])),
        names=(_name(dataset, features) or "first set", _name(other, other_features) or "second set"),
    )


def _name(dataset: Dataset | None, features: Embedding | None) -> str | None:
    """The name of a data set, or where its features were loaded from."""
    return dataset.uri if dataset is not None else features.uri if features is not None else None


def _frechet_distance(first: Tensor, second: Tensor) -> Tensor:
    """Fréchet distance between Gaussians with the means and covariances of two sets of features.

    With S = A^T A and S' = B^T B, tr((S S')^1/2) is the sum of the singular values of A B^T, so no
    covariance is squared or inverted and sets with fewer than D images are allowed. A is the triangular
    factor of the centered, scaled features.
    """
    (mean, root), (other_mean, other_root) = _mean_and_root(first), _mean_and_root(second)
    variances = root.square().sum() + other_root.square().sum()
    trace_of_root = torch.linalg.svdvals(root @ other_root.T).sum()
    return ((mean - other_mean).square().sum() + variances - 2 * trace_of_root).clamp(min=0)


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and a triangular A with A^T A = S, block by block in double precision."""
    # equivalent mutants: neither depends on the blocks
    blocks = features.split(ROWS)
    mean = torch.stack([to_float64(rows).sum(0) for rows in blocks]).sum(0) / len(features)
    root = mean.new_empty(0, len(mean))
    for rows in blocks:
        scaled = (to_float64(rows) - mean) / (len(features) - 1) ** 0.5
        root = torch.linalg.qr(torch.cat([root, scaled]), mode="r").R
    return mean, root


def _kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy, with a block of the kernel at a time."""

    def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
        # equivalent mutants: the sum does not depend on the blocks
        sums = []
        for rows in map(to_float64, x.split(ROWS)):
            for others in map(to_float64, y.split(ROWS)):
                sums.append((rows @ others.T / x.shape[1] + 1).pow(3).sum())
        return torch.stack(sums).sum()

    def mean_within(x: Tensor) -> Tensor:
        # equivalent mutants: the sum does not depend on the blocks
        squares = torch.cat([to_float64(rows).square().sum(1) for rows in x.split(ROWS)])
        diagonal = (squares / x.shape[1] + 1).pow(3).sum()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    mean_between = 2 * kernel_sum(first, second) / (len(first) * len(second))
    return mean_within(first) + mean_within(second) - mean_between


def _mean_thumbnail(embedding: Embedding) -> Tensor:
    return embedding.thumbnails.float().mean(0).round().to(torch.uint8)


def _sample_thumbnails(embedding: Embedding) -> Tensor:
    """At most ``SAMPLES`` thumbnails, evenly spaced over the set."""
    total = len(embedding.ids)
    count = min(SAMPLES, total)
    return embedding.thumbnails[[n * total // count for n in range(count)]]


@hookimpl
def phosphene_methods():
    return [set_distance]
