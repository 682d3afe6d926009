"""Adversarial examples of an ensemble: which attack broke an image, and what makes the figure doubtful."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from phosphene.results import AdversarialExamples, Panel

#: What may be wrong with the model or with what was asked, by name, and what that means.
_DOUBTS = {
    "labels": "not one image is taken for what its label says before any attack: are these its labels?",
    "random": "the model answers the same picture differently: attack it with apgd and eot=20 instead",
    "probabilities": "the model seems to end in a softmax, which flattens gradients: take it off",
    "no gradient": "the gradient is zero or not finite: what white-box attacks say of it is worth little",
    "square": "Square broke what no gradient led to: the gradients are masked, expect worse of other attacks",
    "few classes": "the ratio of logits needs four classes; of fewer the last stands for those there are not",
    "effort": "this was not the whole standard: take it for a first look, and quote no number of it",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoAttackExamples(AdversarialExamples):
    """Adversarial examples of an ensemble of attacks, and which of them broke each image.

    ``broken_by`` (N,) the attack's name, "" where the image withstood them all, and "clean" where it was
    taken for another class before any. ``doubts`` (N,) names of what looked wrong about an image; what
    they mean ``flags`` tells.
    """

    per_image: ClassVar[tuple[str, ...]] = (*AdversarialExamples.per_image, "broken_by", "doubts")

    broken_by: tuple[str, ...]
    doubts: tuple[tuple[str, ...], ...]

    @property
    def clean_accuracy(self) -> float:
        """The share of images that are taken for what their labels say."""
        return 1 - self.broken_by.count("clean") / len(self.broken_by)

    @property
    def robust_accuracy(self) -> float:
        """The share of images that withstood every attack."""
        return self.broken_by.count("") / len(self.broken_by)

    def flags(self) -> dict[str, str]:
        """What looks wrong, by name: in how many images, and what it means."""
        found = Counter(name for doubts in self.doubts for name in doubts)
        if self.clean_accuracy == 0:
            found["labels"] = len(self.broken_by)
        return {n: f"{found[n]} of {len(self.doubts)}: {told}" for n, told in _DOUBTS.items() if n in found}

    def lines(self) -> list[str]:
        fallen = Counter(name for name in self.broken_by if name not in ("", "clean"))
        told = ", ".join(f"{name} broke {count}" for name, count in fallen.items()) or "nothing was broken"
        standing = self.broken_by.count("")
        summary = (
            f"robust accuracy {self.robust_accuracy:.1%} ({standing} of {len(self.broken_by)}), "
            f"{self.clean_accuracy:.1%} before any attack; {told}"
        )
        return [summary, *(f"{name}: {why}" for name, why in self.flags().items()), *super().lines()]

    def panels(self) -> list[list[Panel]]:
        how = {"": "withstood", "clean": "wrong already"}
        return [
            [*group[:-1], replace(group[-1], title=f"{how.get(name, name)}, {group[-1].title}")]
            for name, group in zip(self.broken_by, super().panels(), strict=True)
        ]
