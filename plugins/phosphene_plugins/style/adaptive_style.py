"""AdaIN style transfer: adaptive instance normalization of features, and a decoder trained for them."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
)
from phosphene.results import Stylization
from phosphene.roles import AdaptiveStylizer, Dataset, Images, LayerName, Model, Seed, Styles
from phosphene.spec import Cost, InvariantTo, PixelRange, SameShape, param, size
from phosphene.training import single_precision, train

from ._adain import channel_statistics, match_statistics
from ._adaptive_closed_forms import (
    decoder_is_convolutions_and_upsampling,
    exported_network_is_stylization,
    network_pads_and_crops,
    statistics_of_few_positions,
)
from ._adaptive_network import AdaptiveNetwork, require_adaptive_network
from ._color_transfer import prepare_colors, replace_luminance
from ._decoder import Decoder, decoder_widths, stages_up_to
from ._parameters import Blend, Color, Training
from ._pixel_features import MEAN, STD, draw_images, load_pixel_model, pixel_features, relative
from ._style_blend import normalize_blend, style_title
from ._style_loss import relative_error

HUANG = Reference(
    key="huang2017",
    title="Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
    authors="Huang, Belongie",
    year=2017,
    url="https://arxiv.org/abs/1703.06868",
)
#: Number of preview images of a training.
PREVIEWS = 4


def adain_by_hand(content: Tensor, style: Tensor) -> Tensor:
    """sigma(s) (c - mu(c)) / sigma(c) + mu(s) of one image's maps, from the definition."""
    (mean, std), (style_mean, style_std) = (
        (x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()) for x in (content, style)
    )
    return style_std * (content - mean) / std + style_mean


def pixels_as_features_are_adain_of_pixels() -> None:
    """With pixels as features and the identity as decoder, it is AdaIN of the pixels, in closed form."""
    tested: Any = adaptive_style  # its result has every field here
    model, decoder = load_pixel_model(), nn.Conv2d(3, 3, 1).double()
    std, mean = torch.tensor(STD, dtype=torch.float64), torch.tensor(MEAN, dtype=torch.float64)
    decoder.weight.data, decoder.bias = torch.diag(std)[:, :, None, None], nn.Parameter(mean)
    stylizer = AdaptiveNetwork.from_decoder(model, decoder, "0")
    contents, styles = draw_images(2, 3, 8, 9, seed=0), draw_images(2, 3, 6, 9, seed=1)

    def expected(content: Tensor, styles: Tensor, alpha: float) -> Tensor:
        content, first, second = (pixel_features(i, "0") for i in (content, styles[:1], styles[1:]))
        blend = 0.25 * adain_by_hand(content, first) + 0.75 * adain_by_hand(content, second)
        with torch.no_grad():
            decoded: Tensor = decoder((1 - alpha) * content + alpha * blend)
        return decoded.clamp(0, 1)

    for alpha, color in ((0.0, "style"), (0.25, "histogram"), (0.5, "luminance"), (None, "style")):
        options: Any = {} if alpha is None else {"alpha": alpha, "color": color}
        result = tested(contents, styles, stylizer, blend=[1, 3], **options)
        for n, content in enumerate(contents.split(1)):
            own, colored = prepare_colors(content, styles, options.get("color", "style"))
            stylized = expected(own, colored[0], 1.0 if alpha is None else alpha)
            if color == "luminance":
                stylized = replace_luminance(content, stylized)
            assert (result.stylized[n] - stylized[0]).abs().max() < 1e-9, f"alpha={alpha}, {color}"
        assert result.style == "25% of style 0 + 75% of style 1" and torch.equal(result.sources, styles)


