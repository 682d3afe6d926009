"""``token_norms``: the figure shows which norms are high, and pale maps where none is."""

from __future__ import annotations

import dataclasses
from typing import Any

from phosphene import run
from phosphene_plugins.attention._token_norms_result import high_norms


def test_figure_of_token_norms_shows_the_threshold_and_only_high_norms_full_red() -> None:
    """Dots relative to the median with a line at the factor; without high norms no patch is full red."""
    result: Any = run("token_norms", progress=False, images="builtin:scenes/2")
    assert result.high.sum() == 0
    chart, *maps = result.figure().axes
    assert chart.get_title(loc="left") == "no patch has a high norm"
    assert [line.get_ydata()[0] for line in chart.lines] == [result.factor]
    assert len(maps) == 2 * 5
    # Green is missing from full red, and hardly from pale colors.
    depth = lambda some: [1 - p.image[1].min() for row in some.panels() for p in row if p.is_output]
    assert 0.1 < max(depth(result)) < 0.4
    titles = [panel.title for panel in result.panels()[0][1:]]
    assert titles[3] == "blocks.3: 0.56 to 1 times the median, 0 high"
    peak = result.maps.clone()
    peak[0, 3, 2, 2] *= 8
    high = dataclasses.replace(result, maps=peak, high=high_norms(peak, result.factor).flatten(2).sum(2))
    assert max(depth(high)) > 0.8
    assert high.figure().axes[0].get_title(loc="left") == "1 of 512 norms are high, in 1 of 2 images"
