"""Adaptive style: its equations in closed form, its decoder, what it learns, and how it comes back."""

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
from phosphene_plugins.style._adain import adain, statistics
from phosphene_plugins.style._adaptive_network import AdaptiveNetwork, Decoder, halvings, mirrored
from phosphene_plugins.style._color_transfer import luminance

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
    made = fit(model, TensorDataset(images), TensorDataset(styles), **SMALL, layer="4")
    assert isinstance(made, AdaptiveNetwork)
    return made


def decoded(network: AdaptiveNetwork, maps: Tensor, like: Tensor) -> Tensor:
    with torch.no_grad():
        return network.decode(maps, like).clamp(0, 1)


# --- the operation ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6)),
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
    st.integers(0, 1000),
)
def test_adain_has_the_styles_statistics_and_of_itself_changes_nothing(
    shape: tuple[int, int, int, int], size: tuple[int, int], seed: int
) -> None:
    content, style = draw(*shape, seed=seed).double(), 3 * draw(1, shape[1], *size, seed=seed + 1).double()
    for one in content.split(1):
        torch.testing.assert_close(adain(one, one), one)
    made = adain(content, style)
    mean, deviation = statistics(style)
    torch.testing.assert_close(made.mean((2, 3), keepdim=True), mean.expand(*shape[:2], 1, 1))
    # The 1e-5 inside both roots is all that keeps the deviations apart.
    own = content.var((2, 3), keepdim=True)
    wanted = deviation * (own / (own + 1e-5)).sqrt()
    torch.testing.assert_close(made.std((2, 3), keepdim=True), wanted)


def test_statistics_are_unbiased_with_epsilon_inside_the_root() -> None:
    maps = draw(2, 3, 4, 5)
    mean, deviation = statistics(maps, each=True)
    torch.testing.assert_close(mean, maps.mean((2, 3), keepdim=True))
    variance = (maps - mean).square().sum((2, 3), keepdim=True) / 19
    torch.testing.assert_close(deviation, (variance + 1e-5).sqrt())
    one, other = maps.split(1)
    torch.testing.assert_close(statistics(one)[1], deviation[:1])
    torch.testing.assert_close(
        statistics(maps)[1][0, :, 0, 0], (maps.transpose(0, 1).flatten(1).var(1) + 1e-5) ** 0.5
    )
    assert statistics(maps[:, :, :1, :1], each=True)[1].isfinite().all()


# --- the decoder -----------------------------------------------------------------------------


def test_the_decoder_mirrors_the_encoder() -> None:
    vgg, resnet = load_model("builtin:shapes-vgg"), load_model("builtin:shapes-resnet")
    assert mirrored(vgg, "features.11") == [96, 48, 24]
    assert mirrored(vgg, "features.16") == [128, 96, 48, 24]
    assert mirrored(vgg, "features.3") == [24]
    assert mirrored(resnet, "layer2.0.relu") == [
        64,
        32,
        16,
    ]  # the finest stage is half as large as the picture
    assert [halvings(vgg, stage) for stage in vgg.stages] == [0, 1, 2, 3]


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
def test_pictures_keep_their_size(stylizer: AdaptiveNetwork, styles: Tensor, size: tuple[int, int]) -> None:
    assert adaptive_style(draw(1, 3, *size), styles[:1], stylizer).stylized.shape == (1, 3, *size)


def test_a_picture_that_is_no_whole_number_of_places_is_the_corner_of_one_that_is(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor
) -> None:
    odd = images[:1, :, :17, :19]
    whole = torch.cat([odd, odd[:, :, -1:]], 2)
    whole = torch.cat([whole, whole[..., -1:]], 3)
    made = [adaptive_style(i, styles, stylizer).stylized for i in (odd, whole)]
    assert torch.equal(made[0], made[1][:, :, :17, :19])


# --- applying it -----------------------------------------------------------------------------


def test_alpha_goes_from_the_plain_reconstruction_to_the_style(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor
) -> None:
    content = stylizer.encode(images)
    target = adain(content, stylizer.encode(styles[:1]))
    for alpha in (0.0, 0.3, 1.0):
        made = adaptive_style(images, styles[:1], stylizer, alpha=alpha).stylized
        wanted = decoded(stylizer, (1 - alpha) * content + alpha * target, images)
        torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
    assert torch.equal(
        adaptive_style(images, styles, stylizer, alpha=0.0).stylized,
        adaptive_style(images, styles[:1], stylizer, alpha=0.0).stylized,
    )


def test_a_blend_mixes_the_outputs_of_adain(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor
) -> None:
    content, one = stylizer.encode(images), stylizer.encode(styles)
    parts = [adain(content, style) for style in one.split(1)]
    made = adaptive_style(images, styles, stylizer, blend=[1, 0, 3])
    wanted = decoded(stylizer, 0.25 * parts[0] + 0.75 * parts[2], images)
    torch.testing.assert_close(made.stylized, wanted, atol=1e-5, rtol=0)
    assert made.style == "25% of style 0 + 75% of style 2"
    alone = adaptive_style(images, styles, stylizer, blend=[0, 2, 0]).stylized
    assert torch.equal(alone, adaptive_style(images, styles[1:2], stylizer).stylized)


