"""Trains the bundled shapes-codes: a sparse autoencoder of the last map of shapes-vgg."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model_cards import first_and_last_loss, parameter_count, write_card

from phosphene import run
from phosphene.builtin.scenes import draw_scenes
from phosphene.results import TrainedNetwork

NAME = "shapes-codes"
SCENES = 600
# parameters of the method sparse_autoencoder_fit
TRAINING: dict[str, Any] = {"layer": "features.11", "codes": 192, "k": 8, "steps": 1500, "batch": 16}


def train(out: Path, *, seed: int) -> None:
    """Train the autoencoder and write its result and card to ``out``."""
    images = draw_scenes(SCENES, seed=seed).images
    result: Any = run(
        "sparse_autoencoder_fit", model="builtin:shapes-vgg", dataset=images, seed=seed, **TRAINING
    )
    assert isinstance(result, TrainedNetwork)
    # The training images are recorded by name: as tensors they would be many times as large as the network.
    dataset = f"{SCENES} bundled scenes (split train, seed {seed}), given as an object"
    result = replace(result, inputs={"dataset": dataset})
    folder = result.save(out / NAME)
    facts = {"method": result.method, "parameters": parameter_count(result.network)} | TRAINING
    facts |= {"training_scenes": SCENES, "training_seed": seed, "encoded_network": "shapes-vgg"}
    facts |= {"r2": round(float(result.r2), 4), "l0": round(float(result.l0), 2)}
    facts |= {"codes_never_active": int((result.density == 0).sum())}
    facts |= first_and_last_loss(result.losses)
    summary = "A sparse autoencoder of features.11 of shapes-vgg, on drawn scenes."
    write_card(out / f"{NAME}.md", summary, (folder / "arrays.safetensors").read_bytes(), **facts)
