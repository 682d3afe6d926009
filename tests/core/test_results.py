"""Results for people: arrays, data frames, tables, styled figures, panels, notebooks and logs."""

from __future__ import annotations

import base64
import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import rgb_to_grayscale
from typer.testing import CliRunner

from phosphene import (
    InputError,
    Result,
    UnknownName,
    load_result,
    methods,
    progress_bar,
    report_progress,
    run,
)
from phosphene import progress as progress_module
from phosphene.cli.app import app
from phosphene.images import colorize, overlay
from phosphene.images.map_style import map_style
from phosphene.results import Attribution, Synthesis, panel

QUICK: dict[str, dict[str, Any]] = {
    "grad_cam": {"images": "builtin:scenes/3"},
    "saliency": {"images": "builtin:scenes/3"},
    "pgd": {"images": "builtin:scenes/3", "steps": 2, "seed": 0},
    "activation_maps": {"images": "builtin:scenes/2"},
    "embed": {"dataset": "builtin:scenes/8"},
    "nearest_neighbors": {"images": "builtin:scenes/2", "dataset": "builtin:scenes/8", "k": 3},
    "robust_accuracy": {"dataset": "builtin:scenes/4", "attacks": ["fgsm"], "eps": [1 / 255]},
    "compare_attributions": {
        "dataset": "builtin:scenes/2", "methods": ["saliency"], "scores": ["pointing_game"],
    },
    "activation_statistics": {"dataset": "builtin:scenes/4"},
    "transfer": {"images": "builtin:scenes/2", "labels": None},
    "fast_style": {"images": "builtin:scenes/2"},
}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {name: run(name, progress=False, **options) for name, options in QUICK.items()}


# ------------------------------------------------------------------ arrays and tables


@pytest.mark.parametrize("name", QUICK)
def test_to_numpy_has_every_tensor(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    converted = result.to_numpy()
    for field, value in result.fields():
        if isinstance(value, torch.Tensor):
            assert np.array_equal(converted[field], value.numpy())
    assert all(isinstance(value, (np.ndarray, tuple, dict)) for value in converted.values())


def test_bfloat16_becomes_float32() -> None:
    images = torch.rand(1, 3, 2, 2).bfloat16()
    result = Synthesis(images=images, scores=torch.zeros(0, 1), targets=("a",))
    assert result.to_numpy()["images"].dtype == np.float32


EXPECTED_ROWS = {
    "grad_cam": 3, "saliency": 3, "pgd": 3, "embed": 8, "nearest_neighbors": 2, "robust_accuracy": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in QUICK if name not in ("activation_maps", "fast_style")])
