"""Certificates: radii rounded down, titles, and the figure's curve of the share of proven predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phosphene.testing import linear_model
from phosphene_plugins.defenses._certificates import Certificates


def build(radii: list[float], dtype: torch.dtype = torch.float32, **options: Any) -> Certificates:
    images = torch.rand(len(radii), 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(len(radii)) % 2
    radius = torch.tensor(radii, dtype=torch.float64)
    return Certificates.build(linear_model(), images, labels, radius, norm="l2", subject="L = 2", **options)


def test_radius_is_rounded_down_and_never_changed_where_it_is_exact() -> None:
    radii = [0.1, 0.2, 0.25, 0.0, 1 / 3]
    rounded = build(radii)
    assert rounded.radius.dtype == torch.float32
    exact = torch.tensor(radii, dtype=torch.float64)
    assert (rounded.radius.double() <= exact).all()
    torch.testing.assert_close(rounded.radius.double(), exact, rtol=2e-7, atol=0)
    assert rounded.radius[2] == 0.25 and rounded.abstained.tolist() == [False, False, False, True, False]
    assert build(radii, torch.float64).radius.tolist() == radii


def test_titles_name_the_class_and_the_radius() -> None:
    certificates = build([0.125, 0.5], abstained=torch.tensor([False, True]))
    assert certificates.names == ("class 0", "class 1")
    (first,), (second,) = certificates.panels()
    assert (first.title, second.title) == ("class 0: l2 0.125", "class 1: abstains")
    assert torch.equal(first.image, certificates.images[0].expand(3, -1, -1)) and first.is_output


def curve(certificates: Certificates) -> tuple[Any, Any, Any]:
    figure = certificates.figure()
    left, right = figure.subfigs  # type: ignore[attr-defined]
    (axes,) = right.axes
    return left, axes, axes.patches[0].get_data()


def test_figure_steps_down_at_each_radius() -> None:
    certificates = build([0.5, 0.0, 0.25, 1.0])
    left, axes, data = curve(certificates)
    assert data.values.tolist() == [0.75, 0.5, 0.25, 0.0] and data.baseline is None
    assert data.edges.tolist() == [0.0, 0.25, 0.5, 1.0, 1.1]
    assert axes.get_xlim() == (0.0, 1.1) and axes.get_ylim() == (0.0, 1.05)
    assert axes.get_xlabel() == "radius (l2)" and axes.get_ylabel() == "share of predictions proven"
    assert axes.get_title(loc="left") == "L = 2"
    assert [axis.get_title(loc="left") for axis in left.axes] == [
        panel.title for (panel,) in certificates.panels()
    ]
    assert not any(axis.axison for axis in left.axes)


def test_figure_without_a_proven_prediction_ends_at_one() -> None:
    _, axes, data = curve(build([0.0]))
    assert data.values.tolist() == [0.0] and data.edges.tolist() == [0.0, 1.0] and axes.get_xlim() == (0, 1)


def test_figure_of_many_images_has_twelve_of_them() -> None:
    radii: list[float] = (torch.arange(1, 26) / 8).tolist()
    left, _, data = curve(build(radii))
    assert len(left.axes) == 12 and len(data.values) == 26
    titled: Tensor = torch.tensor([float(axis.get_title(loc="left").split()[-1]) for axis in left.axes])
    assert titled[0] == radii[0] and (titled.diff() > 0).all()
