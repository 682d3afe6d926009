"""Figure of the page about the biased network, drawn when the book is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from method_pages import cached_demo

from phosphene import run
from phosphene.files import write_file
from phosphene_plugins.pages._single_file_page import panel_rows, picture


def write_cheating(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Write the figure of two networks' maps; recomputed only when the sources have changed."""
    stem = folder / "cheating"
    if cached_demo(stem, sources):
        return
    tell("drawing the cheating network")
    folder.mkdir(parents=True, exist_ok=True)
    scores = run(
        "compare_attributions",
        dataset="builtin:biased-scenes/12",
        models=["builtin:shapes-biased"],
        methods=["grad_cam", "integrated_gradients", "saliency", "guided_backprop", "occlusion"],
        scores=["mask_iou"],
        seed=0,
        progress=False,
    )
    write_file(folder / "cheating.html", picture(panel_rows(scores), "two networks' maps of the same scenes"))
    write_file(folder / "cheating.json", json.dumps({"sources": sources}))