def training_step_has_a_closed_form() -> None:
    """The losses of two steps with a negligible learning rate, previews, and a loss that falls."""
    statistics_of_few_positions()
    decoder_is_convolutions_and_upsampling()
    network_pads_and_crops()
    exported_network_is_stylization()
    call: Any = adaptive_style_fit  # its result has every field here
    model, images = load_pixel_model(torch.float32), draw_images(5, 3, 8, 11, seed=0, dtype=torch.float32)
    styles = draw_images(3, 3, 10, 6, seed=1, dtype=torch.float32) ** 2
    data = TensorDataset(images), TensorDataset(styles)
    options: Any = {"layer": "1", "style_layers": ["0"], "style_weight": 2.5, "reconstruction_weight": 7.0}
    last = 2**63 - 1  # after which the seeds of steps start again
    result = call(model, *data, **options, steps=2, batch=2, lr=1e-12, seed=last)
    assert result.config["channels"] == 3 and result.config["widths"] == decoder_widths(model, "1")
    # Images are padded by replication to a multiple of the stride 2, and outputs are cropped.
    pad = lambda x: nn.functional.pad(x, (0, x.shape[3] % 2, 0, 0), mode="replicate")

    def statistics(maps: Tensor) -> Tensor:
        return torch.cat([maps.mean((2, 3)), (maps.var((2, 3)) + 1e-5).sqrt()], 1)

    with torch.no_grad():
        order = torch.randperm(5, generator=torch.Generator().manual_seed(last))
        for step, rows in enumerate((order[:2], order[2:4])):
            which = torch.randint(3, (5,), generator=torch.Generator().manual_seed((last + step) % 2**63))
            total = torch.zeros(1)
            for content, style in zip(images[rows].split(1), styles[which[rows]].split(1), strict=True):
                features = pixel_features(pad(content), "1")
                target = adain_by_hand(features, pixel_features(style, "1"))
                stylized = pad(result.network(target)[..., :11])
                total += relative(pixel_features(stylized, "1"), target)
                total += 7.0 * relative(result.network(features)[..., :11], content)
                for maps in (lambda x: x, lambda x: pixel_features(x, "0")):
                    total += 2.5 * relative(statistics(maps(stylized)), statistics(maps(style)))
            assert torch.allclose(result.losses[step], total / 2, rtol=1e-4), f"the loss of step {step}"
        # An image is encoded with four positions of padding by replication.
        padded = lambda x: nn.functional.pad(pad(x[None]), (8, 8, 8, 8), mode="replicate")
        encode = lambda x: pixel_features(padded(x), "1")[..., 4:-4, 4:-4]
        for n, preview in enumerate(result.previews):
            target = adain_by_hand(encode(images[n]), encode(styles[n % 3]))
            expected = result.network(target)[0, ..., :11].clamp(0, 1)
            assert (preview - expected).abs().max() < 1e-4, "previews"
    assert len(result.previews) == 4
    fields = {name: getattr(result, name) for name in ("method", "config", "losses", "labels", "previews")}
    fields["network"] = result.network.state_dict()
    restored = AdaptiveNetwork.restore(fields, {result.method: call}.get, encoder_model=model)
    drawn = draw_images(1, 3, 4, 5, seed=2, dtype=torch.float32)
    assert torch.equal(restored.network(drawn), result.network(drawn)) and restored.losses is result.losses
    moved = call(model, *data, **options, steps=2, batch=2, lr=0.01, seed=last)
    pairs = zip(moved.network.parameters(), result.network.parameters(), strict=True)
    most = max((after - before).abs().max() for after, before in pairs)
    assert 0.012 < most < 0.016, f"two steps of Adam of length 0.01 and 0.005 move a weight by {most}"
    assert result.labels == tuple(f"in style {data[1].id(n)}" for n in (0, 1, 2, 0)) and result.layer == "1"
    defaults = call(model, *data, steps=30, batch=5, lr=0.01, seed=3)
    assert defaults.layer == "0" and defaults.losses[-1] < 0.7 * defaults.losses[0], "the loss does not fall"
    layers: Any = {"layer": "1", "steps": 1, "batch": 5, "seed": 3}
    both = call(model, *data, style_layers=["0", "1"], **layers)
    assert both.losses == call(model, *data, **layers).losses, "the default style layers differ"
    stages = [nn.Conv2d(3, 3, 1), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1), nn.MaxPool2d(2)]
    three = load_model(nn.Sequential(*stages), input_size=(3, 16, 16))
    middle = call(three, *data, steps=1, batch=1).layer
    assert len(three.stages) == 3 and middle == three.stages[1], "the default layer is not the middle stage"


