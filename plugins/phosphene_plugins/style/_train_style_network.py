"""Teaching a style network to repaint: the perceptual loss of what it paints, and the descent on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Dataset, InputError, Reference, batch_size
from phosphene.optimize import gram_matrix
from phosphene.optimize import total_variation as variation
from phosphene.training import TrainingHistory, train

from ._optimize_style import at_most
from ._style_loss import Aim, Perception, relative
from ._style_network import StyleNetwork, paintable

DUMOULIN = Reference(
    key="dumoulin2017",
    title="A Learned Representation for Artistic Style",
    authors="Dumoulin, Shlens, Kudlur",
    year=2017,
    url="https://arxiv.org/abs/1610.07629",
)


#: Parameters of a training.
Names: TypeAlias = Annotated[list[str] | None, Field(description="what the styles are called")]


ContentWeight: TypeAlias = Annotated[float, Field(ge=0, description="weight of the content")]


StyleWeight: TypeAlias = Annotated[float, Field(ge=0, description="weight of the style")]


TotalVariation: TypeAlias = Annotated[float, Field(ge=0, description="its weight, per pixel")]


Steps: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000, description="steps of Adam")]


Batch: TypeAlias = Annotated[int, Field(ge=1, le=1024, description="pictures a step")]


Rate: TypeAlias = Annotated[float, Field(gt=0, le=1, description="learning rate")]


MixedPrecision: TypeAlias = Annotated[bool, Field(description="convolutions in bfloat16, for GPUs")]


#: The longer side of what is kept of the previews on the way.
_FRAME = 128


def teach(
    network: StyleNetwork,
    look: Perception,
    dataset: Dataset,
    styles: Tensor,
    *,
    content_weight: float,
    style_weight: float,
    total_variation: float,
    steps: int,
    batch: int,
    lr: float,
    mixed_precision: bool,
    frames: int,
    seed: int | None,
) -> tuple[TrainingHistory, Tensor]:
    """Adam on all of a network that wants a gradient: its course, and the first picture in every style.

    The loss is ``fast_style_fit``'s. InputError for pictures that are not colour.
    """
    model = look.model
    first = paintable(dataset.read([0])).to(model.device, model.dtype)
    if mixed_precision and model.dtype != torch.float32:
        raise InputError(f"mixed precision is for float32, the model is in {model.dtype}")
    alone = styles.new_ones(1)
    wanted = [torch.cat(each) for each in zip(*(look.style(s, alone) for s in styles.split(1)), strict=True)]
    one_hot = torch.eye(len(styles), device=model.device, dtype=model.dtype)

    def loss(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        which = torch.randint(len(styles), (len(images),)).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision):
            content, painted = look.content(images), network(paintable(images), one_hot[which])
            maps = look.maps(painted)
        *seen, repainted = (m.to(model.dtype) for m in maps)  # sums and squares are worth all digits
        painted, content = painted.to(model.dtype), content.to(model.dtype)
        style = look.style_loss(
            [gram_matrix(f) for f in seen], Aim(content, [target[which] for target in wanted])
        )
        roughness = variation(painted) / painted[0, 0].numel()
        return (
            content_weight * relative(repainted, content) + style_weight * style + total_variation * roughness
        )

    def draw() -> Tensor:
        network.eval()
        drawn = at_most(previews(network, first), _FRAME)
        network.train()
        return drawn.clamp(0, 1)

    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr)
    course = train(
        network, dataset, loss, optimizer, steps=steps, batch=batch, seed=seed or 0,
        at_once=batch_size(model), frames=frames, draw=draw,
    )  # fmt: skip
    return course, first


@torch.no_grad()
def previews(network: StyleNetwork, image: Tensor) -> Tensor:
    """One picture (1, 3, H, W) in each of its styles: (S, 3, H, W)."""
    return torch.cat([network(image, row[None]) for row in torch.eye(network.config["styles"]).to(image)])


def labels_of(names: list[str] | None, styles: Tensor, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The known styles' names and then these', or an InputError where they do not fit."""
    numbers = range(len(known), len(known) + len(styles))
    labels = (*known, *(f"style {n}" for n in numbers)) if names is None else (*known, *names)
    if len(labels) != len(known) + len(styles) or len(set(labels)) != len(labels):
        raise InputError(
            f"{len(known) + len(styles)} styles need as many different names, not {', '.join(labels)}"
        )
    return labels
