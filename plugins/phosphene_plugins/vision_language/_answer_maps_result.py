"""``AnswerMaps``: a map for every token of an answer about an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from phosphene.images import enlarge_maps, overlay, to_display
from phosphene.results import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerMaps(Result):
    """Answers to a question about N images, with a map for each of up to T tokens.

    ``maps`` (N, T, h, w), raw, on the grid of image tokens; ``words``: N tuples of T tokens, "" after the end
    of an answer, where maps are zero; ``probabilities`` (N, T). Checks: ``control_similarity`` (N, T), the
    correlation of each map with that of the same word and an image of one color; ``sinks`` (N, h, w), image
    tokens that attract much attention with either image; ``sink_share`` (N, T), their share of the map.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N T h w",
        "words": "N",
        "probabilities": "N T",
        "control_similarity": "N T",
        "sinks": "N h w",
        "sink_share": "N T",
    }
    per_image: ClassVar[tuple[str, ...]] = (
        "images",
        "maps",
        "words",
        "probabilities",
        "control_similarity",
        "sinks",
        "sink_share",
    )
    groups_per_row: ClassVar[int] = 1

    images: Tensor
    maps: Tensor
    words: tuple[tuple[str, ...], ...]
    probabilities: Tensor
    control_similarity: Tensor
    sinks: Tensor
    sink_share: Tensor
    question: str
    measure: str

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer about each image."""
        return tuple(" ".join(word for word in words if word) for words in self.words)

    def lines(self) -> list[str]:
        lines = [f"{self.question}: {self.measure}"]
        for n, (words, answer) in enumerate(zip(self.words, self.answers, strict=True)):
            count = max(1, sum(map(bool, words)))
            similarity = float(self.control_similarity[n, :count].mean())
            lines.append(
                f"{answer or 'no answer'}: correlation {similarity:.2f} with maps of an image of one color, "
                f"{int(self.sinks[n].sum())} sinks"
            )
        return lines

    def table(self) -> dict[str, list[Any]]:
        """A row for each word of each image."""
        rows: list[dict[str, Any]] = []
        for n, words in enumerate(self.words):
            for t, word in enumerate(words):
                if word:
                    rows.append(
                        {
                            "image": n,
                            "position": t,
                            "word": word,
                            "probability": float(self.probabilities[n, t]),
                            "control_similarity": float(self.control_similarity[n, t]),
                            "sink_share": float(self.sink_share[n, t]),
                        }
                    )
        names = ("image", "position", "word", "probability", "control_similarity", "sink_share")
        return {name: [row[name] for row in rows] for name in names}

    def panels(self) -> list[list[Panel]]:
        """Per image: the image, and each word's map over it, scaled by the largest value of the word."""
        groups = []
        for n, (image, words) in enumerate(zip(self.images, self.words, strict=True)):
            group = [Panel(image, self.question)]
            for t, word in enumerate(words):
                if not word:
                    continue
                heat = self.maps[n, t].clamp(min=0)
                heat = (heat / heat.max().clamp(min=1e-12))[None].float()
                title = f"{word} ({float(self.probabilities[n, t]):.0%})"
                similarity = float(self.control_similarity[n, t])
                title += f", control {similarity:.2f}"
                enlarged = enlarge_maps(heat, image.shape[1:], None)[0]
                group.append(Panel(overlay(to_display(image), enlarged), title, is_output=True))
            groups.append(group)
        return groups
