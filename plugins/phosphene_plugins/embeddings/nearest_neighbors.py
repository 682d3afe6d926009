"""Nearest neighbours: pictures that a model takes for alike, beside those whose pixels are alike."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, batch_size, hookimpl, load_model, method, progress_bar
from phosphene.results import Neighbors
from phosphene.roles import Dataset, Images, Model
from phosphene.spec import Cost, Nonnegative, size

from ._features import FeatureLayer, represent
from ._nearest_vectors import Nearest


def _oracle() -> None:
    """Where the features are the pictures' two mean halves, grey levels order the neighbours."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(head, mean=[0.0], std=[1.0], input_size=(1, 4, 4))
    images = torch.tensor([0.9, 0.2, 0.6, 0.35]).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    found = nearest_neighbors(model, images[3:], TensorDataset(images), k=3)
    assert found.indices.tolist() == [[3, 1, 2]]
    assert torch.allclose(found.distances, torch.tensor([[0.0, 0.15, 0.25]]) * 2**0.5, atol=1e-6)
    assert torch.allclose(found.pixel_distances, torch.tensor([[0.0, 0.15, 0.25]]) * 4, atol=1e-6)


@method(
    family="embeddings",
    references=[
        Reference(
            key="krizhevsky2012",
            title="ImageNet Classification with Deep Convolutional Neural Networks",
            authors="Krizhevsky, Sutskever, Hinton",
            year=2012,
            url="https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks",
        )
    ],
    invariants=[Nonnegative(field="distances"), Nonnegative(field="pixel_distances")],
    needs=["dataset"],
    cost=Cost(forward=size.images + size.dataset),
    oracle=_oracle,
    quick={"k": 2},
    demo={"k": 7, "exclude_self": True},
)
def nearest_neighbors(
    model: Model,
    images: Images,
    dataset: Dataset,
    *,
    k: Annotated[int, Field(ge=1, le=1000, description="neighbours per image")] = 5,
    layer: FeatureLayer = None,
    metric: Annotated[Literal["l2", "cosine"], Field(description="how far features are apart")] = "l2",
    exclude_self: Annotated[bool, Field(description="leave out pictures equal to the image itself")] = False,
) -> Neighbors:
    """Show the pictures of a data set that are nearest to each image in feature space.

    d(q, x) = ||phi(q) - phi(x)||_2, or 1 - cos(phi(q), phi(x))

    with phi what the classifier is given, or a named ``layer`` averaged over its places. Beside
    them the nearest by raw pixels, ||q - x||_2, for comparison. Exact; all of the data set's
    pictures are met once, a batch at a time, and only the k nearest so far are kept (all of them
    where there are fewer than k). An image that is itself in the data set is its own neighbour at
    distance 0; ``exclude_self`` leaves out pictures that are the image, pixel for pixel. The extra
    ``faiss``, where it is installed, ranks the pictures of large data sets; the answers are the same.
    ModelError where the model has no linear classifier and no layer is named; InputError where the
    data set holds nothing else.
    """

    def embed(pictures: Tensor) -> Tensor:
        features = represent(model, pictures, layer)
        return F.normalize(features) if metric == "cosine" else features

    size = batch_size(model)
    by_features = Nearest(torch.cat([embed(part) for part in images.split(size)]), k)
    by_pixels = Nearest(images.flatten(1), k)
    for batch in progress_bar(dataset.batches(size), "nearest neighbours", -(-len(dataset) // size)):
        pictures = batch.images.to(images)
        never = None
        if exclude_self:
            never = torch.stack([(pictures == image).flatten(1).all(1) for image in images])
        by_features.meet(embed(pictures), batch.indices, never)
        by_pixels.meet(pictures.flatten(1), batch.indices, never)
    indices, distances = by_features.found()
    pixel_indices, pixel_distances = by_pixels.found()

    def read(chosen: Tensor) -> Tensor:
        return torch.stack([dataset.read(row) for row in chosen.tolist()]).to(images)

    return Neighbors(
        images=images,
        neighbors=read(indices),
        indices=indices,
        distances=distances.square() / 2 if metric == "cosine" else distances,
        ids=tuple(tuple(dataset.id(i) for i in row) for row in indices.tolist()),
        pixel_neighbors=read(pixel_indices),
        pixel_indices=pixel_indices,
        pixel_distances=pixel_distances,
    )


@hookimpl
def phosphene_methods():
    return [nearest_neighbors]
