"""The patch: what it covers and what it leaves, that it works on pictures it never saw, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator

from phosphene import TensorDataset, UnknownName, load_model, max_batch, methods, run
from phosphene.data import SceneDataset
from phosphene.progress import report_progress
from phosphene_plugins.attacks.patch import _outline, _paste

patch = methods["attacks.patch"]
model = load_model("builtin:shapes-vgg")
scenes = TensorDataset(SceneDataset(24).read(range(24)))


def test_patch_covers_its_place_alone() -> None:
    images = torch.rand(3, 3, 40, 60)
    mask = _outline(12, "round")
    for seed in range(8):
        draws = Generator().manual_seed(seed)
        covered = _paste(torch.ones(3, 12, 12), mask, images * 0, draws, 20.0, 1.25)
        share = float(covered.mean()) * 40 * 60 / float(mask.sum())
        assert 1.25**-2 * 0.9 < share < 1.25**2 * 1.1
        pasted = _paste(torch.ones(3, 12, 12), mask, images, Generator().manual_seed(seed), 20.0, 1.25)
        bare = covered == 0
        assert torch.equal(pasted[bare], images[bare])
        assert torch.equal(covered[0], covered[1])


def test_patch_lands_in_many_places_and_never_beyond_the_border() -> None:
    images = torch.zeros(1, 1, 32, 32)
    drawn = [
        _paste(torch.ones(1, 8, 8), _outline(8, "square"), images, Generator().manual_seed(s), 0.0, 1.0)
        for s in range(60)
    ]
    assert len({tuple(d.nonzero()[0].tolist()) for d in drawn}) > 40
    for image in drawn:
        rows, columns = image[0, 0].amax(1).nonzero()[:, 0], image[0, 0].amax(0).nonzero()[:, 0]
        assert len(rows) == rows[-1] - rows[0] + 1 == 8
        assert len(columns) == columns[-1] - columns[0] + 1 == 8


def test_trained_patch_beats_a_grey_one_on_pictures_it_never_saw() -> None:
    data = SceneDataset(96)
    grey = patch(model, data, target_class="arrow", steps=1, lr=1e-6, seed=0)
    found = patch(model, data, target_class="arrow", steps=50, seed=0)
    assert found.held_out_rate > grey.held_out_rate + 0.2
    assert found.perturbation.shape == (3, 22, 22)


def test_how_many_go_through_at_once_does_not_matter() -> None:
    whole = patch(model, scenes, steps=3, seed=0)
    with max_batch(3):
        parts = patch(model, scenes, steps=3, seed=0)
    assert whole.held_out_rate == parts.held_out_rate
    torch.testing.assert_close(whole.adversarial, parts.adversarial, rtol=0, atol=1e-2)


def test_cut_off_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    told = {"model": "builtin:shapes-vgg", "dataset": "builtin:scenes/24", "steps": 8, "seed": 0}
    whole = run("patch", **told)
    seen: list[object] = []

    def stop(event: object) -> None:
        seen.append(event)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), report_progress(stop):
        run("patch", **told, out=tmp_path / "patch")
    again: list[object] = []
    with report_progress(again.append):
        resumed = run("patch", **told, out=tmp_path / "patch")
    assert torch.equal(resumed.perturbation, whole.perturbation)
    assert len(again) <= 4


def test_unknown_class_is_refused() -> None:
    with pytest.raises(UnknownName, match="arrow"):
        patch(model, scenes, target_class="arow")
