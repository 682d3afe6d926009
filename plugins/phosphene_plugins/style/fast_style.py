"""Fast neural style: a network trained to repaint any picture in one pass, in several styles."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import (
    DivergenceError,
    InputError,
    Reference,
    UnknownName,
    batch_size,
    hookimpl,
    method,
    pixels,
    progress,
)
from phosphene.results import Stylization, TrainedNetwork
from phosphene.spec import Cost, PixelRange, SameShape
from phosphene.types import Dataset, Images, LayerName, Model, Seed, Styles, Stylizer

from .perceptual import relative
from .style_network import StyleNetwork, conditional_norm_is_instance_norm

REFERENCES = [
    Reference(
        key="dumoulin2017",
        title="A Learned Representation for Artistic Style",
        authors="Dumoulin, Shlens, Kudlur",
        year=2017,
        url="https://arxiv.org/abs/1610.07629",
    ),
    Reference(
        key="johnson2016",
        title="Perceptual Losses for Real-Time Style Transfer and Super-Resolution",
        authors="Johnson, Alahi, Fei-Fei",
        year=2016,
        url="https://arxiv.org/abs/1603.08155",
    ),
]


@method(
    family="style",
    references=REFERENCES,
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward="2 * batch * steps + images", backward="batch * steps"),
    network=StyleNetwork,
    oracle=conditional_norm_is_instance_norm,
    quick={"steps": 2, "batch": 2, "width": 4, "blocks": 1},
    demo={
        "names": ["bricks", "pebbles", "waves", "swirls"],
        "style_weight": 30,
        "width": 8,
        "blocks": 1,
        "steps": 250,
        "batch": 2,
        "lr": 3e-3,
    },  # fmt: skip
)
def fast_style_fit(
    model: Model,
    dataset: Dataset,
    styles: Styles,
    *,
    names: Annotated[list[str] | None, Field(description="what the styles are called")] = None,
    content_layer: Annotated[LayerName | None, Field(description="phi; the middle stage")] = None,
    style_layers: Annotated[list[LayerName] | None, Field(description="the G_j; every stage")] = None,
    content_weight: Annotated[float, Field(ge=0, description="weight of the content")] = 3.0,
    style_weight: Annotated[float, Field(ge=0, description="weight of the style")] = 10.0,
    total_variation: Annotated[float, Field(ge=0, description="its weight, per pixel")] = 0.01,
    width: Annotated[int, Field(ge=1, le=512, description="channels at full resolution")] = 16,
    blocks: Annotated[int, Field(ge=0, le=32, description="residual blocks")] = 3,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="steps of Adam")] = 1000,
    batch: Annotated[int, Field(ge=1, le=1024, description="pictures a step")] = 4,
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate")] = 5e-3,
    seed: Seed = None,
) -> TrainedNetwork:
    """Train one network to repaint pictures in any of several styles: Adam on a perceptual loss.

    min_theta E_x,s  content_weight |phi(T(x, s)) - phi(x)|^2 / |phi(x)|^2
                   + style_weight sum_j 3^-j |G_j(T(x, s)) - G_j(s)|_F^2 / |G_j(s)|_F^2
                   + total_variation TV(T(x, s)) / (H W)

    with phi the model's features at ``content_layer`` (None: the middle one of ``model.stages``),
    G_j the Gram matrices at ``style_layers`` (None: ``model.stages``, j = 0 the finest) and a style s
    drawn for each picture. Both terms are relative, so that the weights mean the same for every
    model. T tells the styles apart by conditional instance norm alone.

    Pictures (N, 3, H, W) and styles (S, 3, H', W') in [0, 1]; ``losses`` (steps,), ``previews``
    (S, 3, H, W) the first picture in every style.

    Raises DivergenceError if the loss is no longer finite, InputError for names that do not fit the
    styles or pictures that are not colour. Source: Johnson et al. 2016, Dumoulin et al. 2017.
    """
    labels = tuple(names) if names is not None else tuple(f"style {n}" for n in range(len(styles)))
    if len(labels) != len(styles) or len(set(labels)) != len(labels):
        raise InputError(f"{len(styles)} styles need as many different names, not {', '.join(labels)}")
    first = paintable(dataset.read([0])).to(model.device, model.dtype)
    style_layers = style_layers or list(model.stages)
    content_layer = content_layer or model.stages[(len(model.stages) - 1) // 2]
    memory = batch_size(model)

    def grams(images: Tensor) -> list[Tensor]:
        return [pixels.gram(model.maps(f, images)) for f in model.features_of(images, style_layers)]

    with torch.no_grad():
        wanted = [torch.cat(layer) for layer in zip(*map(grams, styles.split(memory)), strict=True)]
    config = {"styles": len(styles), "width": width, "blocks": blocks}
    network = StyleNetwork(**config).to(model.device, model.dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    one_hot = torch.eye(len(styles), device=model.device, dtype=model.dtype)

    def perceptual_loss(images: Tensor, which: Tensor) -> Tensor:
        """(N,) one loss per picture."""
        with torch.no_grad():
            content = model.features(images, content_layer)
        painted = network(images, one_hot[which])
        *seen, repainted = model.features_of(painted, [*style_layers, content_layer])
        loss = content_weight * relative(repainted, content)
        for depth, (features, target) in enumerate(zip(seen, wanted, strict=True)):
            found = pixels.gram(model.maps(features, painted))
            loss = loss + style_weight * 3.0**-depth * relative(found, target[which])
        return loss + total_variation * pixels.total_variation(painted) / painted[0, 0].numel()

    losses: list[float] = []
    for step in progress(range(steps), "Training", steps, note=lambda: f"loss {losses[-1]:.3f}"):
        chosen = [(step * batch + n) % len(dataset) for n in range(batch)]
        images = dataset.read(chosen).to(model.device, model.dtype)
        which = torch.randint(len(styles), (batch,)).to(model.device)
        optimizer.zero_grad()
        total = 0.0
        for part, rows in zip(images.split(memory), which.split(memory), strict=True):
            loss = perceptual_loss(part, rows).sum() / batch
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise DivergenceError(f"Step {step}: the loss is no longer finite; lower lr (now {lr:g}).")
        optimizer.step()
        losses.append(total)
    network.eval().requires_grad_(False)
    return TrainedNetwork(
        network=network,
        method="style.fast_style_fit",
        config=config,
        losses=torch.tensor(losses),
        labels=labels,
        previews=torch.cat([network(first, row[None]) for row in one_hot]),
    )


def paintable(images: Tensor) -> Tensor:
    """The images, or an InputError where the network cannot take them."""
    shape = tuple(images.shape)
    if shape[1] != 3 or min(shape[2:]) < 8:
        raise InputError(f"a style network takes (N, 3, H, W) of 8 pixels a side or more, not {shape}")
    return images


@method(
    family="style",
    references=REFERENCES,
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    cost=Cost(forward="images"),
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
    network, labels = stylizer.network, stylizer.labels
    if not isinstance(network, StyleNetwork):
        raise InputError(f"fast_style applies a network of fast_style_fit, not one of {stylizer.method}")
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
    painted = [network(i.to(parameter), mix) for i in progress(images.split(1), "Painting", len(images))]
    words = list(blend) if len(blend) == 1 else [f"{share:.0%} {name}" for name, share in blend.items()]
    return Stylization(images=images, stylized=torch.cat(painted).to(images), style=" + ".join(words))


@hookimpl
def phosphene_methods():
    return [fast_style, fast_style_fit]
