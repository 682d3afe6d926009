"""``AdversarialPatch``: a patch with its mask and success rates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from phosphene.results import Panel

from ._universal_result import UniversalPerturbation


@dataclass(frozen=True, eq=False, kw_only=True)
class AdversarialPatch(UniversalPerturbation):
    """A patch ``perturbation`` (C, p, p) in [0, 1], its ``mask`` (p, p), and images with the patch.

    ``mask`` is 1 inside the patch. ``fooling_rate`` and ``held_out_rate`` are fractions of images whose
    prediction the patch changes; with a target class, to the target, and images predicted as the target
    without the patch are not counted.
    """

    mask: Tensor

    def _perturbation_panel(self) -> Panel:
        return Panel(self.perturbation * self.mask + (1 - self.mask), self._rates(), is_output=True)
