"""Relations that several methods of activations declare, and the references that they agree with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.spec import Calls, InvariantTo, Relation, ScalesWith


def statistics_of_a_data_set(*fields: str) -> tuple[Relation, ...]:
    """Relations of fields that are sums over a data set, of what is computed below the logits."""
    return (
        InvariantTo("dataset_order", fields=fields),
        InvariantTo("normalization", fields=fields),
        ScalesWith("logits", power=0, fields=fields),
    )


@torch.no_grad()
def maps_of_the_data_set(calls: Calls) -> Tensor:
    """The activations (N, C, h, w) of the result's layer on all images at once."""
    features: Tensor = calls.model.features(calls.inputs["dataset"].images, calls.result.layer)
    return features if features.ndim == 4 else features[:, :, None, None]


def active_fraction(calls: Calls) -> Tensor:
    """The fraction of images and positions at which each channel is positive."""
    return (maps_of_the_data_set(calls) > 0).double().mean((0, 2, 3))


def standard_deviation(calls: Calls) -> Tensor:
    """The standard deviation of each channel over images and positions."""
    return maps_of_the_data_set(calls).transpose(0, 1).flatten(1).std(1, correction=0)


def selectivity(calls: Calls) -> Tensor:
    """(mu_max - mu_rest) / (mu_max + mu_rest) from the means of each class's images."""
    means = maps_of_the_data_set(calls).relu().mean((2, 3))
    labels = calls.inputs["dataset"].classes
    rows = [[n for n, label in enumerate(labels) if label == name] for name in sorted(set(labels))]
    by_class = torch.stack([means[row].mean(0) for row in rows]).sort(dim=0).values
    largest, rest = by_class[-1], by_class[:-1].mean(0)
    return ((largest - rest) / (largest + rest)).nan_to_num()


def background_reliance(calls: Calls) -> Tensor:
    """The fraction of the positive activations outside the objects, with masks averaged over cells."""
    maps = maps_of_the_data_set(calls).relu()
    objects = calls.inputs["dataset"].objects.double()
    covered = F.adaptive_avg_pool2d(objects[:, None], (maps.shape[2], maps.shape[3]))
    return ((maps * (1 - covered)).sum((0, 2, 3)) / maps.sum((0, 2, 3))).nan_to_num()


def correlation(calls: Calls) -> Tensor:
    """The correlation of the channels over images and positions; 0 for a constant channel."""
    values = maps_of_the_data_set(calls).transpose(0, 1).flatten(1)
    return torch.corrcoef(values).nan_to_num().fill_diagonal_(1)


def cosine(calls: Calls) -> Tensor:
    """The cosines between the channels over images and positions; 0 for a zero channel."""
    values = F.normalize(maps_of_the_data_set(calls).transpose(0, 1).flatten(1))
    return (values @ values.T).fill_diagonal_(1)


def largest_activations(calls: Calls) -> Tensor:
    """The k largest activations of each channel in turn, at most ``per_image`` of an image."""
    channels = list(dict.fromkeys(calls.result.channels))
    maps = maps_of_the_data_set(calls)[:, channels].flatten(2)
    count = min(calls.params["per_image"], maps.shape[2])
    best = maps.topk(count, dim=2).values.transpose(0, 1).flatten(1)
    return best.topk(min(calls.params["k"], best.shape[1]), dim=1).values.flatten()
