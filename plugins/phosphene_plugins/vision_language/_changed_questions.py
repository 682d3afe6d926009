"""``ChangedQuestions``: questions of which words were replaced, and the answers before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class ChangedQuestions(Result):
    """Questions about N images before and after words were replaced.

    ``questions`` (N texts) were ``question``; ``answers_before`` and ``answers`` (N texts) are the network's;
    ``replaced`` (N,), how many tokens differ; ``scores`` (N, R + 1), the log-probability of ``explained``
    (N texts), the answer that is attacked or reached, after 0 to R replacements; ``success`` (N,), whether
    the answer is another one, not empty, or is the one to reach.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "questions": "N",
        "explained": "N",
        "answers_before": "N",
        "answers": "N",
        "replaced": "N",
        "scores": "N R",
        "success": "N",
    }
    per_image: ClassVar[tuple[str, ...]] = (
        "images",
        "questions",
        "explained",
        "answers_before",
        "answers",
        "replaced",
        "scores",
        "success",
    )

    images: Tensor
    question: str
    questions: tuple[str, ...]
    explained: tuple[str, ...]
    answers_before: tuple[str, ...]
    answers: tuple[str, ...]
    replaced: Tensor
    scores: Tensor
    success: Tensor

    def lines(self) -> list[str]:
        rows = zip(self.questions, self.answers_before, self.answers, strict=True)
        texts = [f"{question!r}: {before!r} -> {after!r}" for question, before, after in rows]
        count, empty = int(self.success.sum()), sum(not answer.strip() for answer in self.answers)
        summary = f"{self.question!r} changed: {count} of {len(self.questions)} attacks succeed"
        return [summary + (f", {empty} answers are empty" if empty else ""), *texts]

    def table(self) -> dict[str, list[Any]]:
        """A row for each image."""
        return {
            "question": [*self.questions],
            "answer_before": [*self.answers_before],
            "answer": [*self.answers],
            "replaced": self.replaced.tolist(),
            "score_before": self.scores[:, 0].tolist(),
            "score": self.scores[:, -1].tolist(),
            "success": self.success.tolist(),
        }

    def panels(self) -> list[list[Panel]]:
        """Per image: the image with the question and its answer, before and after."""
        groups = []
        for n, image in enumerate(self.images):
            before = f"{self.question!r} -> {self.answers_before[n] or 'no answer'}"
            after = f"{self.questions[n]!r} -> {self.answers[n] or 'no answer'}"
            groups.append([Panel(image, before), Panel(image, after)])
        return groups
