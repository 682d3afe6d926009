"""Attacks by predicted classes on a single image, as plain loops: what the oracles compare batches with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from phosphene import Model
from phosphene.attacks import Norm


class PlainQueries:
    """The queries of one image (C, H, W): their number, the nearest adversarial example and its distance."""

    def __init__(
        self, model: Model, image: Tensor, label: int, *, norm: Norm, targeted: bool, max_queries: int
    ) -> None:
        self.model, self.image, self.label = model, image, label
        self.norm, self.targeted, self.max_queries = norm, targeted, max_queries
        self.count, self.nearest, self.distance = 0, image, math.inf
        self.query(image)

    @property
    def remaining(self) -> int:
        """The number of queries left, less one for the result; 0 for an image that is adversarial itself."""
        return max(self.max_queries - 1 - self.count, 0) if self.distance else 0

    def size(self, point: Tensor) -> float:
        """The distance of a point from the image."""
        change = (point - self.image).flatten()
        return float(change.abs().max() if self.norm == "linf" else change.norm())

    def query(self, point: Tensor) -> bool:
        """Whether a point is adversarial."""
        self.count += 1
        success = bool((self.model(point[None]).argmax() == self.label) == self.targeted)
        if success and self.size(point) < self.distance:
            self.nearest, self.distance = point, self.size(point)
        return success

    def find_start(self, start: Tensor | None, seed: int) -> Tensor:
        """``start``, else noise of squares of several sizes; 1/25 of the queries search for a nearer one."""
        if start is not None and self.remaining:
            self.query(start)
        generator = Generator().manual_seed(seed)
        more = self.max_queries // 25 if self.distance == math.inf else 0
        for trial in range(max(100, self.max_queries // 25)):
            started = self.distance < math.inf
            if not self.remaining or more <= 0 and (started or trial >= 100):
                break
            cells = (10**9, 16, 8, 4)[trial % 4]
            channels, height, width = self.image.shape
            noise = torch.rand(1, channels, min(cells, height), min(cells, width), generator=generator)
            point = F.interpolate(noise, (height, width))[0].to(self.image)
            fraction = min(0.9 * self.distance / self.size(point), 1)
            point = self.image + fraction * (point - self.image)
            if self.query(point):
                self.bisect(point, 1 / 16)
            more -= started
        return self.nearest

    def bisect(self, point: Tensor, precision: float) -> Tensor:
        """The boundary between the image and an adversarial point, from the far side."""
        radius, low, high = self.size(point), 0.0, 1.0

        def between(fraction: float) -> Tensor:
            if self.norm == "linf":
                return self.image + (point - self.image).clamp(-fraction * radius, fraction * radius)
            return self.image + fraction * (point - self.image)

        while high - low > precision and self.remaining:
            middle = (low + high) / 2
            low, high = (low, middle) if self.query(between(middle)) else (middle, high)
        return between(high) if high < 1 else point

    def confirmed(self) -> Tensor:
        """The nearest example, a thousandth further out where that is adversarial, too."""
        if 0 < self.distance < math.inf and self.count < self.max_queries:
            further = (self.image + 1.001 * (self.nearest - self.image)).clamp(0, 1)
            if self.query(further):
                self.nearest = further
        return self.nearest


class _AdaptiveLength:
    def __init__(self, length: float, target_rate: float) -> None:
        self.length, self.target_rate, self.outcomes = length, target_rate, list[bool]()

    def adapt(self, success: bool) -> None:
        self.outcomes.append(success)
        if len(self.outcomes) == 10:
            rate = sum(self.outcomes) / 10
            factor = 1.5 if rate > self.target_rate else 1 / 1.5 if rate < self.target_rate / 2 else 1
            self.length, self.outcomes = min(max(self.length * factor, 1e-7), 0.5), []


def boundary_of_one_image(
    queries: PlainQueries, start: Tensor | None, spherical_step: float, source_step: float, seed: int
) -> Tensor:
    """Brendel et al. 2018, algorithm 1."""
    image, generator = queries.image, Generator().manual_seed(seed)
    x = queries.find_start(start, seed)
    if queries.distance < math.inf:
        x = queries.bisect(x, 1e-3)
    spherical, source = _AdaptiveLength(spherical_step, 0.5), _AdaptiveLength(source_step, 0.25)
    for step in range(queries.max_queries):
        if queries.distance == math.inf or not queries.remaining:
            break
        noise = torch.randn(1, *image.shape, generator=generator)[0].to(image)
        radius = (x - image).norm()
        outward = (x - image) / radius
        noise = noise - (noise * outward).sum() * outward
        p = (x - image) + spherical.length * radius * noise / noise.norm()
        y = (image + radius * p / p.norm()).clamp(0, 1)
        if step % 5 == 0:
            spherical.adapt(queries.query(y))
            if not queries.remaining:
                break
        nearer = y - source.length * (y - image)
        success = queries.query(nearer)
        source.adapt(success)
        x = nearer if success else x
    return queries.confirmed()


def hop_skip_jump_of_one_image(
    queries: PlainQueries, start: Tensor | None, steps: int, first_directions: int, seed: int
) -> Tensor:
    """Chen et al. 2020, algorithm 2."""
    image, generator = queries.image, Generator().manual_seed(seed)
    size, epsilon = image.numel(), torch.finfo(image.dtype).eps
    theta = max(size**-1.5, 4 * epsilon)
    reserve = 4 + math.ceil(-math.log2(theta))
    x = queries.find_start(start, seed)
    if queries.distance < math.inf:
        x = queries.bisect(x, theta)
    for t in range(1, steps + 1):
        draws = Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if queries.distance == math.inf or queries.remaining <= reserve + 1:
            break
        delta = max(0.1 if t == 1 else float((x - image).norm()) / size, 8 * epsilon * size**0.5)
        count = min(round(first_directions * t**0.5), queries.remaining - reserve)
        phis, directions = [], []
        for first in range(0, count, 32):
            draw = torch.rand if queries.norm == "linf" else torch.randn
            noise = draw(32, *image.shape, generator=draws).to(image)
            noise = 2 * noise - 1 if queries.norm == "linf" else noise
            for u in noise[: count - first]:
                tried = (x + delta * u / u.norm()).clamp(0, 1)
                directions.append((tried - x) / delta)
                phis.append(1.0 if queries.query(tried) else -1.0)
        mean = sum(phis) / count
        weights = [phi - mean if abs(mean) < 1 else phi for phi in phis]
        v = sum(w * u for w, u in zip(weights, directions, strict=True))
        assert isinstance(v, Tensor)
        direction = v.sign() if queries.norm == "linf" else v / v.norm()
        length = queries.size(x) / t**0.5
        for _ in range(25):
            if not queries.remaining:
                break
            tried = (x + length * direction).clamp(0, 1)
            if queries.query(tried):
                x = tried
                break
            length /= 2
        x = queries.bisect(x, theta)
    return queries.confirmed()
