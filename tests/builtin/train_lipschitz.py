"""Trains the bundled shapes-lipschitz: ``lipschitz_fit`` of a small network, on drawn scenes.

The network is first trained by the cross-entropy alone: initial weights of norm 1 have nearly equal logits.
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
from phosphene.builtin.networks import LIPSCHITZ, MEAN, STD, ShapesLipschitz
from phosphene.builtin.scenes import CLASSES, draw_scenes
from phosphene.data import TensorDataset
from phosphene.results import TrainedNetwork

# first training, by the cross-entropy
FIRST_STEPS = 800
BATCH = 100
FIRST_LEARNING_RATE = 1.5e-3
# parameters of the method lipschitz_fit
TRAINING: dict[str, Any] = {
    "eps": 18 / 255,
    "steps": 1400,
    "batch": BATCH,
    "lr": 3e-3,
    "held_out": 0.005,
}
# evaluation
TEST_SCENES = 2_000
RADII = (9, 18, 36, 72)  # l2, times 1/255


def train(out: Path, *, scenes: int = 10_000, seed: int) -> None:
    """Train the network and write its weights and card to ``out``."""
    data = draw_scenes(scenes, seed=seed)
    images, labels = torch.cat([data.images, data.images.flip(3)]), data.labels.repeat(2)
    network = fit_by_cross_entropy(
        ShapesLipschitz, images, labels, steps=FIRST_STEPS, batch=BATCH, lr=FIRST_LEARNING_RATE, seed=seed
    )
    options: Any = {"mean": MEAN, "std": STD, "input_size": (3, 64, 64), "classes": CLASSES}
    dataset = TensorDataset(images, [CLASSES[label] for label in labels.tolist()])
    result = run(
        "lipschitz_fit", model=load_model(network, **options), dataset=dataset, **TRAINING, seed=seed
    )
    assert isinstance(result, TrainedNetwork)
    # Stored in half precision, and tested as it is stored: rounding changes the norms.
    weights = save({key: value.contiguous() for key, value in result.network.half().state_dict().items()})
    write_file(out / f"{LIPSCHITZ}.safetensors", weights)
    network = result.network.float()
    test_set = draw_scenes(TEST_SCENES, seed=seed, split="test")
    certificates: Any = run("lipschitz", model=load_model(network, **options), images=test_set.images)
    is_right = certificates.labels == test_set.labels
    proven = {
        f"right and proven within l2 {radius}/255": (is_right & (certificates.radius >= radius / 255))
        .double()
        .mean()
        .item()
        for radius in RADII
    }
    facts: dict[str, Any] = {
        "parameters": parameter_count(network),
        "input_mean": MEAN,
        "input_std": STD,
        "training": f"Adam, {FIRST_STEPS} batches of {BATCH} by the cross-entropy, then lipschitz_fit; "
        "scenes and their mirror images; stored in half precision",
        "training_scenes": scenes,
        "training_seed": seed,
        **{name.replace("_", " "): value for name, value in TRAINING.items()},
        "Lipschitz bound": certificates.subject.rpartition(" ")[2],
        "test_scenes": len(test_set),
        "test_accuracy": accuracy(network, test_set),
        **proven,
    }
    summary = f"{(ShapesLipschitz.__doc__ or '').splitlines()[0]} Classifies {', '.join(CLASSES)}."
    write_card(out / f"{LIPSCHITZ}.md", summary, weights, **facts)
    tqdm.write(f"{LIPSCHITZ}: {facts['test_accuracy']:.2%} of {len(test_set)} test scenes")
