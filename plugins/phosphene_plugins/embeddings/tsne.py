"""t-SNE: two-dimensional map of a data set's features that preserves neighborhoods."""

import dataclasses
from typing import Annotated
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Features, Model
from phosphene.spec import Agrees, Cost, ScalesWith, size

from ._features import FeatureLayer, load_features, require_images
from ._principal_components import principal_components
from ._relations import NeedsImages, Trustworthiness, tsne_by_scikit_learn
from ._trustworthiness import trustworthiness


def _oracle() -> None:
    """Two separate clusters of features: the nearest neighbor of every point on the map is in its cluster."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    noise = 0.02 * torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    halves = noise + torch.tensor([[0.1, 0.1], [0.9, 0.9]]).repeat_interleave(6, 0)
    result = tsne(model, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)), perplexity=3)
    assert result.points is not None
    distances = torch.cdist(result.points, result.points).fill_diagonal_(torch.inf)
    assert (distances.argmin(1) // 6).tolist() == [0] * 6 + [1] * 6
    assert torch.allclose(result.features, halves)
    assert set(result.metrics) == {"KL divergence", "trustworthiness"}
    again = tsne(features=result, perplexity=3).points
    assert again is not None and torch.equal(again, result.points)
    # For many images the perplexity is 30; the first component of the start has standard deviation 1e-4.
    numbers = torch.rand(94, 2, generator=torch.Generator().manual_seed(0))
    with mock.patch("sklearn.manifold.TSNE") as estimator:
        estimator.return_value.fit_transform = lambda rows: rows
        estimator.return_value.kl_divergence_ = 0.5
        points = tsne(features=numbers).points  # type: ignore[arg-type]
    assert points is not None and torch.equal(points, numbers)
    assert estimator.call_args.kwargs["perplexity"] == 30
    spread = estimator.call_args.kwargs["init"].std(0)
    assert abs(spread[0] - 1e-4) < 1e-9 and spread[1] < 0.99e-4
    # By default the perplexity is a third of the other images.
    few = TensorDataset(halves[:6, None, None].expand(-1, 1, 2, 2))
    assert tsne(model, few).metrics == tsne(model, few, perplexity=5 / 3).metrics
    # One feature, and features without variance, have no second component.
    for values in (halves[:6, :1], torch.ones(6, 1)):
        one = tsne(
            load_model(pooled, input_size=(1, 2, 2)),
            TensorDataset(values[..., None, None].expand(-1, 1, 2, 2)),
        )
        assert one.points is not None and one.points.shape == (6, 2) and one.points.isfinite().all()


@method(
    family="embeddings",
    title="t-SNE",
    references=[
        Reference(
            key="vandermaaten2008",
            title="Visualizing Data using t-SNE",
            authors="van der Maaten, Hinton",
            year=2008,
            url="https://jmlr.org/papers/v9/vandermaaten08a.html",
        ),
        Reference(
            key="vandermaaten2014",
            title="Accelerating t-SNE using Tree-Based Algorithms",
            authors="van der Maaten",
            year=2014,
            url="https://jmlr.org/papers/v15/vandermaaten14a.html",
        ),
        Reference(
            key="kobak2021",
            title="Initialization is critical for preserving global data structure in both t-SNE and UMAP",
            authors="Kobak, Linderman",
            year=2021,
            url="https://doi.org/10.1038/s41587-020-00809-z",
        ),
        Reference(
            key="venna2001",
            title="Neighborhood Preservation in Nonlinear Projection Methods: An Experimental Study",
            authors="Venna, Kaski",
            year=2001,
            url="https://doi.org/10.1007/3-540-44668-0_68",
        ),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    relations=[
        Agrees(tsne_by_scikit_learn, fields=("points",)),
        Agrees(tsne_by_scikit_learn, fields=("points",), where={"perplexity": None}),
        Trustworthiness(),
        ScalesWith("logits", power=0, fields=("points",)),
        NeedsImages(4, where={"perplexity": 1}),
    ],
    exempt={
        "independent_of_the_dataset_order": "a thousand steps amplify the rounding of sums in another order"
    },
    quick={"perplexity": 2},
)
def tsne(
    model: Model | None = None,
    dataset: Dataset | None = None,
    features: Features | None = None,
    *,
    layer: FeatureLayer = None,
    perplexity: Annotated[
        float | None,
        Field(
            ge=1,
            le=10000,
            description="effective number of neighbors; default: 30, at most a third of the images",
        ),
    ] = None,
) -> Embedding:
    """t-SNE: two-dimensional map of a data set's features that preserves neighborhoods.

    p_j|i ~ exp(-||phi_i - phi_j||^2 / 2 sigma_i^2),  q_ij ~ 1 / (1 + ||y_i - y_j||^2)

    min_y KL(P || Q) = sum_ij p_ij log(p_ij / q_ij)

    phi_i is the input of the model's linear classifier for image i, or the output of ``layer`` averaged over
    its positions; sigma_i is such that p_.|i has the ``perplexity``. scikit-learn's Barnes-Hut approximation,
    1000 iterations, initialized with the principal components: nothing is random, and the same features
    give the same map. Distances between clusters on the map, and their sizes, have no meaning.

    Returns:
        ``points`` (N, 2): y. ``metrics``: ``KL divergence``, and ``trustworthiness`` in [0, 1], 1 if the
        five nearest neighbors of each point on the map are neighbors in feature space. ``features`` (N, D),
        ``ids``, ``labels``, ``thumbnails`` as ``embed`` returns them.

    Raises:
        InputError: fewer than four images, or a perplexity that needs more images.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("tsne", dataset="builtin:scenes/32")
        result.points.shape  # (32, 2)

    Source:
        van der Maaten and Hinton 2008, section 3; Barnes-Hut: van der Maaten 2014; initialization: Kobak and
        Linderman 2021; trustworthiness: Venna and Kaski 2001.
    """
    limit = require_images(dataset, features, 4, "t-SNE") - 1
    if perplexity is not None and perplexity > limit:
        raise InputError(f"{limit + 1} images allow a perplexity of at most {limit}, not {perplexity:g}")
    embedding = load_features(model, dataset, features, layer)
    default = min(30.0, limit / 3)
    points, divergence = _fit(embedding.features, default if perplexity is None else perplexity)
    metrics = {
        "KL divergence": divergence,
        "trustworthiness": trustworthiness(embedding.features, points),
    }
    return dataclasses.replace(embedding, points=points, metrics=metrics)


def _fit(features: Tensor, perplexity: float) -> tuple[Tensor, Tensor]:
    """The map (N, 2) and its Kullback-Leibler divergence."""
    from sklearn.manifold import TSNE  # slow to import

    # equivalent mutants: the padding cuts off further components
    start, _ = principal_components(features, 2)
    start = nn.functional.pad(start, (0, 2 - start.shape[1]))
    std = start[:, 0].std(correction=0)
    # equivalent mutants: without variance the start is 0
    start = 1e-4 * start / torch.where(std > 0, std, 1)
    model = TSNE(perplexity=perplexity, init=start.float().cpu().numpy())
    # In single precision, as scikit-learn computes: otherwise rounding in double precision changes the map.
    points = torch.from_numpy(model.fit_transform(features.float().cpu().numpy()))
    return points.to(features), features.new_tensor(model.kl_divergence_)


@hookimpl
def phosphene_methods():
    return [tsne]
