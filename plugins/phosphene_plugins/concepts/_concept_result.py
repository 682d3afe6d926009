"""``ConceptVectors``: one direction of a layer's channels for each concept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from phosphene import Direction, UnknownName
from phosphene.images import charts, colorize, enlarge
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptVectors(Result):
    """Concept activation vectors: unit vectors in the channels of a layer.

    ``vectors`` (K, C) of length 1, pointing to the concept; ``concepts``: their names; ``offsets`` (K,): a
    feature x has the concept where v . x > offset; ``accuracy`` (K,): share of the held-out images, of
    concept and random ones, that this decides correctly; ``counts`` (K, 2): how many of each.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "vectors": "K C",
        "concepts": "K",
        "offsets": "K",
        "accuracy": "K",
        "counts": "K kinds",
    }

    layer: str
    concepts: tuple[str, ...]
    vectors: Tensor
    offsets: Tensor
    accuracy: Tensor
    counts: Tensor

    def direction(self, concept: str) -> Direction:
        """A concept as the target of other methods: attributions, drawings, patches and attacks.

        Raises UnknownName for a concept that is not among these.

        Example::
            from phosphene import run

            sets = {"dataset": "builtin:scenes/64", "random": "builtin:textures/32"}
            vectors = run("concept_vectors", **sets, seed=0)
            run("grad_cam", images="builtin:scenes/2", target=vectors.direction("star"), layer="features.11")
        """
        if concept not in self.concepts:
            raise UnknownName("concept", concept, self.concepts)
        row = self.concepts.index(concept)
        return Direction(self.layer, self.vectors[row], threshold=float(self.offsets[row]))

    def panels(self) -> list[list[Panel]]:
        cosines = (self.vectors @ self.vectors.T).float()
        matrix = enlarge(colorize(cosines / 2 + 0.5, "RdBu_r"), max(1, 160 // len(cosines)))
        return [[Panel(matrix, self.lines()[0], is_output=True)]]

    def lines(self) -> list[str]:
        rows = zip(self.concepts, self.accuracy.tolist(), strict=True)
        return [f"{self.layer}: cosines of the vectors", *(f"{name}: {value:.1%}" for name, value in rows)]

    def draw(self) -> Figure:
        """The accuracy of each vector, and the cosines between them."""
        figure = charts.new_figure(4.6)
        left, right = cast(Any, figure.subplots(1, 2))
        names = [charts.plain_label(name) for name in self.concepts]
        rows = range(len(names))
        left.barh(rows, self.accuracy.tolist(), color="tab:blue")
        left.axvline(0.5, color="0.4", linestyle=":")
        left.set_yticks(rows, names, fontsize=7)
        left.set_xlim(0, 1), left.invert_yaxis()
        left.set_xlabel("accuracy on held-out images", fontsize=8)
        left.spines[["top", "right"]].set_visible(False)
        cosines = (self.vectors @ self.vectors.T).float().cpu().numpy()
        image = right.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        figure.colorbar(image, ax=right, shrink=0.7, label="cosine")
        right.set_yticks(rows, names, fontsize=7), right.set_xticks(rows, names, fontsize=7, rotation=90)
        right.set_title(charts.plain_label(self.layer), fontsize=8, loc="left", color="0.3")
        return figure
