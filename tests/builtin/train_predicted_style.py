"""Trains the bundled shapes-predicted: a style predictor and a style network for any style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_cards import first_and_last_loss, parameter_count, write_card
from train_adaptive_style import SCENES, STYLES, TEST_SCENES, UNSEEN, recorded_inputs, style_distances

from phosphene import load_result, run
from phosphene.builtin.scenes import draw_scenes
from phosphene.data import TextureDataset
from phosphene.models import load_model
from phosphene.results import TrainedNetwork

NAME = "shapes-predicted"
# parameters of the method predicted_style_fit
TRAINING: dict[str, Any] = {"steps": 3200, "batch": 4, "lr": 5e-3, "content_weight": 6.0}


def train(out: Path, *, seed: int) -> None:
    """Train the networks and write their result and card to ``out``."""
    scenes = draw_scenes(SCENES, seed=seed).images
    textures = TextureDataset(STYLES["textures"]).read(range(STYLES["textures"]))
    styles = torch.cat([textures, draw_scenes(STYLES["scenes"], seed=seed + 1).images])
    with torch.random.fork_rng(devices=[]):
        model = load_model("builtin:shapes-vgg")
    model.module.to(memory_format=torch.channels_last)  # 1.5 times as fast
    result = run("predicted_style_fit", model=model, dataset=scenes, styles=styles, **TRAINING, seed=seed)
    assert isinstance(result, TrainedNetwork)
    # One preview: four would be as large as the networks.
    result = replace(
        result,
        inputs=recorded_inputs(SCENES, STYLES, seed),
        previews=result.previews[:1],
        contents=None,
        styles=None,
        labels=result.labels[:1],
    )
    result.save(out / NAME)
    write_predicted_card(out, seed=seed)


def write_predicted_card(out: Path, *, seed: int) -> None:
    """Test the stored networks in ``out`` on test scenes and an unseen style, and write their card."""
    with torch.random.fork_rng(devices=[]):
        result, model = load_result(out / NAME), load_model("builtin:shapes-vgg")
    assert isinstance(result, TrainedNetwork)
    images = draw_scenes(TEST_SCENES, seed=seed, split="test").images
    distances = style_distances("predicted_style", result, model, images)
    facts: dict[str, Any] = {"method": result.method, "parameters": parameter_count(result.network)}
    facts |= result.config | TRAINING
    facts |= {"training_scenes": SCENES, "training_seed": seed, "loss_network": "shapes-vgg"}
    facts |= {f"styles that are {name}": count for name, count in STYLES.items()}
    facts |= first_and_last_loss(result.losses) | {"test_scenes": len(images), **distances}
    summary = (
        f"A style predictor and a style network for any style; {UNSEEN} is not among the training styles. "
        "Distances, relative, are those of the means and deviations at the first two stages of shapes-vgg."
    )
    write_card(out / f"{NAME}.md", summary, (out / NAME / "arrays.safetensors").read_bytes(), **facts)
