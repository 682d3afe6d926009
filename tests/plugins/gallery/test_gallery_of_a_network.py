"""The gallery of a network of other classes than the bundled scenes', with a folder of images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phosphene import (
    DivergenceError,
    InputError,
    UnknownName,
    load_model,
    load_result,
    methods,
    read_images,
    run,
)
from phosphene.cli.main import main
from phosphene.images import write_png
from phosphene.models import Model
from phosphene.results import Result
from phosphene.testing.observation import assert_same_result
from phosphene_plugins.gallery import _gallery_page as gallery
from phosphene_plugins.gallery._gallery_page import Exhibit, Source, make_exhibit, make_gallery


def random_network() -> Model:
    """Eight feature maps, pooled and classified by a convolution, without a linear layer."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return load_model(network, input_size=(3, 24, 24), classes=["oak", "elm", "ash", "fir", "yew"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of different sizes without classes."""
    (tmp_path / "trees").mkdir()
    generator = torch.Generator().manual_seed(1)
    for n in range(5):
        write_png(torch.rand(3, 30 + n, 26, generator=generator), tmp_path / "trees" / f"{n}.png")
    return tmp_path / "trees"


@pytest.fixture
def source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(gallery, "load_model", lambda uri, **_: random_network())
    return Source.read("test:trees", {}, [str(folder)])


@pytest.mark.parametrize("images", [True, False])
def test_no_card_uses_networks_or_scenes_of_the_bundled_gallery(source: Source, images: bool) -> None:
    if not images:
        source = Source(source.model, source.uri)
    for call in methods.load_all():
        method = methods[call]
        inputs, lacking = gallery._card_inputs(method.spec, source)
        params = gallery._demo_parameters(method, source)
        text = str([inputs, params])
        assert "builtin:shapes" not in text and "biased" not in text, call
        for declared in method.spec.inputs if not lacking else ():
            value = inputs.get(declared.name)
            if images and declared.role in ("images", "dataset") and value != "builtin:textures/64":
                assert "trees" in str(value), f"{call}: {declared.name}={value}"
        if method.spec.input("model"):
            assert not {*method.layers, "channels"} & params.keys(), call


def test_lengths_in_pixels_are_those_of_the_demo_only_with_images_of_its_size(source: Source) -> None:
    for call in methods.load_all():
        spec = methods[call].spec
        params = gallery._demo_parameters(methods[call], source) if spec.input("model") else {}
        for name in params:
            description = spec.params.model_fields[name].description or ""
            assert not any(words in description for words in (" in pixels", "pixels between")), (call, name)


def test_radius_of_an_attack_is_at_most_the_default(source: Source) -> None:
    parameters = {call: gallery._demo_parameters(methods[call], source) for call in methods.load_all()}
    radii = {call: values["eps"] for call, values in parameters.items() if "eps" in values}
    assert "attacks.universal" not in radii and radii["robustness.auto_attack"] == 2 / 255
    for call, eps in radii.items():
        default = methods[call].spec.params.model_fields["eps"].default
        assert isinstance(eps, list) or eps <= default, call
    bundled = gallery._demo_parameters(methods["universal"], Source(load_model("builtin:shapes-vgg"), None))
    assert bundled["eps"] == 0.2


def test_networks_and_data_sets_that_only_the_bundled_gallery_has_are_named(source: Source) -> None:
    calls = [methods[name].spec.short_name for name in methods.load_all()]
    lacking = {call for call in calls if gallery._card_inputs(methods[call].spec, source)[1]}
    assert lacking == {
        *("adaptive_style", "answer_attribution", "diffusion_style", "fast_style", "fast_style_add"),
        "predicted_style",
        *("instant_style", "ip_adapter", "style_aligned", "style_diffusion"),
        *("latent_visualization", "model_difference", "name_units", "question_attack", "set_distance"),
        *("sparse_autoencoder", "style_augmentation", "wct"),
    }


