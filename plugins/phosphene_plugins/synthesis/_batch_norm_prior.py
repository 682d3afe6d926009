"""The batch-norm prior: distance of images' feature statistics from those that a network has stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Model, ModelError, Reference, at_least_float32
from phosphene.hooks import Tap

YIN = Reference(
    key="yin2020",
    title="Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion",
    authors="Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz",
    year=2020,
    url="https://arxiv.org/abs/1912.08795",
)


class BatchNormPrior:
    """Distance of the statistics of images from those stored in a network's batch norms.

    R(x) = sum_l ||mu_l(x) - m_l||_2 + ||v_l(x) - s_l||_2

    with mu_l and v_l (C_l,) the mean and the biased variance of every channel of the input of batch norm l
    over the positions and, unless the images are apart, over the batch; m_l and s_l are the layer's
    ``running_mean`` and ``running_var``, the statistics of the images that the network was trained on. Of a
    layer that runs several times in a pass the last call counts.

    Raises:
        ModelError: the network has no batch norm with running statistics.

    Example::

        prior = BatchNormPrior(model)
        prior(images)  # (N,), each image by itself
        with prior.record() as tap:  # in the same pass as the logits
            logits = model(images)
        prior.distances(tap, together=True)  # (N,), equal shares of the distance of the batch

    Source:
        Yin et al. 2020, equation 4.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        ran = model.structure.layers
        self.layers = {n: part for n, part in model.layers.items() if n in ran and _has_statistics(part)}
        if not self.layers:
            raise ModelError(
                f"{model.name} has no batch norm with running statistics: no statistics of its training "
                "images are stored in it; torchvision:resnet18 and builtin:shapes-resnet have them"
            )

    def record(self) -> Tap:
        """A tap that records the inputs of the batch norms during the passes inside a ``with`` block."""
        return Tap(self.layers, inputs=True)

    def distances(self, tap: Tap, *, together: bool = False) -> Tensor:
        """The distances (N,) of the images in the last pass, from the tap that recorded it.

        together: the statistics are those of the batch, and each image has an equal share of the distance.
        """
        layers = [_distances(layer, tap[name], together) for name, layer in self.layers.items()]
        return torch.stack(layers).sum(0)

    def __call__(self, images: Tensor, *, together: bool = False) -> Tensor:
        """The distances (N,) of images (N, C, H, W) in [0, 1], on the graph; a pass of its own."""
        names = list(self.layers)
        inputs = self.model.features_of(images, names, inputs=True)
        pairs = zip(self.layers.values(), inputs, strict=True)
        return torch.stack([_distances(layer, values, together) for layer, values in pairs]).sum(0)


def _has_statistics(layer: nn.Module) -> bool:
    """Whether it is a batch norm, also a frozen one, with running statistics of its channels."""
    statistics = (getattr(layer, "running_mean", None), getattr(layer, "running_var", None))
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):  # statistics of single images, not of a set
        return False
    return all(isinstance(value, Tensor) and value.ndim == 1 for value in statistics)


def _distances(layer: Any, inputs: Tensor, together: bool) -> Tensor:
    """||mu - m|| + ||v - s|| (N,) from inputs (N, C, ...): of each image, or of the batch in equal shares."""
    values = at_least_float32(inputs).flatten(2) if inputs.ndim > 2 else at_least_float32(inputs)[:, :, None]
    axes = (0, 2) if together else (2,)
    distance: Tensor = sum(  # type: ignore[assignment]
        torch.linalg.vector_norm(statistic - stored.to(statistic), dim=-1)
        for statistic, stored in (
            (values.mean(axes), layer.running_mean),
            (values.var(axes, correction=0), layer.running_var),
        )
    )
    return (distance / len(values)).expand(len(values)) if together else distance
