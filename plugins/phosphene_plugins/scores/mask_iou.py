"""Mask IoU: overlap of a thresholded attribution map with the object, and its energy inside the object."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Method, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, ScalesWith

from ._evaluate_maps import Metric, ScoringContext, pixel_ranks, positive_part
from ._parameters import Budget, MapTarget, MaxImages, MethodName, MethodParams, Threshold
from ._score_table import Scores, score_method


@dataclass(frozen=True)
class _Overlap:
    threshold: float | None

    def __call__(self, context: ScoringContext) -> Tensor:
        maps, objects = positive_part(context.maps), context.object_masks()
        if self.threshold is None:
            highest = pixel_ranks(maps) < objects.sum((1, 2), keepdim=True)
        else:
            highest = maps >= self.threshold * maps.amax((1, 2), True)
        intersection, union = (highest & objects).sum((1, 2)), (highest | objects).sum((1, 2))
        energy = (maps * objects).sum((1, 2)) / maps.sum((1, 2))
        return torch.stack([intersection / union.clamp(min=1), energy], 1)


def overlap_metric(threshold: float | None) -> Metric:
    """IoU of the map's highest pixels with the object, and the fraction of the map's energy inside it."""
    return Metric(("IoU", "energy inside"), (True, True), _Overlap(threshold), needs_masks=True)


def box_weights_have_a_known_overlap() -> None:
    """A model with weights in a box has all its energy there; half of the object is an IoU of 1/3."""
    weights, objects = torch.zeros(2, 1, 6, 10), torch.zeros(3, 6, 10, dtype=torch.bool)
    weights[:, :, 1:5, 2:6] = 1.0
    objects[0, 1:5, 2:6] = objects[1, 1:5, 4:8] = True
    linear = nn.Linear(60, 2)
    with torch.no_grad():
        linear.weight.copy_(weights.flatten(1))
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 6, 10), mean=[0.0], std=[1.0])
    dataset = TensorDataset(torch.rand(3, 1, 6, 10), ["0", "1", "0"], objects)  # the last object is empty
    result = mask_iou(model, dataset, method="saliency", seed=0)
    expected = torch.tensor([[1.0, 1 / 3, 0.0], [1.0, 0.5, 0.0]])
    torch.testing.assert_close(result.image_values[0, 0], expected)
    torch.testing.assert_close(result.values[0, 0], expected.mean(1))
    torch.testing.assert_close(result.standard_errors[0, 0], expected.std(1) / 3**0.5)
    torch.testing.assert_close(result.maps[0, 0], weights[:1, 0].expand(3, -1, -1))
    assert result.columns == ("IoU", "energy inside") and result.higher_is_better == (True, True)
    assert overlap_metric(None).needs_masks
    # Above half of the maximum are the upper 8 of the box's 16 pixels, and 4 of them in the second object.
    with torch.no_grad():
        linear.weight *= 3
        linear.weight.view(2, 6, 10)[:, 3:] *= 0.4
    result = mask_iou(model, dataset, method="saliency", threshold=0.5, seed=0)
    torch.testing.assert_close(result.image_values[0, 0, 0], torch.tensor([8 / 16, 4 / 20, 0.0]))


@method(
    family="scores",
    title="Mask IoU",
    references=[
        Reference(
            key="zhou2016",
            title="Learning Deep Features for Discriminative Localization",
            authors="Zhou, Khosla, Lapedriza, Oliva, Torralba",
            year=2016,
            url="https://arxiv.org/abs/1512.04150",
        ),
        Reference(
            key="wang2020",
            title="Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
            authors="Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu",
            year=2020,
            url="https://arxiv.org/abs/1910.01279",
        ),
    ],
    relations=[
        ScalesWith("logits", power=0, fields=("values", "image_values")),
        InvariantTo("logit_shift", fields=("values", "image_values")),
        InvariantTo("normalization", fields=("values", "image_values")),
    ],
    needs=["dataset"],
    oracle=box_weights_have_a_known_overlap,
    quick={"method": "grad_cam", "params": {}, "max_images": 2, "budget": 40},
    demo={"max_images": 24},
)
def mask_iou(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: MapTarget = "label",
    threshold: Threshold = None,
    max_images: MaxImages = 200,
    budget: Budget = 20_000,
    seed: Seed = None,
) -> Scores:
    """Mask IoU: overlap of an attribution map with the object's mask, and its energy inside the mask.

    IoU = |T and O| / |T or O|,  energy inside = sum_(ij in O) M_ij / sum_ij M_ij

    M is the map's positive part, at the image's size, O the object, T the map's highest pixels: those of at
    least ``threshold`` times the maximum or, by default, as many as the object has, which does not depend on
    the map's scale. The energy does depend on it: for a constant map it is the object's fraction of the
    image. Two baselines are scored beside the method, as in ``pointing_game``. The score measures map and
    model together: the map of a model that uses the background should score low.

    Returns:
        ``values`` (1, 3, 2): a row each for the method and the baselines; the columns are IoU and energy.

    Raises:
        InputError for a data set without masks or labels, and for a method that returns no maps.

    Example::
        from phosphene import run

        result = run("mask_iou", dataset="builtin:scenes/4")
        result.value("grad_cam", "IoU")

    Source:
        Zhou et al. 2016, section 3.2 (with boxes); the energy is that of Wang et al. 2020, section 4.3.
    """
    return score_method(
        model, dataset, overlap_metric(threshold), method=method, params=params, target=target,
        max_images=max_images, budget=budget, seed=seed,
    )  # fmt: skip


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [mask_iou]