def test_tables_as_pandas_csv_and_parquet(name: str, results: dict[str, Result], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    result = results[name]
    table, frame = result.table(), result.to_pandas()
    assert {len(column) for column in table.values()} == {EXPECTED_ROWS.get(name, len(frame))}
    assert list(frame.columns) == list(table) and all(
        frame[column].tolist() == table[column] for column in table
    )
    read = pandas.read_parquet(result.to_parquet(tmp_path / "a.parquet"))
    assert read.equals(frame) or name in ("compare_attributions", "activation_statistics")
    with result.to_csv(tmp_path / "a.csv").open() as stream:
        heading, *rows = list(csv.reader(stream))
    assert heading == list(table) and len(rows) == len(frame)
    assert rows[0] == ["" if value[0] is None else str(value[0]) for value in table.values()]


def test_values_of_tables(results: dict[str, Any]) -> None:
    pgd, report, scores = (results[n] for n in ("pgd", "robust_accuracy", "compare_attributions"))
    table = pgd.table()
    assert table["success"] == pgd.success.tolist() and table["names_after"] == list(pgd.names_after)
    assert report.table()["accuracy"][0] == report.accuracy(0.0, "fgsm")
    assert report.table()["attack"] == ["fgsm", "fgsm", "worst case", "worst case"]
    row = {key: values[0] for key, values in scores.table().items()}
    assert row["mean"] == scores.value(row["method"], row["score"])
    embedding = results["embed"]
    assert embedding.table()["features_1"] == embedding.features[:, 1].tolist()
    with pytest.raises(InputError, match="has no table"):
        run("higher_layer_filters").table()
    with pytest.raises(InputError, match="cannot be written"):
        pgd.to_csv("/nowhere/a.csv")


# ------------------------------------------------------------------ figures


def test_style_of_maps(results: dict[str, Any]) -> None:
    result = results["grad_cam"]
    usual = result.panels()[0][1].image
    with map_style("viridis", 0.25):
        styled = result.panels()[0][1].image
    image, heat = result.images[0], result.heat()[0]
    gray = rgb_to_grayscale(image)
    torch.testing.assert_close(styled, gray * 0.75 + colorize(heat, "viridis") * 0.25)
    assert torch.equal(usual, overlay(image, heat)) and torch.equal(result.panels()[0][1].image, usual)


def drawn(result: Result, **options: Any) -> Any:
    stream = io.BytesIO()
    result.figure(**options).savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


def test_options_of_figures(results: dict[str, Any]) -> None:
    result = results["grad_cam"]
    usual = drawn(result)
    assert np.array_equal(usual, drawn(result, columns=8))
    assert drawn(result, dpi=220).shape[0] == 2 * usual.shape[0]
    figure = result.figure(columns=2, titles=list("abcdef"))
    assert [axes.get_title() for axes in figure.axes] == list("abcdef")
    assert len({axes.get_subplotspec().rowspan.start for axes in figure.axes}) == 3
    assert {axes.get_title() for axes in result.figure(titles=False).axes} == {""}
    assert not np.array_equal(usual, drawn(result, cmap="gray"))
    assert not np.array_equal(drawn(results["saliency"]), drawn(results["saliency"], cmap="gray"))
    assert not np.array_equal(usual, drawn(result, alpha=0.5))  # the usual opacity is less where heat is low
    assert drawn(results["embed"], dpi=75).shape[0] == drawn(results["embed"]).shape[0] // 2


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("grad_cam", {"cmap": "virids"}, UnknownName, "did you mean 'viridis'"),
        ("grad_cam", {"alpha": 1.5}, InputError, "0 to 1, not 1.5"),
        ("grad_cam", {"columns": 0}, InputError, "not 0"),
        ("grad_cam", {"titles": ["a"]}, InputError, "each of the 6 panels, not 1"),
        ("grad_cam", {"titles": "abcdef"}, InputError, "not 1; False for none"),
        ("grad_cam", {"dpi": 1e9}, InputError, "1 to 2400"),
        ("saliency", {"alpha": 0.3}, InputError, "shows no maps that are laid over images"),
        ("pgd", {"cmap": "gray"}, InputError, "shows no maps"),
        ("embed", {"columns": 3}, InputError, "columns= has no effect: this Embedding is drawn as a chart"),
        ("embed", {"titles": False}, InputError, "titles= has no effect"),
    ],
)
def test_options_without_an_effect_are_refused(
    name: str, options: Any, error: type[Exception], message: str, results: dict[str, Result]
) -> None:
    with pytest.raises(error, match=message):
        results[name].figure(**options)


@pytest.mark.parametrize("name", ["grad_cam", "embed"])
def test_figures_are_saved_by_suffix_and_are_the_same_each_time(
    name: str, results: dict[str, Result], tmp_path: Path
) -> None:
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for suffix, start in starts.items():
        first, second = (results[name].save_figure(tmp_path / f"{n}{suffix}").read_bytes() for n in "ab")
        assert first.startswith(start) and first == second
    if name == "grad_cam":
        svg = results[name].save_figure(tmp_path / "titles.svg", titles=["one", *"bcdef"]).read_text()
        assert ">one<" in svg  # text, not outlines
    with pytest.raises(UnknownName, match=r"no suffix of a figure '.jpg'; there is .png, .pdf, .svg"):
        results[name].save_figure(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="cannot be written"):
        results[name].save_figure("/nowhere/a.png")


def test_a_type_that_overrides_figure_is_drawn_by_it() -> None:
    """``draw`` was called ``figure``: result types written for that name stay valid."""
    from matplotlib.figure import Figure

    class Old(Synthesis):
        def figure(self) -> Figure:  # type: ignore[override]
            return Figure(figsize=(1, 1), dpi=10)

    try:
        old = Old(images=torch.zeros(1, 3, 2, 2), scores=torch.zeros(0, 1), targets=("a",))
        assert old.figure(dpi=30).dpi == 30 and old.png()
    finally:
        del Result.types["Old"]


# ------------------------------------------------------------------ panels


def test_panel_has_a_row_per_image_and_a_column_per_result(results: dict[str, Any]) -> None:
    listed = [results[name] for name in ("grad_cam", "saliency", "pgd")]
    figure = panel(listed, row_titles=["a", "b", "c"])
    assert len(figure.axes) == 3 * 4
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", "grad_cam", "saliency", "pgd"]
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["a", "b", "c"]
    outputs = [group[1].image for result in listed for group in result.panels()]
    drawn = [torch.from_numpy(np.asarray(axes.images[0].get_array())) for axes in figure.axes]
    for column in range(3):
        for row in range(3):
            expected = outputs[3 * column + row].permute(1, 2, 0)
            torch.testing.assert_close(drawn[4 * row + column + 1].to(expected), expected)
    named = panel({"ours": listed[0], "theirs": listed[1]}, cmap="gray")
    assert [axes.get_title() for axes in named.axes[:3]] == ["image", "ours", "theirs"]
    targets = [axes.get_ylabel() for axes in named.axes[::3]]
    assert targets == list(results["grad_cam"].targets)


