"""Images as people have them: files, folders, patterns, URIs, Pillow images of every mode, and arrays."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageMode
from typer.testing import CliRunner

from phosphene import InputError, UnknownName, load_model, methods, read_images, run
from phosphene.cli.app import app
from phosphene.images import array_images, find_images, read_image, to_rgb

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GRAY = COLORS[..., 0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images of one size, one of another, and a mask."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(COLORS).save("a b.png")
    Image.fromarray(COLORS[::-1]).save("c.png")
    (tmp_path / "wide").mkdir()
    Image.fromarray(np.hstack([COLORS, COLORS])).save("wide/[1].png")
    Image.fromarray(GRAY).save("c.mask.png")
    return tmp_path


def forms(folder: Path) -> dict[str, Any]:
    file = folder / "a b.png"
    return {
        "str": "a b.png",
        "path": file,
        "URI": file.as_uri(),
        "URI with a host": file.as_uri().replace("file://", "file://localhost"),
        "Pillow": Image.open(file),
        "bytes (H, W, C)": COLORS,
        "bytes (N, H, W, C)": COLORS[None],
        "floats": COLORS / 255,
        "big-endian floats": (COLORS / 255).astype(">f4"),
        "reversed twice": COLORS[::-1].copy()[::-1],
        "pattern": "a*.png",
        "list": ["a b.png"],
        "tensor": read_image(file)[None],
        "list of tensors": [read_image(file)],
        "mapping": {"files": "a b.png"},
    }


@pytest.mark.parametrize("form", [
    "str", "path", "URI", "URI with a host", "Pillow", "bytes (H, W, C)", "bytes (N, H, W, C)", "floats",
    "big-endian floats", "reversed twice", "pattern", "list", "tensor", "list of tensors", "mapping",
])  # fmt: skip
def test_every_form_of_an_image_has_the_same_pixels(form: str, folder: Path) -> None:
    images = read_images(forms(folder)[form])
    torch.testing.assert_close(images, torch.from_numpy(COLORS).permute(2, 0, 1)[None] / 255)
    assert images.dtype == torch.float32


def test_forms_can_be_mixed_in_a_list(folder: Path) -> None:
    values = [*forms(folder).values()]
    values = [value for value in values if not isinstance(value, (list, dict))]
    assert len(read_images(values)) == len(values)


@pytest.mark.parametrize("name", ["deep_dream", "jpeg", "fast_style", "saliency"])
def test_methods_accept_arrays_and_pillow_images(name: str) -> None:
    image = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    quick = dict(methods[name].spec.quick) | ({"seed": 0} if methods[name].seed else {})
    expected = run(name, images=torch.from_numpy(image).permute(2, 0, 1)[None] / 255, **quick)
    for value in (image, Image.fromarray(image), [Image.fromarray(image)]):
        result = run(name, images=value, **quick)
        for (field, first), (_, second) in zip(result.fields(), expected.fields(), strict=True):
            if isinstance(first, torch.Tensor):
                assert torch.equal(first, second), field


def test_patterns_folders_and_masks(folder: Path) -> None:
    assert read_images(["a b.png", "c.png"]).shape == read_images("*.png").shape == (2, 3, 12, 10)
    assert read_images("**/*.png", size=8).shape == (3, 3, 8, 8)
    assert read_images("wide/[1].png").shape == (1, 3, 12, 20)  # a file whose name is a pattern, too
    assert [path.name for path in find_images(folder.as_uri())] == ["a b.png", "c.png", "[1].png"]
    with pytest.raises(InputError, match=r"no image matches the pattern 'x\*'"):
        read_images("x*")
    with pytest.raises(InputError, match="matches 1 other"):
        read_images("c.mask*")


def test_images_of_different_sizes_are_read_at_one_size(folder: Path) -> None:
    quick = methods["deep_dream"].spec.quick
    assert run("deep_dream", images={"files": ".", "size": (16, 24)}, **quick).images.shape == (3, 3, 16, 24)
    options = [f"--{name}={value}" for name, value in quick.items()]
    arguments = ["run", "deep_dream", "--image", ".", "--image-size", "16,24", "--out", "out", *options]
    assert CliRunner().invoke(app, arguments, obj={"debug": False}).exit_code == 0
    assert len(list(Path("out/pictures").iterdir())) == 3


@pytest.mark.parametrize("name", sorted(n for n in methods if methods[n].spec.input("images")))
def test_methods_that_take_images_have_the_option_image_size(name: str, folder: Path) -> None:
    from phosphene.cli.run import _options

    assert any(option.name == "_image_size" for option in _options(methods[name].spec))


def test_size_covers_and_crops_the_center() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert read_images(Image.fromarray(wide), size=10).min() > 0.9
    for bad in ("x", 0, -3, True, (4, 5, 6), 1e9):
        with pytest.raises(InputError, match="an image size is"):
            read_images(Image.fromarray(wide), size=bad)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean 'files'"):
        read_images({"file": "a.png"})


# ------------------------------------------------------------------ arrays


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4), (2, 5, 6, 3), (2, 3, 5, 6)])
def test_array_layouts(shape: tuple[int, ...]) -> None:
    images = array_images(RNG.random(shape))
    assert images.shape == (shape[0] if len(shape) == 4 else 1, 3, 5, 6)


def test_channels_of_the_model_decide_between_layouts() -> None:
    array = RNG.random((5, 6, 7))
    assert array_images(array, 7).shape == (1, 7, 5, 6)
    assert array_images(array[..., 0], 1).shape == (1, 1, 5, 6)
    with pytest.raises(InputError, match=r"C of 7, not \(5, 6\)"):
        array_images(array[..., 0], 7)


@pytest.mark.parametrize(
    ("array", "readings"),
    [
        (np.zeros((3, 3, 3)), (r"\(H, W, C\)", r"\(C, H, W\)")),
        (np.zeros((3, 8, 9)), (r"\(C, H, W\)", r"\(N, H, W\)")),
        (np.zeros((2, 3, 8, 3)), (r"\(N, H, W, C\)", r"\(N, C, H, W\)")),
        (np.ones((4, 5, 3), np.uint8), ("bytes", "0 and 1")),
        (np.full((4, 5, 3), 7), ("255", "65535")),
        (np.full((4, 5, 3), 7, np.uint16), ("255", "65535")),
    ],
)
def test_arrays_with_two_readings_are_refused_with_both(array: Any, readings: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=".*".join(readings)) as caught:
        read_images(array)
    assert "array(" not in str(caught.value) and "[[" not in str(caught.value)


def test_channels_last_tensors_are_refused_with_the_permutation() -> None:
    model = load_model("builtin:shapes-vgg")
    for value in (torch.zeros(2, 64, 64, 3), torch.zeros(2, 64, 64, 3, dtype=torch.uint8)):
        with pytest.raises(InputError, match=r"permute\(0, 3, 1, 2\)"):
            run("saliency", model=model, images=value)
        with pytest.raises(InputError, match=r"permute\(0, 3, 1, 2\)"):
            run("fast_style", images=value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("http://host/a.png", "scheme 'http'"),
        ("s3://host/a.png", "scheme 's3'"),
        ("file://host/a.png", "host 'host'"),
        ("a\0b", "NUL"),
        (3, "not 3"),
        ([[0.5]], "not a list"),
        ([None], "not None"),
        (np.array(["a"]), "not <U1"),
        (np.zeros((0, 4, 3)), "is empty"),
        (np.full((5, 5, 3), 255.0), r"lie in \[255, 255\]"),
        (np.full((5, 5, 3), np.nan), "not all finite"),
        (np.zeros((5, 5, 5)), "C of 1, 3, 4"),
        ([torch.zeros(4, 4)], r"not \(4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_images(value)


def test_mask_arrays(folder: Path) -> None:
    masks = np.zeros((1, 64, 64), bool)
    masks[:, 20:40, 20:40] = True
    expected = run("saliency_segmentation", images="builtin:scenes/1", masks=masks).inputs["masks"]
    assert torch.equal(expected, torch.from_numpy(masks))
    for value in (masks[0], masks * np.uint8(255), masks.astype(int)):
        again = run("saliency_segmentation", images="builtin:scenes/1", masks=value)
        assert torch.equal(again.inputs["masks"], expected)
    for bad in (masks * 0.3, masks * np.uint8(7), masks[0, 0]):
        with pytest.raises(InputError, match="a mask array"):
            run("saliency_segmentation", images="builtin:scenes/1", masks=bad)


# ------------------------------------------------------------------ Pillow modes

ALPHA = np.full((12, 10), 128, np.uint8)
ALPHA[:6] = 255


def image_of(mode: str) -> tuple[Image.Image, np.ndarray]:
    """An image of a mode and the RGB bytes that it is read as."""
    rgb, gray = Image.fromarray(COLORS), np.repeat(GRAY[..., None], 3, 2)
    match mode:
        case "1":
            return Image.fromarray(GRAY > 99), np.where(gray > 99, 255, 0)
        case "L":
            return Image.fromarray(GRAY), gray
        case "LA" | "La":
            image = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)])
            return (image, gray) if mode == "LA" else (image.convert("La"), gray)
        case "P" | "PA":
            palette = rgb.quantize(16)
            return palette if mode == "P" else palette.convert("PA"), np.asarray(palette.convert("RGB"))
        case "RGB" | "RGBX":
            return rgb.convert(mode), COLORS
        case "RGBA" | "RGBa":
            image = Image.merge("RGBA", [*rgb.split(), Image.fromarray(ALPHA)])
            return image.convert(mode), COLORS
        case "CMYK":
            return rgb.convert("CMYK"), COLORS
        case "YCbCr" | "HSV":
            return rgb.convert(mode), COLORS
        case "LAB":  # colors inside the gamut that 8 bits of L*, a* and b* describe
            return Image.fromarray(COLORS // 4 + 90).convert(mode), COLORS // 4 + 90
        case "F":
            return Image.fromarray(GRAY.astype(np.float32) / 255), gray
    dtype = ">u2" if mode == "I;16B" else "<u2"
    deep = GRAY.astype(dtype) * 257 + 100 * (GRAY < 255)
    return Image.frombytes(mode, (10, 12), deep.astype(dtype).tobytes()), gray


#: Largest difference in levels: conversions that round, or divide by alpha.
TOLERANCE = {"YCbCr": 3, "HSV": 5, "LAB": 4, "La": 1, "RGBa": 1}


@pytest.mark.parametrize("mode", [m for m in Image.MODES if m != "I"])
def test_every_pillow_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    image, expected = image_of(mode)
    assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(to_rgb(image)).astype(int)
    assert np.abs(pixels - expected).max() <= TOLERANCE.get(mode, 0)
    assert torch.equal(read_images(image)[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)


def test_modes_without_a_defined_white_are_refused_with_both_readings() -> None:
    with pytest.raises(InputError, match="255.*65535"):
        read_images(Image.new("I", (3, 4)))
    for value in (1.5, -0.1, np.nan):
        image = Image.fromarray(np.full((4, 5), value, np.float32))
        with pytest.raises(InputError, match=r"mode F must lie in \[0, 1\]"):
            read_images(image)


def test_the_docs_have_a_rule_for_every_pillow_mode() -> None:
    text = (Path(__file__).parents[2] / "docs" / "images-and-data.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    documented = {mode for row in rows for mode in row.split("`")[1::2]}
    assert {m for m in Image.MODES} <= documented
    assert all(ImageMode.getmode(mode) for mode in Image.MODES)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_files_and_pillow_images(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLORS).save(tmp_path / "a.png", exif=exif)
    turn = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }[orientation]  # fmt: skip
    expected = torch.from_numpy(turn(COLORS).copy()).permute(2, 0, 1) / 255
    assert torch.equal(read_image(tmp_path / "a.png"), expected)
    assert torch.equal(read_images(Image.open(tmp_path / "a.png"))[0], expected)


def test_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    palette = Image.fromarray(COLORS).quantize(8)
    palette.save(tmp_path / "a.png", transparency=bytes([0, 255, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "a.png")
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1) / 255
    assert torch.equal(pixels, expected)
