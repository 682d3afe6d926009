"""Feature inversion: exact where it can be, losing more the deeper it looks, whole when cut off."""

from __future__ import annotations

import pytest
import torch

from phosphene import UnknownName, load_model, load_result, methods, run
from phosphene.builtin.scenes import draw_scenes

feature_inversion = methods["synthesis.feature_inversion"]
MODEL = load_model("builtin:shapes-vgg")
SCENES = draw_scenes(2, split="test").images


def test_its_oracle_holds() -> None:
    feature_inversion.spec.oracle()


def test_shallow_layers_keep_the_picture_and_deep_ones_let_go_of_it() -> None:
    found = feature_inversion(MODEL, SCENES, layers=["features.1", "features.11"], steps=25, seed=0)
    away = (found.inversions - SCENES[:, None]).square().mean((2, 3, 4)).sqrt()
    assert (away[:, 0] < 0.05).all() and (away[:, 1] > 2 * away[:, 0]).all()
    # Each has come much nearer to what its layer said.
    assert (found.losses[-1] < 0.2 * found.losses[0]).all()
    # Without a transform the descent never goes up.
    assert (found.losses.diff(dim=0) <= 1e-6).float().mean() > 0.95


def test_penalties_bound_what_they_are_about() -> None:
    plain, smooth = (
        feature_inversion(MODEL, SCENES[:1], layers=["features.11"], steps=15, seed=0, total_variation=weight)
        for weight in (0.0, 20.0)
    )
    roughness = [made.inversions.diff(dim=-1).abs().mean() for made in (plain, smooth)]
    assert roughness[1] < 0.5 * roughness[0]


def test_frames_and_layers_are_kept_side_by_side(tmp_path) -> None:
    found = run(
        "feature_inversion", images=SCENES[:1], layers=["features.1", "features.6"], steps=4, frames=2,
        seed=0, out=tmp_path / "inverted",
    )  # fmt: skip
    assert found.frames is not None and found.frames.shape == (2, 1, 3, 64, 128)
    assert torch.equal(load_result(tmp_path / "inverted").inversions, found.inversions)
    assert (tmp_path / "inverted" / "film.gif").is_file()


def test_a_layer_that_does_not_exist_is_refused_before_work() -> None:
    with pytest.raises(UnknownName, match="features.1"):
        feature_inversion(MODEL, SCENES, layers=["featurs.1"])