def test_panels_of_different_images_are_refused(results: dict[str, Any]) -> None:
    other = run("saliency", images="builtin:biased-scenes/3")
    fewer = run("saliency", images="builtin:scenes/2")
    for bad, message in (
        ([], "one result or more"),
        ([results["grad_cam"], other], "result 1 are not those of result 0"),
        ([results["grad_cam"], fewer], "result 1 are not those of result 0"),
        ([results["embed"]], "no output beside each image"),
        ([3], "result 0 is an int"),
    ):
        with pytest.raises(InputError, match=message):
            panel(bad)
    with pytest.raises(InputError, match="2 results need one title each, not 1"):
        panel([results["grad_cam"], results["saliency"]], titles=["a"])
    with pytest.raises(InputError, match="each of 3 images"):
        panel([results["grad_cam"]], row_titles=["a"])


def test_commands_on_saved_results(results: dict[str, Result], tmp_path: Path) -> None:
    for name in ("grad_cam", "saliency"):
        results[name].save(tmp_path / name)
    first, second, out = (str(tmp_path / name) for name in ("grad_cam", "saliency", "out"))
    for arguments, suffix in (
        (["figure", first, f"{out}.svg", "--cmap", "gray", "--alpha", "0.4", "--columns", "2"], "svg"),
        (["figure", first, f"{out}.pdf", "--no-titles", "--dpi", "50"], "pdf"),
        (["panel", first, second, "--out", f"{out}.png"], "png"),
        (["table", first, f"{out}.csv"], "csv"),
        (["table", first, f"{out}.parquet"], "parquet"),
    ):
        ran = CliRunner().invoke(app, arguments)
        assert ran.exit_code == 0, ran.output
        assert Path(f"{out}.{suffix}").stat().st_size > 30
    failed = CliRunner().invoke(app, ["table", first, f"{out}.txt"])
    assert isinstance(failed.exception, UnknownName)


# ------------------------------------------------------------------ notebooks and logs


@pytest.mark.parametrize("name", ["grad_cam", "embed", "robust_accuracy"])
def test_notebooks_show_the_figure_with_its_description(name: str, results: dict[str, Result]) -> None:
    data, metadata = results[name]._repr_mimebundle_(include=None, exclude=None)
    assert data["text/plain"] == repr(results[name])
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    alt = metadata["image/png"]["alt"]
    assert methods[name].spec.name in alt and len(alt) <= 300 and "\n" not in alt
    assert f'alt="{alt[:20]}' in data["text/html"]
    if name == "grad_cam":
        assert "star" in alt


class Clock:
    """A clock that advances by ten seconds at each look."""

    seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 10
        return self.seconds


def test_a_log_gets_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "time", Clock())
    assert not sys.stderr.isatty()
    list(progress_bar(range(10), "attacking", note=lambda: "loss 0.5"))
    written = capsys.readouterr().err
    assert written.splitlines() == [
        "attacking: 3/10, 0:30 elapsed, 1:10 left, loss 0.5",
        "attacking: 6/10, 1:00 elapsed, 0:40 left, loss 0.5",
        "attacking: 9/10, 1:30 elapsed, 0:10 left, loss 0.5",
    ]
    assert "\r" not in written
    for reporter in (False, lambda event: None):
        with report_progress(reporter):
            list(progress_bar(range(10), "attacking"))
        assert capsys.readouterr().err == ""


def test_durations_in_logs() -> None:
    assert progress_module.log_line("a", 2, None, 3725) == "a: 2, 1:02:05 elapsed"


def test_a_saved_result_has_the_same_table_and_description(
    results: dict[str, Result], tmp_path: Path
) -> None:
    loaded = load_result(results["pgd"].save(tmp_path / "saved"))
    assert loaded.table() == results["pgd"].table() and loaded.alt_text() == results["pgd"].alt_text()


def test_titles_of_panels_can_be_any_text() -> None:
    result = Synthesis(images=torch.zeros(2, 3, 4, 4), scores=torch.zeros(0, 2), targets=("a", "b"))
    figure = result.figure(titles=["$x$", "é\n"])
    assert [axes.get_title() for axes in figure.axes][0] == "$x$"


@pytest.mark.parametrize("layout", ["map", "overlay"])
def test_a_map_of_zeros_says_so(layout: Any) -> None:
    """A black panel would otherwise look like a failure: deconvnet's on networks whose interior it blocks."""
    maps = torch.zeros(2, 3, 3)
    maps[1, 1, 2] = -1e-6
    result = Attribution(
        images=torch.rand(2, 3, 6, 6), maps=maps, targets=("star", "heart"),
        more=maps[:, None].flip(0), more_names=("ring",), layout=layout,
    )  # fmt: skip
    titles = [[panel.title for panel in group] for group in result.panels()]
    assert titles == [["", "star, 0 everywhere", "ring"], ["", "heart", "ring, 0 everywhere"]]
