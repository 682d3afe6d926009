"""``AdversarialExamples``: perturbed images, predictions before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor

from .base import Panel, Result

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True, eq=False, kw_only=True)
class AdversarialExamples(Result):
    """Images, what an attack made of them, and what the model says of both.

    ``images``, ``adversarial`` (N, C, H, W) in [0, 1]; ``labels``, ``before``, ``after`` (N,)
    class indices wanted and predicted; ``confidence_before``, ``confidence_after`` (N,) of those
    predictions; ``success`` (N,) whether the attack reached its aim. ``queries`` (N,), of an attack that
    only asks the model: how many pictures it was shown on each image's behalf, the image itself included.
    ``targeted``: the labels are classes that the attack wanted, not ones that it wanted to get away from.
    """

    per_image: ClassVar[tuple[str, ...]] = (
        *("images", "adversarial", "labels", "before", "after", "confidence_before", "confidence_after"),
        *("success", "names_before", "names_after", "queries"),
    )
    groups_per_row: ClassVar[int] = 2

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor
    confidence_before: Tensor
    confidence_after: Tensor
    success: Tensor
    names_before: tuple[str, ...]
    names_after: tuple[str, ...]
    queries: Tensor | None = None
    targeted: bool = False

    @classmethod
    def from_logits(
        cls,
        model: Model,
        images: Tensor,
        adversarial: Tensor,
        labels: Tensor,
        *both: Tensor,
        targeted: bool,
        queries: Tensor | None = None,
    ) -> Self:
        """An attack's result, judged by the model's logits (N, K) before and after it."""
        said: dict[str, Any] = {}
        for when, logits in zip(("before", "after"), both, strict=True):
            said[f"confidence_{when}"], said[when] = logits.softmax(1).max(1)
            said[f"names_{when}"] = tuple(model.class_name(i) for i in said[when].tolist())
        success = said["after"].eq(labels) if targeted else said["after"].ne(labels)
        said |= {"images": images, "adversarial": adversarial, "labels": labels, "queries": queries}
        return cls(success=success, targeted=targeted, **said)

    def distance(self, norm: Literal["l1", "l2", "linf"]) -> Tensor:
        """(N,) how far each image was moved, in pixel units."""
        # In double precision: torch's float32 norm is wrong by 2e-3 on three million pixels.
        delta = (self.adversarial - self.images).flatten(1).double()
        return delta.norm(float(norm.removeprefix("l")), dim=1).to(self.images)

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, far in enumerate(self.distance("l2").tolist()):
            before = f"{self.names_before[n]} {self.confidence_before[n]:.0%}"
            becomes = "still" if self.before[n] == self.after[n] else "->"
            after = f"{becomes} {self.names_after[n]} {self.confidence_after[n]:.0%}"
            change = Panel.difference(self.images[n], self.adversarial[n])
            told = [change.title, *([f"l2 {far:.3g}"] if far else [])]
            if self.queries is not None:
                told.append(f"{int(self.queries[n])} queries")
            attacked = Panel(self.adversarial[n], after, is_output=True)
            groups.append([Panel(self.images[n], before), attacked, Panel(change.image, ", ".join(told))])
        return groups
