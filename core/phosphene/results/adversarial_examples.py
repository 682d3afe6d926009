"""``AdversarialExamples``: perturbed images, predictions before and after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor

from ..models.output_activation import OutputActivation, warning_for_attacks
from ..precision import to_float64
from .base import Panel, Result

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True, eq=False, kw_only=True)
class AdversarialExamples(Result):
    """Images, their adversarial examples, and the model's predictions of both.

    ``images``, ``adversarial`` (N, C, H, W) in [0, 1]; ``labels`` (N,) the true classes, where ``targeted``
    the target classes; ``before``, ``after`` (N,) the predicted classes with their probabilities
    ``confidence_before``, ``confidence_after`` (N,) and names; ``success`` (N,) whether the prediction after
    is wrong, or the target. ``queries`` (N,), of black-box attacks: how many images the model was evaluated
    on for each image, the image itself included. ``zero_gradient`` (N,), of attacks that follow a gradient:
    whether it was zero at every pixel in the first step, so that the attack had no direction (a saturated
    softmax or sigmoid in the network, for example); False where there was nothing to attack.
    ``output_activation``: "softmax" or "sigmoid" for a model that returns its probabilities instead of
    logits: an attack may then fail for the lack of a gradient, although the network is not robust.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "adversarial": "N C H W",
        "labels": "N",
        "before": "N",
        "after": "N",
        "confidence_before": "N",
        "confidence_after": "N",
        "success": "N",
        "names_before": "N",
        "names_after": "N",
        "queries": "N",
        "zero_gradient": "N",
    }

    per_image: ClassVar[tuple[str, ...]] = (
        *("images", "adversarial", "labels", "before", "after", "confidence_before", "confidence_after"),
        *("success", "names_before", "names_after", "queries", "zero_gradient"),
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
    zero_gradient: Tensor | None = None
    targeted: bool = False
    output_activation: OutputActivation = ""

    @classmethod
    def from_logits(
        cls,
        model: Model,
        images: Tensor,
        adversarial: Tensor,
        labels: Tensor,
        *logits: Tensor,
        targeted: bool,
        queries: Tensor | None = None,
        zero_gradient: Tensor | None = None,
    ) -> Self:
        """An attack's result from the model's logits (N, K) of the images and of the adversarial examples."""
        fields: dict[str, Any] = {}
        for when, values in zip(("before", "after"), logits, strict=True):
            fields[f"confidence_{when}"], fields[when] = model.to_probabilities(values, images).max(1)
            fields[f"names_{when}"] = tuple(model.class_name(i) for i in fields[when].tolist())
        success = fields["after"].eq(labels) if targeted else fields["after"].ne(labels)
        fields |= {"images": images, "adversarial": adversarial, "labels": labels, "queries": queries}
        fields |= {"zero_gradient": zero_gradient, "targeted": targeted}
        fields["output_activation"] = model.output_activation(logits[0], images)
        result = cls(success=success, **fields)
        if (warning := result.gradient_warning) and not success.all():
            warnings.warn(warning, stacklevel=3)
        return result

    @property
    def gradient_warning(self) -> str:
        """Why an attack that follows a gradient may fail on a network that is not robust; "" if unknown."""
        if self.zero_gradient is None:
            return ""
        if self.output_activation:
            return warning_for_attacks(self.output_activation)
        count = int((self.zero_gradient & ~self.success).sum())
        if not count:
            return ""
        return (
            f"the gradient of {count} of {len(self.images)} images was zero at every pixel, so that the "
            "attack had no direction: a softmax, a sigmoid or a clamp behind the logits may be saturated. "
            "This does not mean that the network is robust: square and hop_skip_jump need no gradient"
        )

    def distance(self, norm: Literal["l1", "l2", "linf"]) -> Tensor:
        """The norm (N,) of each perturbation, pixels in [0, 1]."""
        # Double precision: the error of torch's float32 norm of three million pixels is 2e-3.
        delta = to_float64((self.adversarial - self.images).flatten(1))
        return delta.norm(float(norm.removeprefix("l")), dim=1).to(self.images)

    def lines(self) -> list[str]:
        """A line for each image, after the ``gradient_warning``."""
        return [*([self.gradient_warning] if self.gradient_warning else []), *super().lines()]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, distance in enumerate(self.distance("l2").tolist()):
            before = f"{self.names_before[n]} {self.confidence_before[n]:.0%}"
            arrow = "still" if self.before[n] == self.after[n] else "->"
            after = f"{arrow} {self.names_after[n]} {self.confidence_after[n]:.0%}"
            change = Panel.difference(self.images[n], self.adversarial[n])
            title = [change.title, *([f"l2 {distance:.3g}"] if distance else [])]
            if self.queries is not None:
                title.append(f"{int(self.queries[n])} queries")
            if self.zero_gradient is not None and self.zero_gradient[n]:
                title.append("zero gradient")
            attacked = Panel(self.adversarial[n], after, is_output=True)
            groups.append([Panel(self.images[n], before), attacked, Panel(change.image, ", ".join(title))])
        return groups
