"""``LatentSynthesis``, the result of ``latent_visualization``: images from latent space and pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Synthesis


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentSynthesis(Synthesis):
    """Images that maximize units, optimized over a generator's latent codes and, to compare, over pixels.

    ``images`` (N, C, H, W) in [0, 1] are generated from the ``codes`` (N, ...), with ``scores`` (steps, N);
    ``pixel_images`` of the same shape are optimized without the generator, with ``pixel_scores``. Where the
    generator has an encoder, ``reconstruction_error`` and ``pixel_reconstruction_error`` (N,) are the root
    mean square difference between each image and its reconstruction. ``frames`` show the optimization of
    ``images``.
    """

    per_image: ClassVar[tuple[str, ...]] = (
        "images",
        "pixel_images",
        "codes",
        "targets",
        "reconstruction_error",
        "pixel_reconstruction_error",
    )
    per_step: ClassVar[tuple[str, ...]] = ("scores", "pixel_scores", "frames")

    pixel_images: Tensor
    codes: Tensor
    pixel_scores: Tensor
    reconstruction_error: Tensor | None = None
    pixel_reconstruction_error: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        """Per target: the image of the latent code and the image optimized over pixels."""
        latent = _panels(self.images, "code", self.scores, self.reconstruction_error)
        pixels = _panels(self.pixel_images, "pixels", self.pixel_scores, self.pixel_reconstruction_error)
        return [
            [Panel(left.image, f"{target}, {left.title}", is_output=True), right]
            for target, left, right in zip(self.targets, latent, pixels, strict=True)
        ]

    def rows(self) -> list[list[Panel]]:
        """A row of latent images above the row of pixel images, for each row of targets."""
        groups = self.panels()
        starts = range(0, len(groups), self.groups_per_row)
        return [list(row) for n in starts for row in zip(*groups[n : n + self.groups_per_row], strict=True)]


def _panels(images: Tensor, name: str, scores: Tensor, errors: Tensor | None) -> list[Panel]:
    """Images titled by their final score and the root mean square error of their reconstruction."""
    titles = [f"{name}: {score:.3g}" for score in scores[-1].tolist()]
    if errors is not None:
        titles = [f"{t}, RMSE {e:.3f}" for t, e in zip(titles, errors.tolist(), strict=True)]
    return [Panel(image, title, is_output=True) for image, title in zip(images, titles, strict=True)]
