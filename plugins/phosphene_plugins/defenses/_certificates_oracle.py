"""Closed forms of certificates: rounding, titles, and the figure's share of proven predictions."""

from __future__ import annotations

from typing import Any

import torch

from phosphene.images import resize
from phosphene.testing import linear_model

from ._certificates import Certificates


def certificates_have_their_closed_forms() -> None:
    """Radii are rounded down, and the curve of the figure steps down by 1/N at each of them."""
    radii = [0.5, 0.1, 0.25, 0.0, 1 / 3]
    rounded = _certificates(radii, torch.float32)
    assert rounded.radius.dtype == torch.float32 and rounded.radius[2] == 0.25
    exact = torch.tensor(radii, dtype=torch.float64)
    assert (rounded.radius.double() <= exact).all()
    torch.testing.assert_close(rounded.radius.double(), exact, rtol=2e-7, atol=0)
    assert rounded.abstained.tolist() == [False, False, False, True, False]
    assert rounded.labels.tolist() == [0, 1, 0, 1, 0] and rounded.names[:2] == ("class 0", "class 1")
    certificates = _certificates(radii, torch.float64)
    assert certificates.radius.tolist() == radii
    titles = ["class 0: l2 0.5", "class 1: l2 0.1", "class 0: l2 0.25", "class 1: abstains"]
    panels = [panel for (panel,) in certificates.panels()]
    assert [panel.title for panel in panels] == [*titles, "class 0: l2 0.333"]
    assert all(panel.is_output for panel in panels)
    figure: Any = certificates.draw()
    left, right = figure.subfigs
    (axes,) = right.axes
    (steps,) = axes.patches
    data = steps.get_data()
    assert data.values.tolist() == [0.8, 0.6, 0.4, 0.2, 0.0] and data.baseline is None
    assert data.edges.tolist() == [0.0, 0.1, 0.25, 1 / 3, 0.5, 1.1 * 0.5] and steps.get_linewidth() == 2
    assert axes.get_xlim() == (0.0, 1.1 * 0.5) and axes.get_ylim() == (0.0, 1.05)
    assert axes.get_xlabel() == "radius (l2)" and axes.get_ylabel() == "share of predictions proven"
    assert axes.get_title(loc="left") == "L = 2"
    assert [name for name, spine in axes.spines.items() if spine.get_visible()] == ["left", "bottom"]
    (line,) = left.get_suptitle().splitlines()
    assert line == "predicted class, right or wrong: radius in which it provably stays"
    for small, abstained, lines in ((0.0039, None, 2), (0.004, None, 1), (0.0039, True, 1)):
        drawn_small: Any = _certificates([0.001, small], torch.float64, abstained).draw()
        title = drawn_small.subfigs[0].get_suptitle()
        assert title.splitlines()[:1] == [line] and len(title.splitlines()) == lines
        assert lines == 1 or title.endswith("below a gray level of one pixel, 1/255 = 0.0039")
    # Two rows of four, of which the last three stay empty.
    assert [len(axis.images) for axis in left.axes] == [1, 1, 1, 1, 1, 0, 0, 0]
    drawn = [axis.get_title(loc="left") for axis in left.axes[:5]]
    assert drawn == [panel.title.replace(": ", "\n") for panel in panels]
    assert not any(axis.axison for axis in left.axes) and figure.get_figheight() == 3
    assert abs(left.bbox.width / right.bbox.width - 1.2) < 1e-6
    image = resize(panels[4].image, (96, 96))
    pixels = torch.from_numpy(left.axes[4].images[0].get_array().data)
    torch.testing.assert_close(pixels, image.permute(1, 2, 0).float())
    # Of 25 images twelve; a radius of 0 that is not abstained from, or no proven prediction, ends at 1.
    many: Any = _certificates([n / 8 for n in range(25)], torch.float64).draw()
    drawn = [axis.get_title(loc="left") for axis in many.subfigs[0].axes]
    assert len(drawn) == 12 and drawn[1:3] == ["class 0\nl2 0.25", "class 0\nl2 0.5"]
    assert many.get_figheight() == 1.35 * 3
    for abstained, values in ((True, [0.0]), (False, [1.0, 0.0])):
        lone: Any = _certificates([0.0], torch.float64, abstained).draw()
        (axes,) = lone.subfigs[1].axes
        data = axes.patches[0].get_data()
        assert data.values.tolist() == values and data.edges.tolist() == [
            0.0,
            *(len(values) - 1) * [0.0],
            1.0,
        ]
        assert len(lone.subfigs[0].axes) == 1 and axes.get_xlim() == (0, 1)


def _certificates(radii: list[float], dtype: torch.dtype, abstained: bool | None = None) -> Certificates:
    images = torch.eye(2, dtype=dtype).expand(len(radii), 1, 2, 2)
    return Certificates.build(
        linear_model(),
        images,
        torch.arange(len(radii)) % 2,
        torch.tensor(radii, dtype=torch.float64),
        norm="l2",
        subject="L = 2",
        abstained=None if abstained is None else torch.full((len(radii),), abstained),
    )
