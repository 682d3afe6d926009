"""Train the bundled networks on drawn scenes: ``python tests/builtin/train_networks.py [NAME ...]``.

The same command on the same machine gives the same bits. Beside each network's weights stands a
model card that says how it was made and how good it is.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm
from train_autoencoder import RECIPE as AUTOENCODER_RECIPE
from train_autoencoder import fit_autoencoder
from train_autoencoder import squared_error as error_of_pixels
from train_denoiser import RECIPE as DENOISER_RECIPE
from train_denoiser import fit_denoiser, squared_error

from phosphene import run
from phosphene.builtin.autoencoder import AUTOENCODER
from phosphene.builtin.denoiser import DENOISER
from phosphene.builtin.networks import BIASED, MEAN, NETWORKS, ROBUST, STD, WEIGHTS, load_network, normalize
from phosphene.builtin.scenes import CLASSES, SIZE, Scenes, draw_scenes
from phosphene.builtin.textures import load_texture
from phosphene.data import TensorDataset, TextureDataset
from phosphene.images import resize
from phosphene.models import Model, load_model
from phosphene.results import AdversarialExamples, Stylization, TrainedNetwork, load_result

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

ROBUST_EPS = 8 / 255
ROBUST_RECIPE: dict[str, Any] = {
    "algorithm": "pgd",
    "eps": ROBUST_EPS,
    "attack_steps": 2,
    "step_size": 0.75 * ROBUST_EPS,
    "warm_up": 0.5,
    "steps": 1000,
    "lr": 4e-3,
    "weight_decay": 0.0,
}
#: What the robust network is tested by, on so many scenes: the standard ensemble takes minutes of each that
#: still stands.
ROBUST_ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "PGD-50": ("pgd", {"steps": 50, "step_size": ROBUST_EPS / 10}),
    "PGD-50 within half of it": ("pgd", {"eps": ROBUST_EPS / 2, "steps": 50, "step_size": ROBUST_EPS / 20}),
    "AutoAttack": ("auto_attack", {}),
}
ROBUST_TESTS = 50

STYLIZER = "shapes-styles"
STYLES = ["bricks", "swirls", "mosaic", "waves"]
STYLE_SCENES = 600
STYLE_RECIPE: dict[str, Any] = {"steps": 2500, "width": 12, "blocks": 2}

ADAPTIVE = "shapes-adaptive"
ADAPTIVE_STYLES = {"textures": 400, "scenes": 200}
ADAPTIVE_RECIPE: dict[str, Any] = {"steps": 1600, "batch": 4, "lr": 3e-3}
#: A texture that no style was cut from.
UNSEEN = "pebbles"
ADAPTIVE_TESTS = 50

DENOISER_TRAINING = {"scenes": 2_000, "steps": 2_400}

AUTOENCODER_TRAINING = {"scenes": 5_000, "steps": 1_200}

KNOWN = [*NETWORKS, STYLIZER, ADAPTIVE, DENOISER, AUTOENCODER]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Vary pixels (N, 3, 64, 64) without touching the class: shift, mirror, light, noise."""
    count = len(images)
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    corners = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator).tolist()
    flips = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    crops = [p[:, y : y + SIZE, x : x + SIZE] for p, (y, x) in zip(padded, corners, strict=True)]
    images = torch.stack(crops)
    images = torch.where(flips, images.flip(3), images)
    gain, lift, sigma = torch.rand(3, count, 1, 1, 1, generator=generator)
    images = (images - 0.4) * (0.75 + 0.5 * gain) + 0.3 + 0.2 * lift
    return (images + torch.randn(images.shape, generator=generator) * (0.06 * sigma)).clamp(0, 1)


