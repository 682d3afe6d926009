"""Pages of the book with code: the code runs, and its results match the statements on the page."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from phosphene import load_model, methods
from phosphene.builtin.scenes import draw_scenes

DOCS = Path(__file__).parent.parent / "docs"


def execute(page: str) -> dict[str, Any]:
    """The namespace after the code of the page has run."""
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(code, f"docs/{page}", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def targets() -> dict[str, Any]:
    return execute("targets.md")


def test_caption_maps_peak_on_the_named_object(targets: dict[str, Any]) -> None:
    mask = targets["scenes"].masks[targets["names"].index("arrow")]
    for name in ("caption_cam", "caption_occlusion"):
        heat = targets[name].heat()[0]
        assert mask.flatten()[heat.flatten().argmax()], name
    inside = targets["first_word"].maps[0]
    assert inside[mask].mean() > 3 * inside[~mask].mean()
    assert targets["caption_cam"].targets == ("log_probability",)


def test_caption_score_is_the_sum_over_its_words(targets: dict[str, Any]) -> None:
    logits = targets["captioner"].outputs(targets["arrow"])
    words = [targets["VOCABULARY"].index(word) for word in ("an", "arrow")]
    probabilities = logits.softmax(2)[0, [0, 1], words]
    torch.testing.assert_close(
        targets["caption"]("an arrow")(logits), probabilities.log().sum()[None], rtol=1e-4, atol=1e-6
    )
    assert targets["caption"]("a star")(logits) < targets["caption"]("an arrow")(logits) - 5


def test_similarity_maps_peak_on_stars_and_vanish_for_the_reference(
    targets: dict[str, Any],
) -> None:
    stars = [n for n, name in enumerate(targets["names"]) if name == "star"]
    assert len(stars) > 1
    reference, *others = stars
    # Nothing but rounding: the reference is the network's, the maps are from its optimized copy.
    assert targets["similarity_cam"].maps[reference].max() < 1e-5 * targets["similarity_cam"].maps.max()
    model, images, similarity_to_star = (
        targets["model"],
        targets["scenes"].images,
        targets["similarity_to_star"],
    )
    signed = methods["grad_cam"](model, images, similarity_to_star).as_convention("captum").maps
    assert (signed.sum((1, 2)).abs() < 1e-4 * signed.abs().sum((1, 2)))[others].all()
    assert targets["similarity_occlusion"].maps[reference].max() > 0.01
    for n in stars:
        assert targets["scenes"].masks[n].flatten()[targets["projection_cam"].heat()[n].flatten().argmax()]


def test_prompts_are_targets_of_a_vision_language_model(targets: dict[str, Any]) -> None:
    assert targets["a_star"].targets == ("a photo of a star",)
    assert targets["a_star"].maps.shape == (1, 4, 4) and targets["a_star"].maps.isfinite().all()
    attack, clip = targets["to_arrow"], targets["clip"]
    before, after = (clip(images).softmax(1)[0, 1] for images in (attack.images, attack.adversarial))
    assert attack.success.all() or after > before


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that draws the images of a page."""
    monkeypatch.syspath_prepend(str(DOCS))
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("method_pages", None)
    return module


def test_comparison_of_cams_matches_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    execute("comparing-cams.md")
    module = load_script("comparing_cams", monkeypatch)
    models = [load_model(f"builtin:{name}") for name in module.LOWER]
    table = module.numbers(models, draw_scenes(3, seed=5, split="test")).splitlines()
    assert len(table) == 2 + len(models)
    for line in table[2:]:
        assert all(float(cell) < 1e-6 for cell in line.strip("| ").split(" | ")[1:]), line
    scenes = draw_scenes(1, seed=3, split="test")
    quick = [name for name in module.FAMILY if name not in ("score_cam", "ablation_cam")]
    (row,) = module.rows(models[0], scenes, quick, None)
    assert [panel.title for panel in row] == ["shapes-vgg", *(methods[n].spec.title for n in quick)]
    # One stage lower, Grad-CAM is weaker than LayerCAM.
    labels = scenes.labels.tolist()
    maps = {
        n: methods[n](models[0], scenes.images, labels, layer="features.11").maps
        for n in ("grad_cam", "layer_cam")
    }
    assert maps["grad_cam"].max() < 0.05 * maps["layer_cam"].max()


