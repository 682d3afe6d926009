"""``predicted_style_fit``: each preview is beside its content and its style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from phosphene import load_result, run


def test_previews_are_beside_their_contents_and_styles(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "batch": 1, "width": 2, "blocks": 0, "seed": 0}
    data = {"dataset": "builtin:scenes/2", "styles": "builtin:textures/3"}
    result: Any = run("predicted_style_fit", progress=False, **data, **options)
    groups = result.panels()
    assert [[panel.title for panel in group] for group in groups] == [
        ["", "style", "in style 0"],
        ["", "style", "in style 1"],
    ]
    with torch.no_grad():
        drawn = result.network(result.contents[1:], result.styles[1:])
    torch.testing.assert_close(drawn[0], groups[1][2].image)
    loaded: Any = load_result(result.save(tmp_path / "saved"))
    assert torch.equal(loaded.styles, result.styles) and len(loaded.panels()[0]) == 3
