"""Fast neural style: a network trained to repaint any picture in one pass, in several styles."""

from typing import Annotated

import torch
from pydantic import Field

from phosphene import InputError, Reference, UnknownName, hookimpl, method, progress_bar
from phosphene.results import Stylization, TrainedNetwork
from phosphene.roles import Dataset, Frames, Images, Model, Seed, Styles, Stylizer
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._optimize_style import ContentLayer, StyleLayers
from ._style_loss import Perception
from ._style_network import Norm, StyleNetwork, conditional_norm_is_instance_norm, network_of, paintable
from ._train_style_network import (
    DUMOULIN,
    Batch,
    ContentWeight,
    MixedPrecision,
    Names,
    Rate,
    Steps,
    StyleWeight,
    TotalVariation,
    labels_of,
    previews,
    teach,
)

REFERENCES = [
    DUMOULIN,
    Reference(
        key="johnson2016",
        title="Perceptual Losses for Real-Time Style Transfer and Super-Resolution",
        authors="Johnson, Alahi, Fei-Fei",
        year=2016,
        url="https://arxiv.org/abs/1603.08155",
    ),
    Reference(
        key="ulyanov2016",
        title="Instance Normalization: The Missing Ingredient for Fast Stylization",
        authors="Ulyanov, Vedaldi, Lempitsky",
        year=2016,
        url="https://arxiv.org/abs/1607.08022",
    ),
]


@method(
    family="style",
    references=REFERENCES,
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=2 * param.batch * param.steps + size.styles, backward=param.batch * param.steps),
    network=StyleNetwork,
    oracle=conditional_norm_is_instance_norm,
    quick={"steps": 2, "batch": 2, "width": 4, "blocks": 1},
    demo={
        "names": ["bricks", "pebbles", "waves", "swirls"],
        "width": 8,
        "blocks": 1,
        "steps": 430,
        "batch": 1,
        "lr": 1e-2,
    },  # fmt: skip
)
def fast_style_fit(
    model: Model,
    dataset: Dataset,
    styles: Styles,
    *,
    names: Names = None,
    norm: Annotated[Norm, Field(description="instance and batch norm hold one style")] = "conditional",
    content_layer: ContentLayer = None,
    style_layers: StyleLayers = None,
    content_weight: ContentWeight = 3.0,
    style_weight: StyleWeight = 10.0,
    total_variation: TotalVariation = 0.01,
    width: Annotated[int, Field(ge=1, le=512, description="channels at full resolution")] = 16,
    blocks: Annotated[int, Field(ge=0, le=32, description="residual blocks")] = 3,
    steps: Steps = 1000,
    batch: Batch = 4,
    lr: Rate = 5e-3,
    mixed_precision: MixedPrecision = False,
    frames: Frames = 0,
    seed: Seed = None,
) -> TrainedNetwork:
    """Train one network to repaint pictures in any of several styles: Adam on a perceptual loss.

    min_theta E_x,s  content_weight |phi(T(x, s)) - phi(x)|^2 / |phi(x)|^2
                   + style_weight sum_j 3^-j |G_j(T(x, s)) - G_j(s)|_F^2 / |G_j(s)|_F^2
                   + total_variation TV(T(x, s)) / (H W)

    with phi the model's features at ``content_layer`` (None: the middle one of ``model.stages``),
    G_j the Gram matrices at ``style_layers`` (None: ``model.stages``, j = 0 the finest) and a style s
    drawn for each picture. Both terms are relative, so that the weights mean the same for every
    model. T tells the styles apart by conditional instance norm alone; of a single style ``norm`` "batch"
    makes what Johnson et al. had, and "instance" what replaced it: the page on normalisation compares them.

    ``mixed_precision`` runs both networks' convolutions in bfloat16, which saves time and memory on GPUs made
    for it; weights, Gram matrices and the loss keep float32. Cut off, a training goes on bit by bit when
    ``run`` is given the same ``out``.

    Pictures (N, 3, H, W) and styles (S, 3, H', W') in [0, 1]; ``losses`` (steps,), ``previews``
    (S, 3, H, W) the first picture in every style, ``frames`` (F, S, 3, h, w) the same on the way, 128
    pixels a side or less.

    Raises DivergenceError if the loss is no longer finite, InputError for names or a norm that do not fit
    the styles, for pictures that are not colour and for a mixed precision of what is no float32.
    Source: Johnson et al. 2016, Ulyanov et al. 2016, Dumoulin et al. 2017.
    """
    labels = labels_of(names, styles)
    if len(styles) > 1 and norm != "conditional":
        raise InputError(f'{norm} norm knows one style; {len(styles)} need norm="conditional"')
    look = Perception(model, content_layer, style_layers)
    network = StyleNetwork(len(styles), width, blocks, norm).to(model.device, model.dtype)
    course, first = teach(
        network, look, dataset, styles,
        content_weight=content_weight, style_weight=style_weight, total_variation=total_variation,
        steps=steps, batch=batch, lr=lr, mixed_precision=mixed_precision, frames=frames, seed=seed,
    )  # fmt: skip
    return TrainedNetwork(
        network=network,
        method="style.fast_style_fit",
        config=network.config,
        losses=course.losses,
        labels=labels,
        previews=previews(network, first),
        frames=course.frames,
    )


@method(
    family="style",
    references=REFERENCES,
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    cost=Cost(forward=size.images),
    oracle=conditional_norm_is_instance_norm,
)
def fast_style(
    images: Images,
    stylizer: Stylizer,
    *,
    style: Annotated[
        int | str | dict[str, Annotated[float, Field(ge=0, le=1e6)]] | None,
        Field(description="a style by number or name, or shares of several; the first one"),
    ] = None,
) -> Stylization:
    """Repaint pictures in a style, or between styles, in one pass through a trained network.

    T(x; gamma, beta),  (gamma, beta) = sum_s b_s (gamma^(s), beta^(s))

    A style alone is b_s = 1; a blend, ``{"swirls": 1, "waves": 3}``, mixes the styles' scales and
    shifts by its shares, which are divided by their sum. Pictures (N, 3, H, W) in [0, 1], 8 pixels
    a side or more; ``stylizer`` what ``fast_style_fit`` gave, or its folder. Raises InputError or
    UnknownName for a style it was not trained on. Source: Dumoulin et al. 2017.
    """
    paintable(images)
    network, labels = network_of(stylizer), stylizer.labels
    if isinstance(style, int) and not 0 <= style < len(labels):
        raise InputError(f"style {style} does not exist: there are {len(labels)} ({', '.join(labels)})")
    if not isinstance(style, dict):
        style = {style if isinstance(style, str) else labels[style or 0]: 1.0}
    for name in style:
        if name not in labels:
            raise UnknownName("style", name, labels, "this stylizer")
    if not any(style.values()):
        raise InputError(f"a blend needs a share above zero, not {style}")
    blend = {name: style[name] / sum(style.values()) for name in labels if style.get(name)}
    parameter = next(network.parameters())
    mix = torch.tensor([[blend.get(name, 0.0) for name in labels]]).to(parameter)
    painted = [network(i.to(parameter), mix) for i in progress_bar(images.split(1), "Painting", len(images))]
    words = list(blend) if len(blend) == 1 else [f"{share:.0%} {name}" for name, share in blend.items()]
    return Stylization(images=images, stylized=torch.cat(painted).to(images), style=" + ".join(words))


@hookimpl
def phosphene_methods():
    return [fast_style, fast_style_fit]
