"""Trains the bundled shapes-adaptive: the decoder of adaptive style transfer for any style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_cards import first_and_last_loss, parameter_count, write_card
from torch import Tensor

from phosphene import load_result, run
from phosphene.builtin.scenes import SIZE, draw_scenes
from phosphene.builtin.textures import load_texture
from phosphene.data import TextureDataset
from phosphene.images import resize
from phosphene.models import Model, load_model
from phosphene.results import Stylization, TrainedNetwork

NAME = "shapes-adaptive"
# data
SCENES = 600
STYLES = {"textures": 400, "scenes": 200}  # number of style images of each kind
# parameters of the method adaptive_style_fit
TRAINING: dict[str, Any] = {"steps": 1600, "batch": 4, "lr": 3e-3}
# evaluation
TEST_SCENES = 50
TEST_STYLES = ("bricks", "swirls", "mosaic", "waves", "pebbles")
UNSEEN = "pebbles"  # the texture that no style image is a crop of


def train(out: Path, *, seed: int) -> None:
    """Train the decoder and write its result and card to ``out``."""
    scenes = draw_scenes(SCENES, seed=seed).images
    textures = TextureDataset(STYLES["textures"]).read(range(STYLES["textures"]))
    styles = torch.cat([textures, draw_scenes(STYLES["scenes"], seed=seed + 1).images])
    with torch.random.fork_rng(devices=[]):
        model = load_model("builtin:shapes-vgg")
    model.module.to(memory_format=torch.channels_last)  # 1.5 times as fast
    result = run("adaptive_style_fit", model=model, dataset=scenes, styles=styles, **TRAINING, seed=seed)
    assert isinstance(result, TrainedNetwork)
    result.network.to(memory_format=torch.contiguous_format)
    replace(result, inputs=recorded_inputs(SCENES, STYLES, seed)).save(out / NAME)
    write_adaptive_card(out, seed=seed)


def recorded_inputs(scenes: int, styles: dict[str, int], seed: int) -> dict[str, str]:
    """The training images by name: as tensors they would be many times as large as the network."""
    return {
        "dataset": f"{scenes} bundled scenes (split train, seed {seed}), given as an object",
        "styles": f"builtin:textures/{styles['textures']}, {styles['scenes']} scenes of seed {seed + 1}, "
        "given as an object",
    }


def style_distances(method: str, stylizer: TrainedNetwork, model: Model, images: Tensor) -> dict[str, str]:
    """The distances of images to each test style before and after the method, as facts of a card."""
    distances = {}
    for name in TEST_STYLES:
        style = resize(load_texture(name), (SIZE, SIZE))[None]
        output = run(method, images=images, styles=style, stylizer=stylizer, progress=False)
        assert isinstance(output, Stylization)
        before, after = (style_distance(model, x, style) for x in (images, output.stylized))
        distances[f"distance to {name}, before and after"] = f"{before:.3f}, {after:.3f}"
    return distances


def write_adaptive_card(out: Path, *, seed: int) -> None:
    """Test the stored network in ``out`` on test scenes and an unseen style, and write its card beside it."""
    with torch.random.fork_rng(devices=[]):
        result, model = load_result(out / NAME), load_model("builtin:shapes-vgg")
    assert isinstance(result, TrainedNetwork)
    images = draw_scenes(TEST_SCENES, seed=seed, split="test").images
    distances = style_distances("adaptive_style", result, model, images)
    identity = run(
        "adaptive_style", images=images, styles=images[:1], stylizer=result, alpha=0.0, progress=False
    )
    assert isinstance(identity, Stylization)
    facts: dict[str, Any] = {"method": result.method, "parameters": parameter_count(result.network)}
    facts |= {"layer": result.config["layer"]} | TRAINING
    facts |= {"training_scenes": SCENES, "training_seed": seed, "encoder": "shapes-vgg"}
    facts |= {f"styles that are {name}": count for name, count in STYLES.items()}
    facts |= first_and_last_loss(result.losses) | {"test_scenes": len(images), **distances}
    facts["pixels off with alpha 0"] = (identity.stylized - images).square().mean().sqrt().item()
    summary = (
        f"A decoder of shapes-vgg for any style; {UNSEEN} is not among its training styles. Distances, "
        "relative, are those of the means and deviations at the stages up to its layer."
    )
    write_card(out / f"{NAME}.md", summary, (out / NAME / "arrays.safetensors").read_bytes(), **facts)


@torch.no_grad()
def style_distance(model: Model, images: Tensor, style: Tensor) -> float:
    """Mean over two stages of |m(x) - m(s)|^2 / |m(s)|^2, m the channels' means and standard deviations."""
    stages = model.stages[:2]
    pairs = zip(model.features_of(images, stages), model.features_of(style, stages), strict=True)
    terms = []
    for image_maps, style_maps in pairs:
        m_x, m_s = (torch.cat([f.mean((2, 3)), f.std((2, 3))], 1) for f in (image_maps, style_maps))
        terms.append(((m_x - m_s).square().sum(1) / m_s.square().sum(1)).mean())
    return torch.stack(terms).mean().item()
