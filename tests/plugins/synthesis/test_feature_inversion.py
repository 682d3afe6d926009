"""Feature inversion: oracle, loss with depth, penalties, frames and unknown layers."""

from __future__ import annotations

import pytest
import torch

from phosphene import UnknownName, load_model, load_result, methods, run
from phosphene.builtin.scenes import draw_scenes

feature_inversion = methods["synthesis.feature_inversion"]
MODEL = load_model("builtin:shapes-vgg")
SCENES = draw_scenes(2, split="test").images


def test_oracle() -> None:
    feature_inversion.spec.oracle()


def test_shallow_layers_retain_more_than_deep_ones() -> None:
    result = feature_inversion(MODEL, SCENES, layers=["features.1", "features.11"], steps=25, seed=0)
    error = (result.inversions - SCENES[:, None]).square().mean((2, 3, 4)).sqrt()
    assert (error[:, 0] < 0.05).all() and (error[:, 1] > 2 * error[:, 0]).all()
    assert (result.losses[-1] < 0.2 * result.losses[0]).all()
    # The line search of L-BFGS accepts no increase of loss plus penalties.
    assert (result.losses.diff(dim=0) <= 1e-6).float().mean() > 0.95


def test_total_variation_smooths() -> None:
    plain, smooth = (
        feature_inversion(MODEL, SCENES[:1], layers=["features.11"], steps=15, seed=0, total_variation=weight)
        for weight in (0.0, 20.0)
    )
    roughness = [result.inversions.diff(dim=-1).abs().mean() for result in (plain, smooth)]
    assert roughness[1] < 0.5 * roughness[0]


def test_frames_hold_all_layers_side_by_side(tmp_path) -> None:
    result = run(
        "feature_inversion", images=SCENES[:1], layers=["features.1", "features.6"], steps=4, frames=2,
        seed=0, out=tmp_path / "inverted",
    )  # fmt: skip
    assert result.frames is not None and result.frames.shape == (2, 1, 3, 64, 128)
    assert torch.equal(load_result(tmp_path / "inverted").inversions, result.inversions)
    assert (tmp_path / "inverted" / "film.gif").is_file()


def test_unknown_layer_is_refused() -> None:
    with pytest.raises(UnknownName, match="features.1"):
        feature_inversion(MODEL, SCENES, layers=["featurs.1"])
