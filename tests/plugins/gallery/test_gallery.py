"""The gallery: one self-contained page with a result of every method and code that repeats it."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from phosphene import InputError, ModelError, UnknownName, load_result, methods, run
from phosphene.builtin.networks import load_network
from phosphene.cli.main import main
from phosphene.images import data_uri
from phosphene.results import Attribution, Result
from phosphene.testing.observation import assert_same_result
from phosphene_plugins.gallery import _gallery_page as gallery
from phosphene_plugins.gallery._gallery_page import Gallery, make_gallery
from phosphene_plugins.pages._single_file_page import is_page, panel_rows, write_page

CALLS = ["saliency", "grad_cam", "pgd"]


@pytest.fixture(scope="module")
def page_gallery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "SCORED_SCENES", 6)
        yield make_gallery(tmp_path_factory.mktemp("gallery") / "new", only=CALLS)


def test_every_method_is_on_the_page(page_gallery: Gallery) -> None:
    assert {e.call for e in page_gallery.exhibits} == set(CALLS)
    assert not any(e.failure for e in page_gallery.exhibits)
    page = html.unescape(page_gallery.page.read_text())
    for exhibit in page_gallery.exhibits:
        assert exhibit.spec.summary in page
        assert all(source.url in page for source in exhibit.spec.references)


def test_page_is_one_self_contained_file(page_gallery: Gallery) -> None:
    page = page_gallery.page.read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert [path.name for path in page_gallery.page.parent.iterdir()] == ["index.html"]


def test_no_image_is_blank(page_gallery: Gallery) -> None:
    page = page_gallery.page.read_text()
    for exhibit in page_gallery.exhibits:
        for panel in (p for row in exhibit.rows for p in row):
            assert data_uri(panel.image) in page
            assert panel.image.std() > 0.01, f"{exhibit.call}: {panel.title!r} is blank"


@pytest.mark.parametrize("call", CALLS)
def test_command_and_python_code_repeat_the_result(
    call: str, page_gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exhibit = next(e for e in page_gallery.exhibits if e.call == call)
    program, *words = shlex.split(exhibit.command)
    assert program == "phosphene"
    assert exhibit.command in re.sub("</?span>", "", html.unescape(page_gallery.page.read_text()))
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    by_command = load_result(Path("phosphene-out", call))
    exec(exhibit.python, names := {})  # the code that a user copies
    assert exhibit.result is not None
    for again in (by_command, load_result(Path("phosphene-out", call)), names["result"]):
        assert_same_result(again, exhibit.result)


def test_attributions_are_scored_on_bundled_scenes(page_gallery: Gallery) -> None:
    assert set(page_gallery.scores) == {"saliency", "grad_cam"}
    for score in page_gallery.scores.values():
        assert score.count == 6
        assert 0 < score.chance_inside < score.chance_near < 1
        assert score.inside <= score.near
    assert page_gallery.scores["grad_cam"].near > page_gallery.scores["grad_cam"].chance_near
    assert "Is the map's maximum on the object?" in page_gallery.page.read_text()


def test_slow_methods_are_scored_on_fewer_scenes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gallery, "SCORED_SCENES", 6)
    monkeypatch.setattr(gallery, "MAX_PASSES", 6)
    assert make_gallery(tmp_path, only=["saliency"]).scores["saliency"].count == 2


def test_defense_has_a_robustness_curve(tmp_path: Path) -> None:
    new_gallery = make_gallery(tmp_path, model="builtin:shapes-resnet", only=["bit_depth"])
    (card,) = new_gallery.exhibits
    assert card.curve is not None and not card.curve.failure
    assert "--model 'defended:bit_depth(bits=2)|builtin:shapes-resnet'" in card.curve.command
    uri = "defended:bit_depth(bits=2)|builtin:shapes-resnet"
    assert uri in new_gallery.page.read_text() and new_gallery.page.read_text().count("<article") == 1


def test_failure_is_on_the_page_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **arguments: Any) -> Result:
        if name == "cam":
            raise ModelError("no <head> at all")
        return run(name, **arguments)

    monkeypatch.setattr(gallery, "run", refuse)
    monkeypatch.setattr(gallery, "SCORED_SCENES", 2)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--out", str(tmp_path), "--only", "cam", "--only", "saliency"])
    assert end.value.code == 1
    output = capsys.readouterr().out
    assert "1 of 2 methods failed: cam" in output
    assert output.splitlines()[-1] == (tmp_path / "index.html").as_uri()
    assert "no &lt;head&gt; at all" in (tmp_path / "index.html").read_text()


def test_networks_get_the_bundled_scenes_of_their_classes() -> None:
    inputs = lambda call, uri: gallery._card_inputs(methods[call].spec, gallery.Source.read(uri, {}, []))[0]
    vgg, parts = "builtin:shapes-vgg", "builtin:parts-resnet"
    dream = {"files": "builtin:part-scenes/2", "size": (128, 128)}
    assert inputs("deep_dream", None) == {"model": parts, "images": dream}
    assert inputs("deep_dream", vgg) == {"model": vgg, "images": dream | {"files": "builtin:scenes/2"}}
    assert inputs("saliency", None) == {}
    assert inputs("saliency", parts) == {"model": parts, "images": "builtin:part-scenes/4"}
    assert inputs("class_visualization", None)["target"][0] == "boat"
    assert inputs("class_visualization", vgg) == {"model": vgg}
    assert inputs("part_importance", None)["dataset"] == "builtin:part-scenes/12"


def test_other_model_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(load_network("shapes-vgg").state_dict(), tmp_path / "other.safetensors")
    settings = {"weights": "other.safetensors", "pretrained": True}
    monkeypatch.setattr(gallery, "SCORED_SCENES", 2)
    new_gallery = make_gallery(
        "page", model="builtin:shapes-vgg", settings=settings, images=["builtin:scenes/2"], only=["saliency"]
    )
    assert not new_gallery.bundled
    (exhibit,) = new_gallery.exhibits
    assert exhibit.command == (
        "phosphene run saliency --model builtin:shapes-vgg --image builtin:scenes/2"
        " --weights other.safetensors --pretrained"
    )
    with pytest.raises(SystemExit) as end:
        main(shlex.split(exhibit.command)[1:])
    assert not end.value.code
    exec(exhibit.python, names := {})
    assert isinstance(exhibit.result, Attribution)
    again = load_result("phosphene-out/saliency")
    assert isinstance(again, Attribution)
    assert torch.equal(again.maps, exhibit.result.maps)
    assert torch.equal(names["result"].maps, exhibit.result.maps)


def test_invalid_arguments_are_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "run", lambda *_, **__: pytest.fail("a method was run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        make_gallery(tmp_path / "file")
    with pytest.raises(InputError, match="no-such"):
        make_gallery(tmp_path / "page", images=["no-such.png"])
    with pytest.raises(UnknownName, match="saliency"):
        make_gallery(tmp_path / "page", only=["salience"])
    with pytest.raises(InputError, match="options of a model"):
        make_gallery(tmp_path / "page", settings={"pretrained": True})
    assert not (tmp_path / "page").exists()


def test_page_that_is_not_the_gallerys_is_refused_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "run", lambda *_, **__: pytest.fail("a method was run"))
    (tmp_path / "index.html").write_text("<!doctype html><p>mine")
    with pytest.raises(InputError, match="was not written by Phosphene"):
        make_gallery(tmp_path)
    assert (tmp_path / "index.html").read_text() == "<!doctype html><p>mine"


def test_pages_are_recognised_also_those_of_earlier_versions(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "phosphene_plugins.pages", "base.html.j2")
    text = (tmp_path / "page.html").read_text()
    generator = re.search("<meta name=.generator.*>\n", text)[0]
    assert is_page(text)
    assert is_page(text.replace(generator, ""))
    assert not is_page("<!doctype html>\n<p>Phosphene is mine, too")


def test_result_with_its_own_figure_is_drawn_by_it() -> None:
    class Chart(Attribution):
        def figure(self) -> Figure:
            figure = Figure(figsize=(3, 2), dpi=50)
            figure.subplots().plot([1, 3, 2])
            return figure

    chart = Chart(images=torch.zeros(1, 3, 4, 4), maps=torch.zeros(1, 4, 4), targets=("x",))
    ((panel,),) = panel_rows(chart)
    assert panel.image.shape == (3, 100, 150)
    assert panel.image.std() > 0.01


# Each in the process of the method's conformance checks: what a library compiles is compiled once.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in sorted(methods.load_all())]
)
def test_every_method_has_a_nonblank_figure(name: str) -> None:
    spec = methods[name].spec
    seed = {} if methods[name].seed is None else {methods[name].seed: 0}  # as in the gallery
    # Classes and concepts need several images of each.
    count = 60 if spec.family in ("comparison", "concepts") else 20
    few = {i.name: f"builtin:scenes/{count}" for i in spec.inputs if i.name in ("dataset", "concepts")}
    few |= {n: v for n, v in spec.demonstration()[0].items() if str(v).startswith("builtin:part-scenes")}
    other = {"other": spec.demo["other"]} if "other" in spec.demo else {}
    result = run(name, progress=False, **few | other, **spec.quick, **seed)
    assert max(panel.image.std() for row in panel_rows(result) for panel in row) > 0.01
