"""``token_norms``: the figure shows which norms are high, and a uniformly dark map where none is."""

from __future__ import annotations

import dataclasses
from typing import Any

from phosphene import run
from phosphene_plugins.attention._token_norms_result import high_norms


def test_figure_of_token_norms_shows_the_threshold_and_only_high_norms_bright() -> None:
    """Dots relative to the median with a line at the factor; without high norms no map is bright."""
    result: Any = run("token_norms", progress=False, images="builtin:scenes/2")
    assert result.high.sum() == 0
    chart, *maps = result.figure().axes
    assert chart.get_title(loc="left") == "no patch has a high norm"
    assert [line.get_ydata()[0] for line in chart.lines] == [result.factor]
    assert len(maps) == 2 * 5
    brightness = lambda some: [p.image.mean(0).max() for row in some.panels() for p in row if p.is_output]
    assert max(brightness(result)) < 0.6
    peak = result.maps.clone()
    peak[0, 3, 2, 2] *= 8
    high = dataclasses.replace(result, maps=peak, high=high_norms(peak, result.factor).flatten(2).sum(2))
    assert max(brightness(high)) > 0.65
    assert high.figure().axes[0].get_title(loc="left") == "1 of 512 norms are high, in 1 of 2 images"
