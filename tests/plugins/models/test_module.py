"""``module:`` - the user's own network by its import path, and never by a file's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phosphene import InputError, ModelError, UnknownName, load_model, replay, run
from phosphene.cli.main import main
from phosphene.models import load_saved_model, refuse_user_code
from phosphene.models.loading import loaders

SOURCE = """
from torch import nn
from phosphene import load_model

def build(classes=3, pretrained=False, weights=None):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )
    network.chosen = (pretrained, weights)
    return network

def prepared():
    return load_model(build(), mean=[0.5] * 3, std=[0.25] * 3, input_size=(3, 16, 16), classes=list("abc"))

def fails():
    return {}["absent"]

def number():
    return 3

constant = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder; each test has its own name, for imported modules stay imported."""
    name = f"private_{abs(hash(str(tmp_path)))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return f"{name}.networks"


def test_factory_is_called_with_the_options(package: str) -> None:
    model = load_model(f"module:{package}:build", classes=None, pretrained=True)
    assert model.module.chosen == (True, None)
    assert model.name == f"module:{package}:build"
    assert load_model(f"module:{package}:build", weights="best").module.chosen == (False, "best")
    assert load_model(f"module:{package}:build").source["uri"] == f"module:{package}:build"  # type: ignore[index]


def test_model_of_a_factory_has_its_own_preparation(package: str) -> None:
    model = load_model(f"module:{package}:prepared")
    assert model.classes == ("a", "b", "c") and model.input_size == (3, 16, 16)
    assert model.mean.tolist() == [0.5] * 3


def test_weights_of_a_file_are_loaded_into_the_network(package: str, tmp_path: Path) -> None:
    state = load_model(f"module:{package}:build").module.state_dict()
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "w.pth")
    loaded = load_model(f"module:{package}:build", weights=tmp_path / "w.pth").module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(("attribute", "options", "error", "message"), [
    ("biuld", {}, UnknownName, "did you mean 'build'"),
    ("constant", {}, InputError, "is of type int, and no function that returns a network"),
    ("number", {}, ModelError, "returned an object of type int, not a torch module or a Model"),
    ("fails", {}, ModelError, "raised KeyError: 'absent'"),
    ("build", {"flavour": 3}, InputError, "cannot be built with .*flavour"),
    ("build()", {}, InputError, "must name a module and a function in it"),
    ("", {}, InputError, "must name a module and a function in it"),
])  # fmt: skip
def test_names_and_functions_that_are_wrong_are_refused(
    attribute: str, options: Any, error: Any, message: str, package: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(f"module:{package}:{attribute}", **options)


def test_modules_that_cannot_be_imported_are_refused(package: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no module 'private_absent' in the current folder"):
        load_model("module:private_absent.networks:build")
    folder = package.partition(".")[0]
    (tmp_path / folder / "broken.py").write_text("import private_absent")
    with pytest.raises(ModelError, match="cannot be imported: .* No module named 'private_absent'"):
        load_model(f"module:{folder}.broken:build")
    with pytest.raises(ModelError, match=f"cannot be imported: .* No module named '{folder}.x'"):
        load_model(f"module:{folder}.x:build")


def test_command_line_runs_a_private_network(package: str, tmp_path: Path) -> None:
    arguments = ["run", "saliency", "--model", f"module:{package}:prepared", "--target", "b"]
    arguments += ["--image", "builtin:scenes/2", "--out", str(tmp_path / "map"), "--quiet"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code in (0, None)
    assert (tmp_path / "map" / "result.json").is_file()


# --- files ---------------------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URI whose import would leave a file; the test fails where it exists afterwards."""
    name = f"private_trap_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    yield f"module:{name}:build"
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("wrapper", ["{}", "defended:jpeg()|{}", "ensemble:builtin:shapes-vgg + {}"])
def test_saved_sources_import_nothing(wrapper: str, trap: str) -> None:
    with pytest.raises(InputError, match="may not name what is imported: load the model yourself"):
        load_saved_model({"uri": wrapper.format(trap)})


def test_saved_results_import_nothing(package: str, trap: str, tmp_path: Path) -> None:
    model = load_model(f"module:{package}:build")
    run(
        "saliency", model=model, images=torch.rand(1, 3, 16, 16), target=0, progress=False, out=tmp_path / "r"
    )
    with pytest.raises(InputError, match=f"load_model\\('module:{package}:build'\\)"):
        replay(tmp_path / "r")
    assert replay(tmp_path / "r", model=model).same
    text = (tmp_path / "r" / "result.json").read_text()
    (tmp_path / "r" / "result.json").write_text(text.replace(f"module:{package}:build", trap))
    with pytest.raises(InputError, match="may not name what is imported"):
        replay(tmp_path / "r")


def test_parameters_of_saved_results_import_nothing(trap: str, tmp_path: Path) -> None:
    model = load_model("builtin:shapes-vgg")
    options = {"models": ["builtin:shapes-resnet"], "seed": 0, "steps": 1, "progress": False}
    run("transfer", model=model, images=torch.rand(1, 3, 64, 64), out=tmp_path / "r", **options)
    text = (tmp_path / "r" / "result.json").read_text()
    assert "builtin:shapes-resnet" in text
    (tmp_path / "r" / "result.json").write_text(text.replace("builtin:shapes-resnet", trap))
    with pytest.raises(InputError, match="may not name what is imported"):
        replay(tmp_path / "r")


def test_requests_and_plans_import_nothing(trap: str, tmp_path: Path, capsys: Any) -> None:
    request = {"inputs": {"model": trap, "images": "builtin:scenes/2", "target": 0}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    plan = f"models: ['{trap}']\nimages: ['builtin:scenes/2']\nmethods: [saliency]\n"
    (tmp_path / "plan.yaml").write_text(plan)
    for arguments in (
        ["run", "saliency", "--json", str(tmp_path / "request.json"), "--out", str(tmp_path / "o")],
        ["batch", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "b")],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code not in (0, None)
        captured = capsys.readouterr()
        assert "may not name what is imported" in " ".join((captured.out + captured.err).split())


def test_refusal_ends_with_its_block(package: str) -> None:
    uri = f"module:{package}:build"
    with refuse_user_code(), pytest.raises(InputError, match="imports code"):
        load_model(uri)
    assert isinstance(load_model(uri).module, nn.Sequential)
    assert list(loaders()["module"].names()) == []