@method(
    family="style",
    references=[HUANG],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=3 * param.steps * param.batch + 8, backward=param.steps * param.batch),
    network=lambda widths, channels, **_: Decoder(widths, channels),
    oracle=training_step_has_a_closed_form,
    quick={"steps": 2, "batch": 2},
    demo={"styles": "builtin:textures/64", "steps": 120, "batch": 4, "lr": 5e-3},
)
def adaptive_style_fit(
    model: Model,
    dataset: Dataset,
    styles: Dataset,
    *,
    layer: Annotated[
        LayerName | None,
        Field(description="encoder layer f whose features are decoded; default: the middle stage"),
    ] = None,
    style_layers: Annotated[
        list[LayerName] | None,
        Field(description="layers phi_j of the style loss; default: the stages up to layer, and layer"),
    ] = None,
    style_weight: Annotated[float, Field(ge=0, le=1e6, description="weight of the style loss")] = 10.0,
    reconstruction_weight: Annotated[
        float, Field(ge=0, le=1e6, description="weight of the reconstruction loss of unstylized contents")
    ] = 30.0,
    training: Training = Training(steps=2000, batch=8, lr=2e-3),
    seed: Seed = None,
) -> AdaptiveNetwork:
    """AdaIN style transfer: train a decoder of adaptively normalized features for arbitrary styles.

    t = AdaIN(f(c), f(s)) = sigma(f(s)) (f(c) - mu(f(c))) / sigma(f(c)) + mu(f(s))
    min_g E_c,s  |f(g(t)) - t|^2 / |t|^2
               + style_weight sum_j |m_j(g(t)) - m_j(s)|^2 / |m_j(s)|^2,   m_j = (mu(phi_j), sigma(phi_j))
               + reconstruction_weight |g(f(c)) - c|^2 / |c|^2

    with f the model's features at ``layer`` (default: the middle one of ``model.stages``), phi_0 the pixels,
    phi_j the features at ``style_layers`` and g the decoder, a mirrored f: at each resolution it has the
    channels of the model's stage there. phi_0 and the last term, the reconstruction of unstylized contents,
    are not in the paper: without them the decoder of an encoder that was not trained on photographs loses
    colors. Only g is trained, by Adam with a learning rate that falls linearly to zero; each content of a
    step is paired with a style drawn at random. All terms are relative, so the same weights suit
    every model.

    Contents (N, C, H, W) and ``styles`` (S, C, H', W') are two data sets, in [0, 1]; more and more different
    styles improve the result for unseen ones. An interrupted training continues where it stopped.

    Returns:
        ``network`` the decoder, ``losses`` (steps,), ``previews`` (4, C, H, W) the first contents in the
        first styles, ``labels`` of these, ``config`` with the name of the encoder.

    Raises:
        DivergenceError: a loss that is no longer finite.
        ModelError: a layer without spatial positions.

    Example::
        from phosphene import run

        options = {"dataset": "builtin:scenes/4", "styles": "builtin:textures/4", "steps": 2, "batch": 2}
        result = run("adaptive_style_fit", **options)
        result.previews.shape  # (4, 3, 64, 64)

    Source: Huang and Belongie 2017, section 6, equations 9 to 13.
    """
    model = single_precision(model)
    first = dataset.read(range(min(PREVIEWS, len(dataset)))).to(model.device, model.dtype)
    layer = layer or model.stages[(len(model.stages) - 1) // 2]
    loss_layers = style_layers or stages_up_to(model, layer)
    config: dict[str, Any] = {"widths": decoder_widths(model, layer), "channels": first.shape[1]}
    untrained = Decoder(**config).to(first)
    stylizer = AdaptiveNetwork.from_decoder(model, untrained, layer, config=config)
    decoder = stylizer.network.requires_grad_(True)

    def encode(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f (N, C, h, w), and m_j (N, 2 C_j): means and deviations of the pixels and the style layers."""
        images = stylizer.pad(images)
        layers = [layer, *loss_layers]
        outputs = zip(model.features_of(images, layers), layers, strict=True)
        features = [model.maps(output, images, name) for output, name in outputs]
        statistics = [channel_statistics(f, per_image=True) for f in (images, *features[1:])]
        # equivalent mutants: a loss does not depend on the order of the statistics
        return features[0], [torch.cat(mean_and_std, 1).flatten(1) for mean_and_std in statistics]

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        """The loss (n,) of each content; its style depends only on the step and the content's index."""
        step_seed = ((seed or 0) + round(progress * training.steps)) % 2**63
        random = torch.Generator().manual_seed(step_seed)
        style_indices = torch.randint(len(styles), (len(dataset),), generator=random)[list(indices)].tolist()
        with torch.no_grad():
            style_features, style_statistics = encode(styles.read(style_indices).to(images))
            content_features, _ = encode(images)
            style_mean, style_std = channel_statistics(style_features, per_image=True)
            target = match_statistics(content_features, style_mean, style_std)
        stylized_features, stylized_statistics = encode(stylizer.decode(target, images))

        reconstruction_loss = relative_error(stylizer.decode(content_features, images), images)
        total = relative_error(stylized_features, target) + reconstruction_weight * reconstruction_loss
        for statistic, style_statistic in zip(stylized_statistics, style_statistics, strict=True):
            total = total + style_weight * relative_error(statistic, style_statistic)
        return total

    optimizer = torch.optim.Adam(decoder.parameters(), training.lr)
    history = train(
        decoder, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed or 0,
        max_batch=batch_size(model), schedule=lambda progress: 1 - progress,
    )  # fmt: skip
    preview_styles = [n % len(styles) for n in range(len(first))]
    with torch.no_grad():
        statistics = stylizer.style_statistics(styles.read(preview_styles).to(first))
        previews = stylizer.stylize(first, statistics, torch.eye(len(first)))
    labels = tuple(f"in style {styles.id(n)}" for n in preview_styles)
    return dataclasses.replace(stylizer, losses=history.losses, previews=previews, labels=labels)


@method(
    family="style",
    references=[HUANG],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    relations=[InvariantTo("batch_order")],
    cost=Cost(forward=size.images + size.images * size.styles),
    oracle=pixels_as_features_are_adain_of_pixels,
    demo={"styles": ["builtin:swirls"]},
)
def adaptive_style(
    images: Images,
    styles: Styles,
    stylizer: AdaptiveStylizer,
    *,
    blend: Blend = None,
    alpha: Annotated[
        float, Field(ge=0, le=1, description="strength of the style; 0 decodes the content's own features")
    ] = 1.0,
    color: Color = "style",
) -> Stylization:
    """AdaIN style transfer: images stylized by adaptive instance normalization, in arbitrary styles.

    T(c, s) = g((1 - alpha) f(c) + alpha sum_s gamma_s AdaIN(f(c), f(s))),   sum_s gamma_s = 1
    AdaIN(x, y) = sigma(y) (x - mu(x)) / sigma(x) + mu(y)                     (per channel)

    with the encoder f and the decoder g of ``stylizer``, a result of ``adaptive_style_fit`` or its folder.
    Images (N, 3, H, W) and styles (S, 3, H', W') are of any size, in [0, 1]. ``color`` "luminance" stylizes
    the luminance and restores the content's colors, "histogram" first matches the styles' color mean and
    covariance to the content's. The decoder can only produce patterns like those of the styles it was trained
    on.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its title,
        ``sources`` (S, 3, H', W') the styles.

    Raises:
        InputError: blend weights that do not fit the styles, or a network of another method.
        ModelError: an encoder that cannot be loaded.

    Example::
        from phosphene import run

        result = run("adaptive_style", images="builtin:scenes/2", styles=["builtin:swirls"], alpha=0.8)
        result.stylized.shape  # (2, 3, 64, 64)

    Source: Huang and Belongie 2017, sections 5 and 6.4.
    """
    network = require_adaptive_network(stylizer, "adaptive_style")
    blend_weights = normalize_blend(blend, styles)
    content, style_images = prepare_colors(images, styles, color)
    statistics = [network.style_statistics(s) for s in style_images]
    batches = []
    for n, image in enumerate(progress_bar(content.split(1), "Stylizing", len(images))):
        own_statistics = statistics[n % len(statistics)]  # one for all images, or one for each
        batches.append(network.stylize(image, own_statistics, blend_weights[None], alpha))
    stylized = torch.cat(batches)
    return Stylization(
        images=images,
        stylized=replace_luminance(images, stylized) if color == "luminance" else stylized,
        style=style_title(blend_weights),
        sources=styles,
    )


@hookimpl
def phosphene_methods():
    return [adaptive_style, adaptive_style_fit]
