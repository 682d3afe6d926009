"""Trains the bundled shapes-certified: ``interval_bounds_fit`` of a small network, on drawn scenes.

The network is first trained by the cross-entropy alone: interval bounds of initial weights are too wide to
learn from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cross_entropy_training import fit_by_cross_entropy
from model_cards import accuracy, parameter_count, write_card, write_file
from safetensors.torch import save
from tqdm import tqdm

from phosphene import load_model, run
from phosphene.builtin.networks import CERTIFIED, MEAN, STD, ShapesCertified
from phosphene.builtin.scenes import CLASSES, Scenes, draw_scenes
from phosphene.data import TensorDataset
from phosphene.results import TrainedNetwork
from phosphene_plugins.defenses.interval_bounds import worst_case_margins

# first training, by the cross-entropy
FIRST_STEPS = 700
BATCH = 100
LEARNING_RATE = 1.5e-3
# parameters of the method interval_bounds_fit
EPS = 1 / 255
TRAINING: dict[str, Any] = {
    "eps": EPS,
    "kappa": 0.5,
    "warm_up": 0.6,
    "steps": 1800,
    "batch": BATCH,
    "lr": LEARNING_RATE,
    "held_out": 0.005,
}
# evaluation
TEST_SCENES = 2_000
RADII = (0.5, 1.0, 2.0)  # times 1/255


def train(out: Path, *, scenes: int = 10_000, seed: int) -> None:
    """Train the network and write its weights and card to ``out``."""
    data = draw_scenes(scenes, seed=seed)
    images, labels = torch.cat([data.images, data.images.flip(3)]), data.labels.repeat(2)
    network = fit_by_cross_entropy(
        ShapesCertified, images, labels, steps=FIRST_STEPS, batch=BATCH, lr=LEARNING_RATE, seed=seed
    )
    options: Any = {"mean": MEAN, "std": STD, "input_size": (3, 64, 64), "classes": CLASSES}
    dataset = TensorDataset(images, [CLASSES[label] for label in labels.tolist()])
    result = run(
        "interval_bounds_fit", model=load_model(network, **options), dataset=dataset, **TRAINING, seed=seed
    )
    assert isinstance(result, TrainedNetwork)
    # Stored in half precision, and tested as it is stored.
    weights = save({key: value.contiguous() for key, value in result.network.half().state_dict().items()})
    write_file(out / f"{CERTIFIED}.safetensors", weights)
    network = result.network.float()
    test_set = draw_scenes(TEST_SCENES, seed=seed, split="test")
    facts: dict[str, Any] = {
        "parameters": parameter_count(network),
        "input_mean": MEAN,
        "input_std": STD,
        "training": f"Adam, {FIRST_STEPS} batches of {BATCH} by the cross-entropy, then interval_bounds_fit; "
        "scenes and their mirror images; stored in half precision",
        "training_scenes": scenes,
        "training_seed": seed,
        **{name.replace("_", " "): value for name, value in TRAINING.items()},
        "test_scenes": len(test_set),
        "test_accuracy": accuracy(network, test_set),
        **proven_shares(load_model(network, **options), test_set),
    }
    summary = f"{(ShapesCertified.__doc__ or '').splitlines()[0]} Classifies {', '.join(CLASSES)}."
    write_card(out / f"{CERTIFIED}.md", summary, weights, **facts)
    tqdm.write(f"{CERTIFIED}: {facts['test_accuracy']:.2%} of {len(test_set)} test scenes")


def proven_shares(model: Any, scenes: Scenes) -> dict[str, float]:
    """The share of scenes whose class is right and proven, for each of ``RADII``."""
    shares = {}
    for radius in RADII:
        pairs = zip(scenes.images.split(250), scenes.labels.split(250), strict=True)
        proven = [(worst_case_margins(model, x, y, radius / 255) > 0).all(1) for x, y in pairs]
        shares[f"proven within linf {radius:g}/255"] = torch.cat(proven).double().mean().item()
    return shares
