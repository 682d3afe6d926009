"""Asking a model and nothing else: what black-box attacks share, with an account of every picture shown."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene import Model, batch_size, progress_bar
from phosphene.results import AdversarialExamples

from ._gradients import reached
from ._lp_balls import Norm, distance

#: How many random pictures are tried to find one that is taken for what the attacker wants ...
TRIES = 100


#: ... and which part of the queries goes to more of them, each to count only if it is so much nearer.
_MORE, _NEARER = 25, 0.9


#: Noise comes in squares, so many along a side, None for pixels: fine noise looks alike to most networks,
#: large patches do not.
_GRAINS = (None, 16, 8, 4)


#: How much further than the nearest example the result lies, so that rounding does not take it back.
_SURE = 1e-3


class Decisions:
    """A model's answers about some images, counted for each image and never more than ``most``.

    ``queries`` (N,) is how many pictures it was shown on each image's behalf, the image itself first;
    ``nearest`` (N, C, H, W) the nearest of those, in ``norm``, that it took for what the attacker wants,
    and ``reach`` (N,) how far that is: the image itself and infinity where there is none.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targeted: bool,
        norm: Norm,
        most: int,
        sure: bool = True,
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.targeted, self.norm, self.most = targeted, norm, most
        self.sure, self.size = sure, batch_size(model)
        self.queries = torch.zeros_like(labels)
        self.nearest, self.reach = images.clone(), images.new_full((len(images),), torch.inf)
        everyone = torch.arange(len(images), device=images.device)
        self.before = self.after = images.new_zeros(len(images), model.class_count)
        self.before = self.answers(images, everyone)
        self.after = self.before.clone()

    def left(self) -> Tensor:
        """(N,) how many queries are left: none for an image that needs no more of them.

        One is kept back for the result, which is to be ``sure``.
        """
        needed = self.reach > 0 if self.sure else self.reach.isinf()
        return torch.where(needed, self.most - self.sure - self.queries, 0).clamp(min=0)

    def answers(self, points: Tensor, owners: Tensor) -> Tensor:
        """The logits (M, K) of pictures (M, C, H, W) shown on behalf of these images (M,)."""
        logits = torch.cat([self.model(some) for some in points.split(self.size)])
        self.queries += torch.bincount(owners, minlength=len(self.images))
        assert self.queries.max() <= self.most, "an image was asked about more often than it may be"
        far = self.distance(points, owners).masked_fill(~self.wanted(logits, owners), torch.inf)
        least = self.reach.scatter_reduce(0, owners, far, "amin")
        for place in ((far < self.reach[owners]) & (far == least[owners])).nonzero()[:, 0].tolist():
            owner = owners[place]
            self.nearest[owner], self.reach[owner] = points[place], far[place]
            self.after[owner] = logits[place]
        return logits

    def wanted(self, logits: Tensor, owners: Tensor) -> Tensor:
        """(M,) whether these answers are what the attacker wants."""
        return reached(logits, self.labels[owners], self.targeted)

    def ask(self, points: Tensor, owners: Tensor) -> Tensor:
        """(M,) whether the model takes these pictures for what the attacker wants."""
        return self.wanted(self.answers(points, owners), owners)

    def distance(self, points: Tensor, owners: Tensor) -> Tensor:
        """(M,) how far these pictures are from their images."""
        return distance(points, self.images[owners], self.norm)

    def begin(self, start: Tensor | None, seed: int) -> Tensor:
        """A picture for each image, (N, C, H, W), that is taken for what is wanted, where one is found.

        The ``start`` given, where it is one; else random noise, of several pictures the one on whose way the
        boundary is nearest.
        """
        if start is not None and len(who := self.left().nonzero()[:, 0]):
            self.ask(start[who], who)
        # A generator of its own: how long others search must not change what an image sees afterwards.
        generator = torch.Generator().manual_seed(seed)
        more = torch.where(self.reach.isinf(), self.most // _MORE, 0)
        for trial in progress_bar(range(max(TRIES, self.most // _MORE)), "looking for a start"):
            channels, height, width = self.images.shape[1:]
            sides = [min(_GRAINS[trial % len(_GRAINS)] or side, side) for side in (height, width)]
            noise = torch.rand(1, channels, *sides, generator=generator)
            noise = F.interpolate(noise, (height, width)).to(self.images)
            known = self.reach.isfinite()
            who = ((more > 0 if trial >= TRIES else ~known | (more > 0)) & (self.left() > 0)).nonzero()[:, 0]
            if not len(who):
                break
            # Where a picture is known, another counts only if it still is one a little nearer than that.
            tried = noise.expand(len(who), -1, -1, -1)
            part = (_NEARER * self.reach[who] / self.distance(tried, who)).clamp(max=1)
            tried = torch.lerp(self.images[who], tried, part[:, None, None, None])
            won = self.ask(tried, who)
            self.bisect(tried[won], who[won], 1 / 16)
            more -= known.long()
        return self.nearest.clone()

    def bisect(self, points: Tensor, owners: Tensor, precision: float) -> Tensor:
        """Between each image and its picture the boundary, from the far side: (M, C, H, W).

        In "l2" on the straight line, to ``precision`` times its length; in "linf" by clipping the picture to
        ever smaller boxes.
        """
        images = self.images[owners]
        far = self.distance(points, owners)

        def between(share: Tensor, rows: Tensor) -> Tensor:
            here, there, part = images[rows], points[rows], share[:, None, None, None]
            if self.norm == "linf":
                box = part * far[rows, None, None, None]
                return torch.minimum(torch.maximum(there, here - box), here + box)
            return torch.lerp(here, there, part)

        low, high = torch.zeros_like(far), torch.ones_like(far)
        while len(rows := ((high - low > precision) & (self.left()[owners] > 0)).nonzero()[:, 0]):
            middle = (low[rows] + high[rows]) / 2
            won = self.ask(between(middle, rows), owners[rows])
            high[rows] = torch.where(won, middle, high[rows])
            low[rows] = torch.where(won, low[rows], middle)
        everything = torch.arange(len(owners), device=far.device)
        moved = between(high, everything)
        return torch.where((high < 1)[:, None, None, None], moved, points)

    def examples(self, best: Tensor | None = None, answers: Tensor | None = None) -> AdversarialExamples:
        """The result: the nearest pictures; where there are none the ``best``, with the model's ``answers``.

        To be ``sure``, each is moved on by a thousandth where the model still says the same of it.
        """
        if best is not None and answers is not None:
            none = self.reach.isinf()
            self.nearest[none], self.after[none] = best[none], answers[none]
        who = (self.reach.isfinite() & (self.reach > 0) & (self.queries < self.most)).nonzero()[:, 0]
        if self.sure and len(who):
            images = self.images[who]
            further = (images + (1 + _SURE) * (self.nearest[who] - images)).clamp(0, 1)
            logits = self.answers(further, who)
            held = self.wanted(logits, who)
            self.nearest[who[held]], self.after[who[held]] = further[held], logits[held]
        return AdversarialExamples.from_logits(
            self.model, self.images, self.nearest, self.labels, self.before, self.after,
            targeted=self.targeted, queries=self.queries,
        )  # fmt: skip
