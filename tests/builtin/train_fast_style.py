"""Trains the bundled shapes-styles: a feed-forward style network for four of the bundled textures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model_cards import first_and_last_loss, parameter_count, write_card

from phosphene import run
from phosphene.builtin.scenes import draw_scenes
from phosphene.results import TrainedNetwork

NAME = "shapes-styles"
STYLES = ["bricks", "swirls", "mosaic", "waves"]
SCENES = 600
# parameters of the method fast_style_fit
TRAINING: dict[str, Any] = {"steps": 2500, "width": 12, "blocks": 2}


def train(out: Path, *, seed: int) -> None:
    """Train the style network and write its result and card to ``out``."""
    inputs: dict[str, Any] = {
        "model": "builtin:shapes-vgg",
        "dataset": draw_scenes(SCENES, seed=seed).images,
        "styles": [f"builtin:{name}" for name in STYLES],
        "names": STYLES,
    }
    result = run("fast_style_fit", **inputs | TRAINING, seed=seed)
    assert isinstance(result, TrainedNetwork)
    # The training images are recorded by name: as tensors they would be many times as large as the network.
    dataset = f"{SCENES} bundled scenes (split train, seed {seed}), given as an object"
    result = replace(result, inputs={"dataset": dataset, "styles": inputs["styles"]})
    folder = result.save(out / NAME)
    facts = {"method": result.method, "parameters": parameter_count(result.network)}
    facts |= result.config | TRAINING
    facts |= {"training_scenes": SCENES, "training_seed": seed, "loss_network": "shapes-vgg"}
    facts |= first_and_last_loss(result.losses)
    summary = f"A style network for {', '.join(STYLES)}, on drawn scenes."
    write_card(out / f"{NAME}.md", summary, (folder / "arrays.safetensors").read_bytes(), **facts)
