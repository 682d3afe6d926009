"""Saliency segmentation: the bundled objects are cut out, and maps that tell nothing crash nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from phosphene import InputError, MissingExtra, load_model, methods, run
from phosphene.results import Segmentation

cut = methods["attribution.saliency_segmentation"]


def test_oracle() -> None:
    cut.spec.oracle()


def test_the_bundled_objects_are_cut_out_better_than_by_taking_everything() -> None:
    result = run("saliency_segmentation", images="builtin:scenes/12", seed=0, progress=False)
    assert isinstance(result, Segmentation) and result.iou is not None
    truth = result.inputs["masks"]
    assert result.iou.mean() > 0.5 > 2 * truth.float().mean()
    found, either = (result.masks & truth).sum((1, 2)), (result.masks | truth).sum((1, 2))
    torch.testing.assert_close(result.iou, found / either)


def test_a_constant_map_and_flat_pictures_give_masks_all_the_same() -> None:
    blind = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    nn.init.constant_(blind[1].weight, 0.5)
    for images in (torch.rand(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)):
        assert not cut(load_model(blind), images, 0, seed=0).masks.any()


def test_without_the_truth_there_is_no_score_and_bad_masks_are_refused() -> None:
    model, images = load_model("builtin:shapes-vgg"), torch.rand(2, 3, 64, 64)
    assert cut(model, images, seed=0).iou is None
    with pytest.raises(InputError, match="bool"):
        cut(model, images, None, torch.ones(2, 64, 64))
    with pytest.raises(InputError, match="shape"):
        cut(model, images, None, torch.ones(2, 32, 32, dtype=torch.bool))
    with pytest.raises(InputError, match="overlap"):
        cut(model, images, foreground=0.6, background=0.6)


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtra, match="segmentation"):
        cut(load_model("builtin:shapes-vgg"), torch.rand(1, 3, 64, 64))
