"""Adversarial patch: pasting, success on held-out images, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator

from phosphene import TensorDataset, UnknownName, load_model, max_batch, methods, run
from phosphene.data import SceneDataset
from phosphene.progress import ProgressEvent, report_progress
from phosphene_plugins.attacks.patch import _outline, _paste

patch = methods["attacks.patch"]
model = load_model("builtin:shapes-vgg")
scenes = TensorDataset(SceneDataset(24).read(range(24)))


def test_paste_changes_only_the_patch() -> None:
    images = torch.rand(3, 3, 40, 60)
    mask = _outline(12, "round")
    for seed in range(8):
        draws = Generator().manual_seed(seed)
        covered = _paste(torch.ones(3, 12, 12), mask, images * 0, draws, 20.0, 1.25)
        fraction = float(covered.mean()) * 40 * 60 / float(mask.sum())
        assert 1.25**-2 * 0.9 < fraction < 1.25**2 * 1.1
        pasted = _paste(torch.ones(3, 12, 12), mask, images, Generator().manual_seed(seed), 20.0, 1.25)
        uncovered = covered == 0
        assert torch.equal(pasted[uncovered], images[uncovered])
        assert torch.equal(covered[0], covered[1])


def test_paste_positions_vary_and_stay_inside_the_image() -> None:
    images = torch.zeros(1, 1, 32, 32)
    pasted_images = [
        _paste(torch.ones(1, 8, 8), _outline(8, "square"), images, Generator().manual_seed(s), 0.0, 1.0)
        for s in range(60)
    ]
    assert len({tuple(d.nonzero()[0].tolist()) for d in pasted_images}) > 40
    for image in pasted_images:
        rows, columns = image[0, 0].amax(1).nonzero()[:, 0], image[0, 0].amax(0).nonzero()[:, 0]
        assert len(rows) == rows[-1] - rows[0] + 1 == 8
        assert len(columns) == columns[-1] - columns[0] + 1 == 8


def test_trained_patch_beats_a_gray_one_on_held_out_images() -> None:
    data = SceneDataset(96)
    gray = patch(model, data, target_class="arrow", steps=1, lr=1e-6, seed=0)
    result = patch(model, data, target_class="arrow", steps=50, seed=0)
    assert result.held_out_rate > gray.held_out_rate + 0.2
    assert result.perturbation.shape == (3, 22, 22)


def test_batch_size_does_not_matter() -> None:
    complete = patch(model, scenes, steps=3, seed=0)
    with max_batch(3):
        parts = patch(model, scenes, steps=3, seed=0)
    assert complete.held_out_rate == parts.held_out_rate
    torch.testing.assert_close(complete.adversarial, parts.adversarial, rtol=0, atol=1e-2)


def test_examples_show_the_returned_patch() -> None:
    result = patch(model, scenes, steps=1, lr=0.3, batch=2, held_out=0.5, seed=3)
    assert len(result.images) == 6
    for n, (image, example) in enumerate(zip(result.images, result.adversarial, strict=True)):
        draws = Generator().manual_seed(3 + 1 + 12 + n)  # seed + steps + index: the first half is trained on
        pasted = _paste(result.perturbation, result.mask, image[None], draws, 20.0, 1.25)
        assert torch.equal(example, pasted[0])


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    params = {"model": "builtin:shapes-vgg", "dataset": "builtin:scenes/24", "steps": 8, "seed": 0}
    complete = run("patch", **params)

    def stop(event: ProgressEvent) -> None:
        if (event.description, event.done) == ("adversarial patch", 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), report_progress(stop):
        run("patch", **params, out=tmp_path / "patch")
    again: list[ProgressEvent] = []
    with report_progress(again.append):
        resumed = run("patch", **params, out=tmp_path / "patch")
    assert torch.equal(resumed.perturbation, complete.perturbation)
    # The predictions before the loop are restored; those after it are computed.
    assert [event.description for event in again] == ["adversarial patch"] * 4 + ["predictions"]


def test_unknown_class_raises() -> None:
    with pytest.raises(UnknownName, match="arrow"):
        patch(model, scenes, target_class="arow")
