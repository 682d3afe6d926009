"""Model difference: the images on which two models disagree most, with the attribution maps of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    Fold,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    to_float64,
)
from phosphene import Model as _Model
from phosphene.data import Batch, Rows, State
from phosphene.images import enlarge_maps, resize
from phosphene.roles import Dataset, Model, OtherModel
from phosphene.spec import Agrees, Calls, InvariantTo, Nonnegative, UnitRange

from ..scores._evaluate_maps import method_source
from ._difference_result import ModelDifference


def divergences_of_linear_models() -> None:
    """Of two linear models, divergences by their definitions and saliency maps |w| of each prediction."""
    draw = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"mean": [0.4], "std": [0.2], "input_size": (1, 2, 3)}
    heads = [nn.Linear(6, 3).double() for _ in range(2)]
    with torch.no_grad():
        for head in heads:
            head.weight.normal_(generator=draw), head.bias.normal_(generator=draw)
    names = ["a", "b", "c"]
    models = [load_model(nn.Sequential(nn.Flatten(), head), classes=names, **settings) for head in heads]
    images = torch.rand(9, 1, 2, 3, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        p, q = (model(images).softmax(1) for model in models)
    middle = (p + q) / 2

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([torch.dot(x, (x / y).log()) for x, y in zip(a, b, strict=True)])

    js = (divergence(p, middle) + divergence(q, middle)) / 2
    measures: dict[Any, Tensor] = {"js": js, "kl": divergence(p, q)}
    for measure, expected in measures.items():
        result = model_difference(
            models[0], TensorDataset(images), models[1], measure=measure, k=4, attribution="saliency"
        )
        torch.testing.assert_close(result.divergences, expected)
        assert result.indices.tolist() == expected.argsort(descending=True)[:4].tolist()
    assert torch.equal(result.images, images[result.indices]) and result.labels is None
    both = torch.stack([p.argmax(1), q.argmax(1)], 1)
    assert torch.equal(result.predictions, both)
    torch.testing.assert_close(result.confidences, torch.stack([p.amax(1), q.amax(1)], 1))
    assert result.agreement == float((both[:, 0] == both[:, 1]).double().mean())
    for number, head in enumerate(heads):
        weights = head.weight.detach()[both[result.indices, number]].abs() / 0.2
        torch.testing.assert_close(result.maps[:, number], weights.view(4, 2, 3))
    # The same classes in another order are compared by their names; larger images are resized.
    order = [2, 0, 1]
    permuted = nn.Linear(6, 3).double()
    network = nn.Sequential(nn.Upsample(scale_factor=0.5), nn.Flatten(), permuted)
    with torch.no_grad():
        permuted.weight.copy_(heads[1].weight[order]), permuted.bias.copy_(heads[1].bias[order])
    settings |= {"input_size": (1, 4, 6), "classes": [names[n] for n in order]}
    flat = images.mean((2, 3), keepdim=True).expand(-1, -1, 2, 3)
    data = TensorDataset(flat)
    options: dict[str, Any] = {"k": 2, "attribution": "saliency"}
    result = model_difference(models[0], data, load_model(network, **settings), **options)
    same = model_difference(models[0], data, models[1], **options)
    torch.testing.assert_close(result.divergences, same.divergences)
    assert torch.equal(result.predictions, same.predictions) and result.maps.shape == (2, 2, 2, 3)
    assert torch.equal(result.maps[:, 0], same.maps[:, 0]) and result.ids == tuple("012345678")
    maps = torch.rand(2, 2, 3, generator=draw)
    wide = nn.functional.interpolate(maps[:, None], (2, 6), mode="bilinear")[:, 0]
    torch.testing.assert_close(_fit_maps(maps, torch.zeros(2, 1, 2, 6)), wide)
    smaller = _fit_maps(wide, torch.zeros(2, 1, 2, 3))  # each is the mean of 1/8, 3/8, 3/8 and 1/8 of four
    weights = torch.tensor([1, 3, 3, 1]) / 8
    torch.testing.assert_close(smaller[:, :, 1], wide[:, :, 1:5] @ weights)


def jensen_shannon(calls: Calls) -> Tensor:
    """The entropy of the mean prediction minus the mean of the entropies."""
    images = calls.inputs["dataset"].images
    with torch.no_grad():
        p, q = (model(images).double().softmax(1) for model in (calls.model, calls.inputs["other"]))

    def entropy(shares: Tensor) -> Tensor:
        return -torch.special.xlogy(shares, shares).sum(1)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


@method(
    family="comparison",
    references=[
        Reference(
            key="lin1991",
            title="Divergence measures based on the Shannon entropy",
            authors="Lin",
            year=1991,
            url="https://doi.org/10.1109/18.61115",
        )
    ],
    invariants=[Nonnegative(field="divergences"), UnitRange(field="confidences")],
    relations=[
        Agrees(jensen_shannon, fields=("divergences",), tolerance=1e-6),
        InvariantTo("logit_shift", fields=("divergences", "confidences")),
        InvariantTo("normalization", fields=("divergences",)),
        InvariantTo("dataset_order", fields=("divergences",)),
    ],
    needs=["dataset", "gradients"],
    oracle=divergences_of_linear_models,
    quick={"k": 2, "attribution": "saliency", "attribution_params": {}},
    demo={"dataset": "builtin:scenes/300", "other": "builtin:shapes-resnet"},
)
def model_difference(
    model: Model,
    dataset: Dataset,
    other: OtherModel,
    *,
    measure: Annotated[
        Literal["js", "kl"],
        Field(description="Jensen-Shannon divergence, or Kullback-Leibler divergence of other from model"),
    ] = "js",
    k: Annotated[int, Field(ge=1, le=1000, description="number of images to return")] = 8,
    attribution: Annotated[
        str, Field(description="method of the maps: any that returns an Attribution of model and images")
    ] = "grad_cam",
    attribution_params: Annotated[
        dict[str, Any], Field(description="parameters of that method, for both models")
    ] = {},  # noqa: B006
) -> ModelDifference:
    """Model difference: the images on which two models' predictions diverge most, with the maps of both.

    JS(x) = (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2,  KL(p || q) = sum_c p_c log p_c / q_c

    with p = softmax(z(x)) of ``model`` and q of ``other``, in nats: JS lies between 0 and log 2 = 0.69. The
    map beside each image explains the class that the model itself predicts. Where both have class names they
    are compared by name, in any order. Images are resized where the other model takes another size. Random
    attribution methods have the seed 0.

    Returns:
        ``divergences`` (M) and ``predictions`` (M, 2) of all images; ``indices`` (k), ``images``
        (k, C, H, W) and ``maps`` (k, 2, H, W) of those of largest divergence; ``agreement``.

    Raises:
        InputError: no other model, models of other classes, a method without maps.
        ModelError: a model without exclusive classes.

    Example::
        from phosphene import run

        result = run("model_difference", dataset="builtin:scenes/24", other="builtin:shapes-resnet", k=3)
        result.agreement
        result.maps.shape  # (3, 2, 64, 64)

    Source:
        Lin 1991, section IV (Jensen-Shannon divergence).
    """
    if other is None:
        raise InputError("model_difference compares two models: pass the other one as other=")
    order = _class_order(model, other)
    source = method_source(attribution, attribution_params, 0)
    rows = _Predictions(model, other, order, measure).run(dataset, batch_size(model))
    divergences, predictions, confidences = (
        rows[name].tensor() for name in ("divergences", "predictions", "confidences")
    )
    # equivalent mutants: on the CPU every sort of torch is stable
    indices = divergences.sort(descending=True, stable=True).indices[:k]
    chosen = indices.tolist()
    images = dataset.read(chosen).to(model.device, model.dtype)
    maps = []
    for number, network in enumerate((model, other)):
        classes = predictions[indices, number]
        # The other model's own numbers of the classes.
        target = classes if number == 0 else order[classes]
        pixels = _fit(network, images) if number else images
        parts = torch.arange(len(images)).split(batch_size(network))
        heat = torch.cat(
            [
                source.compute(network, pixels[part], Class(tuple(target[part].tolist())), range(len(part)))
                for part in parts
            ]
        )
        # equivalent mutants: maps of this size are enlarged to themselves
        if heat.shape[1:] != images.shape[2:]:
            heat = _fit_maps(heat, images)
        maps.append(heat.to(images))
    labels = [dataset.labels([index]) for index in chosen]
    return ModelDifference(
        names=(model.name, other.name),
        measure=measure,
        divergences=divergences.to(model.device, model.dtype),
        predictions=predictions.to(model.device),
        confidences=confidences.to(model.device, model.dtype),
        ids=tuple(dataset.id(i) for i in range(len(dataset))),
        indices=indices.to(model.device),
        images=images,
        maps=torch.stack(maps, 1),
        attribution=source.name,
        classes=tuple(model.class_name(n) for n in range(len(order))),
        agreement=float((predictions[:, 0] == predictions[:, 1]).double().mean()),
        labels=None if None in labels else tuple(str(label[0]) for label in labels if label is not None),
    )


def _class_order(model: _Model, other: _Model) -> Tensor:
    """The other model's number of each class (K). Raises InputError for models of other classes."""
    counts = model.class_count, other.class_count
    if model.classes is not None and other.classes is not None:
        names = [{name.strip().lower(): n for n, name in enumerate(m.classes or ())} for m in (model, other)]
        if names[0].keys() != names[1].keys():
            only = sorted(names[0].keys() ^ names[1].keys())
            raise InputError(
                f"{model.name} and {other.name} have other classes, which cannot be compared: "
                f"{', '.join(only[:5])}{', ...' if len(only) > 5 else ''} is of one model alone"
            )
        if len(names[0]) == counts[0]:
            return torch.tensor([names[1][name] for name in names[0]])
    if counts[0] != counts[1]:
        raise InputError(f"{model.name} has {counts[0]} classes and {other.name} {counts[1]}")
    return torch.arange(counts[0])


def _fit(model: _Model, images: Tensor) -> Tensor:
    """Images in the size, precision and on the device of a model."""
    if images.shape[2:] != model.input_size[1:] and model.size_known:
        images = resize(images, model.input_size[1:])
    return images.to(model.device, model.dtype)


def _fit_maps(maps: Tensor, images: Tensor) -> Tensor:
    """Maps in the size of the images: enlarged, or averaged where they are larger."""
    size = images.shape[2:]
    if maps.shape[1] <= size[0] and maps.shape[2] <= size[1]:
        return enlarge_maps(maps, size)
    return nn.functional.interpolate(maps[:, None], tuple(size), mode="bilinear", antialias=True)[:, 0]


@dataclass
class _Predictions(Fold[State]):
    """The divergence (M) of both predictions, their classes and probabilities (M, 2)."""

    model: _Model
    other: _Model
    order: Tensor
    measure: str
    title: str = "predictions"

    def start(self) -> State:
        return {"divergences": Rows(), "predictions": Rows(), "confidences": Rows()}

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        p = to_float64(self.model(images)).cpu().log_softmax(1)
        fitted = _fit(self.other, images).split(batch_size(self.other))
        logits = torch.cat([to_float64(self.other(part)).cpu() for part in fitted])
        q = logits[:, self.order].log_softmax(1)
        if self.measure == "kl":
            divergence = _kl(p, q)
        else:
            middle = torch.stack([p, q]).logsumexp(0) - torch.tensor(2.0, dtype=p.dtype).log()
            divergence = (_kl(p, middle) + _kl(q, middle)) / 2
        best = [shares.exp().max(1) for shares in (p, q)]
        first = batch.indices[0]
        state["divergences"].write(first, divergence.clamp(min=0))  # rounding may leave less than 0
        state["predictions"].write(first, torch.stack([part.indices for part in best], 1))
        state["confidences"].write(first, torch.stack([part.values for part in best], 1))
        return state


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) (n) of log-probabilities (n, K)."""
    return (p.exp() * (p - q)).sum(1)


@hookimpl
def phosphene_methods():
    return [model_difference]
