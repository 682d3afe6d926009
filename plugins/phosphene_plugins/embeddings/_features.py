"""Features of images and of data sets, which every method of this family starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Dataset, Fold, InputError, Model, ModelError, at_least_float32, batch_size
from phosphene.data import Batch, LabelRows, Rows, State
from phosphene.images import resize, to_display
from phosphene.results import Embedding
from phosphene.roles import LayerName

#: The parameter ``layer`` of every method of this family.
FeatureLayer = Annotated[
    LayerName | None,
    Field(description="layer of the features; default: the input of the linear classifier"),
]

#: Largest side of a thumbnail in pixels.
THUMBNAIL_SIDE = 48


def image_features(model: Model, images: Tensor, layer: str | None, *, pooled: bool = True) -> Tensor:
    """Features (n, D) of images: the classifier's input, or a layer's output averaged over its positions.

    In single precision of a network in half precision: sums over features would overflow.

    ``pooled=False`` flattens a layer's output instead of averaging it.
    """
    if layer is None:
        return at_least_float32(model.embed(images))
    return layer_vectors(model, model.features(images, layer), images, layer, pooled=pooled)


def layer_vectors(model: Model, output: Tensor, images: Tensor, layer: str, *, pooled: bool = True) -> Tensor:
    """A layer's output as one vector per image (n, D), averaged over its positions or flattened."""
    features = at_least_float32(output)
    if pooled and features.ndim > 2:
        return model.maps(features, images, layer).mean((2, 3))
    if len(features) != len(images):
        raise ModelError(f"layer {layer!r} returns {len(features)} rows for {len(images)} images")
    return features.flatten(1)


def position_features(model: Model, images: Tensor, layer: str) -> Tensor:
    """Features (n, C, h, w) at every position of a layer's map, computed in batches."""
    parts = images.split(batch_size(model))
    return torch.cat([at_least_float32(model.maps(model.features(p, layer), p, layer)) for p in parts])


def load_features(
    model: Model | None,
    dataset: Dataset | None,
    features: Embedding | None,
    layer: str | None,
    *,
    title: str = "features",
) -> Embedding:
    """Features that were computed before, or those of a data set as ``embed_dataset`` computes them."""
    if features is None:
        assert model is not None and dataset is not None  # the call was checked: features replace both
        # equivalent mutants: a title changes no feature
        return embed_dataset(model, dataset, layer, title=title)
    if model is not None:
        require_layer(model, features, layer)
    return Embedding(
        ids=features.ids,
        features=features.features,
        thumbnails=features.thumbnails,
        labels=features.labels,
    )


def require_layer(model: Model, features: Embedding, layer: str | None) -> None:
    """Raise InputError where features that were computed before are not those of the model's ``layer``."""
    params = features.provenance.params if features.provenance else {}
    if not params.get("pooled", True):
        raise InputError("the features were computed with pooled=False, those of images are pooled")
    if "layer" in params and params["layer"] != layer:
        computed = "without a layer" if params["layer"] is None else f"with layer={params['layer']!r}"
        raise InputError(
            f"the features were computed {computed}, so layer={layer!r} is not the same: pass that"
        )


def embed_dataset(
    model: Model, dataset: Dataset, layer: str | None, *, pooled: bool = True, title: str = "features"
) -> Embedding:
    """Features, thumbnails, ids and labels of a data set; an interrupted run resumes.

    ``title``: description of the progress bar.
    """
    state = _Features(model, layer, pooled, title).run(dataset, batch_size(model))
    labels = state["labels"].labels()
    return Embedding(
        ids=tuple(dataset.id(i) for i in range(len(dataset))),
        features=state["features"].tensor().to(model.device),
        thumbnails=state["thumbnails"].tensor().to(model.device),
        labels=labels if len(labels) == len(dataset) else None,
    )


@dataclass
class _Features(Fold[State]):
    """Features, thumbnails and labels of every image."""

    model: Model
    layer: str | None
    pooled: bool
    title: str

    def start(self) -> State:
        return {"features": Rows(), "thumbnails": Rows(), "labels": LabelRows()}

    def update(self, state: State, batch: Batch) -> State:
        first = batch.indices[0]
        images = batch.images.to(self.model.device, self.model.dtype)
        state["features"].write(first, image_features(self.model, images, self.layer, pooled=self.pooled))
        state["thumbnails"].write(first, thumbnails(images))
        if (labels := batch.labels) is not None:
            state["labels"].write_labels(first, labels)
        return state


def thumbnails(images: Tensor) -> Tensor:
    """The central squares of images as bytes (n, 3, s, s), with s at most ``THUMBNAIL_SIDE``."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    squares = images[:, :, top : top + side, left : left + side]
    # equivalent mutants: an image of this side is resized to itself
    small = resize(squares, (THUMBNAIL_SIDE, THUMBNAIL_SIDE)) if side > THUMBNAIL_SIDE else squares
    return torch.stack([(to_display(image) * 255).round().to(torch.uint8) for image in small])


def require_images(dataset: Dataset | None, features: Embedding | None, count: int, purpose: str) -> int:
    """The number of images of a data set, or of features that were computed before.

    Raises InputError for fewer than ``count``; ``purpose`` starts the message.
    """
    assert dataset is not None or features is not None  # the call was checked
    images = len(features.ids) if features is not None else len(dataset or ())
    if images < count:
        raise InputError(f"{purpose} needs at least {count} images, the data set has {images}")
    return images
