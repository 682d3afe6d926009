"""``UniversalPerturbation``: one perturbation for all images, with its fooling rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class UniversalPerturbation(Result):
    """One perturbation for all images, its fooling rates, and some perturbed images.

    ``perturbation`` (C, H, W) is added to an image. ``fooling_rate``: the fraction of the training images
    whose predicted class it changes; ``held_out_rate``: that of the held-out images, None where none of them
    counts. ``images``, ``adversarial`` (P, C, H, W) in [0, 1] with their predicted classes ``names_before``
    and ``names_after``.
    """

    groups_per_row: ClassVar[int] = 3

    perturbation: Tensor
    fooling_rate: float
    held_out_rate: float | None
    images: Tensor
    adversarial: Tensor
    names_before: tuple[str, ...]
    names_after: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        examples = zip(self.images, self.adversarial, self.names_before, self.names_after, strict=True)
        pairs = [
            [Panel(image, name), Panel(perturbed, f"-> {other}" if other != name else "the same")]
            for image, perturbed, name, other in examples
        ]
        return [[self._perturbation_panel()], *pairs]

    def _perturbation_panel(self) -> Panel:
        largest = float(self.perturbation.abs().max())
        # The inverse of a subnormal number overflows.
        factor = 0.5 / max(largest, 1e-30) if largest else 1.0
        return Panel(0.5 + self.perturbation * factor, f"×{factor:.0f}: {self._rates()}", is_output=True)

    def _rates(self) -> str:
        held_out = "" if self.held_out_rate is None else f", {self.held_out_rate:.0%} held out"
        return f"fools {self.fooling_rate:.0%}{held_out}"
