"""More styles for a trained style network, which learns them by new scales and shifts alone."""

import torch
from torch import nn

from phosphene import InputError, TensorDataset, hookimpl, load_model, method
from phosphene.results import TrainedNetwork
from phosphene.roles import Dataset, Frames, Model, Seed, Styles, Stylizer
from phosphene.spec import Cost, PixelRange, param, size

from ._optimize_style import ContentLayer, StyleLayers
from ._style_loss import Perception
from ._style_network import StyleNetwork, joined, network_of, new_to
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


def one_colour_is_learned_and_the_old_style_kept() -> None:
    """Features = pixels, no content: a style of one colour is that colour, and the old style has its bits."""
    see = nn.Conv2d(3, 3, 1, bias=False)
    see.weight.data = torch.eye(3)[:, :, None, None]
    model = load_model(nn.Sequential(see, nn.ReLU()), input_size=(3, 8, 8))
    random = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=random)
    colour = torch.tensor([0.8, 0.3, 0.5])[None, :, None, None]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = StyleNetwork(styles=1, width=2, blocks=0).eval().requires_grad_(False)
    old = TrainedNetwork(
        network=network,
        method="style.fast_style_fit",
        config=network.config,
        losses=torch.zeros(1),
        labels=("old",),
        previews=previews(network, images[:1]),
    )
    made = fast_style_add(
        model, TensorDataset(images), colour.expand(1, 3, 8, 8), old,
        content_weight=0.0, total_variation=0.0, steps=120, batch=2, lr=0.1, seed=0,
    )  # fmt: skip
    found = made.previews[1].mean((1, 2), keepdim=True)
    assert (found - colour[0]).abs().max() < 0.05, "the new style is not the colour"
    assert torch.equal(made.previews[0], old.previews[0]), "the old style changed"


@method(
    family="style",
    references=[DUMOULIN],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=2 * param.batch * param.steps + size.styles, backward=param.batch * param.steps),
    network=StyleNetwork,
    oracle=one_colour_is_learned_and_the_old_style_kept,
    quick={"steps": 2, "batch": 2},
    demo={
        "styles": ["builtin:pebbles"],
        "names": ["pebbles"],
        "steps": 120,
        "batch": 1,
        "lr": 0.05,
    },
)
def fast_style_add(
    model: Model,
    dataset: Dataset,
    styles: Styles,
    stylizer: Stylizer,
    *,
    names: Names = None,
    content_layer: ContentLayer = None,
    style_layers: StyleLayers = None,
    content_weight: ContentWeight = 3.0,
    style_weight: StyleWeight = 10.0,
    total_variation: TotalVariation = 0.01,
    steps: Steps = 200,
    batch: Batch = 4,
    lr: Rate = 0.05,
    mixed_precision: MixedPrecision = False,
    frames: Frames = 0,
    seed: Seed = None,
) -> TrainedNetwork:
    """Teach a trained style network more styles: only their own scales and shifts are learned.

    min_{gamma^(s), beta^(s)} E_x,s  L(T(x; gamma^(s), beta^(s)), x, s)

    with L the loss of ``fast_style_fit`` and its parameters. The convolutions and the old styles' rows stay
    as they are, so old styles paint the same bits as before; the new rows begin at the mean of the old.
    ``note`` says how many numbers were learned, and their share of the whole network's. What the old styles
    had no use for, the convolutions do not offer to the new.

    Pictures (N, 3, H, W) and new styles (S, 3, H', W') in [0, 1], ``stylizer`` what ``fast_style_fit`` or
    this method gave; ``losses`` (steps,), ``previews`` and ``labels`` of all styles, old ones first,
    ``frames`` (F, S, 3, h, w) of the new.

    Raises InputError for a network with batch norm, which holds one style only, and what ``fast_style_fit``
    raises. Source: Dumoulin et al. 2017.
    """
    old, labels = network_of(stylizer), labels_of(names, styles, stylizer.labels)
    if old.config["norm"] == "batch":
        raise InputError("a network with batch norm holds one style; train one with conditional norm")
    look = Perception(model, content_layer, style_layers)
    new = new_to(old, len(styles)).to(model.device, model.dtype)
    learned = sum(p.numel() for p in new.parameters() if p.requires_grad)
    course, first = teach(
        new, look, dataset, styles,
        content_weight=content_weight, style_weight=style_weight, total_variation=total_variation,
        steps=steps, batch=batch, lr=lr, mixed_precision=mixed_precision, frames=frames, seed=seed,
    )  # fmt: skip
    network = joined(old, new)
    whole = sum(p.numel() for p in network.parameters())
    return TrainedNetwork(
        network=network,
        method="style.fast_style_add",
        config=network.config,
        losses=course.losses,
        labels=labels,
        previews=previews(network, first.to(next(network.parameters()))),
        note=f"learned {learned:,} of {whole:,} numbers ({learned / whole:.2%})",
        frames=course.frames,
    )


@hookimpl
def phosphene_methods():
    return [fast_style_add]
