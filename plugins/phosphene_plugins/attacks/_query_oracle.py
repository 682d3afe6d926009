"""``QueryOracle``: a model as a black-box attack may use it, with a count of queries for each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene import Model, batch_size, progress_bar
from phosphene.attacks import Norm, distance, is_adversarial
from phosphene.results import AdversarialExamples

#: The number of random images tried to find one that is adversarial.
TRIES = 100

#: Once a start is found, 1 / ``_MORE_STARTS`` of the queries go to further ones, each of which counts only if
#: it is adversarial within ``_NEARER`` of the best distance.
_MORE_STARTS, _NEARER = 25, 0.9

#: Noise consists of this number of squares along a side, None for pixels: most networks assign all fine noise
#: to one class, large squares to several.
_NOISE_SIDES = (None, 16, 8, 4)

#: How much further than the nearest example the result lies, so that rounding does not undo the success.
_CONFIRM = 1e-3


class QueryOracle:
    """A model's predictions for some images, counted for each image and never more than ``max_queries``.

    ``queries`` (N,): the number of queries for each image, the image itself first. ``nearest``
    (N, C, H, W): the adversarial example nearest in ``norm`` among them, the image itself where there is
    none; ``distances`` (N,): how far it is, or infinity. With ``confirm`` the result is moved slightly across
    the boundary and queried once more.

    Queried points (M, C, H, W) come with ``owners`` (M,), the index of the image that each counts for.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targeted: bool,
        norm: Norm,
        max_queries: int,
        confirm: bool = True,
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.targeted, self.norm, self.max_queries = targeted, norm, max_queries
        self.confirm, self.batch_size = confirm, batch_size(model)
        self.queries = torch.zeros_like(labels)
        self.nearest, self.distances = images.clone(), images.new_full((len(images),), torch.inf)
        self.before = self.after = images.new_zeros(len(images), model.class_count)
        self.before = self.query(images, torch.arange(len(images), device=images.device))
        self.after = self.before.clone()

    def remaining(self) -> Tensor:
        """(N,) the number of queries left: 0 for an image that needs no more.

        With ``confirm`` one is reserved for the result.
        """
        needed = self.distances > 0 if self.confirm else self.distances.isinf()
        return torch.where(needed, self.max_queries - self.confirm - self.queries, 0).clamp(min=0)

    def query(self, points: Tensor, owners: Tensor) -> Tensor:
        """The logits (M, K) of points (M, C, H, W), counted for their owners (M,)."""
        logits = torch.cat([self.model(batch) for batch in points.split(self.batch_size)])
        self.queries += torch.bincount(owners, minlength=len(self.images))
        assert self.queries.max() <= self.max_queries, "more queries than max_queries for one image"
        success = self.is_adversarial(logits, owners)
        distances = self.distance(points, owners).masked_fill(~success, torch.inf)
        least = self.distances.scatter_reduce(0, owners, distances, "amin")
        nearer = (distances < self.distances[owners]) & (distances == least[owners])
        for index in nearer.nonzero()[:, 0].tolist():
            owner = owners[index]
            self.nearest[owner], self.distances[owner] = points[index], distances[index]
            self.after[owner] = logits[index]
        return logits

    def query_success(self, points: Tensor, owners: Tensor) -> Tensor:
        """(M,) whether points are adversarial, counted as queries."""
        return self.is_adversarial(self.query(points, owners), owners)

    def is_adversarial(self, logits: Tensor, owners: Tensor) -> Tensor:
        """(M,) whether these logits are those of an adversarial example."""
        return is_adversarial(logits, self.labels[owners], self.targeted)

    def distance(self, points: Tensor, owners: Tensor) -> Tensor:
        """(M,) the distance of points from their images."""
        return distance(points, self.images[owners], self.norm)

    def find_start(self, start: Tensor | None, seed: int) -> Tensor:
        """An adversarial starting point for each image, (N, C, H, W); the image where none is found.

        ``start`` where that is adversarial; else random noise, of several points the one on whose line to the
        image the boundary is nearest.
        """
        if start is not None and len(active := self.remaining().nonzero()[:, 0]):
            self.query_success(start[active], active)
        # A generator of its own: how long other images search must not change this one's later draws.
        generator = torch.Generator().manual_seed(seed)
        more = torch.where(self.distances.isinf(), self.max_queries // _MORE_STARTS, 0)
        for trial in progress_bar(range(max(TRIES, self.max_queries // _MORE_STARTS)), "finding a start"):
            channels, height, width = self.images.shape[1:]
            sides = [min(_NOISE_SIDES[trial % len(_NOISE_SIDES)] or side, side) for side in (height, width)]
            noise = torch.rand(1, channels, *sides, generator=generator)
            noise = F.interpolate(noise, (height, width)).to(self.images)
            started = self.distances.isfinite()
            searching = more > 0 if trial >= TRIES else ~started | (more > 0)
            active = (searching & (self.remaining() > 0)).nonzero()[:, 0]
            if not len(active):
                break
            # An image that has a start takes another one only if that is adversarial a little nearer.
            points = noise.expand(len(active), -1, -1, -1)
            fraction = (_NEARER * self.distances[active] / self.distance(points, active)).clamp(max=1)
            points = torch.lerp(self.images[active], points, fraction[:, None, None, None])
            success = self.query_success(points, active)
            self.bisect(points[success], active[success], 1 / 16)
            more -= started.long()
        return self.nearest.clone()

    def bisect(self, points: Tensor, owners: Tensor, precision: float) -> Tensor:
        """The boundary between each image and its adversarial point, from the far side: (M, C, H, W).

        In "l2" on the straight line, to ``precision`` times its length; in "linf" by clipping the point to
        ever smaller boxes around the image.
        """
        images = self.images[owners]
        distances = self.distance(points, owners)

        def between(fraction: Tensor, rows: Tensor) -> Tensor:
            image, point, factor = images[rows], points[rows], fraction[:, None, None, None]
            if self.norm == "linf":
                radius = factor * distances[rows, None, None, None]
                return torch.minimum(torch.maximum(point, image - radius), image + radius)
            return torch.lerp(image, point, factor)

        low, high = torch.zeros_like(distances), torch.ones_like(distances)
        while len(rows := ((high - low > precision) & (self.remaining()[owners] > 0)).nonzero()[:, 0]):
            middle = (low[rows] + high[rows]) / 2
            success = self.query_success(between(middle, rows), owners[rows])
            high[rows] = torch.where(success, middle, high[rows])
            low[rows] = torch.where(success, low[rows], middle)
        moved = between(high, torch.arange(len(owners), device=distances.device))
        return torch.where((high < 1)[:, None, None, None], moved, points)

    def build_result(
        self, best: Tensor | None = None, best_logits: Tensor | None = None
    ) -> AdversarialExamples:
        """The result: the nearest examples; ``best`` with its logits where there is none.

        With ``confirm`` each is moved on by a thousandth where it stays adversarial.
        """
        if best is not None and best_logits is not None:
            none = self.distances.isinf()
            self.nearest[none], self.after[none] = best[none], best_logits[none]
        moved = self.distances.isfinite() & (self.distances > 0)
        active = (moved & (self.queries < self.max_queries)).nonzero()[:, 0]
        if self.confirm and len(active):
            images = self.images[active]
            further = (images + (1 + _CONFIRM) * (self.nearest[active] - images)).clamp(0, 1)
            logits = self.query(further, active)
            success = self.is_adversarial(logits, active)
            self.nearest[active[success]], self.after[active[success]] = further[success], logits[success]
        return AdversarialExamples.from_logits(
            self.model, self.images, self.nearest, self.labels, self.before, self.after,
            targeted=self.targeted, queries=self.queries,
        )  # fmt: skip
