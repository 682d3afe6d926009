"""Images of different sizes: a result for each, in order, from Python and from the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from phosphene import InputError, load_model, load_result, replay, run
from phosphene.cli.main import main
from phosphene.results import ResultSequence

#: (width, height) of three images.
SIZES = [(48, 40), (36, 52), (48, 40)]
DREAM: dict[str, Any] = {"model": "builtin:shapes-resnet", "octaves": 1, "steps": 1, "seed": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, size in zip("cab", SIZES, strict=True):
        pixels = torch.rand(size[1], size[0], 3, generator=torch.Generator().manual_seed(ord(name)))
        Image.fromarray((pixels * 255).byte().numpy()).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def network() -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return load_model(nn.Sequential(*layers, nn.Linear(6, 3)), classes=["a", "b", "c"])


def test_files_of_their_own_size_have_a_result_each(folder: Path, tmp_path: Path) -> None:
    results = run("deep_dream", images=folder, out=tmp_path / "out", **DREAM)
    assert isinstance(results, ResultSequence) and len(results) == 3
    assert [tuple(result.images.shape) for result in results] == [  # type: ignore[attr-defined]
        (1, 3, 52, 36), (1, 3, 40, 48), (1, 3, 40, 48)
    ]  # fmt: skip
    for number, file in enumerate(sorted(folder.iterdir())):
        alone = run("deep_dream", images=file, **DREAM)
        assert torch.equal(alone.images, results[number].images)  # type: ignore[attr-defined]
        saved = load_result(tmp_path / "out" / f"00{number}")
        assert saved.provenance is not None and saved.provenance.files == (str(file),)
    assert replay(tmp_path / "out/001").same
    assert len(results.lines()) == 3 and results.lines()[2].startswith("002")
    assert results.figure().axes and "3 results" in repr(results)
    table = results.table()
    assert table["image"] == [0, 1, 2] and table["file"] == [str(folder / f"{n}.png") for n in "abc"]
    run("deep_dream", images=folder, out=tmp_path / "out", **DREAM)  # an earlier result is replaced


def test_labels_and_targets_belong_to_their_images() -> None:
    model, images = network(), [torch.rand(1, 3, 20, 24), torch.rand(1, 3, 16, 16)]
    maps = run("saliency", model=model, images=images, target=["b", "c"])
    assert isinstance(maps, ResultSequence)
    for result, image, target in zip(maps, images, ("b", "c"), strict=True):
        alone = run("saliency", model=model, images=image, target=target)
        assert torch.equal(result.maps, alone.maps)  # type: ignore[attr-defined]
    attacked = run("fgsm", model=model, images=images, labels=["b", "a"])
    assert isinstance(attacked, ResultSequence)
    assert [int(result.labels) for result in attacked] == [1, 0]  # type: ignore[attr-defined]
    assert run("grad_cam", model=model, images=images).table()["targets"] == [
        *(model.classes[int(model(image).argmax())] for image in images),
    ]
    with pytest.raises(InputError, match="2 images need one class, or one each|class"):
        run("saliency", model=model, images=images, target=["a", "b", "c"])


def test_one_result_of_all_images_needs_one_size(folder: Path) -> None:
    model, images = network(), [torch.rand(1, 3, 20, 24), torch.rand(1, 3, 16, 16)]
    with pytest.raises(InputError, match=r"transfer computes one result of all its images.*--image-size 256"):
        run("transfer", model=model, images=images)
    result = run("transfer", model=network(), images={"files": folder, "size": 16}, steps=1)
    assert result.images.shape == (3, 3, 16, 16)  # type: ignore[attr-defined]


def test_a_model_of_one_size_takes_a_folder_as_a_batch(folder: Path) -> None:
    result = run("grad_cam", model="builtin:shapes-vgg", images=folder)
    assert result.table()["file"] == [str(folder / f"{n}.png") for n in "abc"]


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "builtin:shapes-resnet", "--octaves", "1", "--steps", "1", "--seed", "0"]
    with pytest.raises(SystemExit) as stop:
        main(["run", "deep_dream", "--image", str(folder), *words, "--out", str(tmp_path / "out")])
    assert stop.value.code in (0, None)
    printed = capsys.readouterr().out
    assert printed.count("saved in") == 1 and f"{tmp_path / 'out'}/000" in printed
    assert len(list((tmp_path / "out").glob("*/picture.png"))) == 3