def test_command_makes_a_gallery_of_a_network_and_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []
    monkeypatch.setattr(gallery, "load_model", lambda *a, **k: loaded.append((a, k)) or random_network())
    exhibits: dict[str, Exhibit] = {}

    def record(call: str, source: Source) -> Exhibit:
        exhibits[call] = make_exhibit(call, source)
        return exhibits[call]

    monkeypatch.setattr(gallery, "make_exhibit", record)
    ran = ["saliency", "top_patches", "pca", "penalized_target", "deletion_insertion"]
    refused = ["linear_probe", "attention_maps", "fast_style", "set_distance"]
    words = [word for call in [*ran, *refused] for word in ("--only", call)]
    options = ["--model", "test:trees", "--weights", "NAME", "--image", str(folder), "--count", "3"]
    with pytest.raises(SystemExit) as end:
        main(["demo", *options, *words, "--out", str(tmp_path / "page")])
    assert not end.value.code
    assert loaded == [(("test:trees",), {"weights": "NAME"})]
    assert {call for call, e in exhibits.items() if e.failure} == {*refused}
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count('class="failure"') == len(refused)
    assert "bundled images" not in page and "drawn scenes" not in page
    assert "4 of 9 methods did not run" in capsys.readouterr().out

    saliency, patches, pca, towards, score = (exhibits[call] for call in ran)
    assert [str(folder / f"{n}.png") for n in range(3)] == [
        word for word in shlex.split(saliency.command) if word.endswith(".png")
    ]
    assert f"--dataset {folder}" in patches.command and "--layer" not in patches.command
    assert "--layer 4" in pca.command  # without a linear classifier: the last layer with feature maps
    assert "--target predicted" in score.command
    model = random_network()
    predicted = model(read_images(str(folder / "0.png"), model)).argmax()
    assert f"--labels {(int(predicted) + 1) % 5}" in towards.command
    assert "one folder per class" in exhibits["linear_probe"].failure
    assert "attention" in exhibits["attention_maps"].failure
    assert "pass --stylizer, a folder of a network" in exhibits["fast_style"].failure
    assert "--stylizer FOLDER" in exhibits["fast_style"].command
    assert "pass --other, a folder of images" in exhibits["set_distance"].failure


def test_classes_without_images_are_those_predicted_for_the_images(source: Source) -> None:
    inputs, _ = gallery._card_inputs(methods["class_visualization"].spec, source)
    assert inputs["target"] == list(dict.fromkeys(source.predicted))
    assert len(source.predicted) == 4


def test_name_that_the_network_refuses_is_left_at_its_default(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: str, **arguments: Any) -> Result:
        if "rule" in arguments:
            raise UnknownName("rule", arguments["rule"], ["epsilon"])
        return run(call, **arguments)

    monkeypatch.setattr(gallery, "run", refuse)
    exhibit = make_exhibit("lrp", source)
    assert not exhibit.failure and "--rule" not in exhibit.command
    bundled = make_exhibit("lrp", Source(load_model("builtin:shapes-vgg")))  # its demo must run as it is
    assert "no rule 'composite'" in bundled.failure


def test_start_without_a_gradient_is_drawn_with_another_seed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: str, **arguments: Any) -> Result:
        if arguments["seed"] == 0:
            raise DivergenceError("the gradient is zero at every pixel")
        return run(call, **arguments)

    monkeypatch.setattr(gallery, "run", refuse)
    exhibit = make_exhibit("occlusion", source)
    assert not exhibit.failure and "--seed 1" in exhibit.command


def test_images_of_different_sizes_are_read_in_the_networks_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = make_gallery("page", model="builtin:shapes-resnet", images=["trees"], count=2, only=["deep_dream"])
    (exhibit,) = new.exhibits
    assert not exhibit.failure and "--image-size 64,64" in exhibit.command
    with pytest.raises(SystemExit) as end:
        main(shlex.split(exhibit.command)[1:])
    assert not end.value.code
    exec(exhibit.python.replace("phosphene-out", "again"), {})
    for saved in ("phosphene-out/deep_dream", "again/deep_dream"):
        assert exhibit.result is not None
        assert_same_result(load_result(saved), exhibit.result)


def test_network_without_images_of_its_kind_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "load_model", lambda *_, **__: random_network())
    new = make_gallery(tmp_path, model="test:trees", only=["saliency"])
    assert "no classes of this network" in new.warning
    assert "no classes of this network" in new.page.read_text()


def test_interrupted_gallery_has_the_cards_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(call: str, source: Source) -> Exhibit:
        if call == "saliency":
            raise KeyboardInterrupt
        return make_exhibit(call, source)

    monkeypatch.setattr(gallery, "make_exhibit", interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        make_gallery(tmp_path, only=["grad_cam", "saliency"])
    assert error.value.__notes__ == [
        f"interrupted; the page has 1 method: {(tmp_path / 'index.html').resolve().as_uri()}"
    ]
    text = (tmp_path / "index.html").read_text()
    assert text.count("<article") == 1
    assert f"1 of {len(methods.plugins)} registered methods (the run was interrupted), run on" in text


def test_folder_without_images_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "run", lambda *_, **__: pytest.fail("a method was run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no images"):
        make_gallery(tmp_path / "page", images=[str(tmp_path / "empty")])
