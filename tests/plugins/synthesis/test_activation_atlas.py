"""Activation atlas: oracle, UMAP, class atlases, batches, saving, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import InputError, Model, TensorDataset, load_result, max_batch, methods, run

atlas = methods["synthesis.activation_atlas"]
FEW: dict[str, Any] = {
    **{"grid": 3, "min_count": 2, "positions": 3, "projection": "pca"},
    **{"tile": 12, "steps": 5, "jitter": 1, "seed": 0},
}


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.rand(9, 3, 12, 12, dtype=torch.float64))


def test_oracle() -> None:
    atlas.spec.oracle()


def test_batches_do_not_change_the_atlas(model: Model, data: TensorDataset) -> None:
    result = atlas(model, data, layer="2", **FEW)
    assert result.points.shape == (27, 2) and result.points.min() == 0 and result.points.max() == 1
    assert (result.counts >= 2).all() and result.cells.max() < 3
    with max_batch(2):
        parts = atlas(model, data, layer="2", **FEW)
    torch.testing.assert_close(parts.vectors, result.vectors, atol=1e-9, rtol=0)
    torch.testing.assert_close(parts.tiles, result.tiles, atol=1e-9, rtol=0)


def test_class_atlas_weights_by_contribution(model: Model, data: TensorDataset) -> None:
    plain, classes = (atlas(model, data, layer="2", attributed_to=of, **FEW) for of in (None, 2))
    assert torch.equal(plain.points, classes.points)
    assert classes.target == "class 2" and "attributed to class 2" in classes.lines()[0]
    # All positions of an image: the attributions of all cells sum to those of the images.
    options = FEW | {"positions": 25, "grid": 1, "min_count": 1, "steps": 1}
    total = atlas(model, data, layer="2", attributed_to="2[3]", **options)
    features = model.features(data.images, "2")[:, 3]
    torch.testing.assert_close(total.attributions[0], (features / 25).mean().detach())
    mosaic = classes.mosaic()
    assert mosaic.shape == (3, 36, 36)
    empty = {(r, c) for r in range(3) for c in range(3)} - {tuple(cell) for cell in classes.cells.tolist()}
    for row, column in empty:
        assert (mosaic[:, 12 * row : 12 * row + 12, 12 * column : 12 * column + 12] == 1).all()


def test_refusals(model: Model, data: TensorDataset) -> None:
    with pytest.raises(InputError, match="none of 3x3 cells has 50 of 27 activations"):
        atlas(model, data, layer="2", **FEW | {"min_count": 50})
    with pytest.raises(InputError, match="at least four activations"):
        atlas(model, TensorDataset(data.images[:1]), layer="2", **FEW)
    with pytest.raises(InputError, match="there are"):
        atlas(model, data, layer="2", **FEW).direction(99)


def test_umap_and_saving(tmp_path: Path) -> None:
    options = FEW | {"projection": "umap", "neighbors": 4, "tile": 16, "steps": 2}
    result = run("activation_atlas", dataset="builtin:scenes/12", out=tmp_path / "result", **options)
    loaded = load_result(tmp_path / "result")
    assert loaded.layer == result.layer and torch.equal(loaded.tiles, result.tiles)
    again = run("activation_atlas", dataset="builtin:scenes/12", **options)
    assert torch.equal(again.points, result.points)
