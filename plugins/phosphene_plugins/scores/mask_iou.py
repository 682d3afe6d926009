"""Map against object mask: the overlap of the thresholded map, and the share of its energy inside."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Method, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.roles import Dataset, Model, Seed

from ._evaluate_maps import (
    About,
    Budget,
    Explained,
    Measure,
    MethodName,
    MethodParams,
    Pictures,
    evidence,
    ranks,
)
from ._score_table import Scores, scored

Threshold = Annotated[
    float | None,
    Field(gt=0, le=1, description="of the highest value; as many places as the object has unless told"),
]


def overlap(threshold: float | None) -> Measure:
    """IoU of the map's high places with the object, and how much of its energy lies inside."""

    def measure(seen: Explained) -> Tensor:
        maps, objects = evidence(seen.maps), seen.objects()
        sizes = objects.sum((1, 2), keepdim=True)
        high = ranks(maps) < sizes if threshold is None else maps >= threshold * maps.amax((1, 2), True)
        both, either = (high & objects).sum((1, 2)), (high | objects).sum((1, 2))
        energy = (maps * objects).sum((1, 2)) / maps.sum((1, 2))
        return torch.stack([both / either.clamp(min=1), energy], 1)

    return Measure(("IoU", "energy inside"), (True, True), measure, needs_masks=True)


def known_boxes_have_known_overlap() -> None:
    """A model that sees a box evenly has all its energy in that; half of an object is an IoU of 1/3."""
    seen, objects = torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
    seen[:, :, 2:6, 2:6] = 1.0
    objects[0, 2:6, 2:6] = objects[1, 2:6, 4:8] = True
    linear = nn.Linear(64, 2)
    with torch.no_grad():
        linear.weight.copy_(seen.flatten(1))
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 8, 8), mean=[0.0], std=[1.0])
    dataset = TensorDataset(torch.rand(2, 1, 8, 8), ["0", "1"], objects)
    found = mask_iou(model, dataset, method="saliency", seed=0)
    torch.testing.assert_close(found.each[0, 0], torch.tensor([[1.0, 1 / 3], [1.0, 0.5]]))


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
    needs=["dataset"],
    oracle=known_boxes_have_known_overlap,
    quick={"method": "grad_cam", "params": {}, "pictures": 2, "budget": 40},
    demo={"pictures": 24},
)
def mask_iou(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: About = "label",
    threshold: Threshold = None,
    pictures: Pictures = 200,
    budget: Budget = 20_000,
    seed: Seed = None,
) -> Scores:
    """Measure how far a map and the object cover each other.

    IoU = |T and O| / |T or O|,  energy inside = sum_(ij in O) M_ij / sum_ij M_ij

    M is what of the map speaks for the class, at the picture's size, O the object, T the map's highest
    places: those of at least ``threshold`` times the highest value or, unless told, as many as the object
    has pixels, which asks nothing of the map's scale. Energy asks everything of it: a constant map has the
    object's share of the picture. Beside the method stand the centre point and random maps; targets and
    ``budget`` as in ``pointing_game``. A map of a model that looks elsewhere should score low: this
    measures map and model together.

    Raises InputError where the data set knows no masks or classes, and for a method that gives no maps.

    Source: Zhou et al. 2016, section 3.2 (by boxes); the energy is that of Wang et al. 2020, section 4.3.
    """
    return scored(
        model, dataset, overlap(threshold), method=method, params=params, target=target, pictures=pictures,
        budget=budget, seed=seed,
    )  # fmt: skip


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [mask_iou]
