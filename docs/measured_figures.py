"""Figures of the pages with numbers measured once: double descent; ReLU, leaky ReLU and ELU."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from method_pages import cached_demo
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from phosphene.files import write_file
from phosphene.images import charts
from phosphene.results import Panel
from phosphene_plugins.pages._single_file_page import picture

DOCS = Path(__file__).parent
#: Epochs after which double_descent_measured.py has measured.
EPOCHS = (10, 20, 50, 100, 200, 500, 1000, 2000)


def write_measured_figures(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Write the figures of both pages; drawn again only when the sources or the numbers have changed."""
    files = [DOCS / "double_descent.json", DOCS / "rectifiers.json"]
    digest = sources + "".join(file.read_text() for file in files)
    stem = folder / "double-descent"
    if cached_demo(stem, digest):
        return
    tell("drawing measured figures")
    folder.mkdir(parents=True, exist_ok=True)
    descent, rectifiers = (json.loads(file.read_text()) for file in files)
    figures = {
        "double-descent": (draw_widths(descent), "errors against the number of parameters"),
        "double-descent-epochs": (draw_epochs(descent), "test error against width and epochs"),
        "rectifiers": (draw_rectifiers(rectifiers), "sparsity and recovered variance by layer"),
    }
    for name, (figure, title) in figures.items():
        write_file(folder / f"{name}.html", picture([[as_panel(figure)]], title))
    write_file(folder / "rectifiers-numbers.md", rectifier_table(rectifiers))
    write_file(folder / "double-descent.json", json.dumps({"sources": digest}))


def as_panel(figure: Figure) -> Panel:
    """A figure as one image of a page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight")
    return Panel(to_tensor(Image.open(stream).convert("RGB")))


def by_width(records: list[dict[str, Any]], curve: str) -> tuple[list[int], list[int], Tensor]:
    """Widths, numbers of parameters, and a curve (W, seeds, epochs)."""
    rows = defaultdict(list)
    for record in records:
        rows[record["width"], record["parameters"]].append(record[curve])
    keys = sorted(rows)
    return [k[0] for k in keys], [k[1] for k in keys], torch.tensor([rows[k] for k in keys])


def draw_widths(records: list[dict[str, Any]]) -> Figure:
    """Training, test and robust error after two numbers of epochs against the number of parameters."""
    figure = charts.new_figure(3.6)
    for axes, epochs in zip(figure.subplots(1, 2, sharey=True), (500, 2000), strict=True):
        for curve, label in (("robust", "robust (PGD)"), ("test", "test"), ("training", "training")):
            _, parameters, values = by_width(records, curve)
            errors = values[:, :, EPOCHS.index(epochs)]
            axes.plot(parameters, errors.mean(1), marker="o", markersize=3, label=label)
            axes.fill_between(parameters, errors.amin(1), errors.amax(1), alpha=0.15)
        axes.set(xscale="log", xlabel="parameters", ylim=(-0.02, 1.02))
        axes.set_title(f"{epochs} epochs", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("error")
    axes.legend(fontsize=8, frameon=False)
    return figure


def draw_epochs(records: list[dict[str, Any]]) -> Figure:
    """Test error of every width against the epochs, for some widths, and of all as an image."""
    widths, parameters, values = by_width(records, "test")
    mean = values.mean(1)
    figure = charts.new_figure(3.2)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    for width in (4, 8, 24, 256):
        row = widths.index(width)
        left.plot(EPOCHS, mean[row], marker="o", markersize=3, label=f"{parameters[row]} parameters")
    left.set(xscale="log", xlabel="epochs", ylabel="test error")
    left.legend(fontsize=7, frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    drawn = right.imshow(mean.T, origin="lower", aspect="auto", cmap="viridis")
    right.set_xticks(range(0, len(widths), 3), [str(p) for p in parameters[::3]])
    right.set_yticks(range(len(EPOCHS)), [str(e) for e in EPOCHS])
    right.set(xlabel="parameters", ylabel="epochs")
    figure.colorbar(drawn, ax=right, label="test error")
    return figure


def by_activation(records: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    """The mean of a measured value over the seeds, by activation."""
    rows = defaultdict(list)
    for record in records:
        rows[record["activation"]].append(torch.as_tensor(record[name]))
    return {activation: torch.stack(values).mean(0) for activation, values in rows.items()}


def draw_rectifiers(records: list[dict[str, Any]]) -> Figure:
    """Share of zeros and recovered share of the image against the layer."""
    figure = charts.new_figure(2.8)
    titles = {"sparsity": "share of activations near zero", "recovered": "recovered variance of the image"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for activation, values in by_activation(records, name).items():
            axes.plot(range(1, len(values) + 1), values, marker="o", label=activation)
        axes.set(xlabel="layer", xticks=[1, 2, 3], ylim=(0, 1))
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


def rectifier_table(records: list[dict[str, Any]]) -> str:
    """Accuracy, and both values of the last layer, as a table."""
    columns = [by_activation(records, name) for name in ("accuracy", "sparsity", "recovered")]
    lines = ["| activation | test accuracy | near zero, layer 3 | recovered, layer 3 |", "| --- " * 4 + "|"]
    for activation in columns[0]:
        cells = [f"{float(column[activation].reshape(-1)[-1]):.0%}" for column in columns]
        lines.append(f"| {activation} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
