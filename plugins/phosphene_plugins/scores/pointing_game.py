"""The pointing game: whether a map's highest place lies in the object."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Method, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.data import peak_hits
from phosphene.roles import Dataset, Model, Seed

from ._evaluate_maps import About, Budget, Explained, Measure, MethodName, MethodParams, Pictures, evidence
from ._score_table import Scores, scored

Radius = Annotated[int, Field(ge=0, le=100, description="pixels beside the object that still count as near")]


def pointing(radius: int) -> Measure:
    """Hits in the object, and at most ``radius`` pixels off."""

    def measure(seen: Explained) -> Tensor:
        return peak_hits(evidence(seen.maps), seen.objects(), radius=radius)

    columns = ("pointing", f"within {radius} px")
    return Measure(columns, (True, True), measure, needs_masks=True)


def one_pixel_counts() -> None:
    """A model that sees one pixel alone hits an object of that pixel, and misses all that are far from it."""
    linear = nn.Linear(81, 2)
    with torch.no_grad():
        linear.weight.zero_()[:, 40] = 1.0
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 9, 9), mean=[0.0], std=[1.0])
    objects = torch.zeros(3, 9, 9, dtype=torch.bool)
    objects[0, 4, 4] = objects[1, 4, 6] = objects[2, 0, 0] = True
    dataset = TensorDataset(torch.rand(3, 1, 9, 9), ["0", "1", "0"], objects)
    found = pointing_game(model, dataset, method="saliency", radius=2, seed=0)
    assert found.each[0, 0].tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


@method(
    family="scores",
    references=[
        Reference(
            key="zhang2018",
            title="Top-Down Neural Attention by Excitation Backprop",
            authors="Zhang, Bargal, Lin, Brandt, Shen, Sclaroff",
            year=2018,
            url="https://arxiv.org/abs/1608.00507",
        )
    ],
    needs=["dataset"],
    oracle=one_pixel_counts,
    quick={"method": "grad_cam", "params": {}, "pictures": 2, "budget": 40},
    demo={"pictures": 24},
)
def pointing_game(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: About = "label",
    radius: Radius = 4,
    pictures: Pictures = 200,
    budget: Budget = 20_000,
    seed: Seed = None,
) -> Scores:
    """Count how often a map's highest place lies in the object, or next to it.

    score = mean over pictures of  1[ argmax_ij M_ij in the object ]

    M is what of the map speaks for the class, at the picture's size; of several highest places the share
    that lies in the object counts. Beside the method stand the centre point and random maps. It needs
    a data set that knows where the objects are, and is right only as far as the model looks at them: a
    map that is faithful to a model that looks elsewhere loses. An expensive method is scored on as many
    pictures as ``budget`` forward passes (a backward counts two) pay for, and the table tells how many.

    Raises InputError where the data set knows no masks or classes, and for a method that gives no maps.

    Source: Zhang et al. 2018, section 4.1, with their tolerance as a second column.
    """
    return scored(
        model, dataset, pointing(radius), method=method, params=params, target=target, pictures=pictures,
        budget=budget, seed=seed,
    )  # fmt: skip


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [pointing_game]
