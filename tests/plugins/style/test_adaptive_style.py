"""AdaIN style transfer: closed forms, the decoder, training, saving and loading."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perceptual_networks import load_decoder, load_vgg19
from torch import Tensor, nn

from phosphene import (
    InputError,
    Model,
    ModelError,
    UnknownName,
    load_model,
    load_result,
    max_batch,
    methods,
    replay,
    run,
)
from phosphene.builtin.scenes import draw_scenes
from phosphene.builtin.textures import TEXTURES, load_texture
from phosphene.data import TensorDataset, TextureDataset
from phosphene.images import read_image, resize
from phosphene_plugins.style._adain import adain, channel_statistics
from phosphene_plugins.style._adaptive_network import AdaptiveNetwork
from phosphene_plugins.style._color_transfer import luminance
from phosphene_plugins.style._decoder import Decoder, decoder_widths, log2_stride
from phosphene_plugins.style._style_blend import normalize_blend

fit = methods["style.adaptive_style_fit"]
adaptive_style = methods["style.adaptive_style"]
SMALL: dict[str, Any] = {"steps": 3, "batch": 2, "seed": 0}


def encoder() -> Model:
    torch.manual_seed(0)
    fine, coarse = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
    network = nn.Sequential(fine, nn.ReLU(), nn.MaxPool2d(2), coarse, nn.ReLU(), nn.MaxPool2d(2))
    return load_model(network, input_size=(3, 18, 20))


@pytest.fixture(scope="module")
def model() -> Model:
    return encoder()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw(5, 3, 18, 20)


@pytest.fixture(scope="module")
def styles() -> Tensor:
    return draw(3, 3, 16, 16, seed=2) ** 2


@pytest.fixture(scope="module")
def stylizer(model: Model, images: Tensor, styles: Tensor) -> AdaptiveNetwork:
    result = fit(model, TensorDataset(images), TensorDataset(styles), **SMALL, layer="4")
    assert isinstance(result, AdaptiveNetwork)
    return result


def decode(network: AdaptiveNetwork, maps: Tensor, like: Tensor) -> Tensor:
    with torch.no_grad():
        return network.decode(maps, like).clamp(0, 1)


# --- the operation ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6)),
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
    st.integers(0, 1000),
)
def test_adain_matches_the_statistics_and_is_the_identity_for_itself(
    shape: tuple[int, int, int, int], size: tuple[int, int], seed: int
) -> None:
    content, style = draw(*shape, seed=seed).double(), 3 * draw(1, shape[1], *size, seed=seed + 1).double()
    for one in content.split(1):
        torch.testing.assert_close(adain(one, one), one)
    result = adain(content, style)
    mean, deviation = channel_statistics(style)
    torch.testing.assert_close(result.mean((2, 3), keepdim=True), mean.expand(*shape[:2], 1, 1))
    # The deviations differ by the 1e-5 inside both roots alone.
    own = content.var((2, 3), keepdim=True)
    expected = deviation * (own / (own + 1e-5)).sqrt()
    torch.testing.assert_close(result.std((2, 3), keepdim=True), expected)


def test_statistics_are_unbiased_with_epsilon_inside_the_root() -> None:
    maps = draw(2, 3, 4, 5)
    mean, deviation = channel_statistics(maps, per_image=True)
    torch.testing.assert_close(mean, maps.mean((2, 3), keepdim=True))
    variance = (maps - mean).square().sum((2, 3), keepdim=True) / 19
    torch.testing.assert_close(deviation, (variance + 1e-5).sqrt())
    one, other = maps.split(1)
    torch.testing.assert_close(channel_statistics(one)[1], deviation[:1])
    torch.testing.assert_close(
        channel_statistics(maps)[1][0, :, 0, 0], (maps.transpose(0, 1).flatten(1).var(1) + 1e-5) ** 0.5
    )
    assert channel_statistics(maps[:, :, :1, :1], per_image=True)[1].isfinite().all()


# --- the decoder -----------------------------------------------------------------------------


def test_the_decoder_mirrors_the_encoder() -> None:
    vgg, resnet = load_model("builtin:shapes-vgg"), load_model("builtin:shapes-resnet")
    assert decoder_widths(vgg, "features.11") == [96, 48, 24]
    assert decoder_widths(vgg, "features.16") == [128, 96, 48, 24]
    assert decoder_widths(vgg, "features.3") == [24]
    assert decoder_widths(resnet, "layer2.0.relu") == [
        64,
        32,
        16,
    ]  # the finest stage is half as large as the image
    assert [log2_stride(vgg, stage) for stage in vgg.stages] == [0, 1, 2, 3]


def test_the_decoder_is_convolutions_upsampling_and_relus() -> None:
    torch.manual_seed(0)
    decoder, maps = Decoder([5, 4, 3], 3), torch.rand(2, 5, 3, 4)
    layers: list[nn.Module] = []
    for own in (decoder.widen[0], decoder.smooth[0], decoder.widen[1], decoder.paint):
        conv = nn.Conv2d(own.in_channels, own.out_channels, 3, padding=1, padding_mode="reflect")
        conv.load_state_dict(own.state_dict())
        layers += [conv, nn.ReLU()]
    layers.insert(2, nn.Upsample(scale_factor=2))
    layers.insert(7, nn.Upsample(scale_factor=2))
    torch.testing.assert_close(decoder(maps), nn.Sequential(*layers[:-1])(maps))
    assert decoder(maps[..., :1, :1]).shape == (2, 3, 4, 4)  # nothing to mirror


@pytest.mark.parametrize("size", [(18, 20), (5, 5), (9, 31), (64, 40)])
def test_images_keep_their_size(stylizer: AdaptiveNetwork, styles: Tensor, size: tuple[int, int]) -> None:
    assert adaptive_style(draw(1, 3, *size), styles[:1], stylizer).stylized.shape == (1, 3, *size)


def test_an_image_is_padded_by_replication_to_a_multiple_of_the_stride(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor
) -> None:
    odd = images[:1, :, :17, :19]
    padded = torch.cat([odd, odd[:, :, -1:]], 2)
    padded = torch.cat([padded, padded[..., -1:]], 3)
    result = [adaptive_style(i, styles, stylizer).stylized for i in (odd, padded)]
    assert torch.equal(result[0], result[1][:, :, :17, :19])


# --- applying it -----------------------------------------------------------------------------


def test_alpha_interpolates_between_reconstruction_and_style(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor
) -> None:
    content = stylizer.encode(images)
    target = adain(content, stylizer.encode(styles[:1]))
    for alpha in (0.0, 0.3, 1.0):
        result = adaptive_style(images, styles[:1], stylizer, alpha=alpha).stylized
        expected = decode(stylizer, (1 - alpha) * content + alpha * target, images)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert torch.equal(
        adaptive_style(images, styles, stylizer, alpha=0.0).stylized,
        adaptive_style(images, styles[:1], stylizer, alpha=0.0).stylized,
    )


def test_a_blend_mixes_the_outputs_of_adain(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor
) -> None:
    content, one = stylizer.encode(images), stylizer.encode(styles)
    parts = [adain(content, style) for style in one.split(1)]
    result = adaptive_style(images, styles, stylizer, blend=[1, 0, 3])
    expected = decode(stylizer, 0.25 * parts[0] + 0.75 * parts[2], images)
    torch.testing.assert_close(result.stylized, expected, atol=1e-5, rtol=0)
    assert result.style == "25% of style 0 + 75% of style 2"
    alone = adaptive_style(images, styles, stylizer, blend=[0, 2, 0]).stylized
    assert torch.equal(alone, adaptive_style(images, styles[1:2], stylizer).stylized)


def test_colors_are_preserved(stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor) -> None:
    pale, gray = 0.45 + 0.1 * images, copy.deepcopy(stylizer.network)
    torch.nn.init.constant_(gray.paint.bias, 0.5)  # barely trained, its output is nearly black
    stylizer = dataclasses.replace(stylizer, network=gray)
    stylized = adaptive_style(pale, styles, stylizer, color="luminance").stylized
    inside = ((stylized > 0) & (stylized < 1)).all(1)
    assert inside.double().mean() > 0.5  # the other pixels are clipped
    chroma_change = (stylized - luminance(stylized) - (pale - luminance(pale))).movedim(1, -1)[inside]
    assert chroma_change.abs().max() < 1e-5
    for color in ("luminance", "histogram"):  # independent of the other images of the batch
        together = adaptive_style(images, styles, stylizer, color=color).stylized
        alone = [adaptive_style(i, styles, stylizer, color=color).stylized for i in images.split(1)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


def test_bad_input_is_refused(stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor) -> None:
    with pytest.raises(InputError, match="one weight each"):
        adaptive_style(images, styles, stylizer, blend=[1.0])
    with pytest.raises(InputError, match="not one of style.fast_style_fit"):
        adaptive_style(images, styles, load_result("builtin:shapes-styles"))
    with pytest.raises(InputError, match="a style network of fast_style_fit is needed"):
        methods["fast_style"](images, stylizer)
    with pytest.raises(InputError, match="3 channels, the images have 1"):
        adaptive_style(images[:, :1], styles, stylizer)
    with pytest.raises(UnknownName, match=r"shapes-adaptive"):
        load_result("builtin:shapes-adaptiv")


# --- training it -----------------------------------------------------------------------------


def test_oracles() -> None:
    fit.spec.oracle()


def test_the_loss_equals_the_equation(model: Model, images: Tensor, styles: Tensor) -> None:
    """A step with a negligible learning rate, computed by hand for the style that was drawn."""
    result = fit(
        model, TensorDataset(images), TensorDataset(styles), layer="4", style_layers=["1", "4"],
        style_weight=2.5, reconstruction_weight=7.0, steps=1, batch=5, lr=1e-12, seed=3,
    )  # fmt: skip
    random = torch.Generator().manual_seed(3)
    which = torch.randint(3, (5,), generator=random).tolist()
    total = 0.0
    with torch.no_grad():
        for n, style in enumerate(which):
            content, sample = images[n : n + 1], styles[style : style + 1]
            target = adain(model.features(content, "4"), model.features(sample, "4"))
            stylized = result.network(target)
            total += float((model.features(stylized, "4") - target).square().sum() / target.square().sum())
            reconstruction = result.network(model.features(content, "4"))
            total += 7.0 * float((reconstruction - content).square().sum() / content.square().sum())
            for features in (lambda x: x, lambda x: model.features(x, "1"), lambda x: model.features(x, "4")):
                (m, d), (mean, deviation) = (channel_statistics(features(i)) for i in (stylized, sample))
                difference = (m - mean).square().sum() + (d - deviation).square().sum()
                total += 2.5 * float(difference / (mean.square().sum() + deviation.square().sum()))
    assert result.losses[0].item() == pytest.approx(total / 5, rel=1e-4)


def test_training_lowers_the_loss_and_does_not_change_the_encoder(
    model: Model, images: Tensor, styles: Tensor
) -> None:
    before = model.digest
    result = fit(model, TensorDataset(images), TensorDataset(styles), **SMALL | {"steps": 60})
    assert result.layer == "1"  # the middle one of two stages, rounded down
    assert result.losses[-5:].mean() < 0.7 * result.losses[:5].mean()
    assert result.previews.shape == (4, 3, 18, 20) and len(result.labels) == 4
    assert model.digest == before and all(
        p.requires_grad and p.grad is None for p in model.module.parameters()
    )


def test_the_seed_is_reproducible_and_batch_size_changes_only_rounding(
    model: Model, images: Tensor, styles: Tensor
) -> None:
    train = lambda **changed: fit(model, TensorDataset(images), TensorDataset(styles), **SMALL | changed)
    first, repeated, other = train(), train(), train(seed=1)
    assert torch.equal(first.losses, repeated.losses) and torch.equal(first.previews, repeated.previews)
    assert not torch.equal(first.losses, other.losses)
    with max_batch(1):  # the styles stay the same
        torch.testing.assert_close(train().losses, first.losses, atol=1e-4, rtol=1e-4)


def test_an_interrupted_training_continues_bit_for_bit(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == 2:
            raise Stopped

    options: dict[str, Any] = {
        "dataset": "builtin:scenes/4",
        "styles": "builtin:textures/3",
        **SMALL | {"steps": 4},
    }
    uninterrupted = run("adaptive_style_fit", **options, progress=False)
    with pytest.raises(Stopped):
        run("adaptive_style_fit", **options, out=tmp_path / "result", progress=stop)
    assert (tmp_path / ".result.unfinished").is_file()
    continued = run("adaptive_style_fit", **options, out=tmp_path / "result", progress=False)
    assert torch.equal(continued.previews, uninterrupted.previews)
    assert torch.equal(continued.losses, uninterrupted.losses)
    assert replay(tmp_path / "result").same


# --- saving and loading -----------------------------------------------------------------------------


def test_loading_restores_the_encoder(tmp_path: Path, images: Tensor, styles: Tensor) -> None:
    result = run(
        "adaptive_style_fit", model="builtin:shapes-resnet", dataset="builtin:scenes/4",
        styles="builtin:textures/3", out=tmp_path / "result", progress=False, **SMALL,
    )  # fmt: skip
    loaded = load_result(tmp_path / "result")
    assert isinstance(loaded, AdaptiveNetwork) and loaded.encoder.name == "builtin:shapes-resnet"
    stylized = adaptive_style(images, styles, result).stylized
    assert torch.equal(adaptive_style(images, styles, loaded).stylized, stylized)
    run(
        "adaptive_style",
        images=images,
        styles=styles,
        stylizer=tmp_path / "result",
        out=tmp_path / "stylized",
    )
    assert torch.equal(load_result(tmp_path / "stylized").stylized, stylized)
    assert replay(tmp_path / "stylized").same
    record = dict(loaded.config["encoder"])
    other = dataclasses.replace(loaded, config={**loaded.config, "encoder": record | {"digest": "another"}})
    with pytest.raises(ModelError, match="other weights"):
        adaptive_style(images, styles, other)


def test_an_encoder_passed_as_an_object_must_be_passed_again(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor, tmp_path: Path
) -> None:
    stylizer.save(tmp_path / "result")
    loaded = load_result(tmp_path / "result")
    with pytest.raises(ModelError, match=r"encoder_model=model"):
        adaptive_style(images, styles, loaded)
    complete = dataclasses.replace(loaded, encoder_model=encoder())
    stylized = adaptive_style(images, styles, stylizer).stylized
    assert torch.equal(adaptive_style(images, styles, complete).stylized, stylized)


def test_features_have_no_border_effects_and_equal_the_encoders_inside(model: Model, images: Tensor) -> None:
    own = AdaptiveNetwork.from_decoder(model, nn.Conv2d(8, 3, 1), "4")
    flat = own.encode(torch.full((1, 3, 18, 20), 0.7))
    assert (flat - flat[..., :1, :1]).abs().max() < 1e-6 < flat.abs().max()
    torch.testing.assert_close(
        own.encode(images)[..., 3:-3, 3:-3], model.features(images, "4")[..., 3:-3, 3:-3]
    )


def test_an_own_decoder_needs_no_training(model: Model, images: Tensor, styles: Tensor) -> None:
    decoder = nn.Sequential(nn.Conv2d(8, 3, 1), nn.Upsample(scale_factor=2))
    own = AdaptiveNetwork.from_decoder(model, decoder, "4")
    result = adaptive_style(images, styles[:1], own).stylized
    target = adain(own.encode(images), own.encode(styles[:1]))
    with torch.no_grad():
        torch.testing.assert_close(result, decoder(target).clamp(0, 1), atol=1e-6, rtol=0)


def test_bundled_styles_are_diverse_and_reproducible() -> None:
    textures = TextureDataset(6, size=(32, 48))
    some = textures.read([4, 1])
    assert some.shape == (2, 3, 32, 48) and 0 <= some.min() <= some.max() <= 1
    assert torch.equal(some[1], TextureDataset(2, size=(32, 48)).read([1])[0])
    means = TextureDataset(40).read(range(40)).mean((2, 3))
    assert (torch.pdist(means) > 0.01).double().mean() > 0.95
    with pytest.raises(InputError, match="no bundled data set"):
        run("adaptive_style_fit", styles="builtin:biased-textures")


# --- the bundled network, and the paper's ---------------------------------------------------------


def moments(model: Model, images: Tensor, layer: str) -> Tensor:
    with torch.no_grad():
        return torch.cat(channel_statistics(model.features(images, layer), per_image=True), 1).flatten(1)


def relative_distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().sum(1) / other.square().sum(1)


def test_the_bundled_stylizer_reproduces_an_unseen_texture_better_than_any_other() -> None:
    vgg, scenes = load_model("builtin:shapes-vgg"), draw_scenes(4, seed=0, split="test").images
    statistics_of = lambda images: torch.cat([moments(vgg, images, layer) for layer in vgg.stages[:2]], 1)
    textures = {name: resize(load_texture(name), (64, 64))[None] for name in TEXTURES}
    pebbles = textures["pebbles"]  # no training style was cut from this texture
    stylized = statistics_of(run("adaptive_style", images=scenes, styles=pebbles).stylized)
    distances = {
        name: float(relative_distance(stylized, statistics_of(other)).mean())
        for name, other in textures.items()
    }
    assert min(distances, key=distances.__getitem__) == "pebbles"
    assert distances["pebbles"] < 0.5 * float(
        relative_distance(statistics_of(scenes), statistics_of(pebbles)).mean()
    )


def test_the_encoder_and_decoder_of_the_paper(assets: Path) -> None:
    """VGG-19 at relu3_1: alpha 0 reconstructs the photograph, alpha 1 has the style's statistics."""
    vgg = load_vgg19(assets)
    network = AdaptiveNetwork.from_decoder(vgg, load_decoder(assets), "relu3_1")
    photograph = resize(read_image(assets / "images" / "demo" / "tubingen.jpg"), (192, 256))[None]
    plain = adaptive_style(photograph, photograph, network, alpha=0.0).stylized
    assert (plain - photograph).square().mean().sqrt() < 0.06
    for name in ("edtaonisl", "starry_night", "udnie"):
        style = resize(read_image(assets / "images" / "style" / f"{name}.jpg"), (192, 256))[None]
        stylized = adaptive_style(photograph, style, network).stylized
        expected = moments(vgg, style, "relu3_1")
        far, near = (
            float(relative_distance(moments(vgg, i, "relu3_1"), expected)) for i in (photograph, stylized)
        )
        assert near < 0.5 * far, name


def test_blend_of_very_large_weights_is_normalized_without_overflow() -> None:
    styles = torch.zeros(2, 3, 8, 8)
    assert torch.equal(normalize_blend([0, 3.5e38], styles), torch.tensor([0.0, 1.0]))
    assert torch.equal(normalize_blend([1.7e308, 1.7e308], styles), torch.tensor([0.5, 0.5]))
