"""Predicted style parameters, Ghiasi et al. 2017: a network that maps a style image to normalizations."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import (
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    fork_random_state,
    hookimpl,
    max_batch,
    method,
    progress_bar,
)
from phosphene.optimize import gram_matrix
from phosphene.results import Stylization
from phosphene.roles import Dataset, Images, Model, PredictedStylizer, Seed, Styles
from phosphene.spec import Cost, InvariantTo, PixelRange, SameShape, param, size
from phosphene.training import linear_decay, single_precision, train

from ._parameters import Blend, PerceptualLoss, Training
from ._pixel_features import draw_images, load_pixel_model, transfer_loss
from ._predicted_network import PredictedStyle, PredictedStyleNetwork, require_predicted_style
from ._style_blend import normalize_blend, style_title
from ._style_loss import StyleLoss, StyleTargets
from ._style_network import check_images
from ._train_style_network import DUMOULIN, weighted_loss

GHIASI = Reference(
    key="ghiasi2017",
    title="Exploring the structure of a real-time, arbitrary neural artistic stylization network",
    authors="Ghiasi, Lee, Kudlur, Dumoulin, Shlens",
    year=2017,
    url="https://arxiv.org/abs/1705.06830",
)

#: Number of preview images of a training.
PREVIEWS = 4


def random_network() -> PredictedStyleNetwork:
    """A network in double precision whose styles differ."""
    with fork_random_state():
        torch.manual_seed(0)
        network = PredictedStyleNetwork(width=2, blocks=1, predictor_width=3, bottleneck=4).double()
        torch.nn.init.normal_(network.predictor.predict.weight)
        torch.nn.init.normal_(network.predictor.encode.weight)
        for name, parameter in network.transfer.named_parameters():
            if name.endswith((".gamma", ".beta")):
                torch.nn.init.normal_(parameter)
    return network.eval().requires_grad_(False)


def parameters_by_hand(network: PredictedStyleNetwork, styles: Tensor) -> Tensor:
    """gamma and beta (S, P) of styles: convolutions, statistics and two linear layers."""
    x, statistics = styles - 0.5, []
    for layer in (None, *network.predictor.down):
        if layer is not None:
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), layer.weight, layer.bias, stride=2)
            x = x.clamp(min=0)
        statistics += [x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-5).sqrt()]
    encode, predict = network.predictor.encode, network.predictor.predict
    hidden = (torch.cat(statistics, 1) @ encode.weight.T + encode.bias).clamp(min=0)
    state = network.transfer.state_dict()
    own = [t for name, t in state.items() if name.endswith((".gamma", ".beta"))]
    return torch.cat(own, 1) + hidden @ predict.weight.T + predict.bias


def apply_by_hand(network: PredictedStyleNetwork, images: Tensor, parameters: Tensor) -> Tensor:
    """The style network with one gamma and beta (P,) written into its normalizations."""
    parts = iter(parameters.split([p.shape[1] for n, p in _norms(network)]))
    state = {n: next(parts)[None] for n, _ in _norms(network)}
    with fork_random_state():
        config = {name: network.config[name] for name in ("width", "blocks")}
        copy = type(network.transfer)(1, **config).double().eval()
    copy.load_state_dict({**network.transfer.state_dict(), **state})
    with torch.no_grad():
        stylized: Tensor = copy(images, images.new_ones(len(images), 1))
    return stylized


def _norms(network: PredictedStyleNetwork) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in network.transfer.named_parameters() if n.endswith((".gamma", ".beta"))]


def predicted_parameters_are_those_of_the_formula() -> None:
    """gamma and beta by hand, of one style and of blends, for every image."""
    tested: Any = predicted_style  # its result has every field here
    network = random_network()
    images, styles = draw_images(2, 3, 9, 12, seed=0), draw_images(2, 3, 7, 11, seed=1) ** 2
    stylizer = PredictedStyle(
        network=network, method="style.predicted_style_fit", config=network.config, losses=torch.zeros(1),
        labels=(), previews=images[:0],
    )  # fmt: skip
    first, second = parameters_by_hand(network, styles)
    assert (first - second).abs().max() > 0.01, "the styles of the oracle have equal parameters"
    identity = parameters_by_hand(network, images)
    for blend, strength, mixed in (
        ([1.0, 0.0], 1.0, [first, first]),
        ([1.0, 3.0], 1.0, [0.25 * first + 0.75 * second] * 2),
        ([0.0, 2.0], 0.25, [0.25 * second + 0.75 * own for own in identity]),
    ):
        result = tested(images, styles, stylizer, blend=blend, strength=strength)
        for image, stylized, parameters in zip(images.split(1), result.stylized, mixed, strict=True):
            expected = apply_by_hand(network, image, parameters)[0]
            assert (stylized - expected).abs().max() < 1e-9, f"blend={blend}, strength={strength}"
        assert torch.equal(result.sources, styles) and torch.equal(result.images, images)
    for unfit in (images[:, :1], images[..., :7]):
        try:
            tested(unfit, styles, stylizer)
        except InputError:
            continue
        raise AssertionError(f"images {tuple(unfit.shape)} are not refused")
    assert result.style == "100% of style 1"
    weights = [weight for name, weight in network.predictor.down.named_parameters() if "weight" in name]
    assert [weight.shape[:2] for weight in weights] == [(3, 3), (6, 3), (12, 6)]
    exported, inputs = stylizer.export_network()
    shapes = {name: values.shape for name, values in inputs.items()}
    # Of different sizes: torch.export takes equal ones to be equal always.
    assert shapes == {"images": (2, 3, 64, 96), "style": (2, 3, 56, 80)} and exported is network
    for values in inputs.values():
        assert values.dtype == torch.float64 and 0 <= values.min() < values.max() <= 1


def training_steps_have_a_closed_form() -> None:
    """Losses of two steps with a negligible learning rate, steps of Adam, and two colors that are learned."""
    call: Any = predicted_style_fit  # its result has every field here
    model, images = load_pixel_model(torch.float32), draw_images(5, 3, 8, 12, seed=0, dtype=torch.float32)
    styles = draw_images(3, 3, 10, 9, seed=1, dtype=torch.float32) ** 2
    data = TensorDataset(images.double()), TensorDataset(styles.double())
    last = 2**63 - 1  # the largest seed
    options: Any = {"width": 2, "blocks": 1, "predictor_width": 3, "bottleneck": 4, "seed": last}
    options |= {"content_layer": "1", "style_layers": ["1", "0"], "content_weight": 2, "style_weight": 5}
    options |= {"total_variation": 7, "steps": 2}
    sizes = []
    handle = model.module.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with max_batch(1):
        result = call(model, *data, **options, batch=2, lr=1e-12)
    handle.remove()
    assert set(sizes) == {1}, "a batch is larger than the limit"
    with fork_random_state(), torch.no_grad():
        torch.manual_seed(last)
        network = PredictedStyleNetwork(width=2, blocks=1, predictor_width=3, bottleneck=4).eval()
        order = torch.randperm(5, generator=torch.Generator().manual_seed(last))
        for step, rows in enumerate((order[:2], order[2:4])):
            which = torch.randint(3, (5,), generator=torch.Generator().manual_seed(last + step))
            losses = [
                transfer_loss(
                    network(content, style), content, style, content_layer="1", weights={"1": 1, "0": 1 / 3},
                    alpha=2, beta=5, smoothness=7,
                )
                for content, style in zip(images[rows].split(1), styles[which[rows]].split(1), strict=True)
            ]  # fmt: skip
            assert torch.allclose(result.losses[step], torch.cat(losses).mean(), rtol=1e-4), f"step {step}"
        expected = network(images[:4], styles[[0, 1, 2, 0]])
        returned = result.network(images[:4], styles[[0, 1, 2, 0]])
    assert (returned - expected).abs().max() < 1e-4, "the network is not the trained one"
    assert result.config == network.config
    for unfit in ((TensorDataset(images[:, :1]), data[1]), (data[0], TensorDataset(styles[:, :1]))):
        try:
            call(model, *unfit, **options)
        except InputError:
            continue
        raise AssertionError("images of one channel are not refused")
    # A constant gradient: Adam's steps are as long as the learning rate, which falls from 1 to 1/2 of lr.
    for dtype, trained in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        single = TensorDataset(images[:1]), TensorDataset(styles[:1])
        result = call(load_pixel_model(dtype), *single, **options, batch=1, lr=1e-5)
        bias = result.network.predictor.predict.bias  # which starts at 0
        assert bias.dtype == result.previews.dtype == trained
        assert (bias.abs().max() - 1.5e-5).abs() < 1e-7
    colors = torch.tensor([[0.8, 0.3, 0.4], [0.3, 0.6, 0.7]])[:, :, None, None].expand(2, 3, 8, 8)
    options |= {"content_weight": 0, "total_variation": 0, "steps": 20, "seed": 4}
    learned = call(model, data[0], TensorDataset(colors.contiguous()), batch=2, lr=0.1, **options)
    previews = learned.network(images[:4], colors[[0, 1, 0, 1]]).detach()
    assert (learned.previews - previews).abs().max() < 1e-6
    assert learned.labels == ("in style 0", "in style 1") * 2
    difference = (previews[1::2] - previews[::2]).mean((0, 2, 3))
    target = (colors[1] - colors[0])[:, 0, 0]
    assert torch.cosine_similarity(difference, target, 0) > 0.95, "the colors are not learned"
    assert difference.norm() > 0.2 * target.norm(), "the colors are not learned"


@method(
    family="style",
    references=[GHIASI, DUMOULIN],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=3 * param.batch * param.steps, backward=param.batch * param.steps),
    network=PredictedStyleNetwork,
    oracle=training_steps_have_a_closed_form,
    quick={"steps": 2, "batch": 2, "width": 4, "blocks": 1},
    demo={"styles": "builtin:textures/64", "stylizer": "builtin:shapes-predicted", "steps": 100, "batch": 2},
)
def predicted_style_fit(
    model: Model,
    dataset: Dataset,
    styles: Dataset,
    stylizer: PredictedStylizer | None = None,
    *,
    perceptual_loss: PerceptualLoss = PerceptualLoss(),
    width: Annotated[
        int, Field(ge=1, le=512, description="channels of the style network at full resolution")
    ] = 8,
    blocks: Annotated[int, Field(ge=0, le=32, description="residual blocks of the style network")] = 1,
    predictor_width: Annotated[
        int, Field(ge=1, le=512, description="channels of the style predictor's first layer")
    ] = 8,
    bottleneck: Annotated[int, Field(ge=1, le=4096, description="length of the style's embedding")] = 32,
    training: Training = Training(steps=2000, batch=4, lr=5e-3),
    seed: Seed = None,
) -> PredictedStyle:
    """Predicted style parameters: train a style predictor and a style network for arbitrary styles.

    min_{theta, phi} E_x,s  L(T_theta(x; gamma_phi(s), beta_phi(s)), x, s)

    with L the loss of ``fast_style_fit``. There every style has its own scales gamma and shifts beta of
    conditional instance normalization; here a network phi predicts them from an image of the style, so that
    one pass stylizes in a style that was not trained. phi is a small convolutional network, trained together
    with T; its means and deviations over the positions of each layer are the input of two linear layers. The
    paper's phi begins with Inception-v3; this one needs no other network where it is applied.

    Contents (N, 3, H, W) and ``styles`` (S, 3, H', W') are two data sets, in [0, 1]. Each content of a step
    is paired with a style drawn at random; more and more different styles improve the result for unseen ones.
    The weights start at random, or at those of a ``stylizer``, an earlier result, whose widths, ``blocks``
    and ``bottleneck`` are used. The learning rate of Adam falls linearly to zero. An interrupted training
    continues where it stopped.

    Returns:
        ``network``, ``losses`` (steps,), ``previews`` (4, 3, H, W) the first ``contents`` in the first
        ``styles``, ``labels`` of these.

    Raises:
        DivergenceError: a loss that is no longer finite.
        InputError: images or styles that do not have three channels, or a stylizer of another method.

    Example::
        from phosphene import run

        options = {"dataset": "builtin:scenes/4", "styles": "builtin:textures/4", "steps": 2, "batch": 2}
        result = run("predicted_style_fit", **options)
        result.previews.shape  # (4, 3, 64, 64)

    Source: Ghiasi et al. 2017, section 2; loss and training: equations 1 to 3.
    """
    assert seed is not None
    model = single_precision(model)
    first = check_images(dataset.read(range(min(PREVIEWS, len(dataset))))).to(model.device, model.dtype)
    preview_styles = [n % len(styles) for n in range(len(first))]
    check_images(styles.read([0]))
    loss_network = StyleLoss(model, perceptual_loss.content_layer, perceptual_loss.style_layers)
    if stylizer is None:
        network = PredictedStyleNetwork(width, blocks, predictor_width, bottleneck)
    else:
        network = deepcopy(require_predicted_style(stylizer)).requires_grad_()
    network = network.to(model.device, model.dtype)

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        """The loss (n,) of each content; its style depends only on the step and the content's index."""
        random = torch.Generator().manual_seed(seed + round(progress * training.steps))
        style_indices = torch.randint(len(styles), (len(dataset),), generator=random)[list(indices)].tolist()
        style_images = styles.read(style_indices).to(images)
        with torch.no_grad():
            grams = [gram_matrix(f) for f in loss_network.features(style_images)[:-1]]
            targets = StyleTargets(loss_network.content_features(images), grams)
        stylized = network(check_images(images), style_images)
        features = loss_network.features(stylized)
        return weighted_loss(loss_network, perceptual_loss, stylized, features, targets)

    optimizer = torch.optim.Adam(network.parameters(), training.lr)
    history = train(
        network, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed,
        max_batch=batch_size(model), schedule=linear_decay,
    )  # fmt: skip
    style_images = styles.read(preview_styles).to(first)
    with torch.no_grad():
        pairs = zip(first.split(1), style_images.split(1), strict=True)
        previews = torch.cat([network(image, style) for image, style in pairs])
    return PredictedStyle(
        network=network,
        method="style.predicted_style_fit",
        config=network.config,
        losses=history.losses,
        labels=tuple(f"in style {styles.id(n)}" for n in preview_styles),
        previews=previews,
        contents=first,
        styles=style_images,
    )