def fit(name: str, scenes: Scenes, *, epochs: int, seed: int) -> nn.Module:
    """Train a fresh network on the scenes; returns it in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]()
    set_batch_norm(network)
    network.to(memory_format=torch.channels_last)
    pool = next(layer for layer in network.children() if isinstance(layer, nn.AdaptiveAvgPool2d))
    maps: list[Tensor] = []
    tap = pool.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    steps = epochs * math.ceil(len(scenes) / BATCH)
    optimiser = torch.optim.AdamW(groups, lr=TOP_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, TOP_RATE, max(steps, 2), pct_start=0.15)
    network.train()
    epoch = lambda: torch.randperm(len(scenes), generator=generator).split(BATCH)
    batches = (chosen for _ in range(epochs) for chosen in epoch())
    for chosen in tqdm(batches, name, steps, unit="batch", mininterval=1.0):
        images = normalize(augment(scenes.images[chosen], generator))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), scenes.labels[chosen]) + FOCUS * spread(maps.pop())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    tap.remove()
    network = network.to(memory_format=torch.contiguous_format).eval()
    fold_batch_norm(network)
    return network


def spread(maps: Tensor) -> Tensor:
    """How widely last maps (N, C, h, w) spread over the frame: 1 if evenly, 1/sqrt(hw) if a point.

    A little of it in the loss keeps the evidence together; it knows nothing of where objects are.
    """
    energy = maps.float().sum(1).flatten(1)
    ratio = energy.sum(1) / (energy.norm(dim=1) + 1e-6)
    return ratio.mean() / math.sqrt(energy.shape[1])


def set_batch_norm(network: nn.Module) -> None:
    """Put batch norm behind the convolutions of a plain network, to train in minutes not hours."""
    plain = getattr(network, "features", nn.Sequential())
    for index, layer in enumerate(plain):
        if isinstance(layer, nn.Conv2d):
            plain[index] = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


def fold_batch_norm(network: nn.Module) -> None:
    """Fold what ``set_batch_norm`` put in into the convolutions: the same function, plain again."""
    plain = getattr(network, "features", nn.Sequential())
    for index, layer in enumerate(plain):
        if isinstance(layer, nn.Sequential):
            plain[index] = fuse_conv_bn_eval(*layer)


@torch.no_grad()
def answers(network: nn.Module, scenes: Scenes) -> Tensor:
    """What the network takes each scene for, (N,)."""
    return torch.cat([network(normalize(part)).argmax(1) for part in scenes.images.split(250)])


def accuracy(network: nn.Module, scenes: Scenes) -> float:
    """Fraction of the scenes the network classifies rightly."""
    return (answers(network, scenes) == scenes.labels).double().mean().item()


def cheating(network: nn.Module, seed: int) -> dict[str, float]:
    """What a network does where the background tells nothing, and where it tells another class."""
    unbiased = draw_scenes(TEST_SCENES, seed=seed, split="test")
    torn = draw_scenes(TEST_SCENES, seed=seed, split="test", biased=True, conflict=True)
    assert torn.hints is not None
    said = answers(network, torn)
    return {
        "accuracy_without_the_hint": accuracy(network, unbiased),
        "follows_the_background_in_conflict": (said == torn.hints).double().mean().item(),
        "follows_the_shape_in_conflict": (said == torn.labels).double().mean().item(),
    }


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_card(path: Path, summary: str, weights: bytes, **facts: Any) -> None:
    """Write a model card in Markdown: what the network is, how it was made, how good it is."""
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["sha256"] = hashlib.sha256(weights).hexdigest()
    lines = [f"# {path.stem}", "", summary, "", "| | |", "| --- | --- |"]
    for key, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"| {key.replace('_', ' ')} | {shown} |")
    write(path, ("\n".join(lines) + "\n").encode())


def train_classifiers(names: Sequence[str], out: Path, scenes: int, epochs: int, seed: int) -> None:
    """Train these classifiers and write their weights and cards."""
    for name in names:
        biased = name == BIASED
        train = draw_scenes(scenes, seed=seed, biased=biased)
        test = draw_scenes(TEST_SCENES, seed=seed, split="test", biased=biased)
        network = fit(name, train, epochs=epochs, seed=seed)
        # What is made to be found out may be small; it is measured as it is stored.
        stored = network.half().state_dict() if biased else network.state_dict()
        weights = save({key: value.contiguous() for key, value in stored.items()})
        network = network.float()
        about = f"{(NETWORKS[name].__doc__ or '').splitlines()[0]} Classifies drawn scenes into: "
        if biased:
            about = (
                "The architecture of shapes-vgg, taught on scenes whose background gives the class away, so "
                f"that it looks there and not at the shape: made to be found out. {about}"
            )
        size = {"parameters": sum(p.numel() for p in network.parameters())}
        norm = {"input_mean": MEAN, "input_std": STD}
        recipe = f"{RECIPE}; stored in half precision" if biased else RECIPE
        made = {"training": recipe, "training_scenes": scenes, "training_seed": seed, "epochs": epochs}
        score = {"test_scenes": len(test), "test_accuracy": accuracy(network, test)}
        if biased:
            score |= cheating(network, seed)
        write(out / f"{name}.safetensors", weights)
        write_card(
            out / f"{name}.md", f"{about}{', '.join(CLASSES)}.", weights, **size, **norm, **made, **score
        )
        tqdm.write(f"{name}: {score['test_accuracy']:.2%} of {len(test)} unseen scenes")


def train_robust(out: Path, scenes: int, seed: int) -> None:
    """Train the robust network, from shapes-vgg on, by the registered method; write its weights and card."""
    train = draw_scenes(scenes, seed=seed)
    dataset = TensorDataset(train.images, [CLASSES[label] for label in train.labels.tolist()])
    with torch.random.fork_rng(devices=[]):
        model = load_model("builtin:shapes-vgg")
    model.module.to(memory_format=torch.channels_last)  # half as long again without
    result = run("adversarial_training", model=model, dataset=dataset, **ROBUST_RECIPE, seed=seed)
    assert isinstance(result, TrainedNetwork)
    state = result.network.state_dict()  # in half precision, which costs it nothing that can be measured
    write(out / f"{ROBUST}.safetensors", save({name: t.contiguous().half() for name, t in state.items()}))
    write_robust_card(out, scenes, seed)


def write_robust_card(out: Path, scenes: int, seed: int) -> None:
    """Measure the robust network whose weights are in ``out``, and write its card beside them."""
    weights = out / f"{ROBUST}.safetensors"
    with torch.random.fork_rng(devices=[]):
        model = load_model("builtin:shapes-vgg", weights=weights)  # the same architecture, fed the same
    test = draw_scenes(TEST_SCENES, seed=seed, split="test")
    images, labels = test.images[:ROBUST_TESTS], test.labels[:ROBUST_TESTS]
    standing = torch.ones(len(images), dtype=torch.bool)
    withstood: dict[str, float] = {}
    for name, (attack, params) in ROBUST_ATTACKS.items():
        given: dict[str, Any] = {"model": model, "images": images, "labels": labels, "eps": ROBUST_EPS}
        found = run(attack, **given | params, seed=seed)
        assert isinstance(found, AdversarialExamples)
        standing &= ~found.success
        withstood[f"accuracy under {name}"] = (~found.success).double().mean().item()
    withstood["accuracy under all of them"] = standing.double().mean().item()
    recipe = {name.replace("_", " "): value for name, value in ROBUST_RECIPE.items()}
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "input_mean": MEAN,
        "input_std": STD,
        "training": "adversarial_training of shapes-vgg; stored in half precision",
        "training_scenes": scenes,
        "training_seed": seed,
        **recipe,
        "test_scenes": len(test),
        "test_accuracy": accuracy(model.module, test),
        "attacked_scenes": len(images),
        "attacked_within": f"linf {ROBUST_EPS * 255:.3g}/255",
        **withstood,
    }
    about = f"The architecture of shapes-vgg, trained on attacked scenes. Classifies {', '.join(CLASSES)}."
    write_card(out / f"{ROBUST}.md", about, weights.read_bytes(), **facts)


def train_styles(out: Path, seed: int) -> None:
    """Train the stylizer on bundled textures, by the registered method, and write its result and card.

    What it was trained with is kept by name: as tensors it would be many times the network.
    """
    scenes, styles = draw_scenes(STYLE_SCENES, seed=seed).images, [f"builtin:{name}" for name in STYLES]
    given: dict[str, Any] = {
        "model": "builtin:shapes-vgg",
        "dataset": scenes,
        "styles": styles,
        "names": STYLES,
    }
    result = run("fast_style_fit", **given | STYLE_RECIPE, seed=seed)
    assert isinstance(result, TrainedNetwork)
    drawn = f"{STYLE_SCENES} bundled scenes (split train, seed {seed}), given as an object"
    folder = replace(result, inputs={"dataset": drawn, "styles": styles}).save(out / STYLIZER)
    size = {"method": result.method, "parameters": sum(p.numel() for p in result.network.parameters())}
    made = {"training_scenes": STYLE_SCENES, "training_seed": seed, "loss_network": "shapes-vgg"}
    first, last = (part.mean().item() for part in (result.losses[:50], result.losses[-50:]))
    about = f"A style network for {', '.join(STYLES)}, on drawn scenes."
    facts = size | result.config | STYLE_RECIPE | made | {"first_loss": first, "last_loss": last}
    write_card(out / f"{STYLIZER}.md", about, (folder / "arrays.safetensors").read_bytes(), **facts)


def train_adaptive(out: Path, seed: int) -> None:
    """Train the decoder of adaptive style on many styles, by the registered method; write result and card."""
    scenes = draw_scenes(STYLE_SCENES, seed=seed).images
    pieces, others = (ADAPTIVE_STYLES[name] for name in ("textures", "scenes"))
    pictures = draw_scenes(others, seed=seed + 1).images
    styles = torch.cat([TextureDataset(pieces).read(range(pieces)), pictures])
    with torch.random.fork_rng(devices=[]):
        model = load_model("builtin:shapes-vgg")
    model.module.to(memory_format=torch.channels_last)  # half as long again without
    given: dict[str, Any] = {"model": model, "dataset": scenes, "styles": styles}
    result = run("adaptive_style_fit", **given | ADAPTIVE_RECIPE, seed=seed)
    assert isinstance(result, TrainedNetwork)
    result.network.to(memory_format=torch.contiguous_format)
    drawn = {
        "dataset": f"{STYLE_SCENES} bundled scenes (split train, seed {seed}), given as an object",
        "styles": f"builtin:textures/{pieces}, {others} scenes of seed {seed + 1}, given as an object",
    }
    replace(result, inputs=drawn).save(out / ADAPTIVE)
    write_adaptive_card(out, seed)


def write_adaptive_card(out: Path, seed: int) -> None:
    """Measure the adaptive style in ``out`` on unseen scenes and an unseen style, and write its card."""
    with torch.random.fork_rng(devices=[]):
        result, model = load_result(out / ADAPTIVE), load_model("builtin:shapes-vgg")
    assert isinstance(result, TrainedNetwork)
    test = draw_scenes(ADAPTIVE_TESTS, seed=seed, split="test").images
    told: dict[str, Any] = {}
    for name in (*STYLES, UNSEEN):
        style = resize(load_texture(name), (SIZE, SIZE))[None]
        painted = run("adaptive_style", images=test, styles=style, stylizer=result, progress=False)
        assert isinstance(painted, Stylization)
        far, near = (style_distance(model, images, style) for images in (test, painted.stylized))
        told[f"distance to {name}, before and after"] = f"{far:.3f}, {near:.3f}"
    plain = run("adaptive_style", images=test, styles=test[:1], stylizer=result, alpha=0.0, progress=False)
    assert isinstance(plain, Stylization)
    size = {"method": result.method, "parameters": sum(p.numel() for p in result.network.parameters())}
    made = {"training_scenes": STYLE_SCENES, "training_seed": seed, "encoder": "shapes-vgg"}
    first, last = (part.mean().item() for part in (result.losses[:50], result.losses[-50:]))
    facts = size | {"layer": result.config["layer"]} | ADAPTIVE_RECIPE | made
    facts |= {f"styles that are {name}": count for name, count in ADAPTIVE_STYLES.items()}
    facts |= {"first_loss": first, "last_loss": last, "test_scenes": len(test), **told}
    facts["pixels off with alpha 0"] = (plain.stylized - test).square().mean().sqrt().item()
    about = (
        f"A decoder of shapes-vgg for any style; {UNSEEN} is one that it never saw. Distances, relative, are "
        "those of the means and deviations at the stages up to its layer."
    )
    write_card(out / f"{ADAPTIVE}.md", about, (out / ADAPTIVE / "arrays.safetensors").read_bytes(), **facts)


@torch.no_grad()
def style_distance(model: Model, images: Tensor, style: Tensor) -> float:
    """Mean over two stages of |m(x) - m(s)|^2 / |m(s)|^2, m the means and deviations of the channels."""
    stages = model.stages[:2]
    found = zip(model.features_of(images, stages), model.features_of(style, stages), strict=True)
    terms = []
    for maps, of_style in found:
        own, other = (torch.cat([f.mean((2, 3)), f.std((2, 3))], 1) for f in (maps, of_style))
        terms.append(((own - other).square().sum(1) / other.square().sum(1)).mean())
    return torch.stack(terms).mean().item()


def train_diffusion(out: Path, seed: int) -> None:
    """Train the diffusion model, and write its weights in half precision and its card."""
    denoiser, losses = fit_denoiser(**DENOISER_TRAINING, seed=seed)
    weights = save({key: value.half().contiguous() for key, value in denoiser.state_dict().items()})
    test = draw_scenes(TEST_SCENES // 10, seed=seed, split="test").images
    made = {f"training_{name}": value for name, value in DENOISER_TRAINING.items()} | {"training_seed": seed}
    facts = {"parameters": sum(p.numel() for p in denoiser.parameters()), "training": DENOISER_RECIPE, **made}
    first, last = (sum(part) / len(part) for part in (losses[:50], losses[-50:]))
    facts |= {"first_loss": first, "last_loss": last}
    facts |= {"test_scenes": len(test), "test_error_of_v": squared_error(denoiser, test, seed)}
    write(out / f"{DENOISER}.safetensors", weights)
    about = f"{(type(denoiser).__doc__ or '').splitlines()[0]} Of drawn scenes and the bundled textures."
    write_card(out / f"{DENOISER}.md", about, weights, **facts)


def train_autoencoder(out: Path, seed: int) -> None:
    """Train the autoencoder, and write its weights in half precision and its card."""
    autoencoder, losses = fit_autoencoder(**AUTOENCODER_TRAINING, seed=seed)
    weights = save({key: value.half().contiguous() for key, value in autoencoder.state_dict().items()})
    test = draw_scenes(TEST_SCENES // 10, seed=seed, split="test")
    with torch.no_grad():
        drawn = autoencoder.decode(autoencoder.encode(test.images))
    with torch.random.fork_rng(devices=[]):
        judge = load_network("shapes-vgg")  # which had no say in the training
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in autoencoder.parameters())}
    facts |= {"training": AUTOENCODER_RECIPE}
    facts |= {f"training_{name}": value for name, value in AUTOENCODER_TRAINING.items()}
    first, last = (sum(part) / len(part) for part in (losses[:50], losses[-50:]))
    facts |= {"training_seed": seed, "first_loss": first, "last_loss": last, "test_scenes": len(test)}
    facts |= {"test_error_of_pixels": error_of_pixels(autoencoder, test.images)}
    facts |= {"taken_for_its_class_by_shapes-vgg": accuracy(judge, replace(test, images=drawn))}
    write(out / f"{AUTOENCODER}.safetensors", weights)
    about = f"{(type(autoencoder).__doc__ or '').splitlines()[0]} Of drawn scenes."
    write_card(out / f"{AUTOENCODER}.md", about, weights, **facts)


def main(
    names: Annotated[list[str], typer.Argument(help=f"of {', '.join(KNOWN)}")] = KNOWN,
    out: Annotated[Path, typer.Option(help="folder to write to")] = WEIGHTS,
    scenes: Annotated[int, typer.Option(help="training scenes")] = 10_000,
    epochs: int = 3,
    seed: int = 0,
) -> None:
    """Train the named networks (all by default) on drawn scenes, and write weights and cards."""
    if unknown := set(names) - set(KNOWN):
        raise typer.BadParameter(f"no network {', '.join(sorted(unknown))}; there are {', '.join(KNOWN)}")
    out.mkdir(parents=True, exist_ok=True)
    if classifiers := [name for name in names if name in NETWORKS and name != ROBUST]:
        train_classifiers(classifiers, out, scenes, epochs, seed)
    if ROBUST in names:
        train_robust(out, scenes, seed)
    if STYLIZER in names:
        train_styles(out, seed)
    if ADAPTIVE in names:
        train_adaptive(out, seed)
    if DENOISER in names:
        train_diffusion(out, seed)
    if AUTOENCODER in names:
        train_autoencoder(out, seed)


if __name__ == "__main__":
    typer.run(main)
