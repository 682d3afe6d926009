"""Preprocessing of image files: the pixels of timm's and torchvision's own evaluation transforms."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models import get_pretrained_cfg
from torchvision import models

from phosphene import InputError, Model, load_model
from phosphene.images import read_image, to_pil
from phosphene.images.decode import image_size, open_rgb
from phosphene.models.preprocessing import CROP_MODES, preprocess
from phosphene_plugins.models.torchvision import _kind, _preprocessing

MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)

#: Sides (H, W) of images: landscape, portrait, exact, small, elongated.
SIDES = ((331, 500), (500, 333), (224, 224), (37, 53), (40, 411))


@cache
def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def normalized(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    mean_column, std_column = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (pixels - mean_column) / std_column


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_crop_modes_are_those_of_timm(crop_mode: str, interpolation: str) -> None:
    for size, crop_pct, sides in itertools.product(((96, 96), (96, 128)), (1.0, 0.9, 0.875), SIDES):
        options = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
        theirs = create_transform((3, *size), mean=MEAN, std=STD, **options)(noise(*sides))
        ours = normalized(preprocess(noise(*sides), (3, *size), mean=MEAN, **options), MEAN, STD)
        assert (ours - theirs).abs().max() == 0, (size, crop_pct, sides)


def test_every_configuration_of_timm_gives_its_own_pixels() -> None:
    """All different evaluation transforms of timm's 1,800 pretrained configurations, on one image each."""
    names = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    configs = {}
    for name in timm.list_pretrained():
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
        configs[tuple(str(config[key]) for key in names)] = config
    assert len(configs) > 100 and {c["crop_mode"] for c in configs.values()} == {"center", "squash", "border"}
    for config in configs.values():
        if max(config["input_size"]) > 640:
            continue
        theirs = create_transform(**config)(noise(200, 301))
        options = {name: config[name] for name in ("crop_pct", "crop_mode", "interpolation", "mean")}
        ours = preprocess(noise(200, 301), config["input_size"], **options)
        assert (normalized(ours, config["mean"], config["std"]) - theirs).abs().max() == 0, config


def test_every_preset_of_torchvision_gives_its_own_pixels() -> None:
    """All different evaluation transforms of torchvision's weights of classifiers and segmenters."""
    presets = {}
    for name in models.list_models():
        if (kind := _kind(name)) in ("", "quantization", "segmentation"):
            for entry in models.get_model_weights(name):
                presets[repr(entry.transforms())] = (entry, kind)
    assert len(presets) > 20
    for entry, kind in presets.values():
        model = Model(torch.nn.Identity(), **_preprocessing(entry, kind, {}))
        for sides in ((331, 500), (500, 333)):
            theirs = entry.transforms()(noise(*sides))
            ours = model.normalize(model.transform(noise(*sides))[None])[0]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_timms_own_squashed_names_get_the_pixels_that_they_were_evaluated_with() -> None:
    tiny = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    columns = np.zeros((200, 600, 3), np.uint8)  # red, green and blue: a center crop would show green alone
    for channel in range(3):
        columns[:, 200 * channel : 200 * (channel + 1), channel] = 255
    image = Image.fromarray(columns)
    for name, red in (("convnext_tiny.in12k_ft_in1k_384", 1 / 3), ("convnext_tiny.fb_in1k", 0.0)):
        model = load_model(f"timm:{name}", **tiny)
        theirs = create_transform(**resolve_model_data_config(model.module))(image)
        pixels = model.transform(image)
        assert (model.normalize(pixels[None])[0] - theirs).abs().max() == 0
        assert float((pixels[0] > pixels[1]).float().mean()) == pytest.approx(red, abs=0.01)


# --- modes with other sizes -------------------------------------------------------------------------


def test_shorter_side_is_resized_and_the_longer_one_bounded() -> None:
    def size(sides: tuple[int, int], goal: tuple[int, int], mode: str = "resize") -> tuple[int, ...]:
        return tuple(preprocess(noise(*sides), (3, *goal), crop_mode=mode).shape[1:])

    assert size((100, 300), (50, 50)) == (50, 150)
    assert size((300, 100), (50, 50)) == (150, 50)
    assert size((100, 300), (50, 80)) == (27, 80)
    assert size((100, 110), (50, 80)) == (50, 55)
    assert size((100, 110), (50, 80), "resize-16") == (48, 48)
    assert size((37, 53), (50, 80), "none") == (37, 53)
    assert torch.equal(
        preprocess(noise(37, 53), (3, 1, 1), crop_mode="none") * 255,
        torch.from_numpy(np.array(noise(37, 53))).permute(2, 0, 1).float() / 255 * 255,
    )


