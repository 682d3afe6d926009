"""Trains the bundled shapes-robust: adversarial training of shapes-vgg on drawn scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_cards import accuracy, parameter_count, write_card, write_file
from safetensors.torch import save

from phosphene import run
from phosphene.builtin.networks import MEAN, ROBUST, STD
from phosphene.builtin.scenes import CLASSES, draw_scenes
from phosphene.data import TensorDataset
from phosphene.models import load_model
from phosphene.results import AdversarialExamples, TrainedNetwork

EPS = 8 / 255
# parameters of the method adversarial_training
TRAINING: dict[str, Any] = {
    "algorithm": "pgd",
    "eps": EPS,
    "attack_steps": 2,
    "step_size": 0.75 * EPS,
    "warm_up": 0.5,
    "steps": 1000,
    "lr": 4e-3,
    "weight_decay": 0.0,
}
# evaluation
TEST_SCENES = 2_000
ATTACKED_SCENES = 50  # AutoAttack takes minutes for each image that it does not fool
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "PGD-50": ("pgd", {"steps": 50, "step_size": EPS / 10}),
    "PGD-50 within half of it": ("pgd", {"eps": EPS / 2, "steps": 50, "step_size": EPS / 20}),
    "AutoAttack": ("auto_attack", {}),
}


def train(out: Path, *, scenes: int, seed: int) -> None:
    """Train the robust network, starting from shapes-vgg, and write its weights and card to ``out``."""
    data = draw_scenes(scenes, seed=seed)
    dataset = TensorDataset(data.images, [CLASSES[label] for label in data.labels.tolist()])
    with torch.random.fork_rng(devices=[]):
        model = load_model("builtin:shapes-vgg")
    model.module.to(memory_format=torch.channels_last)  # 1.5 times as fast
    result = run("adversarial_training", model=model, dataset=dataset, **TRAINING, seed=seed)
    assert isinstance(result, TrainedNetwork)
    state = result.network.state_dict()  # stored in half precision, without a measurable loss of accuracy
    write_file(
        out / f"{ROBUST}.safetensors", save({name: t.contiguous().half() for name, t in state.items()})
    )
    write_robust_card(out, scenes=scenes, seed=seed)


def write_robust_card(out: Path, *, scenes: int, seed: int) -> None:
    """Test the stored network in ``out``, with and without attacks, and write its card beside it."""
    weights = out / f"{ROBUST}.safetensors"
    with torch.random.fork_rng(devices=[]):
        model = load_model("builtin:shapes-vgg", weights=weights)  # the same architecture and normalization
    test_set = draw_scenes(TEST_SCENES, seed=seed, split="test")
    images, labels = test_set.images[:ATTACKED_SCENES], test_set.labels[:ATTACKED_SCENES]
    robust = torch.ones(len(images), dtype=torch.bool)
    robust_accuracy: dict[str, float] = {}
    for name, (attack, params) in ATTACKS.items():
        arguments = {"model": model, "images": images, "labels": labels, "eps": EPS} | params
        result = run(attack, **arguments, seed=seed)
        assert isinstance(result, AdversarialExamples)
        robust &= ~result.success
        robust_accuracy[f"accuracy under {name}"] = (~result.success).double().mean().item()
    robust_accuracy["accuracy under all of them"] = robust.double().mean().item()
    facts: dict[str, Any] = {
        "parameters": parameter_count(model.module),
        "input_mean": MEAN,
        "input_std": STD,
        "training": "adversarial_training of shapes-vgg; stored in half precision",
        "training_scenes": scenes,
        "training_seed": seed,
        **{name.replace("_", " "): value for name, value in TRAINING.items()},
        "test_scenes": len(test_set),
        "test_accuracy": accuracy(model.module, test_set),
        "attacked_scenes": len(images),
        "attacked_within": f"linf {EPS * 255:.3g}/255",
        **robust_accuracy,
    }
    summary = f"The architecture of shapes-vgg, trained on attacked scenes. Classifies {', '.join(CLASSES)}."
    write_card(out / f"{ROBUST}.md", summary, weights.read_bytes(), **facts)
