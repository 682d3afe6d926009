"""Text is text: no class, file or layer name is read as a formula, as HTML or as a path."""

import dataclasses
import html.parser
import os
import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from matplotlib.text import Text
from torch import nn

from phosphene import Result, load_model, load_result, methods, run
from phosphene.files import write_file
from phosphene.images.charts import new_figure, plain_label, printable, show_text_literally
from phosphene.results import Panel
from phosphene_plugins.batch._plan import folder_name
from phosphene_plugins.pages._single_file_page import is_web_link, picture

#: Names that break what reads text as something else.
NAMES = (
    *("$\\foo$", "$5 to $10", "$x^2$", "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'),
    *("two\nlines", "NUL\0here", "\x1b[2Jclear", "\u202eright to left", "שלום", "long " * 60, "絵文字"),
    *("😀", "../../etc/passwd", "{{7*7}}", "%s %d", "\ud800 lone surrogate", ""),
)

#: A quick method for each result type: these in every run, all others in the nightly one.
QUICK = {
    "ActivationAtlas": "activation_atlas",
    "ActivationGrid": "activation_grid",
    "AttentionDistances": "attention_distance",
    "AttentionMaps": "attention_maps",
    "ClassInversions": "deep_inversion",
    "ConceptMaps": "concept_factorization",
    "ConceptRelevance": "concept_relevance",
    "ConceptSensitivity": "tcav",
    "ConceptVectors": "concept_vectors",
    "SparseAutoencoder": "sparse_autoencoder_fit",
    "UnitNames": "name_units",
    "AnswerMaps": "answer_attribution",
    "AlignedImages": "style_aligned",
    "ImagePrompted": "ip_adapter",
    "PromptMaps": "prompt_attribution",
    "ChangedQuestions": "question_attack",
    "LearnedStylization": "inst_style",
    "SparseCodes": "sparse_autoencoder",
    "DecisionRegions": "decision_boundary_map",
    "Dissection": "network_dissection",
    "HeadAblation": "head_ablation",
    "LayerSimilarity": "cka",
    "LogitLens": "logit_lens",
    "ModelDifference": "model_difference",
    "PatchComponents": "patch_pca",
    "RelevantPatches": "relevant_patches",
    "PatchSimilarity": "patch_similarity",
    "PatchingEffects": "activation_patching",
    "ProbeAccuracy": "knn_probe",
    "PruningCurves": "prune_and_measure",
    "ReceptiveField": "effective_receptive_field",
    "ReceptiveFields": "receptive_field",
    "TokenAttribution": "attention_rollout",
    "RepresenterInfluence": "representer_points",
    "RecoveredImages": "training_set_recovery",
    "TokenNorms": "token_norms",
    "TrainingInfluence": "similar_examples",
    "ActivationMaps": "activation_maps",
    "AdversarialExamples": "pgd",
    "Attribution": "grad_cam",
    "Certificates": "randomized_smoothing",
    "Embedding": "clusters",
    "FilterBank": "first_layer_filters",
    "Neighbors": "nearest_neighbors",
    "Patches": "top_patches",
    "TransferTable": "transfer",
    "VideoStylization": "video_style",
}

SLOW = {
    "AdversarialPatch": "patch",
    "AugmentedViews": "style_augmentation",
    "AutoAttackExamples": "auto_attack",
    "Cascade": "sanity_check",
    "ChannelRedundancy": "channel_redundancy",
    "ChannelStatistics": "activation_statistics",
    "Curves": "deletion_insertion",
    "DefendedImages": "jpeg",
    "EnsembleReport": "ensemble_evaluation",
    "Facets": "facets",
    "GradientMasking": "gradient_masking_checks",
    "Inversions": "feature_inversion",
    "LatentSynthesis": "latent_visualization",
    "RobustnessReport": "robust_accuracy",
    "PartImportance": "part_importance",
    "Scores": "pointing_game",
    "Segmentation": "saliency_segmentation",
    "SetDistance": "set_distance",
    "StyleSweep": "style_sweep",
    "Stylization": "fast_style",
    "Synthesis": "deep_dream",
    "TrainedModel": "adversarial_training",
    "TrainedNetwork": "fast_style_fit",
    "UniversalPerturbation": "universal",
}


class Linear(nn.Module):
    """A network with a class for every name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, len(NAMES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images).relu().mean((2, 3)))


def rename(value: Any, hint: Any, names: Iterator[str]) -> Any:
    """The value of a field with every text replaced, except for one of a fixed set."""
    if get_origin(hint) is Literal or value is None:
        return value
    if isinstance(value, str) and (hint is str or str in get_args(hint)):
        return next(names)
    if isinstance(value, tuple) and get_origin(hint) is tuple:
        return tuple(rename(item, get_args(hint)[0], names) for item in value)
    return value


def renamed(result: Result) -> Result:
    """The result with hostile names in its fields."""
    hints, names = get_type_hints(type(result)), cycle(NAMES)
    fields = {n: v for n, v in result.fields() if n not in ("method", "convention")}
    return dataclasses.replace(result, **{n: rename(v, hints[n], names) for n, v in fields.items()})


@pytest.mark.parametrize(
    "name", [*QUICK.values(), *(pytest.param(name, marks=pytest.mark.nightly) for name in SLOW.values())]
)
def test_figure_draws_names_as_they_are(name: str, tmp_path: Path) -> None:
    spec = methods[name].spec
    count = 60 if spec.family in ("comparison", "concepts") else 8  # several of each concept
    paths = {"images": "builtin:scenes/2", "dataset": f"builtin:scenes/{count}"}
    inputs = {i.name: paths[i.role] for i in spec.inputs if i.role in paths}
    inputs |= {i.name: "builtin:shapes-resnet" for i in spec.inputs if i.role == "other_model" and i.required}
    inputs |= {n: v for n, v in spec.demonstration()[0].items() if str(v).startswith("builtin:part-scenes")}
    result = renamed(run(name, progress=False, **inputs, **spec.quick))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph, a layout that collapsed
        figure = result.figure()
        saved = result.save(tmp_path / "saved")  # with the figure as PNG
    texts: Any = figure.findobj(Text)
    assert not any(text.get_parse_math() and "$" in text.get_text() for text in texts)
    assert not any(len(line) > 80 for text in texts for line in text.get_text().split("\n"))
    loaded = load_result(saved)
    assert loaded.lines() == result.lines() and loaded.png()
    assert all(line.isprintable() for group in result.panels() for line in (panel.title for panel in group))
    check_html(picture(result.rows(), spec.title), {"div", "figure", "img", "figcaption"})


def test_every_result_type_is_drawn() -> None:
    types = {
        name
        for name, kind in Result.types.items()
        if kind.__module__.startswith(("phosphene.", "phosphene_plugins."))
    }
    # Drawn as a TrainedNetwork, as the results in them, and as an Embedding.
    others = {"AdaptiveNetwork", "PredictedStyle", "ResultSequence", "ResultStream", "NeighborIndex"}
    assert types - {*QUICK, *SLOW} <= others


def test_class_names_reach_a_saved_result(tmp_path: Path) -> None:
    model = load_model(Linear(), classes=NAMES, input_size=(3, 16, 16))
    images = torch.rand(len(NAMES), 3, 16, 16)
    result = run("saliency", model=model, images=images, target=list(range(len(NAMES))), out=tmp_path / "o")
    assert load_result(tmp_path / "o").targets == result.targets  # type: ignore[attr-defined]


# --- figures --------------------------------------------------------------------------------------------


def test_text_of_a_figure_is_literal() -> None:
    figure = new_figure()
    axes = figure.subplots()
    axes.plot([0, 1], [1, 100], label="$x$")
    axes.set(title="a $b$ c\nsecond line", xlabel="$5 to $10", ylabel="NUL\0")
    axes.set_xticks([0, 1], ["$\\foo$", plain_label("絵" * 50)])
    axes.set_yscale("log")
    axes.legend()
    show_text_literally(figure)
    assert axes.get_title() == "a $b$ c\nsecond line" and axes.get_ylabel() == "NUL "
    assert plain_label("絵" * 50) == "□" * 23 + "…" and plain_label("naïve ↑") == "naïve ↑"
    figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert any("10^{2}" in label for label in labels)  # the numbers of a logarithmic axis stay formulas
    assert all(label.get_parse_math() for label in axes.get_yticklabels())


def test_titles_are_one_printable_line() -> None:
    assert Panel(torch.zeros(3, 4, 4), "a\nb\0c\x1b[2J\u202e").title == "a b c [2J "
    assert printable("\t\u2028tab") == "  tab"


# --- pages and paths ----------------------------------------------------------------------------------


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))


def check_html(page: str, allowed: set[str]) -> None:
    """No tag, no event handler and no character that hides text got in from a name."""
    parser = _Tags()
    parser.feed(page)
    assert {tag for tag, _ in parser.tags} <= allowed
    assert not any(name.startswith("on") for _, attributes in parser.tags for name, _ in attributes)
    assert all(character.isprintable() or character == "\n" for character in page)


def test_only_web_addresses_are_links() -> None:
    assert is_web_link("https://arxiv.org/abs/1") and is_web_link("HTTP://a")
    for url in ("javascript:alert(1)", "JaVaScRiPt:alert(1)", " https://a", "data:text/html,x", "", "//a"):
        assert not is_web_link(url)


def test_gallery_drops_links_that_are_no_web_address(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from phosphene_plugins.gallery._gallery_page import Gallery, Source, _write

    references = [
        SimpleNamespace(url=url, title=NAMES[4], authors=NAMES[3], year=2020)
        for url in ("javascript:alert(1)", "https://arxiv.org/abs/1")
    ]
    spec = SimpleNamespace(
        name="a.b", family="attribution", title=NAMES[3], summary=NAMES[4], references=references
    )
    exhibit = SimpleNamespace(
        spec=spec, failure=NAMES[3], rows=[], command="c", python="p", seconds=1.0, curve=None
    )
    file, exhibits = tmp_path / "page.html", [exhibit]
    source = Source(SimpleNamespace(name=NAMES[3], classes=None))  # type: ignore[arg-type]
    gallery = Gallery(page=file, exhibits=exhibits, scores={}, broken=[], source=source)  # type: ignore[arg-type]
    _write(file, gallery)
    page = file.read_text()
    assert "https://arxiv.org/abs/1" in page and "javascript:" not in page
    assert "<script" not in page and "<img" not in page


def test_page_with_invalid_unicode_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "page.html", "a \ud800 b")
    assert (tmp_path / "page.html").read_text() == "a ? b"


@pytest.mark.parametrize("label", [*NAMES, "絵" * 200, "é" * 200, "..", "a/../../b", "." * 300, "😀" * 120])
def test_folder_names_fit_into_a_file_system(label: str, tmp_path: Path) -> None:
    name = folder_name(label)
    assert name and len(os.fsencode(f".{name}.unfinished.part")) <= 255
    folder = tmp_path / name
    folder.mkdir()
    assert folder.resolve().parent == tmp_path.resolve()


def test_html_representation_is_an_image(tmp_path: Path) -> None:
    result = renamed(run("saliency", images="builtin:scenes/1", progress=False))
    check_html(result._repr_html_(), {"img"})
