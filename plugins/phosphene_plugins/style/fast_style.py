"""Fast style transfer: a feed-forward network trained on a perceptual loss, with conditional norm."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from phosphene import (
    InputError,
    Reference,
    TensorDataset,
    UnknownName,
    hookimpl,
    load_model,
    method,
    progress_bar,
)
from phosphene import Model as AnyModel
from phosphene.results import Stylization, TrainedNetwork
from phosphene.roles import Dataset, Frames, Images, Model, Seed, Styles, Stylizer
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._parameters import PerceptualLoss, StyleNames, StyleNetworkTraining
from ._style_loss import StyleLoss
from ._style_network import (
    Norm,
    StyleNetwork,
    check_images,
    conditional_norm_is_instance_norm,
    require_style_network,
)
from ._train_style_network import DUMOULIN, style_labels, style_previews, train_style_network

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


def _pixels_as_features() -> AnyModel:
    """A model whose layer "0" returns the pixels: its convolution undoes the normalization."""
    pixels = nn.Conv2d(3, 3, 1).double()
    mean, std = torch.tensor([0.375, 0.5, 0.625]), torch.tensor([0.25, 0.5, 0.75])
    with torch.no_grad():
        pixels.weight.copy_(torch.diag(std)[:, :, None, None]), pixels.bias.copy_(mean)  # type: ignore[union-attr]
    return load_model(nn.Sequential(pixels), input_size=(3, 8, 12), mean=mean.tolist(), std=std.tolist())


def first_loss_is_that_of_the_untrained_network() -> None:
    """Features = pixels: the first loss is the equation for the untrained network's output."""
    conditional_norm_is_instance_norm()
    draw = torch.Generator().manual_seed(0)
    images, style = (torch.rand(1, 3, 8, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    # So small a learning rate leaves the weights as they are.
    options: Any = {"steps": 1, "batch": 1, "lr": 1e-12, "width": 4, "blocks": 1, "total_variation": 0.0}
    options |= {"content_layer": "0", "style_layers": ["0"], "content_weight": 2.0, "style_weight": 5.0}
    result = fast_style_fit(_pixels_as_features(), TensorDataset(images), style, seed=0, **options)
    with torch.no_grad():
        output = result.network(images, torch.ones(1, 1, dtype=torch.float64))
    gram = lambda x: torch.einsum("nchw,ndhw->ncd", x, x)
    relative = lambda x, y: (x - y).square().sum() / y.square().sum()
    expected = 2 * relative(output, images) + 5 * relative(gram(output), gram(style))
    torch.testing.assert_close(result.losses[0], expected.to(result.losses))
    torch.testing.assert_close(result.previews, output)
    torch.testing.assert_close(fast_style(images, result).stylized, output)


@method(
    family="style",
    references=REFERENCES,
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=2 * param.batch * param.steps + size.styles, backward=param.batch * param.steps),
    network=StyleNetwork,
    oracle=first_loss_is_that_of_the_untrained_network,
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
    names: StyleNames = None,
    norm: Annotated[
        Norm, Field(description="normalisation layers; instance and batch norm have a single style")
    ] = "conditional",
    perceptual_loss: PerceptualLoss = PerceptualLoss(),
    width: Annotated[int, Field(ge=1, le=512, description="number of channels at full resolution")] = 16,
    blocks: Annotated[int, Field(ge=0, le=32, description="number of residual blocks")] = 3,
    training: StyleNetworkTraining = StyleNetworkTraining(steps=1000, batch=4, lr=5e-3),
    frames: Frames = 0,
    seed: Seed = None,
) -> TrainedNetwork:
    """Fast style transfer: train a feed-forward network for one or several styles on a perceptual loss.

    min_theta E_x,s  content_weight |phi(T(x, s)) - phi(x)|^2 / |phi(x)|^2
                   + style_weight sum_j 3^-j |G_j(T(x, s)) - G_j(s)|_F^2 / |G_j(s)|_F^2
                   + total_variation TV(T(x, s)) / (H W)

    with phi the model's features at ``content_layer`` (default: the middle one of ``model.stages``), G_j
    the Gram matrices at ``style_layers`` (default: ``model.stages``, j = 0 the finest) and a style s drawn
    at random for each image. Both terms are relative, so the same weights suit every model. The
    styles differ only in the scales and shifts of conditional instance normalisation. For a single style,
    ``norm`` "batch" is the network of Johnson et al. and "instance" that of Ulyanov et al.

    ``mixed_precision`` runs the convolutions of both networks in bfloat16, which saves time and memory on
    GPUs with tensor cores; weights, Gram matrices and the loss stay in float32. An interrupted training
    continues bit for bit when ``run`` is called again with the same ``out``. Images (N, 3, H, W) and styles
    (S, 3, H', W') are in [0, 1].

    Returns:
        ``network``, ``losses`` (steps,), ``labels`` (the S names), ``previews`` (S, 3, H, W) of the first
        image in every style, ``frames`` (F, S, 3, h, w) of these previews during training, at most 128
        pixels a side.

    Raises:
        DivergenceError: a loss that is no longer finite.
        InputError: names or a norm that do not fit the styles, images that do not have three channels, or
            mixed precision for a model that is not in float32.

    Example::
        from phosphene import run

        options = {"steps": 2, "batch": 2, "width": 4, "blocks": 1}
        result = run("fast_style_fit", dataset="builtin:scenes/4", styles=["builtin:waves"], **options)
        result.previews.shape  # (1, 3, 64, 64)

    Source: Johnson et al. 2016, section 3; Ulyanov et al. 2016, section 2; Dumoulin et al. 2017, section 2.1.
    """
    labels = style_labels(names, styles)
    if len(styles) > 1 and norm != "conditional":
        raise InputError(f'{norm} norm has a single style; {len(styles)} need norm="conditional"')
    loss_network = StyleLoss(model, perceptual_loss.content_layer, perceptual_loss.style_layers)
    network = StyleNetwork(len(styles), width, blocks, norm).to(model.device, model.dtype)
    history, first = train_style_network(
        network,
        loss_network,
        dataset,
        styles,
        perceptual_loss=perceptual_loss,
        training=training,
        frames=frames,
        seed=seed,
    )
    return TrainedNetwork(
        network=network,
        method="style.fast_style_fit",
        config=network.config,
        losses=history.losses,
        labels=labels,
        previews=style_previews(network, first),
        frames=history.frames,
    )


@method(
    family="style",
    references=REFERENCES,
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    cost=Cost(forward=size.images),
    oracle=first_loss_is_that_of_the_untrained_network,
)
def fast_style(
    images: Images,
    stylizer: Stylizer,
    *,
    style: Annotated[
        int | str | dict[str, Annotated[float, Field(ge=0, le=1e6)]] | None,
        Field(
            description="number or name of a style, or weights of several by name; default: the first style"
        ),
    ] = None,
) -> Stylization:
    """Fast style transfer: images stylized by one pass through a trained network, in one style or a blend.

    T(x; gamma, beta),  (gamma, beta) = sum_s b_s (gamma^(s), beta^(s))

    For a single style b_s is 1. A blend, ``{"swirls": 1, "waves": 3}``, mixes the scales and shifts of the
    styles' conditional instance normalisation; its weights are divided by their sum. Images (N, 3, H, W)
    are in [0, 1], 8 pixels a side or more. ``stylizer`` is a result of ``fast_style_fit`` or
    ``fast_style_add``, or its folder.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its name.

    Raises:
        InputError: a style number, weights or images that the network does not take.
        UnknownName: a style that it was not trained on.

    Example::
        from phosphene import run

        result = run("fast_style", images="builtin:scenes/2", style={"swirls": 1, "waves": 3})
        result.stylized.shape  # (2, 3, 64, 64)

    Source: Dumoulin et al. 2017, sections 2.1 and 3.5.
    """
    check_images(images)
    network, labels = require_style_network(stylizer), stylizer.labels
    if isinstance(style, int) and not 0 <= style < len(labels):
        raise InputError(f"style {style} does not exist: there are {len(labels)} ({', '.join(labels)})")
    if not isinstance(style, dict):
        style = {style if isinstance(style, str) else labels[style or 0]: 1.0}
    for name in style:
        if name not in labels:
            raise UnknownName("style", name, labels, "this stylizer")
    if not any(style.values()):
        raise InputError(f"a blend needs a weight above zero, not {style}")
    blend = {name: style[name] / sum(style.values()) for name in labels if style.get(name)}
    parameter = next(network.parameters())
    blend_weights = torch.tensor([[blend.get(name, 0.0) for name in labels]]).to(parameter)
    stylized = [
        network(image.to(parameter), blend_weights)
        for image in progress_bar(images.split(1), "Stylizing", len(images))
    ]
    titles = list(blend) if len(blend) == 1 else [f"{weight:.0%} {name}" for name, weight in blend.items()]
    return Stylization(images=images, stylized=torch.cat(stylized).to(images), style=" + ".join(titles))


@hookimpl
def phosphene_methods():
    return [fast_style, fast_style_fit]
