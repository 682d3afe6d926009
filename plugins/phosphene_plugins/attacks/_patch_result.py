"""``AdversarialPatch``: a patch with its mask and success rates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from phosphene.results import Panel

from ._universal_result import UniversalPerturbation


@dataclass(frozen=True, eq=False, kw_only=True)
class AdversarialPatch(UniversalPerturbation):
    """A patch, ``perturbation`` (C, p, p) in [0, 1] where ``mask`` (p, p) is 1, and images with it.

    With a target class the rates are fractions of the images not classified as the target without the patch.
    """

    mask: Tensor

    def _perturbation_panel(self) -> Panel:
        return Panel(self.perturbation * self.mask + (1 - self.mask), self._rates(), is_output=True)
