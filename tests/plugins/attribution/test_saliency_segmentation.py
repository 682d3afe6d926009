"""Saliency segmentation: IoU on the bundled objects, constant maps, refused inputs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from phosphene import InputError, MissingExtra, load_model, methods, run
from phosphene.results import Segmentation

saliency_segmentation = methods["attribution.saliency_segmentation"]


def test_oracle() -> None:
    saliency_segmentation.spec.oracle()


def test_masks_of_the_bundled_objects_have_a_high_iou() -> None:
    result = run("saliency_segmentation", images="builtin:scenes/12", seed=0, progress=False)
    assert isinstance(result, Segmentation) and result.iou is not None
    truth = result.inputs["masks"]
    assert result.iou.mean() > 0.5 > 2 * truth.float().mean()
    intersection, union = (result.masks & truth).sum((1, 2)), (result.masks | truth).sum((1, 2))
    torch.testing.assert_close(result.iou, intersection / union)


def test_constant_maps_and_images_give_empty_masks() -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    nn.init.constant_(constant[1].weight, 0.5)
    for images in (torch.rand(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)):
        assert not saliency_segmentation(load_model(constant), images, 0, seed=0).masks.any()


def test_iou_needs_true_masks_and_invalid_masks_are_refused() -> None:
    model, images = load_model("builtin:shapes-vgg"), torch.rand(2, 3, 64, 64)
    assert saliency_segmentation(model, images, seed=0).iou is None
    with pytest.raises(InputError, match="bool"):
        saliency_segmentation(model, images, None, torch.ones(2, 64, 64))
    with pytest.raises(InputError, match="shape"):
        saliency_segmentation(model, images, None, torch.ones(2, 32, 32, dtype=torch.bool))
    with pytest.raises(InputError, match="overlap"):
        saliency_segmentation(model, images, foreground=0.6, background=0.6)


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtra, match="segmentation"):
        saliency_segmentation(load_model("builtin:shapes-vgg"), torch.rand(1, 3, 64, 64))
