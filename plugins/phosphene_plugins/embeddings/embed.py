"""Embed: the features of a data set's pictures, saved with their ids."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, size

from ._features import FeatureLayer, embedded


def _oracle() -> None:
    """Two constant halves, averaged: the features are the halves' grey levels, or their mean when pooled."""
    layers = [nn.Identity(), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2)]
    model = load_model(nn.Sequential(*layers), mean=[0.0], std=[1.0], input_size=(1, 4, 4))
    halves = torch.tensor([[0.25, 0.75], [1.0, 0.5]])
    dataset = TensorDataset(halves[:, None, None].repeat_interleave(2, 3).expand(-1, 1, 4, 4), ["a", "b"])
    assert torch.allclose(embed(model, dataset).features, halves)
    assert torch.equal(embed(model, dataset, layer="0", pooled=False).features, dataset.images.flatten(1))
    found = embed(model, dataset, layer="0")
    assert torch.allclose(found.features, halves.mean(1, keepdim=True))
    assert found.ids == ("0", "1") and found.labels == ("a", "b")


@method(
    family="embeddings",
    title="Embedding",
    references=[
        Reference(
            key="donahue2014",
            title="DeCAF: A Deep Convolutional Activation Feature for Generic Visual Recognition",
            authors="Donahue, Jia, Vinyals, Hoffman, Zhang, Tzeng, Darrell",
            year=2014,
            url="https://arxiv.org/abs/1310.1531",
        )
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
)
def embed(
    model: Model,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    pooled: Annotated[bool, Field(description="average a named layer over its places")] = True,
) -> Embedding:
    """Collect the features of every picture of a data set, with their ids.

    x -> phi(x) = mean over (h, w) of A[:, h, w](x), or all of A(x) as one vector

    with A a ``layer``, or phi(x) what the classifier is given where none is named. Saved, the folder's
    ``arrays.safetensors`` holds ``features`` (N, D) in the model's precision and ``result.json`` the
    ids and, where known, the labels of its rows, in the data set's order. Nothing above the layer runs,
    and a run that was cut off goes on where it was. The picture shows the cosine between every two
    pictures' features, the mean feature taken off, sorted by class where the classes are known. All
    features are held in memory: ``pooled=False`` of an early layer is large. ModelError where the model
    has no linear classifier and no layer is named, or where a layer has no row for each picture.
    """
    return embedded(model, dataset, layer, pooled=pooled)


@hookimpl
def phosphene_methods():
    return [embed]
