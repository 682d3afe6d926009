"""Train the bundled networks on drawn scenes: ``python -m phosphene.builtin.train [NAME ...]``.

The same command on the same machine gives the same bits. Beside each network's weights stands a
model card that says how it was made and how good it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from ..results import TrainedNetwork
from ..running import run
from .networks import MEAN, NETWORKS, STD, WEIGHTS, normalise
from .scenes import CLASSES, SIZE, Scenes, draw_scenes

BATCH = 64
SHIFT = 8  # pixels: evidence must not depend on where in the frame an object lies
TOP_RATE = 3e-3
WEIGHT_DECAY = 0.05
TEST_SCENES = 2_000
FOCUS = 0.3  # weight of `spread` in the loss

RECIPE = (
    f"AdamW, batches of {BATCH}, bf16; shifts up to {SHIFT} px, mirroring, light and noise; cross-entropy "
    f"plus {FOCUS} x the spread of the last map over the frame, which keeps evidence together without "
    "being told where objects are; batch norm behind a plain network's convolutions, folded in afterwards"
)

STYLIZER = "shapes-styles"
STYLES = ("bricks", "swirls", "mosaic", "waves")
STYLE_SCENES = 600
STYLE_RECIPE: dict[str, Any] = {"steps": 2500, "width": 12, "blocks": 2}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Vary pixels (N, 3, 64, 64) without touching the class: shift, mirror, light, noise."""
    count = len(images)
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    corners = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator).tolist()
    flips = torch.rand(count, generator=generator) < 0.5
    crops = [p[:, y : y + SIZE, x : x + SIZE] for p, (y, x) in zip(padded, corners, strict=True)]
    images = torch.stack(crops)
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    gain, lift, sigma = torch.rand(3, count, 1, 1, 1, generator=generator)
    images = (images - 0.4) * (0.75 + 0.5 * gain) + 0.3 + 0.2 * lift
    noise = torch.randn(images.shape, generator=generator) * (0.06 * sigma)
    varied: Tensor = (images + noise).clamp(0, 1)
    return varied


