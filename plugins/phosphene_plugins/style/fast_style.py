"""Fast style transfer: a feed-forward network trained on a perceptual loss, with conditional norm."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import (
    InputError,
    Reference,
    TensorDataset,
    UnknownName,
    fork_random_state,
    hookimpl,
    method,
    progress_bar,
)
from phosphene.results import Stylization, TrainedNetwork
from phosphene.roles import Dataset, Frames, Images, Model, Seed, Styles, Stylizer
from phosphene.spec import Cost, InvariantTo, PixelRange, SameShape, param, size
from phosphene.training import single_precision

from ._parameters import PerceptualLoss, StyleNames, StyleNetworkTraining
from ._pixel_features import draw_images, load_pixel_model, transfer_loss
from ._style_loss import StyleLoss
from ._style_network import (
    Norm,
    StyleNetwork,
    check_images,
    concatenate_styles,
    network_for_new_styles,
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


def training_steps_have_a_closed_form() -> None:
    """The losses of two steps with a negligible learning rate, and a style of one color that is learned."""
    tested: Any = fast_style_fit  # its result has every field here
    frames_do_not_change_the_training()
    model, images = load_pixel_model(torch.float32), draw_images(5, 3, 9, 12, seed=0, dtype=torch.float32)
    styles = draw_images(3, 3, 8, 8, seed=1, dtype=torch.float32) ** 2
    options: Any = {"steps": 2, "batch": 2, "width": 2, "blocks": 1, "seed": 3, "frames": 2, "lr": 1e-12}
    options |= {"content_layer": "1", "style_layers": ["1", "0"], "content_weight": 2, "style_weight": 5}
    fitted = tested(model, TensorDataset(images), styles, total_variation=7, names=["a", "b", "c"], **options)
    with fork_random_state(), torch.no_grad():
        torch.manual_seed(3)
        network = StyleNetwork(styles=3, width=2, blocks=1)
        order = torch.randperm(5, generator=torch.Generator().manual_seed(3))
        for step, rows in enumerate((order[:2], order[2:4])):
            torch.manual_seed(3 + step)
            style = torch.randint(3, (2,))
            stylized = network(images[rows], torch.eye(3)[style])
            losses = [
                transfer_loss(
                    one,
                    content,
                    styles[s, None],
                    content_layer="1",
                    weights={"1": 1, "0": 1 / 3},
                    alpha=2,
                    beta=5,
                    smoothness=7,
                )
                for one, content, s in zip(stylized.split(1), images[rows].split(1), style, strict=True)
            ]
            assert torch.allclose(fitted.losses[step], torch.cat(losses).mean(), rtol=1e-4)
        previews = torch.cat([network.eval()(images[:1], b[None]) for b in torch.eye(3)])
        returned = torch.cat([fitted.network(images[:1], b[None]) for b in torch.eye(3)])
    assert (fitted.previews - previews).abs().max() < 1e-5, "previews are not the first image in each style"
    assert (returned - previews).abs().max() < 1e-5, "the network is not the trained one"
    assert fitted.labels == ("a", "b", "c") and fitted.frames.shape == (2, 3, 3, 9, 12)
    assert (fitted.frames / 255 - previews).abs().max() < 0.003, "frames are not previews during training"
    assert fitted.config == {"styles": 3, "width": 2, "blocks": 1, "norm": "conditional"}
    color = torch.tensor([0.8, 0.3, 0.5])[None, :, None, None].expand(1, 3, 8, 8)
    options |= {"steps": 40, "lr": 0.1, "content_weight": 0, "norm": "batch", "frames": 0}
    learned = tested(model, TensorDataset(images), color, total_variation=0, **options)
    assert learned.labels == ("style 0",) and learned.config["norm"] == "batch"
    assert (learned.previews.mean((2, 3)) - color[:, :, 0, 0]).abs().max() < 0.1, "the color is not learned"


def frames_do_not_change_the_training() -> None:
    """Batch norm is trained on the contents alone; frames are 128 pixels wide; a model in float64."""
    call: Any = fast_style_fit  # its result has every field here
    wide = TensorDataset(draw_images(2, 3, 8, 136, seed=0, dtype=torch.float32)), torch.zeros(1, 3, 8, 8)
    options: Any = {"steps": 3, "batch": 1, "width": 1, "blocks": 0, "norm": "batch", "seed": 0}
    model = load_pixel_model()
    without, with_frames = (call(model, wide[0], wide[1].double(), **options, frames=n) for n in (0, 3))
    assert with_frames.frames.shape == (3, 1, 3, 8, 128) and with_frames.previews.dtype == torch.float64
    assert torch.equal(without.losses, with_frames.losses), "frames change the losses"
    assert torch.equal(without.previews, with_frames.previews), "frames change the statistics"


def apply_by_hand(network: StyleNetwork, images: Tensor, blend_weights: Tensor) -> Tensor:
    """T(x; gamma, beta): downsampling by four, residual blocks, upsampling with skip connections."""

    def layer(x: Tensor, layer: Any, *, upsample: bool = False) -> Tensor:
        if upsample:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.pad(x, (layer.conv.weight.shape[-1] // 2,) * 4, mode="reflect")
        x = F.conv2d(x, layer.conv.weight, stride=layer.conv.stride)
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        gamma, beta = ((blend_weights @ p)[:, :, None, None] for p in (layer.norm.gamma, layer.norm.beta))
        return gamma * (x - mean) / (variance + 1e-5).sqrt() + beta

    full = layer(images, network.down[0]).clamp(min=0)
    half = layer(full, network.down[1]).clamp(min=0)
    x = layer(half, network.down[2]).clamp(min=0)
    for block in network.residual:
        x = x + layer(layer(x, block["first"]).clamp(min=0), block["second"])  # type: ignore[index]
    for up, skip in zip(network.up, (half, full), strict=True):
        x = (layer(x, up, upsample=True)[:, :, : skip.shape[2], : skip.shape[3]] + skip).clamp(min=0)
    return layer(x, network.paint).sigmoid()


def network_has_a_closed_form() -> None:
    """The network by hand, in training and without gradients; its initial filters; new styles for it."""
    with fork_random_state():
        torch.manual_seed(0)
        network = StyleNetwork(styles=2, width=2, blocks=2)
        torch.manual_seed(0)
        filters = torch.nn.Conv2d(3, 2, 9, bias=False).weight
        for name, parameter in network.named_parameters():
            if name.endswith((".gamma", ".beta")):
                assert torch.all(parameter == float(".gamma" in name and ".second" not in name)), name
                torch.nn.init.normal_(parameter)
    distance = torch.arange(-4, 5)
    gaussian = torch.exp(-(distance**2 + distance[:, None] ** 2) / 2)
    gaussian *= 9 / gaussian.norm()  # as large as 81 ones
    first: Any = network.down[0].conv
    assert (first.weight - filters * gaussian).abs().max() < 1e-6, "the initial filters"
    images, blend_weights = draw_images(3, 3, 9, 14, seed=0), torch.tensor([[1, 0], [0, 1], [0.3, 0.7]])
    network, blend_weights = network.double(), blend_weights.double()
    expected = apply_by_hand(network, images, blend_weights)
    assert (network(images, blend_weights) - expected).abs().max() < 1e-12, (
        "not the network of the definition"
    )
    with torch.no_grad():
        assert (network(images, blend_weights) - expected).abs().max() < 1e-12, "it differs without gradients"
    new = network_for_new_styles(network, 3)
    assert [n for n, p in new.named_parameters() if p.requires_grad] == [
        n for n, _ in new.named_parameters() if n.endswith(("gamma", "beta"))
    ]
    both = concatenate_styles(network, new.float())
    assert not both.training and not any(p.requires_grad for p in both.parameters())
    one_hot, mean = torch.eye(5).double(), torch.tensor([[0.5, 0.5]]).double()
    assert torch.equal(both(images, one_hot[:2][[1, 0, 1]]), network(images, one_hot[:2, :2][[1, 0, 1]]))
    assert (both(images, one_hot[2:]) - network(images, mean.expand(3, -1))).abs().max() < 1e-6
    addresses = [{p.data_ptr() for p in each.parameters()} for each in (network, both)]
    assert addresses[0].isdisjoint(addresses[1]), "the networks share parameters"


def styles_and_blends_select_scales_and_shifts() -> None:
    """By number, by name and in a blend it is the network with those weights, for each image alone."""
    call: Any = fast_style  # its result has every field here
    network_has_a_closed_form()
    with fork_random_state(), torch.no_grad():
        torch.manual_seed(0)
        network = StyleNetwork(styles=3, width=2, blocks=1).double()
        for name, parameter in network.named_parameters():
            if name.endswith((".gamma", ".beta")):
                parameter.normal_()
    images = draw_images(2, 3, 9, 8, seed=0)
    stylizer = TrainedNetwork(
        network=network.eval(), method="style.fast_style_fit", config=network.config, losses=torch.zeros(1),
        labels=("ink", "oil", "wax"), previews=images[:1].expand(3, -1, -1, -1),
    )  # fmt: skip
    for style, weights, title in (
        (None, (1, 0, 0), "ink"),
        (2, (0, 0, 1), "wax"),
        ("oil", (0, 1, 0), "oil"),
        ({"wax": 3, "oil": 1}, (0, 0.25, 0.75), "25% oil + 75% wax"),
        ({"wax": 3, "oil": 0}, (0, 0, 1), "wax"),
    ):
        blend_weights = torch.tensor([weights] * 2, dtype=torch.float64)
        with torch.no_grad():
            expected = network(images, blend_weights)
        result = call(images, stylizer, style=style)
        assert (result.stylized - expected).abs().max() < 1e-6, f"style={style} is not {weights}"
        assert result.style == title and torch.equal(result.images, images)


@method(
    family="style",
    references=REFERENCES,
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=2 * param.batch * param.steps + size.styles, backward=param.batch * param.steps),
    network=StyleNetwork,
    oracle=training_steps_have_a_closed_form,
    quick={"steps": 2, "batch": 2, "width": 4, "blocks": 1},
    demo={
        "styles": ["builtin:pebbles", "builtin:sea"],
        "names": ["pebbles", "sea"],
        "stylizer": "builtin:shapes-styles",
        "steps": 120,
        "batch": 2,
    },
)
def fast_style_fit(
    model: Model,
    dataset: Dataset,
    styles: Styles,
    stylizer: Stylizer | None = None,
    *,
    names: StyleNames = None,
    norm: Annotated[
        Norm, Field(description="normalization layers; instance and batch norm have a single style")
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
    styles differ only in the scales and shifts of conditional instance normalization. For a single style,
    ``norm`` "batch" is the network of Johnson et al. and "instance" that of Ulyanov et al.

    The weights start at random, or at those of a ``stylizer``, an earlier result, whose ``width`` and
    ``blocks`` are used: new styles then need a hundred steps instead of thousands, and start at the mean of
    its styles. (``fast_style_add`` trains nothing but the new styles' scales and shifts.)

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
        InputError: names or a norm that do not fit the styles or the stylizer, images that do not have three
            channels, or mixed precision for a model that is not in float32.

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
    model = single_precision(model)
    loss_network = StyleLoss(model, perceptual_loss.content_layer, perceptual_loss.style_layers)
    if stylizer is None:
        network = StyleNetwork(len(styles), width, blocks, norm)
    else:
        if norm != "conditional" or (trained := require_style_network(stylizer)).config["norm"] == "batch":
            raise InputError("a training that starts at a stylizer needs conditional norm in both networks")
        network = network_for_new_styles(trained, len(styles)).requires_grad_()
    network = network.to(model.device, model.dtype)
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
    relations=[InvariantTo("batch_order")],
    cost=Cost(forward=size.images),
    oracle=styles_and_blends_select_scales_and_shifts,
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
    styles' conditional instance normalization; its weights are divided by their sum. Images (N, 3, H, W)
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
        name = style if isinstance(style, str) else labels[style or 0]
        # equivalent mutants: weights are divided by their sum
        style = {name: 1.0}
    for name in style:
        if name not in labels:
            raise UnknownName("style", name, labels, "this stylizer")
    if not any(style.values()):
        raise InputError(f"a blend needs a weight above zero, not {style}")
    blend = {name: style[name] / sum(style.values()) for name in labels if style.get(name)}
    parameter = next(network.parameters())
    blend_weights = torch.tensor([[blend.get(name, 0.0) for name in labels]]).to(parameter)
    # equivalent mutants: images do not depend on each other
    batches = images.split(1)
    stylized = [
        network(image.to(parameter), blend_weights)
        for image in progress_bar(batches, "Stylizing", len(images))
    ]
    titles = list(blend) if len(blend) == 1 else [f"{weight:.0%} {name}" for name, weight in blend.items()]
    return Stylization(images=images, stylized=torch.cat(stylized).to(images), style=" + ".join(titles))


@hookimpl
def phosphene_methods():
    return [fast_style, fast_style_fit]
