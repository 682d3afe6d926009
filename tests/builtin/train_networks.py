"""Trains the bundled networks on drawn scenes: ``python tests/builtin/train_networks.py [NAME ...]``.

Writes the weights of each network and, beside them, a model card: how it was trained and how accurate it is.
Training is deterministic on one machine. The trainings are in ``train_*.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import train_adaptive_style
import train_answers
import train_autoencoder
import train_certified
import train_classifiers
import train_denoiser
import train_fast_style
import train_image_adapter
import train_lipschitz
import train_parts
import train_predicted_style
import train_robust
import train_sparse_codes
import train_vit
import typer

from phosphene.builtin.answers import ANSWERS
from phosphene.builtin.autoencoder import AUTOENCODER
from phosphene.builtin.denoiser import DENOISER
from phosphene.builtin.image_adapter import IMAGE_ADAPTER
from phosphene.builtin.networks import CERTIFIED, LIPSCHITZ, NETWORKS, PARTS_RESNET, ROBUST, WEIGHTS
from phosphene.builtin.vision_transformer import VIT

CLASSIFIERS = [name for name in NETWORKS if name != ROBUST]
#: The other trainings, which take the output folder and a seed.
TRAININGS: dict[str, Callable[..., None]] = {
    train_fast_style.NAME: train_fast_style.train,
    train_adaptive_style.NAME: train_adaptive_style.train,
    train_predicted_style.NAME: train_predicted_style.train,
    train_sparse_codes.NAME: train_sparse_codes.train,
    DENOISER: train_denoiser.train,
    IMAGE_ADAPTER: train_image_adapter.train,
    AUTOENCODER: train_autoencoder.train,
    VIT: train_vit.train,
    ANSWERS: train_answers.train,
    PARTS_RESNET: train_parts.train,
    CERTIFIED: train_certified.train,
    LIPSCHITZ: train_lipschitz.train,
}
NAMES = [*NETWORKS, *TRAININGS]


def main(
    names: Annotated[list[str], typer.Argument(help=f"of {', '.join(NAMES)}")] = NAMES,
    out: Annotated[Path, typer.Option(help="output folder")] = WEIGHTS,
    scenes: Annotated[int, typer.Option(help="training scenes of the classifiers")] = 10_000,
    epochs: Annotated[int, typer.Option(help="epochs of the classifiers")] = 3,
    seed: int = 0,
) -> None:
    """Train the named networks (default: all) and write their weights and cards."""
    if unknown := set(names) - set(NAMES):
        raise typer.BadParameter(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    out.mkdir(parents=True, exist_ok=True)
    classifiers = [name for name in CLASSIFIERS if name in names]
    train_classifiers.train(classifiers, out, scenes=scenes, epochs=epochs, seed=seed)
    if ROBUST in names:  # starts from shapes-vgg
        train_robust.train(out, scenes=scenes, seed=seed)
    for name, train in TRAININGS.items():
        if name in names:
            train(out, seed=seed)


if __name__ == "__main__":
    typer.run(main)