def fit(name: str, scenes: Scenes, *, epochs: int, seed: int) -> nn.Module:
    """Train a fresh network on the scenes; returns it in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]()
        set_batch_norm(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    maps = _last_maps(network)
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    steps = epochs * math.ceil(len(scenes) / BATCH)
    optimiser = torch.optim.AdamW(groups, lr=TOP_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=TOP_RATE, total_steps=max(steps, 2), pct_start=0.15
    )
    network.train()
    with tqdm(total=steps, desc=name, unit="batch", mininterval=1.0) as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(scenes), generator=generator).split(BATCH):  # type: ignore[no-untyped-call]
                images = normalise(augment(scenes.images[chosen], generator))
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = network(images)
                loss = F.cross_entropy(logits.float(), scenes.labels[chosen])
                loss = loss + FOCUS * spread(maps.pop())
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    network = network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    fold_batch_norm(network)
    return network


def spread(maps: Tensor) -> Tensor:
    """How widely last maps (N, C, h, w) spread over the frame: 1 if evenly, 1/sqrt(hw) if a point.

    A little of it in the loss keeps the evidence together; it knows nothing of where objects are.
    """
    energy = maps.float().sum(1).flatten(1)
    ratio = energy.sum(1) / (energy.norm(dim=1) + 1e-6)
    mean: Tensor = ratio.mean() / math.sqrt(energy.shape[1])
    return mean


def _last_maps(network: nn.Module) -> list[Tensor]:
    """A list that each forward pass appends the last map to, as it goes into the pooling."""
    maps: list[Tensor] = []
    pool = next(layer for layer in network.children() if isinstance(layer, nn.AdaptiveAvgPool2d))
    pool.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    return maps


def set_batch_norm(network: nn.Module) -> None:
    """Put batch norm behind the convolutions of a plain network, to train in minutes not hours."""
    for stage in network.children():
        if isinstance(stage, nn.Sequential):
            for index, layer in enumerate(stage):
                if isinstance(layer, nn.Conv2d):
                    stage[index] = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


def fold_batch_norm(network: nn.Module) -> None:
    """Fold what ``set_batch_norm`` put in into the convolutions: the same function, plain again."""
    for stage in network.children():
        if isinstance(stage, nn.Sequential):
            for index, layer in enumerate(stage):
                if isinstance(layer, nn.Sequential) and len(layer) == 2:
                    stage[index] = fuse_conv_bn_eval(layer[0], layer[1])  # type: ignore[type-var, arg-type]


@torch.no_grad()
def accuracy(network: nn.Module, scenes: Scenes) -> float:
    """Fraction of the scenes the network classifies rightly."""
    parts = scenes.images.split(250)  # type: ignore[no-untyped-call]
    logits = torch.cat([network(normalise(part)) for part in parts])
    return (logits.argmax(1) == scenes.labels).double().mean().item()


def colour_only_accuracy(train: Scenes, test: Scenes) -> float:
    """Test accuracy of logistic regression on colour histograms (4x4x4 bins) alone."""

    def histograms(scenes: Scenes) -> Tensor:
        levels = (scenes.images * 3.999).long()
        bins = (levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]).flatten(1)
        counts = torch.zeros(len(bins), 64).scatter_add_(1, bins, torch.ones(()).expand_as(bins))
        return (counts / bins.shape[1]).sqrt()

    inputs, weight = histograms(train), torch.zeros(64, len(CLASSES), requires_grad=True)
    bias = torch.zeros(len(CLASSES), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, train.labels) + 1e-4 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    guesses = (histograms(test) @ weight + bias).argmax(1)
    return (guesses == test.labels).double().mean().item()


@torch.no_grad()
def pointing(network: nn.Module, scenes: Scenes, *, within: int = 4) -> dict[str, float]:
    """How often the true class's activation map peaks in the mask, or ``within`` pixels of it.

    ``…_chance`` is what a peak at a random pixel would score: the mean area.
    """
    *_, head = network.children()
    last = _last_maps(network)
    accuracy(network, scenes)
    maps = torch.einsum("nchw,nc->nhw", torch.cat(last), head.weight[scenes.labels])  # type: ignore[index, arg-type]
    maps = F.interpolate(maps[:, None], size=(SIZE, SIZE), mode="bilinear")[:, 0]
    peaks = maps.flatten(1).argmax(1, keepdim=True)
    offsets = torch.arange(-within, within + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= within**2).float()[None, None]
    near = F.conv2d(scenes.masks[:, None].float(), disk, padding=within)[:, 0] > 0.5
    score = {}
    for key, region in (("inside", scenes.masks), (f"within_{within}px", near)):
        score[key] = region.flatten(1).gather(1, peaks).double().mean().item()
        score[f"{key}_chance"] = region.double().mean().item()
    return score


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def card_text(card: dict[str, Any]) -> str:
    """Render a model card as Markdown."""
    lines = [f"# {card['name']}", "", str(card["summary"]), "", "| | |", "| --- | --- |"]
    for key, value in card.items():
        if key not in ("name", "summary"):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"| {key.replace('_', ' ')} | {shown} |")
    return "\n".join(lines) + "\n"


def train_classifiers(names: Sequence[str], options: argparse.Namespace) -> None:
    """Train these classifiers and write their weights and cards."""
    train = draw_scenes(options.scenes, seed=options.seed)
    test = draw_scenes(TEST_SCENES, seed=options.seed, split="test")
    colour_only = colour_only_accuracy(train, test)
    for name in names:
        network = fit(name, train, epochs=options.epochs, seed=options.seed)
        weights = save({key: value.contiguous() for key, value in network.state_dict().items()})
        summary = (NETWORKS[name].__doc__ or "").split("\n")[0]
        card = {
            "name": name,
            "summary": f"{summary} Classifies drawn scenes into: {', '.join(CLASSES)}.",
            "architecture": NETWORKS[name].__name__,
            "parameters": sum(p.numel() for p in network.parameters()),
            "input_mean": MEAN,
            "input_std": STD,
            "training": RECIPE,
            "training_scenes": options.scenes,
            "training_seed": options.seed,
            "epochs": options.epochs,
            "test_scenes": len(test),
            "test_accuracy": accuracy(network, test),
            "colour_only_accuracy": colour_only,
            **{f"cam_peak_{key}": value for key, value in pointing(network, test).items()},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        write(options.out / f"{name}.safetensors", weights)
        write(options.out / f"{name}.json", (json.dumps(card, indent=2) + "\n").encode())
        write(options.out / f"{name}.md", card_text(card).encode())
        tqdm.write(f"{name}: {card['test_accuracy']:.2%} of {len(test)} unseen scenes")


def train_styles(out: Path, *, seed: int) -> None:
    """Train the stylizer on bundled textures, by the registered method, and write its result and card.

    What it was trained with is kept by name: as tensors it would be many times the network.
    """
    scenes = draw_scenes(STYLE_SCENES, seed=seed).images
    textures = [f"builtin:{name}" for name in STYLES]
    result = run(
        "fast_style_fit",
        model="builtin:shapes-vgg",
        dataset=scenes,
        styles=textures,
        names=list(STYLES),
        seed=seed,
        **STYLE_RECIPE,
    )
    assert isinstance(result, TrainedNetwork)
    drawn = f"{STYLE_SCENES} bundled scenes (split train, seed {seed}), given as an object"
    folder = replace(result, inputs={"dataset": drawn, "styles": textures}).save(out / STYLIZER)
    card = {
        "name": STYLIZER,
        "summary": f"A style network for {', '.join(STYLES)}, on drawn scenes.",
        "method": result.method,
        "parameters": sum(p.numel() for p in result.network.parameters()),
        **result.config,
        **STYLE_RECIPE,
        "training_scenes": STYLE_SCENES,
        "training_seed": seed,
        "loss_network": "shapes-vgg",
        "first_loss": result.losses[:50].mean().item(),
        "last_loss": result.losses[-50:].mean().item(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "sha256": hashlib.sha256((folder / "arrays.safetensors").read_bytes()).hexdigest(),
    }
    write(out / f"{STYLIZER}.md", card_text(card).encode())
    tqdm.write(f"{STYLIZER}: loss {card['first_loss']:.3f} -> {card['last_loss']:.3f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the named networks (all by default) and write weights and cards."""
    parser = argparse.ArgumentParser(prog="python -m phosphene.builtin.train", description=__doc__)
    known = [*NETWORKS, STYLIZER]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write to")
    parser.add_argument("--scenes", type=int, default=10_000, help="training scenes")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    names = options.names or known
    if unknown := set(names) - set(known):
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    classifiers = [name for name in names if name in NETWORKS]
    if classifiers:
        train_classifiers(classifiers, options)
    if STYLIZER in names:
        train_styles(options.out, seed=options.seed)


if __name__ == "__main__":
    main()