@method(
    family="style",
    references=[GHIASI],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    relations=[InvariantTo("batch_order")],
    cost=Cost(forward=size.images + size.styles),
    oracle=predicted_parameters_are_those_of_the_formula,
    demo={"styles": ["builtin:swirls"]},
)
def predicted_style(
    images: Images,
    styles: Styles,
    stylizer: PredictedStylizer,
    *,
    blend: Blend = None,
    strength: Annotated[
        float,
        Field(ge=0, le=1, description="strength of the style; 0 is the image's own style"),
    ] = 1.0,
) -> Stylization:
    """Predicted style parameters: images stylized in arbitrary styles by one pass through a trained network.

    T(x; z),  z = strength sum_s b_s z(s) + (1 - strength) z(x),   z(s) = (gamma(s), beta(s))

    with the scales gamma and shifts beta of conditional instance normalization that the style predictor of
    ``stylizer``, a result of ``predicted_style_fit`` or its folder, returns for an image of the style. A
    blend mixes the styles' parameters, which are predicted once for all images. Images (N, 3, H, W) of 8
    pixels a side or more and styles (S, 3, H', W') of any size are in [0, 1].

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its title,
        ``sources`` (S, 3, H', W') the styles.

    Raises:
        InputError: blend weights that do not fit the styles, images of another shape, or a network of another
            method.

    Example::
        from phosphene import run

        result = run("predicted_style", images="builtin:scenes/2", styles=["builtin:swirls"])
        result.stylized.shape  # (2, 3, 64, 64)

    Source: Ghiasi et al. 2017, sections 2.2 and 3.6.
    """
    network, blend_weights = require_predicted_style(stylizer), normalize_blend(blend, styles)
    if styles.shape[1] != 3:
        raise InputError(f"a style predictor takes styles (S, 3, H, W), not {tuple(styles.shape)}")
    check_images(images)
    weight = next(network.parameters())
    # equivalent mutants: a style's parameters do not depend on the others
    of_styles = torch.cat([network.predict(style.to(weight)) for style in styles.split(1)])
    mixed = blend_weights.to(of_styles)[None] @ of_styles
    stylized = []
    # One image at a time: its result does not depend on the others of the batch.
    for image in progress_bar(images.split(1), "Stylizing", len(images)):
        own = image.to(weight)
        # equivalent mutants: of strength 1 only a pass is saved
        parameters = mixed if strength == 1 else network.predict(own).lerp(mixed, strength)
        stylized.append(network.stylize(own, parameters).to(images))
    return Stylization(
        images=images, stylized=torch.cat(stylized), style=style_title(blend_weights), sources=styles
    )


@hookimpl
def phosphene_methods():
    return [predicted_style, predicted_style_fit]
