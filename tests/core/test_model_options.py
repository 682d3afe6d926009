"""Options of the command line that describe a model, and what the command line says about random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import InputError, UnknownName, load_model, load_result, run
from phosphene.cli.main import main
from phosphene.cli.model_options import read_class_names

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, {columns}))
"""


def command(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    assert stop.value.code in (0, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for columns in (1, 3):
        (tmp_path / f"own_network_{columns}.py").write_text(NETWORK.format(columns=columns))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_task_classes_and_normalization_of_a_model(folder: Path) -> None:
    options = ["--model-task", "binary", "--model-classes", "ill", "--model-mean", "0.5,0.4,0.3"]
    options += ["--model-std", "0.2,0.2,0.2", "--image", "builtin:scenes/1"]
    command("run", "saliency", "--model", "module:own_network_1:build", *options, "--out", "out")
    result: Any = load_result(folder / "out")
    assert result.targets[0] in ("ill", "not ill")
    source = result.provenance.model["source"]
    assert source["mean"] == [0.5, 0.4, 0.3] and source["task"] == "binary"
    (folder / "names.txt").write_text("cat, kitten\n\ndog\neel\n")
    options = ["--model-classes", "names.txt", "--target", "kitten", "--image", "builtin:scenes/1"]
    command("run", "saliency", "--model", "module:own_network_3:build", *options, "--out", "out")
    named: Any = load_result(folder / "out")
    assert named.targets == ("cat, kitten",)


def test_export_takes_the_options_of_a_model(folder: Path) -> None:
    options = ["--model-task", "binary", "--model-mean", "0.5,0.5,0.5"]
    command("export", "module:own_network_1:build", "own.pt2", *options)
    images = torch.rand(2, 3, 224, 224)
    assert torch.export.load(folder / "own.pt2").module()(images=images).shape == (2, 1)
    run("saliency", images="builtin:scenes/1", out="result")
    with pytest.raises(SystemExit):
        main(["export", "result", "own.pt2", "--model-task", "binary"])


def test_class_names_are_a_file_a_list_or_imagenet(folder: Path) -> None:
    assert read_class_names("cat, dog") == ["cat", "dog"] and read_class_names("ill") == ["ill"]
    assert read_class_names("imagenet") == "imagenet"
    for missing in ("names.txt", "lists/names"):
        with pytest.raises(InputError, match="there is no file of class names"):
            read_class_names(missing)
    (folder / "imagenet").write_text("cat\n")
    with pytest.raises(InputError, match="write --model-classes ./imagenet"):
        read_class_names("imagenet")
    assert read_class_names("./imagenet") == ["cat"]


def test_random_weights_are_reported_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--models", "timm:test_vit", "--steps", 1, "--image", "builtin:scenes/1", "--quiet"]
    command("run", "ensemble_evaluation", "--model", "timm:test_vit", *options)
    reported = "phosphene: the weights of timm:test_vit are random; --pretrained loads its published weights"
    assert capsys.readouterr().err.count(reported) == 1
    command("layers", "torchvision:squeezenet1_0")
    assert "the weights of torchvision:squeezenet1_0 are random" in capsys.readouterr().err
    command("layers", "builtin:shapes-vgg")
    assert not capsys.readouterr().err
    load_model("timm:test_vit")  # nothing is printed from Python
    assert not capsys.readouterr().err


def test_find_names_the_nearest_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["find", "saliensy"])
    captured = capsys.readouterr()
    assert "did you mean 'saliency'" in captured.err and not captured.out


def test_unknown_options_of_figures_name_the_nearest() -> None:
    result = run("saliency", images="builtin:scenes/1")
    for option in ("colour", "colormap", "color"):
        with pytest.raises(InputError, match="did you mean 'cmap'"):
            result.figure(**{option: "viridis"})  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean 'columns'"):
        result.figure(column=2)


def test_output_of_a_regression_that_does_not_exist() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    model = load_model(network, input_size=(3, 2, 2), task="regression")
    with pytest.raises(InputError, match="output 5 does not exist: .* has 2 outputs"):
        run("saliency", model=model, images=torch.rand(1, 3, 2, 2), target=5)