def test_maps_lie_at_the_centers_of_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    execute("where-units-look.md")
    module = load_script("where_units_look", monkeypatch)
    titles = [[panel.title for panel in row[1:]] for row in module.dots(module.strided_network())]
    assert titles[0] == ["shares: largest at 79, 79", "centers: largest at 64, 64"]
    models = [load_model(f"builtin:{name}") for name in module.NETWORKS]
    table = module.numbers(models, draw_scenes(20, seed=5, split="test")).splitlines()[2:]
    for cells in ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in table):
        if cells[0] == "builtin:shapes-vgg":
            assert cells[2] == cells[3] and cells[4] == cells[5]
        else:
            shares, centers = ([float(v) for v in cell.split(", ")] for cell in cells[4:])
            assert all(3 < a - b < 4 for a, b in zip(shares, centers, strict=True))
    rows = module.rows(models[0], draw_scenes(1, seed=3, split="test"))
    assert [panel.title for panel in rows[0]] == ["", "shares", "centers"]


def test_biased_network_predicts_the_background_class() -> None:
    namespace = execute("cheating.md")
    assert namespace["follows_background"] > 0.9
    assert namespace["follows_shape"] < 0.1


def test_any_style_page_stylizes_and_draws_views() -> None:
    namespace = execute("any-style.md")
    assert namespace["first"].shape == namespace["second"].shape == (8, 3, 64, 64)
    assert not torch.equal(namespace["first"], namespace["second"])
    assert namespace["stylizer"].layer == "features.1"


def test_instance_norm_has_a_lower_loss_and_is_invariant_to_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    more = execute("normalization.md")["more"]
    page = (DOCS / "normalization.md").read_text()
    assert f"# {more.note}\n" in page and str(more.labels).replace("'", '"') in page
    module = load_script("normalization", monkeypatch)
    model, scenes = load_model("builtin:shapes-vgg"), draw_scenes(6, split="test").images
    networks = module.trained(model, draw_scenes(16).images, steps=12)
    assert networks["instance"].losses.mean() < 0.9 * networks["batch"].losses.mean()
    table = module.numbers(networks, model, scenes).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    style = {norm: [float(value) for value in values[::2]] for norm, *values in cells}
    for norm in ("instance", "conditional"):
        assert max(style[norm]) - min(style[norm]) < 0.02 * max(style[norm])
    assert style["batch"][2] > style["batch"][1] > style["batch"][0]
    (original, pale) = module.rows(networks, scenes[:1])
    assert [panel.title for panel in original[1:]] == ["batch", "instance", "conditional"]
    assert (
        (original[2].image - pale[2].image).abs().max()
        < 0.05
        < (original[1].image - pale[1].image).abs().max()
    )
    assert module.losses(networks).image.shape[0] == 3


def test_features_replace_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = execute("embeddings.md")
    assert page["groups"].provenance.model is None and page["points"].shape == (60, 2)
    assert page["index"].metrics["recall"] >= 0.9 and page["near"].recall == page["index"].metrics["recall"]
    assert page["exact"].indices[:, 0].tolist() == [0, 1] == page["near"].indices[:, 0].tolist()


def test_textures_of_the_page_are_tiled_and_guided() -> None:
    page = execute("textures.md")
    assert page["tiled"].shape == (1, 3, 160, 240)
    assert page["guided"][:, :, :16].mean() > 0.5 > page["guided"][:, :, -16:].mean()


LECTURE = (DOCS / "lecture.md").read_text()
#: The sections of the lecture that name methods.
SECTIONS = (
    *("21.1.1", "21.1.2", "21.2.1", "21.2.2", "21.3", "21.3.1", "21.4.1", "21.4.2", "21.5.1", "21.5.2"),
    *("21.5.3", "21.6", "21.6.1", "21.6.2", "21.7.1", "21.7.2", "21.7.3", "21.7.4", "21.7.5", "21.7.6"),
    *("21.8", "21.8.1", "21.8.2", "21.9", "21.10", "21.11.1", "21.11.2", "21.12.1", "21.12.2"),
)


