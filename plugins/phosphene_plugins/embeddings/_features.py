"""What all of this family begins with: the features of pictures, and of a whole data set with its ids."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import (
    Dataset,
    InputError,
    Model,
    ModelError,
    batch_size,
    progress_bar,
    save_progress,
    saved_progress,
)
from phosphene.images import resize, to_display
from phosphene.results import Embedding
from phosphene.roles import LayerName

#: The parameter that all of them have.
FeatureLayer = Annotated[
    LayerName | None, Field(description="whose features; what the classifier is given unless told")
]


#: A thumbnail's side in pixels.
SIDE = 48


def represent(model: Model, pictures: Tensor, layer: str | None, *, pooled: bool = True) -> Tensor:
    """The pictures' features (n, D): what the classifier is given, or a layer, averaged or whole."""
    if layer is None:
        return model.embed(pictures)
    features = model.features(pictures, layer)
    if pooled and features.ndim > 2:
        return model.maps(features, pictures).mean((2, 3))
    if len(features) != len(pictures):
        raise ModelError(f"layer {layer!r} gives {len(features)} rows for {len(pictures)} pictures")
    return features.flatten(1)


def embedded(
    model: Model, dataset: Dataset, layer: str | None, *, pooled: bool = True, name: str = "features"
) -> Embedding:
    """The features of a whole data set: nothing above the layer runs, and work that was cut off goes on.

    ``name``: what it is called in the progress and the checkpoint, where there are several.
    """
    done = saved_progress()
    start, labels = done.get(f"{name} done", 0), list(done.get(f"{name} labels", []))
    kept = [done[f"{name} {part}"] for part in ("vectors", "thumbnails")] if start else []
    vectors, thumbnails = kept or (torch.empty(0), torch.empty(0))
    vectors = vectors.to(model.device, model.dtype)
    size = batch_size(model)
    for batch in progress_bar(dataset.batches(size, start), name, -(-(len(dataset) - start) // size)):
        pictures = batch.images.to(model.device, model.dtype)
        found, small = represent(model, pictures, layer, pooled=pooled), thumbnail(pictures)
        if not start:
            vectors, thumbnails = (part.new_empty(len(dataset), *part.shape[1:]) for part in (found, small))
        rows = slice(start, start + len(pictures))
        vectors[rows], thumbnails[rows] = found, small
        labels += dataset.labels(batch.indices) or ()
        start = rows.stop
        state = {"vectors": vectors, "thumbnails": thumbnails, "labels": labels, "done": start}
        save_progress(**done | {f"{name} {part}": value for part, value in state.items()})
    return Embedding(
        ids=tuple(dataset.id(i) for i in range(len(dataset))),
        features=vectors,
        thumbnails=thumbnails.to(model.device),
        labels=tuple(labels) or None,
    )


def thumbnail(pictures: Tensor) -> Tensor:
    """The pictures' middle squares as small bytes: (n, 3, s, s), none larger than it was."""
    height, width = pictures.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    squares = pictures[:, :, top : top + side, left : left + side]
    small = resize(squares, (SIDE, SIDE)) if side > SIDE else squares
    return torch.stack([(to_display(picture) * 255).round().to(torch.uint8) for picture in small])


def at_least(dataset: Dataset, count: int, what: str) -> None:
    """Refuse a data set that holds too few pictures for ``what``."""
    if len(dataset) < count:
        raise InputError(f"{what} needs at least {count} pictures, the data set holds {len(dataset)}")


def centred(features: Tensor) -> Tensor:
    """Features less their mean; what is left of equal ones by rounding is nothing."""
    rest = features - features.mean(0)
    low, high = features.amin(0), features.amax(0)  # ten times as fast as aminmax(dim=0)
    rounding = 16 * torch.finfo(features.dtype).eps * torch.maximum(-low.min(), high.max())
    rest[:, high - low <= rounding] = 0
    return rest


def principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Coordinates (N, count) on the directions of most variance, and every direction's share of it.

    By the eigenvectors of the covariance, or of the N x N inner products where there are more features
    than pictures. Signs are such that a direction's largest entry is positive.
    """
    rest = centred(features)
    tall = rest.shape[0] >= rest.shape[1]
    values, directions = torch.linalg.eigh(rest.T @ rest if tall else rest @ rest.T)
    values, directions = values.flip(0).clamp(min=0), directions.flip(1)[:, :count]
    if not tall:
        directions = rest.T @ directions
        directions = directions / directions.norm(dim=0).clamp(min=torch.finfo(rest.dtype).tiny)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    points = rest @ torch.where(largest < 0, -directions, directions)
    total = values.sum()
    return points, values[:count] / torch.where(total > 0, total, 1)


def k_means(features: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """The heap of each row (N,), their middles (k, D) and the sum of squared distances to them.

    scikit-learn's, the best of ten beginnings, which ``seed`` < 2^32 chooses.
    """
    from sklearn.cluster import KMeans  # imported late, for it takes a second

    means = KMeans(k, n_init=10, random_state=seed)
    groups = torch.from_numpy(means.fit_predict(features.cpu().numpy())).to(features.device, torch.int64)
    return groups, torch.from_numpy(means.cluster_centers_).to(features), float(means.inertia_)


def trustworthiness(features: Tensor, points: Tensor) -> Tensor:
    """How far a map's neighbours are neighbours in truth, in [0, 1]: of the 5 nearest, by their ranks there.

    Of more than 2000 pictures an even choice is measured. Source: Venna and Kaski (2001).
    """
    from sklearn.manifold import trustworthiness as measured  # imported late, for it takes a second

    step = -(-len(points) // 2000)
    truth, shown = (t[::step].double().cpu().numpy() for t in (features, points))
    nearest = min(5, (len(shown) - 1) // 2)
    return features.new_tensor(measured(truth, shown, n_neighbors=nearest))
