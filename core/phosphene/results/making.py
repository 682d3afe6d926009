"""The results of making something with a model: attacks, syntheses, styles, trained networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..registry import methods
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
    abreast: ClassVar[int] = 2

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
    def judged(
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
            attacked = Panel(self.adversarial[n], after, made=True)
            groups.append([Panel(self.images[n], before), attacked, Panel(change.image, ", ".join(told))])
        return groups


@dataclass(frozen=True, eq=False, kw_only=True)
class Synthesis(Result):
    """Images made by optimisation: ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N), one name each.

    What is made without optimisation has no steps: ``scores`` (0, N). ``sources`` (N, C, H, W) are the
    pictures they were made after, where there are such; ``frames`` (F, N, C, H, W), bytes, how they came
    about, where that was asked for.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "targets", "sources")
    per_step: ClassVar[tuple[str, ...]] = ("scores", "frames")
    abreast: ClassVar[int] = 5

    images: Tensor
    scores: Tensor
    targets: tuple[str, ...]
    sources: Tensor | None = None
    frames: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        groups = [[Panel(i, t, made=True)] for i, t in zip(self.images, self.targets, strict=True)]
        if self.sources is None:
            return groups
        return [[Panel(s, "sample"), *group] for s, group in zip(self.sources, groups, strict=True)]

    def film(self) -> list[Tensor]:
        return _side_by_side(self.frames)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stylization(Result):
    """Images in other manners: ``images`` and ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its name.

    ``sources`` (S, 3, H', W') are the pictures whose style it is, where there are such. Of what was painted
    step by step, ``losses`` (steps, N) and ``frames`` as in ``Synthesis``.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "stylized")
    per_step: ClassVar[tuple[str, ...]] = ("losses", "frames")
    abreast: ClassVar[int] = 2

    images: Tensor
    stylized: Tensor
    style: str
    sources: Tensor | None = None
    losses: Tensor | None = None
    frames: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        styles = [] if self.sources is None else list(self.sources)
        names = ["style"] if len(styles) == 1 else [f"style {n}" for n in range(len(styles))]
        sources = [Panel(*style) for style in zip(styles, names, strict=True)]
        return [
            [Panel(image), *sources, Panel(stylized, self.style, made=True)]
            for image, stylized in zip(self.images, self.stylized, strict=True)
        ]

    def film(self) -> list[Tensor]:
        return _side_by_side(self.frames)


def _side_by_side(frames: Tensor | None) -> list[Tensor]:
    """Frames (F, N, C, H, W) as pictures with all N images in a row."""
    return [] if frames is None else [torch.cat(list(frame), -1) / 255 for frame in frames]


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedNetwork(Result):
    """A network that a method trained, ready for its partner that applies it.

    ``network`` is built by ``method`` (an id) from ``config``; ``losses`` (steps,) its training;
    ``labels`` name what it learned; ``previews`` (P, 3, H, W) show what it does; ``note`` is what should be
    known of it. ``frames`` (F, P, 3, h, w), bytes, are previews from its training, where that was asked for.
    """

    abreast: ClassVar[int] = 6

    network: nn.Module
    method: str
    config: dict[str, Any]
    losses: Tensor
    labels: tuple[str, ...]
    previews: Tensor
    note: str = ""
    frames: Tensor | None = None

    @classmethod
    def restore(cls, fields: dict[str, Any], **rest: Any) -> TrainedNetwork:
        """Rebuild the network through the method that made it, and fill in its weights."""
        method = methods[fields["method"]]
        if method.network is None:
            raise InputError(f"{method.spec.name} trains no network")
        with torch.device("meta"):  # its own beginning would cost time and random numbers
            network = method.network(**fields["config"])
        network.load_state_dict(fields.pop("network"), assign=True)  # in the precision it was saved in
        return cls(network=network.eval(), **fields, **rest)

    def panels(self) -> list[list[Panel]]:
        return [[Panel(preview, name)] for preview, name in zip(self.previews, self.labels, strict=False)]

    def lines(self) -> list[str]:
        """How the loss fell, the note, and the previews."""
        losses = self.losses.tolist()
        fell = [f"loss: {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps"] if losses else []
        return [*fell, *filter(None, [self.note]), *super().lines()]

    def film(self) -> list[Tensor]:
        return _side_by_side(self.frames)