def test_every_section_of_the_lecture_has_methods_and_pictures() -> None:
    sections = re.split(r"^#+ ([\d.]+) ", LECTURE, flags=re.MULTILINE)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert [s for s in SECTIONS if "| topic | method" not in texts[s]] == []
    assert [s for s in SECTIONS if ":file: _build/pictures/" not in texts[s]] == []
    pages = {*re.findall(r"methods/([a-z_.]+?)\.md", LECTURE)}
    assert len(pages) > 80 and pages <= {*methods}
    # Every method that is called on the page is in one of its tables.
    called = {*re.findall(r'run\("([a-z_]+)"', LECTURE)}
    assert called <= {page.partition(".")[2] for page in pages}
    # Every parameter that a table names is one of a method.
    fields = {f for name in methods for f in methods[name].spec.params.model_fields}
    inputs = {declared.name for name in methods for declared in methods[name].spec.inputs}
    tables = "\n".join(re.findall(r"^\|.*", LECTURE, re.MULTILINE))
    named = {*re.findall(r"(?<!\[)`([a-z_]+\d?)(?:=[^`]*)?`", tables)}
    assert named - fields - inputs <= {"weights"}


def test_pictures_of_the_lecture_are_of_the_calls_above_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load_script("lecture_pictures", monkeypatch)
    blocks = module.page_blocks(LECTURE)
    pictures = [name for block in blocks for name in block.pictures]
    assert len(pictures) == len({*pictures}) == LECTURE.count("pictures/lecture-") > 60
    assert all({*block.pictures} <= {*module.named_calls(block)} for block in blocks)
    # What is drawn is the result of the call; it is drawn again where the call is another one.
    page, log = tmp_path / "page.md", list[str]()
    monkeypatch.setattr(module, "PAGE", page)
    text = (
        "## 21.1 Filters\n```python\nfrom phosphene import run\n```\n```python\n"
        'few = run("higher_layer_filters", filters=2)\n```\n:file: _build/pictures/lecture-21.1.few.html\n'
    )
    for filters in (2, 2, 3):
        page.write_text(text.replace("filters=2", f"filters={filters}"))
        module.write_lecture(tmp_path, "sources", log.append)
        written = (tmp_path / "lecture-21.1.few.html").read_text()
        result = methods["higher_layer_filters"](load_model("builtin:shapes-vgg"), filters=filters)
        assert written == module.picture(module.panel_rows(result), "21.1.few")
    assert log == ["drawing 21.1.few of the lecture"] * 2


def test_calls_of_the_lecture_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs and parameters of every call, without running it."""

    def check(name: str, **arguments: Any) -> None:
        method = methods[name]
        inputs = {declared.name for declared in method.spec.inputs}
        method.validate({n: v for n, v in arguments.items() if n not in inputs})
        checked.append(name)

    checked: list[str] = []
    namespace: dict[str, Any] = {"run": check}
    for block in load_script("lecture_pictures", monkeypatch).page_blocks(LECTURE):
        if "import torch" not in block.code:
            code = block.code.replace("from phosphene import load_model, run", "")
            exec(compile(code, "docs/lecture.md", "exec"), namespace)
    assert len(checked) > 70


@pytest.mark.nightly
def test_lecture_runs_and_recovers_memorised_images() -> None:
    namespace = execute("lecture.md")
    recovery = namespace["recovery"]
    assert recovery.ids == ("5", "7") and (recovery.recovered > recovery.baseline).all()


def test_measured_figures_are_drawn_from_their_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load_script("measured_figures", monkeypatch)
    log: list[str] = []
    for _ in range(2):
        module.write_measured_figures(tmp_path, "sources", log.append)
    assert log == ["drawing measured figures"]
    names = {"double-descent", "double-descent-epochs", "rectifiers"}
    assert names <= {path.stem for path in tmp_path.glob("*.html")}
    table = (tmp_path / "rectifiers-numbers.md").read_text().splitlines()
    sparsity = [float(line.split("|")[3].strip(" %")) for line in table[2:]]
    assert sparsity[0] > 5 * sparsity[2]


def test_bundled_page_measures_parts_and_removes_them() -> None:
    page = execute("bundled.md")
    result = page["result"]
    assert result.rank_correlation.shape == (3, 3)
    assert set(result.class_importance()) == set(result.classes)
    assert not (page["without"].part_maps == 0).any() and (page["scene"].part_maps == 0).any()
    assert not torch.equal(page["hybrid"].images, page["scene"].images)
