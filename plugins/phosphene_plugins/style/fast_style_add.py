"""New styles for a trained style network: only their conditional instance normalization is trained."""

from typing import Any

import torch

from phosphene import InputError, TensorDataset, fork_random_state, hookimpl, method
from phosphene.results import TrainedNetwork
from phosphene.roles import Dataset, Frames, Model, Seed, Styles, Stylizer
from phosphene.spec import Cost, PixelRange, param, size
from phosphene.training import single_precision

from ._parameters import PerceptualLoss, StyleNames, StyleNetworkTraining
from ._pixel_features import draw_images, gram, load_pixel_model, relative, transfer_loss
from ._style_loss import StyleLoss
from ._style_network import StyleNetwork, concatenate_styles, network_for_new_styles, require_style_network
from ._train_style_network import DUMOULIN, style_labels, style_previews, train_style_network


def one_color_is_learned_and_the_old_style_unchanged() -> None:
    """Features = pixels: the first loss by hand; a style of one color is learned, the old one stays."""
    tested: Any = fast_style_add  # its result has every field here
    model, images = load_pixel_model(), draw_images(4, 3, 8, 8, seed=0)
    color = torch.tensor([0.8, 0.3, 0.5], dtype=torch.float64)[None, :, None, None]
    with fork_random_state():
        torch.manual_seed(0)
        network = StyleNetwork(styles=1, width=2, blocks=0).double().eval().requires_grad_(False)
    previews = style_previews(network, images[:1])
    old = TrainedNetwork(
        network=network, method="style.fast_style_fit", config=network.config, losses=torch.zeros(1),
        labels=("old",), previews=previews,
    )  # fmt: skip
    style = color.expand(1, 3, 8, 8)
    options: Any = {"content_weight": 0.0, "total_variation": 0.0, "batch": 2, "lr": 0.1, "seed": 3}
    options |= {"style_layers": ["0"], "style_weight": 3.0}
    extended = tested(model, TensorDataset(images), style, old, steps=120, frames=2, **options)
    batch = images[torch.randperm(4, generator=torch.Generator().manual_seed(3))[:2]]
    with torch.no_grad():
        stylized = network(batch, torch.ones(2, 1, dtype=torch.float64))
    loss = transfer_loss(stylized, batch, style, weights={"0": 1}, alpha=0, beta=3).mean()
    assert torch.allclose(extended.losses[0].double(), loss, rtol=1e-5), "not the old style's loss at first"
    assert relative(gram(extended.previews[1:], "0"), gram(style, "0")) < 0.05, "the new style is not learned"
    assert torch.equal(extended.previews[0], previews[0]), "the old style changed"
    assert extended.labels == ("old", "style 1") and extended.frames.shape == (2, 1, 3, 8, 8)
    named = tested(model, TensorDataset(images), style, old, names=["new"], steps=1, **options)
    assert named.labels == ("old", "new") and named.config["styles"] == 2


@method(
    family="style",
    references=[DUMOULIN],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=2 * param.batch * param.steps + size.styles, backward=param.batch * param.steps),
    network=StyleNetwork,
    oracle=one_color_is_learned_and_the_old_style_unchanged,
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
    names: StyleNames = None,
    perceptual_loss: PerceptualLoss = PerceptualLoss(),
    training: StyleNetworkTraining = StyleNetworkTraining(steps=200, batch=4, lr=0.05),
    frames: Frames = 0,
    seed: Seed = None,
) -> TrainedNetwork:
    """Conditional instance normalization: add styles to a trained network by new scales and shifts alone.

    min_{gamma^(s), beta^(s)} E_x,s  L(T(x; gamma^(s), beta^(s)), x, s)

    with L the loss of ``fast_style_fit`` and its parameters. The convolutions and the old styles' scales and
    shifts stay fixed, so the old styles' output stays the same bit for bit; the new ones start at the mean of
    the old. The new styles can only use the filters that were trained for the old ones.

    Images (N, 3, H, W) and new styles (S, 3, H', W') are in [0, 1]; ``stylizer`` is a result of
    ``fast_style_fit`` or of this method, or its folder.

    Returns:
        ``network`` with R + S styles, the old ones first; ``losses`` (steps,), ``labels`` (the R + S
        names), ``previews`` (R + S, 3, H, W), ``frames`` (F, S, 3, h, w) of the new styles, ``note`` the
        number of trained parameters and their share.

    Raises:
        DivergenceError: a loss that is no longer finite.
        InputError: a network with batch norm, which has a single style; names that do not fit the styles,
            images that do not have three channels, or mixed precision for a model that is not in float32.

    Example::
        from phosphene import run

        options = {"styles": ["builtin:pebbles"], "names": ["pebbles"], "steps": 2, "batch": 2}
        result = run("fast_style_add", dataset="builtin:scenes/4", **options)
        result.labels  # ("bricks", "swirls", "mosaic", "waves", "pebbles")

    Source: Dumoulin et al. 2017, section 3.4.
    """
    old, labels = require_style_network(stylizer), style_labels(names, styles, stylizer.labels)
    if old.config["norm"] == "batch":
        raise InputError("a network with batch norm has a single style; train one with conditional norm")
    model = single_precision(model)
    loss_network = StyleLoss(model, perceptual_loss.content_layer, perceptual_loss.style_layers)
    new = network_for_new_styles(old, len(styles)).to(model.device, model.dtype)
    trained = sum(p.numel() for p in new.parameters() if p.requires_grad)
    history, first = train_style_network(
        new,
        loss_network,
        dataset,
        styles,
        perceptual_loss=perceptual_loss,
        training=training,
        frames=frames,
        seed=seed,
    )
    network = concatenate_styles(old, new).to(model.device)
    total = sum(p.numel() for p in network.parameters())
    return TrainedNetwork(
        network=network,
        method="style.fast_style_add",
        config=network.config,
        losses=history.losses,
        labels=labels,
        previews=style_previews(network, first.to(next(network.parameters()))),
        note=f"trained {trained:,} of {total:,} parameters ({trained / total:.2%})",
        frames=history.frames,
    )


@hookimpl
def phosphene_methods():
    return [fast_style_add]
