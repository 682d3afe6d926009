"""Embedding: the features of a data set's images, with their ids."""

import dataclasses
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, max_batch, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model
from phosphene.spec import Agrees, Cost, size

from ._features import FeatureLayer, embed_dataset, load_features, position_features
from ._relations import classifier_inputs, features_of


def _oracle() -> None:
    """For images of two constant halves, the features are the gray levels, or their mean when pooled."""
    layers = [nn.Identity(), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2)]
    model = load_model(nn.Sequential(*layers), mean=[0.0], std=[1.0], input_size=(1, 4, 4))
    halves = torch.tensor([[0.25, 0.75], [1.0, 0.5]])
    dataset = TensorDataset(halves[:, None, None].repeat_interleave(2, 3).expand(-1, 1, 4, 4), ["a", "b"])
    assert torch.allclose(embed(model, dataset).features, halves)
    assert torch.equal(embed(model, dataset, layer="0", pooled=False).features, dataset.images.flatten(1))
    result = embed(model, dataset, layer="0")
    assert torch.allclose(result.features, halves.mean(1, keepdim=True))
    assert result.ids == ("0", "1") and result.labels == ("a", "b")
    # Features that are passed on are those of the layer, if it is known, and of pooled maps.
    plain, positions = embed(model, dataset), embed(model, dataset, layer="0", pooled=False)
    unknown = dataclasses.replace(result, provenance=None)
    for features, layer in ((result, "0"), (plain, None), (unknown, None)):
        assert load_features(model, None, features, layer).features is features.features
    refused = ((result, None, "layer='0'"), (plain, "0", "without a layer"), (positions, "0", "pooled=False"))
    for features, layer, reason in refused:
        message = ""
        try:
            load_features(model, None, features, layer)
        except InputError as error:
            message = str(error)
        assert reason in message.partition(",")[0], f"features that were computed {reason}: {message}"
    assert embed(model, TensorDataset(dataset.images)).labels is None
    with max_batch(1):
        assert torch.equal(position_features(model, dataset.images, "0"), dataset.images)
    # Thumbnails are the central squares, of at most 48 pixels; features have the model's precision.
    bytes_ = torch.arange(32.0).view(1, 1, 4, 8)
    for images, central in (
        (bytes_, bytes_[..., 2:6]),
        (bytes_.view(1, 1, 8, 4), bytes_.view(1, 1, 8, 4)[:, :, 2:6]),
        (torch.full((1, 1, 49, 60), 7.0), torch.full((1, 1, 48, 48), 7.0)),
    ):
        double = load_model(nn.Sequential(*layers).double(), input_size=(1, 4, 4))
        result = embed(double, TensorDataset(images / 255))
        assert torch.equal(result.thumbnails, central.byte().expand(-1, 3, -1, -1))
        assert result.features.dtype == torch.float64


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
    relations=[*features_of("features"), Agrees(classifier_inputs, fields=("features",))],
)
def embed(
    model: Model,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    pooled: Annotated[
        bool, Field(description="average the output of a named layer over its positions")
    ] = True,
) -> Embedding:
    """Embedding: feature vectors of all images of a data set, with ids and labels.

    phi(x) = mean over (h, w) of A[:, h, w](x),  or all of A(x) as one vector with ``pooled=False``

    with A the output of ``layer``; without a layer, phi(x) is the input of the model's linear classifier.
    Only the layers up to A are computed, and an interrupted run resumes. All features are in memory:
    ``pooled=False`` with an early layer is large. The figure shows the cosine similarities between the
    images' centered features, sorted by class.

    Returns:
        ``features`` (N, D) in the model's precision, ``ids`` and, if the data set has classes, ``labels``
        of the N rows in the data set's order; ``thumbnails`` (N, 3, s, s), bytes. Saved as
        ``arrays.safetensors`` and ``result.json``.

    Raises:
        ModelError: no layer is named and the model has no linear classifier, or the layer's output does not
            have one row per image.

    Example::
        from phosphene import run

        result = run("embed", dataset="builtin:scenes/32")
        result.features.shape  # (32, 128)

    Source:
        Donahue et al. 2014, section 3.
    """
    return embed_dataset(model, dataset, layer, pooled=pooled)


@hookimpl
def phosphene_methods():
    return [embed]
