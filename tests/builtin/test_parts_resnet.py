"""``parts-resnet``: its card and accuracy, its 7x7 filters, and its training."""

from __future__ import annotations

import hashlib
import re

import torch
import train_parts

from phosphene import load_model
from phosphene.builtin.networks import PARTS_RESNET, WEIGHTS
from phosphene.builtin.part_scenes import PART_CLASSES, draw_part_scenes
from phosphene.builtin.parts_resnet import load_parts_resnet


def test_weights_match_their_card() -> None:
    weights = WEIGHTS / f"{PARTS_RESNET}.safetensors"
    card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", weights.with_suffix(".md").read_text(), re.MULTILINE))
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert int(card["parameters"]) == sum(p.numel() for p in load_parts_resnet().parameters())
    assert float(card["test accuracy"]) >= 0.95
    assert weights.stat().st_size < 1_300_000


def test_model_classifies_new_scenes() -> None:
    model = load_model("builtin:parts-resnet")
    assert model.input_size == (3, 128, 128) and model.classes == PART_CLASSES
    scenes = draw_part_scenes(12, seed=11, split="test")
    assert (model(scenes.images).argmax(1) == scenes.labels).double().mean() >= 0.9


def test_filters_are_smooth_and_of_color_and_of_edges() -> None:
    filters = load_parts_resnet().conv1.weight.detach()
    assert filters.shape == (32, 3, 7, 7)
    strong = filters[filters.flatten(1).norm(dim=1) > 0.3 * filters.flatten(1).norm(dim=1).max()]
    steps = (strong[..., 1:] - strong[..., :-1]).square().mean((1, 2, 3)) / strong.square().mean((1, 2, 3))
    assert steps.median() < 1.2  # 2 for noise
    gray = strong.mean(1, keepdim=True)
    colored = ((strong - gray).square().sum((1, 2, 3)) / strong.square().sum((1, 2, 3))) > 0.5
    assert colored.any() and not colored.all()


def test_training_is_deterministic() -> None:
    state = torch.get_rng_state()
    images = torch.arange(8 * 3 * 32 * 32).remainder(251).byte().view(8, 3, 32, 32)
    labels = torch.arange(8)
    first, second = (train_parts.fit(images, labels, epochs=2, seed=1).state_dict() for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not first["fc.weight"].isnan().any()