def test_colours_can_stay(stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor) -> None:
    pale, grey = 0.45 + 0.1 * images, copy.deepcopy(stylizer.network)
    torch.nn.init.constant_(grey.paint.bias, 0.5)  # it has learned next to nothing, and paints in black
    stylizer = dataclasses.replace(stylizer, network=grey)
    whole = adaptive_style(pale, styles, stylizer, colour="luminance").stylized
    inside = ((whole > 0) & (whole < 1)).all(1)
    assert inside.double().mean() > 0.5  # the others are clipped
    kept = (whole - luminance(whole) - (pale - luminance(pale))).movedim(1, -1)[inside]
    assert kept.abs().max() < 1e-5
    for colour in ("luminance", "histogram"):  # every picture's own, whatever it stands beside
        together = adaptive_style(images, styles, stylizer, colour=colour).stylized
        alone = [adaptive_style(i, styles, stylizer, colour=colour).stylized for i in images.split(1)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused(stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor) -> None:
    with pytest.raises(InputError, match="one share each"):
        adaptive_style(images, styles, stylizer, blend=[1.0])
    with pytest.raises(InputError, match="not one of style.fast_style_fit"):
        adaptive_style(images, styles, load_result("builtin:shapes-styles"))
    with pytest.raises(InputError, match="a style network of fast_style_fit is needed"):
        methods["fast_style"](images, stylizer)
    with pytest.raises(InputError, match="3 channels, the pictures have 1"):
        adaptive_style(images[:, :1], styles, stylizer)
    with pytest.raises(UnknownName, match=r"shapes-adaptive"):
        load_result("builtin:shapes-adaptiv")


# --- training it -----------------------------------------------------------------------------


def test_oracles() -> None:
    fit.spec.oracle()


def test_the_loss_is_the_equations(model: Model, images: Tensor, styles: Tensor) -> None:
    """A step too short to move anything, worked out again for the style that was drawn."""
    made = fit(
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
            painted = made.network(target)
            total += float((model.features(painted, "4") - target).square().sum() / target.square().sum())
            again = made.network(model.features(content, "4"))
            total += 7.0 * float((again - content).square().sum() / content.square().sum())
            for look in (lambda x: x, lambda x: model.features(x, "1"), lambda x: model.features(x, "4")):
                (m, d), (mean, deviation) = (statistics(look(i)) for i in (painted, sample))
                apart = (m - mean).square().sum() + (d - deviation).square().sum()
                total += 2.5 * float(apart / (mean.square().sum() + deviation.square().sum()))
    assert made.losses[0].item() == pytest.approx(total / 5, rel=1e-4)


def test_training_lowers_the_loss_and_leaves_the_encoder_alone(
    model: Model, images: Tensor, styles: Tensor
) -> None:
    before = model.digest
    made = fit(model, TensorDataset(images), TensorDataset(styles), **SMALL | {"steps": 60})
    assert made.layer == "1"  # the middle one of two stages, rounded down
    assert made.losses[-5:].mean() < 0.7 * made.losses[:5].mean()
    assert made.previews.shape == (4, 3, 18, 20) and len(made.labels) == 4
    assert model.digest == before and all(
        p.requires_grad and p.grad is None for p in model.module.parameters()
    )


def test_memory_and_seed(model: Model, images: Tensor, styles: Tensor) -> None:
    train = lambda **changed: fit(model, TensorDataset(images), TensorDataset(styles), **SMALL | changed)
    first, again, other = train(), train(), train(seed=1)
    assert torch.equal(first.losses, again.losses) and torch.equal(first.previews, again.previews)
    assert not torch.equal(first.losses, other.losses)
    with max_batch(1):  # the styles stay the same
        torch.testing.assert_close(train().losses, first.losses, atol=1e-4, rtol=1e-4)


def test_a_training_that_was_cut_off_goes_on_bit_by_bit(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == 2:
            raise Enough

    told: dict[str, Any] = {
        "dataset": "builtin:scenes/4",
        "styles": "builtin:textures/3",
        **SMALL | {"steps": 4},
    }
    whole = run("adaptive_style_fit", **told, progress=False)
    with pytest.raises(Enough):
        run("adaptive_style_fit", **told, out=tmp_path / "made", progress=stop)
    assert (tmp_path / ".made.unfinished").is_file()
    went_on = run("adaptive_style_fit", **told, out=tmp_path / "made", progress=False)
    assert torch.equal(went_on.previews, whole.previews) and torch.equal(went_on.losses, whole.losses)
    assert replay(tmp_path / "made").same


# --- coming back -----------------------------------------------------------------------------


def test_it_comes_back_with_its_encoder(tmp_path: Path, images: Tensor, styles: Tensor) -> None:
    made = run(
        "adaptive_style_fit", model="builtin:shapes-resnet", dataset="builtin:scenes/4",
        styles="builtin:textures/3", out=tmp_path / "made", progress=False, **SMALL,
    )  # fmt: skip
    again = load_result(tmp_path / "made")
    assert isinstance(again, AdaptiveNetwork) and again.encoder.name == "builtin:shapes-resnet"
    painted = adaptive_style(images, styles, made).stylized
    assert torch.equal(adaptive_style(images, styles, again).stylized, painted)
    run("adaptive_style", images=images, styles=styles, stylizer=tmp_path / "made", out=tmp_path / "painted")
    assert torch.equal(load_result(tmp_path / "painted").stylized, painted)
    assert replay(tmp_path / "painted").same
    told = dict(again.config["encoder"])
    other = dataclasses.replace(again, config={**again.config, "encoder": told | {"digest": "another"}})
    with pytest.raises(ModelError, match="other weights"):
        adaptive_style(images, styles, other)


def test_an_encoder_given_as_an_object_is_given_again(
    stylizer: AdaptiveNetwork, images: Tensor, styles: Tensor, tmp_path: Path
) -> None:
    stylizer.save(tmp_path / "made")
    again = load_result(tmp_path / "made")
    with pytest.raises(ModelError, match=r"given=model"):
        adaptive_style(images, styles, again)
    whole = dataclasses.replace(again, given=encoder())
    painted = adaptive_style(images, styles, stylizer).stylized
    assert torch.equal(adaptive_style(images, styles, whole).stylized, painted)


def test_maps_know_of_no_edge_and_inside_are_the_encoders(model: Model, images: Tensor) -> None:
    own = AdaptiveNetwork.of(model, nn.Conv2d(8, 3, 1), "4")
    flat = own.encode(torch.full((1, 3, 18, 20), 0.7))
    assert (flat - flat[..., :1, :1]).abs().max() < 1e-6 < flat.abs().max()
    torch.testing.assert_close(
        own.encode(images)[..., 3:-3, 3:-3], model.features(images, "4")[..., 3:-3, 3:-3]
    )


def test_a_decoder_of_ones_own_needs_no_training(model: Model, images: Tensor, styles: Tensor) -> None:
    decoder = nn.Sequential(nn.Conv2d(8, 3, 1), nn.Upsample(scale_factor=2))
    own = AdaptiveNetwork.of(model, decoder, "4")
    made = adaptive_style(images, styles[:1], own).stylized
    target = adain(own.encode(images), own.encode(styles[:1]))
    with torch.no_grad():
        torch.testing.assert_close(made, decoder(target).clamp(0, 1), atol=1e-6, rtol=0)


def test_bundled_styles_are_many_and_the_same_every_time() -> None:
    textures = TextureDataset(6, size=(32, 48))
    some = textures.read([4, 1])
    assert some.shape == (2, 3, 32, 48) and 0 <= some.min() <= some.max() <= 1
    assert torch.equal(some[1], TextureDataset(2, size=(32, 48)).read([1])[0])
    means = TextureDataset(40).read(range(40)).mean((2, 3))
    assert (torch.pdist(means) > 0.01).double().mean() > 0.95
    with pytest.raises(InputError, match="no bundled data set"):
        run("adaptive_style_fit", styles="builtin:biased-textures")


# --- the bundled one, and the paper's ---------------------------------------------------------


def moments(model: Model, images: Tensor, layer: str) -> Tensor:
    with torch.no_grad():
        return torch.cat(statistics(model.features(images, layer), each=True), 1).flatten(1)


def apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().sum(1) / other.square().sum(1)


def test_the_bundled_one_paints_an_unseen_texture_more_like_itself_than_like_any_other() -> None:
    vgg, scenes = load_model("builtin:shapes-vgg"), draw_scenes(4, seed=0, split="test").images
    seen = lambda images: torch.cat([moments(vgg, images, layer) for layer in vgg.stages[:2]], 1)
    textures = {name: resize(load_texture(name), (64, 64))[None] for name in TEXTURES}
    pebbles = textures["pebbles"]  # no style of its training was cut from them
    painted = seen(run("adaptive_style", images=scenes, styles=pebbles).stylized)
    distances = {name: float(apart(painted, seen(other)).mean()) for name, other in textures.items()}
    assert min(distances, key=distances.__getitem__) == "pebbles"
    assert distances["pebbles"] < 0.5 * float(apart(seen(scenes), seen(pebbles)).mean())


def test_the_papers_encoder_and_decoder(assets: Path) -> None:
    """VGG-19 at relu3_1: alpha 0 paints the photograph again, alpha 1 gives it the style's statistics."""
    vgg = load_vgg19(assets)
    network = AdaptiveNetwork.of(vgg, load_decoder(assets), "relu3_1")
    photograph = resize(read_image(assets / "images" / "demo" / "tubingen.jpg"), (192, 256))[None]
    plain = adaptive_style(photograph, photograph, network, alpha=0.0).stylized
    assert (plain - photograph).square().mean().sqrt() < 0.06
    for name in ("edtaonisl", "starry_night", "udnie"):
        style = resize(read_image(assets / "images" / "style" / f"{name}.jpg"), (192, 256))[None]
        painted = adaptive_style(photograph, style, network).stylized
        wanted = moments(vgg, style, "relu3_1")
        far, near = (float(apart(moments(vgg, i, "relu3_1"), wanted)) for i in (photograph, painted))
        assert near < 0.5 * far, name
