"""``AutoAttackExamples``: adversarial examples of an ensemble of attacks, with warnings about the result."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from phosphene.results import AdversarialExamples, Panel

#: The warnings about a model or a call: name and text.
_WARNINGS = {
    "labels": "no image is classified as its label before any attack: are these its labels?",
    "random": "the same image gets different logits: attack the model with apgd and eot_samples=20 instead",
    "probabilities": "the model seems to end in a softmax or a sigmoid, which flattens gradients: remove it",
    "no gradient": "the gradient is zero or not finite: white-box attacks on this model prove little",
    "square": "Square succeeded where gradients did not: they are masked, and other attacks may succeed too",
    "few classes": "the ratio of logits needs four classes; with fewer, the last one is repeated",
    "effort": "steps and queries were reduced: a first impression, not a result to report",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoAttackExamples(AdversarialExamples):
    """Adversarial examples of an ensemble of attacks, and the attack that broke each image.

    ``broken_by`` (N,) the attack's name, "" for an image that no attack broke, and "clean" for one that was
    misclassified before any attack. ``warnings`` (N,) the names of the warnings about each image;
    ``flags()`` has their texts.
    """

    per_image: ClassVar[tuple[str, ...]] = (*AdversarialExamples.per_image, "broken_by", "warnings")

    broken_by: tuple[str, ...]
    warnings: tuple[tuple[str, ...], ...]

    @property
    def clean_accuracy(self) -> float:
        """The share of images that are classified as their labels."""
        return 1 - self.broken_by.count("clean") / len(self.broken_by)

    @property
    def robust_accuracy(self) -> float:
        """The share of images that no attack broke."""
        return self.broken_by.count("") / len(self.broken_by)

    def flags(self) -> dict[str, str]:
        """Text of each warning by its name, with the number of images that it is about."""
        counts = Counter(name for names in self.warnings for name in names)
        if self.clean_accuracy == 0:
            counts["labels"] = len(self.broken_by)
        total = len(self.warnings)
        return {n: f"{counts[n]} of {total}: {text}" for n, text in _WARNINGS.items() if n in counts}

    def lines(self) -> list[str]:
        counts = Counter(name for name in self.broken_by if name not in ("", "clean"))
        by_attack = ", ".join(f"{name} broke {count}" for name, count in counts.items())
        summary = (
            f"robust accuracy {self.robust_accuracy:.1%} ({self.broken_by.count('')} of "
            f"{len(self.broken_by)}), {self.clean_accuracy:.1%} before any attack; "
            f"{by_attack or 'no image was broken'}"
        )
        return [summary, *(f"{name}: {text}" for name, text in self.flags().items()), *super().lines()]

    def panels(self) -> list[list[Panel]]:
        outcomes = {"": "not broken", "clean": "misclassified before"}
        return [
            [*group[:-1], replace(group[-1], title=f"{outcomes.get(name, name)}, {group[-1].title}")]
            for name, group in zip(self.broken_by, super().panels(), strict=True)
        ]
