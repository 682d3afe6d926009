"""Similar examples: the training images nearest in feature space, of the same class and of others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, batch_size, hookimpl, load_model, method
from phosphene.errors import PhospheneError
from phosphene.roles import Dataset, Images, Labels, Model
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, size
from phosphene.training import label_index

from ..embeddings._features import FeatureLayer, embed_dataset, image_features
from ._influence_result import TrainingInfluence, training_influence
from ._weight_gradients import Count, image_gradients, require_class_labels, unit_scale


def _oracle() -> None:
    """Cosines and inner products of the normalized pixels, negative for images of other classes."""
    draw = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    settings: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": (3, 2, 2)}
    model = load_model(network, **settings)
    images = torch.rand(9, 3, 2, 2, generator=draw, dtype=torch.float64)
    classes = ["0", "2", "2", "1", "0", "2", "1"]
    data, labels = TensorDataset(images[:7], classes), torch.tensor([2, 0])
    pixels = model.normalize(images).flatten(1)
    products = torch.tensor([[float((a * b).sum()) for b in pixels[:7]] for a in pixels[7:]])
    norms = pixels.square().sum(1).sqrt()
    signs = torch.tensor([[1.0 if name == own else -1.0 for name in classes] for own in ("2", "0")])
    result = similar_examples(model, images[7:], data, labels, similarity="dot", k=2)
    torch.testing.assert_close(result.values, (signs * products).double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(result.proponent_images, images[result.proponents])
    assert torch.equal(result.opponent_images, images[result.opponents])
    cosines = products / norms[7:, None] / norms[:7]
    result = similar_examples(model, images[7:], data, labels, k=2)
    torch.testing.assert_close(result.values, signs * cosines, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        logits = model(images)
    result = similar_examples(model, images[7:], data, labels, similarity="dot", layer="1")
    torch.testing.assert_close(result.values, signs.double() * (logits[7:] @ logits[:7].T))
    gradients_of_weights_by_hand(model, images)


def gradients_of_weights_by_hand(model: Model, images: Tensor) -> None:
    """A weight that is not used has a gradient of 0; classes that the model does not have are refused."""
    linear = nn.Linear(12, 3, bias=False).double()
    unused = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2))
    loss = lambda logits, classes: logits[:, classes].square().sum()
    weights = [*linear.parameters(), nn.Parameter(torch.ones(5).double())]
    for gradient in image_gradients(unused, weights, images[:2], torch.tensor([1, 2]), loss):
        assert gradient.shape == (41,) and not gradient[36:].any() and not gradient.requires_grad
        assert (gradient[:36].view(3, 12) != 0).any(1).sum() == 1
    for vector, scale in (([0.0, 0.0], 0), ([0.3, 0.4], 2), ([30.0, 40.0], 0.02), ([1e-150, 0.0], 1e150)):
        result = unit_scale(torch.tensor(vector, dtype=torch.float64))
        torch.testing.assert_close(result, torch.tensor(scale, dtype=torch.float64))
    for data, message in (
        (TensorDataset(images), "classes"),
        (TensorDataset(images[:1], ["cat"]), "cat"),
    ):
        refusal = ""
        try:
            require_class_labels(model, data)
        except PhospheneError as error:
            refusal = str(error)
        assert message in refusal, refusal
    require_class_labels(model, TensorDataset(images[:1], ["2"]))


@torch.no_grad()
def cosines_of_embeddings(calls: Calls) -> Tensor:
    """The cosine of each pair of embeddings, negative where the class is not the explained one."""
    data, rows = calls.inputs["dataset"], []
    for image, label in zip(calls.inputs["images"], calls.inputs["labels"].tolist(), strict=True):
        own, row = calls.model.embed(image[None])[0], []
        for other, name in zip(data.images, data.classes, strict=True):
            cosine = F.cosine_similarity(own, calls.model.embed(other[None])[0], dim=0)
            row.append(cosine if int(name) == label else -cosine)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@method(
    family="influence",
    references=[
        Reference(
            key="hanawa2021",
            title="Evaluation of Similarity-based Explanations",
            authors="Hanawa, Yokoi, Hara, Inui",
            year=2021,
            url="https://arxiv.org/abs/2006.04528",
        )
    ],
    relations=[
        Agrees(cosines_of_embeddings, fields=("values",)),
        InvariantTo("normalization", fields=("values",)),
        InvariantTo("logit_shift", fields=("values",)),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.images + size.dataset),
    oracle=_oracle,
    quick={"k": 2},
    demo={"dataset": "builtin:scenes/400"},
)
def similar_examples(
    model: Model,
    images: Images,
    dataset: Dataset,
    labels: Labels,
    *,
    similarity: Annotated[
        Literal["cosine", "dot"], Field(description="cosine or inner product of the features")
    ] = "cosine",
    layer: FeatureLayer = None,
    k: Count = 5,
) -> TrainingInfluence:
    """Similar examples: the training images nearest in feature space, of the same class and of others.

    values = s(phi(x), phi(x_i))  if y_i = y,  else -s(phi(x), phi(x_i))

    with s the cosine or the inner product, phi the input of the model's linear classifier, or the output of
    ``layer`` averaged over its positions, and y the explained class. Proponents are the most similar images
    of that class, opponents those of the classes that the image could most easily be confused with. Nothing
    here depends on how the model was trained; it is the baseline of every measure of influence.

    Returns:
        ``values`` (N, M) of M training images; ``proponents`` and ``opponents`` (N, k), their indices.

    Raises:
        InputError: a data set without classes.
        UnknownName: a class of the data set that is no class of the model.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("similar_examples", images="builtin:scenes/2", dataset="builtin:scenes/24", k=3)
        result.proponents  # indices of training images, (2, 3)

    Source:
        Hanawa et al. 2021, section 2.1; by nearest neighbors, `nearest_neighbors`.
    """
    require_class_labels(model, dataset)
    size = batch_size(model)
    queries = torch.cat([image_features(model, part, layer) for part in images.split(size)])
    embedding = embed_dataset(model, dataset, layer)
    if embedding.labels is None:
        raise InputError("some images of the data set have no class")
    features = embedding.features
    if similarity == "cosine":
        queries, features = F.normalize(queries), F.normalize(features)
    indices = torch.tensor([label_index(model, name) for name in embedding.labels], device=model.device)
    signs = torch.where(indices == labels[:, None], 1, -1)
    values = signs * (queries @ features.T)
    return training_influence(
        model, images, labels, dataset, embedding.labels, values, k, f"similarity ({similarity})"
    )


@hookimpl
def phosphene_methods():
    return [similar_examples]
