"""Images: files, scaling, color maps, overlays and resizing."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from phosphene import images as im
from phosphene.errors import InputError

few = settings(max_examples=30, deadline=None)
numbers = st.floats(-1e6, 1e6, width=32)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ files


def test_png_round_trip_is_exact_to_half_a_level(tmp_path: Path) -> None:
    image = rand(3, 5, 7)
    im.write_png(image, tmp_path / "a.png")
    loaded = im.read_image(tmp_path / "a.png")
    assert loaded.dtype == torch.float32 and loaded.shape == (3, 5, 7)
    assert (loaded - image).abs().max() <= 0.5 / 255 + 1e-6
    im.write_png(loaded, tmp_path / "b.png")
    assert torch.equal(im.read_image(str(tmp_path / "b.png")), loaded)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_read_image_handles_exif_alpha_palette_and_16_bits(tmp_path: Path) -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    array[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise for display
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    rotated = im.read_image(tmp_path / "turned.png")
    assert rotated.shape == (3, 6, 4) and (rotated[:, 0, 3] == 1).all() and rotated.sum() == 3
    Image.fromarray(np.dstack([array, array[..., :1]])).save(tmp_path / "alpha.png")
    assert im.read_image(tmp_path / "alpha.png").shape == (3, 4, 6)
    Image.fromarray(array).convert("P").save(tmp_path / "palette.gif")
    assert im.read_image(tmp_path / "palette.gif").shape == (3, 4, 6)
    deep = (np.arange(24).reshape(4, 6) * 2849).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    values = im.read_image(tmp_path / "deep.png")[0].numpy()
    np.testing.assert_allclose(values, deep / 65535, atol=1 / 255)


def test_mp4_has_the_order_size_and_frame_rate(tmp_path: Path) -> None:
    from imageio.v3 import immeta, imread

    images = [torch.full((3, 33, 48), 0.2 * (n + 1)) for n in range(4)]
    im.write_mp4(images, tmp_path / "film.mp4", seconds=0.25)
    frames = imread(tmp_path / "film.mp4")
    assert frames.shape == (4, 34, 48, 3)  # padded to even sides
    np.testing.assert_allclose(frames.mean((1, 2, 3)) / 255, [0.2, 0.4, 0.6, 0.8], atol=0.02)
    assert immeta(tmp_path / "film.mp4")["fps"] == 4


def test_unreadable_files_are_input_errors(tmp_path: Path) -> None:
    im.write_png(rand(3, 40, 40), tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    for name in ("missing.png", "text.png", "empty.png", "half.png", "."):
        with pytest.raises(InputError) as caught:
            im.read_image(tmp_path / name)
        assert repr(os.fspath(tmp_path / name)) in str(caught.value)


def test_find_images_is_recursive_and_sorted(tmp_path: Path) -> None:
    for name in ("b/x.PNG", "a.jpg", "b/a.webp", "notes.txt", ".hidden.png", "b/.cache/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / "a.jpg", tmp_path / "b/a.webp", tmp_path / "b/x.PNG"]
    assert im.find_images(tmp_path) == expected
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"\.jpeg.*\.png"):
        im.find_images(tmp_path / "none")
    with pytest.raises(InputError, match="no folder"):
        im.find_images(tmp_path / "nowhere")


def test_data_uri_and_gray_images() -> None:
    image = rand(3, 4, 5)
    head, body = im.data_uri(image).split(",")
    opened = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/png;base64" and opened.format == "PNG"
    assert np.array_equal(np.asarray(opened), np.asarray(im.to_pil(image)))
    gray = np.asarray(im.to_pil(torch.full((1, 2, 2), 0.5)))
    assert np.array_equal(gray, np.full((2, 2, 3), 128))


# ------------------------------------------------------------------ scaling and colors


@given(st.lists(numbers, min_size=4, max_size=4))
@few
def test_min_max_is_in_range_and_attains_0_and_1(values: list[float]) -> None:
    maps = torch.tensor([values, [v + 7 for v in values]]).view(2, 2, 2)
    scaled = im.min_max(maps)
    assert scaled.isfinite().all() and scaled.min() >= 0 and scaled.max() <= 1
    if max(values) > min(values):
        assert scaled.min() == 0 and scaled.max() == 1


def test_min_max_of_constant_maps_and_dims() -> None:
    constant = torch.full((2, 3, 3), 4.2)
    assert torch.equal(im.min_max(constant), torch.zeros_like(constant))
    maps = torch.tensor([[[0.0, 1.0]], [[0.0, 4.0]]])
    assert torch.equal(im.min_max(maps), torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]))
    filters = rand(2, 3, 4, 4) - 0.5
    together = im.min_max(filters, (1, 2, 3))
    assert (together.amax((1, 2, 3)) == 1).all() and (together.amax((2, 3)) == 1).sum() == 2
    assert im.min_max(torch.tensor([[0, 5]])).tolist() == [[0, 1]]


@pytest.mark.parametrize("cmap", ["viridis", "turbo", "RdBu_r", "gray"])
def test_colorize_equals_matplotlib(cmap: str) -> None:
    maps = rand(2, 5, 6) * 1.5 - 0.25
    colored = im.colorize(maps, cmap)
    for color, values in zip(colored, maps, strict=True):
        expected = matplotlib.colormaps[cmap](values.clamp(0, 1).numpy())[..., :3]
        np.testing.assert_allclose(color.permute(1, 2, 0), expected, atol=1e-6)
    assert torch.equal(im.colorize(maps[0], cmap), colored[0])
    assert colored.min() >= 0 and colored.max() <= 1


def test_symmetric_maps_zero_to_one_half() -> None:
    map_ = torch.tensor([[-1.0, 0.0], [0.5, 0.25]])
    assert im.symmetric(map_).tolist() == [[0, 0.5], [0.75, 0.625]]
    assert torch.equal(im.symmetric(torch.stack([map_, 3 * map_]))[1], im.symmetric(map_))
    assert torch.equal(im.symmetric(torch.zeros(2, 2)), torch.full((2, 2), 0.5))


def test_overlay_blends_the_image_in_gray_and_resizes() -> None:
    image, heat = rand(3, 8, 6), rand(8, 6, seed=1)
    color = im.colorize(heat, "turbo")
    gray = 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    opacity = torch.where(heat < 0.25, 2 * heat, 0.5)
    assert (opacity < 0.5).any()
    torch.testing.assert_close(im.overlay(image, heat), (1 - opacity) * gray + opacity * color)
    torch.testing.assert_close(im.overlay(image[:1], heat), (1 - opacity) * image[:1] + opacity * color)
    small = rand(3, 3, seed=2)
    large = torch.nn.functional.interpolate(small[None, None], (8, 6), mode="bilinear")[0, 0]
    torch.testing.assert_close(im.overlay(image, small), im.overlay(image, large))


def test_overlay_shows_the_image_in_gray_where_the_heat_is_0() -> None:
    gray = rand(1, 4, 4)
    assert torch.equal(im.overlay(gray, torch.zeros(2, 2)), gray.expand(3, 4, 4))


def test_overlay_shows_a_value_in_the_same_hue_on_every_color() -> None:
    teal, red = torch.tensor([0.0, 0.7, 0.6]), torch.tensor([0.8, 0.1, 0.1])
    hot = torch.ones(4, 4)
    for color in (teal, red):
        r, g, b = im.overlay(color[:, None, None].expand(3, 4, 4), hot)[:, 0, 0]
        assert r - b > 0.2 and r - g > 0.2  # the end of turbo is dark red


# ------------------------------------------------------------------ shapes


def test_to_display_accepts_any_number_of_channels() -> None:
    for channels in (1, 2, 3, 5):
        image = rand(channels, 3, 4) * 3 - 1
        displayed = im.to_display(image.requires_grad_())
        assert displayed.shape == (3, 3, 4) and not displayed.requires_grad
        for c in range(3):
            source = image[0] if channels == 1 else image[c] if c < channels else torch.zeros(3, 4)
            assert torch.equal(displayed[c], source.detach().clamp(0, 1))
    for bad in (rand(2, 3, 4, 4), rand(4, 4), rand(3, 0, 4), torch.full((3, 2, 2), torch.nan)):
        with pytest.raises(InputError):
            im.to_display(bad)


def test_enlarge_repeats_pixels() -> None:
    image = rand(2, 3, 4, 5)
    enlarged = im.enlarge(image, 3)
    assert torch.equal(enlarged, image.repeat_interleave(3, -1).repeat_interleave(3, -2))


def test_resize_equals_torchvision_and_is_differentiable() -> None:
    from torchvision.transforms.v2 import functional as torchvision_transforms

    images = rand(2, 3, 20, 31)
    for size in ([10, 12], [40, 50]):
        resized = im.resize(images, (size[0], size[1]))
        torch.testing.assert_close(resized, torchvision_transforms.resize(images, size, antialias=True))
    assert torch.equal(im.resize(images[0], (10, 12)), im.resize(images, (10, 12))[0])
    assert torch.equal(im.resize(images, (20, 31)), images)
    leaf = images.clone().requires_grad_()
    im.resize(leaf, (8, 8)).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    extremes = (rand(1, 3, 33, 33) > 0.5).float()
    assert im.resize(extremes, (50, 50)).max() <= 1