def test_padding_is_at_the_right_and_the_bottom_and_has_the_mean_color() -> None:
    pixels = preprocess(noise(50, 100), (3, 64, 64), crop_mode="pad", mean=MEAN)
    assert pixels.shape == (3, 64, 64)
    inside = np.array(noise(50, 100).resize((64, 32), Image.Resampling.BILINEAR))
    torch.testing.assert_close(pixels[:, :32], torch.from_numpy(inside).permute(2, 0, 1) / 255)
    assert not normalized(pixels, MEAN, STD)[:, 32:].any()


def test_corner_of_a_crop_is_rounded_down_with_the_suffix_floor() -> None:
    """A ramp of 67 columns, of which 32 are cropped: from column 17.5, which timm rounds to 18."""
    ramp = Image.fromarray(np.arange(67, dtype=np.uint8)[None].repeat(67, 0))
    for mode, first in (("center", 18), ("center-floor", 17), ("squash", 18), ("squash-floor", 17)):
        pixels = preprocess(ramp, (1, 32, 32), crop_pct=32 / 67, crop_mode=mode)
        assert round(float(pixels[0, 0, 0]) * 255) == first


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_images_smaller_than_the_crop_are_padded_with_black(crop_mode: str) -> None:
    """As timm's VOLO of 448 pixels, whose crop_pct is 1.15."""
    options = {"crop_pct": 1.5, "crop_mode": crop_mode}
    theirs = create_transform((3, 48, 48), mean=(0,) * 3, std=(1,) * 3, **options)
    assert torch.equal(preprocess(noise(64, 70), (3, 48, 48), **options), theirs(noise(64, 70)))


def test_sizes_of_models_whose_images_are_not_cropped_follow_the_images() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for mode in CROP_MODES:
        model = Model(network, input_size=(3, 48, 64), crop_mode=mode)
        is_fixed = mode not in ("resize", "resize-16", "none")
        assert model.size_known is is_fixed
        assert model.settings["crop_mode"] == mode
        pixels = model.transform(noise(90, 70))
        assert (pixels.shape == (3, 48, 64)) is is_fixed
        assert model(pixels[None]).shape == (1, 4)


@pytest.mark.parametrize("crop_mode", ["centre", "", None, 3])
def test_unknown_crop_modes_are_refused(crop_mode: object) -> None:
    with pytest.raises(InputError, match="crop_mode must be one of center, center-floor, squash"):
        Model(torch.nn.Flatten(), crop_mode=crop_mode)  # type: ignore[arg-type]


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_a_file_is_prepared_as_its_pixels(mode: str, tmp_path: Path) -> None:
    model = load_model(models.mobilenet_v2(), input_size=(3, 96, 96))
    image = noise(150, 200).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(file)
    assert torch.equal(model.transform(file), model.transform(to_pil(read_image(file))))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_draft_decodes_a_fraction_that_covers_the_input(orientation: int, tmp_path: Path) -> None:
    model = load_model(models.mobilenet_v2(), input_size=(3, 96, 96))
    exif = Image.Exif()
    exif[0x0112] = orientation
    large, small = tmp_path / "large.jpg", tmp_path / "small.jpg"
    smooth = noise(12, 18).resize((1201, 803), Image.Resampling.BICUBIC)
    smooth.save(large, quality=95, exif=exif)
    noise(150, 200).save(small, quality=95, exif=exif)
    turned = orientation in (6, 8)
    assert image_size(large) == ((803, 1201) if turned else (1201, 803))
    # 803 pixels cover 96 up to 1/8, 150 only at 1/1.
    sizes = ((96, 144), (101, 151)) if turned else ((144, 96), (151, 101))
    assert open_rgb(large, sizes[0]).size == sizes[1]
    assert torch.equal(model.transform(small, draft=True), model.transform(small))
    full, draft = model.transform(large), model.transform(large, draft=True)
    assert full.shape == draft.shape
    assert 0 < (full - draft).abs().mean() < 0.02
    noise(803, 1201).save(tmp_path / "large.png")  # only JPEG files have smaller decodings
    assert torch.equal(*(model.transform(tmp_path / "large.png", draft=value) for value in (False, True)))
