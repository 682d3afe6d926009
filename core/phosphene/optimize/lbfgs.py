"""L-BFGS with a backtracking line search, per image."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .first_order import Evaluation
from .parametrizations import Parametrization


class Lbfgs:
    """Limited-memory BFGS with backtracking along the projected path (Nocedal and Wright, ch. 7).

    Every image has its own history and step length, while the objective always sees the whole
    batch, so that targets which belong to single images stay with them.
    """

    def __init__(
        self, image: Parametrization, lr: float, evaluate: Callable[[], Evaluation], kind: str
    ) -> None:
        self.image, self.lr, self.evaluate = image, lr, evaluate
        self.place = image.parameter.detach().view(len(image.parameter), -1)  # (N, D), the parameter itself
        self.last: tuple[Tensor, Tensor] | None = None
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=10)
        self.curvature = torch.zeros_like(self.place[:, :1])  # 0 where an image has no history
        self.resting = self.curvature != 0
        self.stayed = self.resting
        self.length = torch.full_like(self.curvature, lr)

    def __call__(self, point: Evaluation) -> Evaluation:
        here, slope = self.place.clone(), point.gradient.flatten(1)
        heading = self.heading(here, slope)
        waiting = ~self.resting
        length = torch.where(waiting, self.length, 0)
        for _ in range(2):  # the objective is dear: two looks a step, and shorter ones at the next
            self.place.copy_(here + length * heading)
            self.image.project()
            found = self.evaluate()
            gain = (slope * (self.place - here)).sum(1)
            waiting &= ~((gain < 0) & (found.loss <= point.loss + 1e-4 * gain))[:, None]
            length = torch.where(waiting, length / 4, length)
            if not waiting.any():
                break
        waiting &= found.loss.isfinite()[:, None]  # a second number that is none is for the user to hear
        # what did not fall stays where it was
        self.place.copy_(torch.where(waiting, here, self.place))
        rows = [waiting.view(-1, *[1] * (old.ndim - 1)) for old in point]
        found = Evaluation(*map(torch.where, rows, point, found))
        self.stayed = waiting
        # no length helps these images: they try the bare gradient next, and then rest
        hopeless = waiting & (length < self.lr * 2.0**-12)
        self.length = torch.where(waiting & ~hopeless, length, self.lr)
        self.resting |= hopeless & (self.curvature == 0)
        for history in (self.curvature, *(inverse for *_, inverse in self.pairs)):
            history.masked_fill_(hopeless, 0)
        return found

    def memory(self) -> dict[str, Tensor]:
        """What the next step depends on, beside the parameter."""
        names = ("curvature", "resting", "stayed", "length")
        found = {name: getattr(self, name) for name in names}
        found |= {} if self.last is None else {"here": self.last[0], "slope": self.last[1]}
        pairs = zip(("moved", "bent", "inverse"), zip(*self.pairs, strict=True), strict=False)
        return found | {name: torch.stack(column) for name, column in pairs}

    def recall(self, memory: dict[str, Tensor]) -> None:
        if "here" in memory:
            self.last = memory.pop("here"), memory.pop("slope")
        columns = [memory.pop(name) for name in ("moved", "bent", "inverse") if name in memory]
        self.pairs.extend(zip(*columns, strict=True))
        vars(self).update(memory)

    def heading(self, here: Tensor, slope: Tensor) -> Tensor:
        if self.last is not None:
            moved, bent = here - self.last[0], slope - self.last[1]
            product, norm = (moved * bent).sum(1, True), bent.square().sum(1, True)
            # else the pair is left out, for that image alone; one that stayed moved by rounding at most
            convex = (product > 1e-10 * norm) & ~self.stayed
            self.curvature = torch.where(convex, product / norm, self.curvature)
            self.pairs.append((moved, bent, torch.where(convex, 1 / product, 0)))
            self.resting &= (moved == 0).all(1, True)
        self.last = (here, slope)
        result, shares = slope, []
        for moved, bent, inverse in reversed(self.pairs):
            shares.append(inverse * (moved * result).sum(1, True))
            result = result - shares[-1] * bent
        # with no history a step moves no parameter by more than a hundredth
        first = 0.01 / slope.abs().amax(1, True).clamp_min(1e-30)
        result = result * torch.where(self.curvature > 0, self.curvature, first)
        for (moved, bent, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            result = result + moved * (share - inverse * (bent * result).sum(1, True))
        return -result
