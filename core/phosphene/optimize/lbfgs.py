"""L-BFGS with a backtracking line search, per image."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from .evaluation import Evaluation, Evaluator

#: Curvature pairs of the limited memory.
MEMORY = 10


#: Sufficient decrease (Armijo): the loss must fall by this part of the linear prediction.
SUFFICIENT_DECREASE = 1e-4


#: The line search has failed when a step is shorter than this part of lr.
SHORTEST_STEP = 2.0**-12


#: Largest change of a parameter in a step without curvature pairs.
FIRST_STEP = 0.01


class CurvaturePair(NamedTuple):
    """Change s of the parameter and y of the gradient in one step, (N, D), and rho = 1 / s.y, (N, 1).

    rho is 0 for an image that does not use the pair.
    """

    parameter_change: Tensor
    gradient_change: Tensor
    rho: Tensor


class Lbfgs:
    """Limited-memory BFGS with backtracking along the projected path (Nocedal and Wright, ch. 7).

    Every image has its own curvature pairs and step length. The objective is always evaluated on the full
    batch, because it may belong to single images (a target class each).
    """

    def __init__(self, evaluate: Evaluator, lr: float) -> None:
        self.evaluate, self.image, self.lr = evaluate, evaluate.image, lr
        # (N, D); shares memory with the parameter, so writing to it moves the images
        self.point = self.image.parameter.detach().view(len(self.image.parameter), -1)
        self.previous: tuple[Tensor, Tensor] | None = None  # point and gradient of the last step
        self.pairs: deque[CurvaturePair] = deque(maxlen=MEMORY)
        # s.y / y.y of the last pair, the scale of the initial inverse Hessian; 0: no pairs yet
        self.scale = torch.zeros_like(self.point[:, :1])
        self.finished = self.scale != 0  # images (N, 1) that no step improves
        self.rejected = self.finished  # images whose last step was not accepted
        self.step_length = torch.full_like(self.scale, lr)

    def step(self, evaluation: Evaluation) -> Evaluation:
        """One step with a line search of at most two evaluations; returns the evaluation at the new point.

        An image whose loss does not fall stays where it is and tries a quarter of the length next time.
        """
        start, gradient = self.point.clone(), evaluation.gradient.flatten(1)
        direction = self._direction(start, gradient)
        rejected = ~self.finished
        step_length = torch.where(rejected, self.step_length, 0)
        # Two evaluations a step, since they are what costs; backtracking continues in the next step.
        for _ in range(2):
            self.point.copy_(start + step_length * direction)
            self.image.project()
            candidate = self.evaluate()
            predicted_change = (gradient * (self.point - start)).sum(1)
            sufficient = candidate.loss <= evaluation.loss + SUFFICIENT_DECREASE * predicted_change
            rejected &= ~((predicted_change < 0) & sufficient)[:, None]
            step_length = torch.where(rejected, step_length / 4, step_length)
            if not rejected.any():
                break
        # A loss that is still not finite is accepted, so that the next check reports it.
        rejected &= candidate.loss.isfinite()[:, None]
        self.point.copy_(torch.where(rejected, start, self.point))
        masks = [rejected.view(-1, *[1] * (value.ndim - 1)) for value in evaluation]
        candidate = Evaluation(*map(torch.where, masks, evaluation, candidate))
        self.rejected = rejected
        self._update_step_length(step_length)
        return candidate

    def _update_step_length(self, step_length: Tensor) -> None:
        """Keep a shortened length; after a failed search drop the pairs, or finish where there are none."""
        failed = self.rejected & (step_length < self.lr * SHORTEST_STEP)
        self.step_length = torch.where(self.rejected & ~failed, step_length, self.lr)
        self.finished |= failed & (self.scale == 0)
        for history in (self.scale, *(pair.rho for pair in self.pairs)):
            history.masked_fill_(failed, 0)

    def _direction(self, point: Tensor, gradient: Tensor) -> Tensor:
        """-H g with the inverse Hessian H of the curvature pairs: the two-loop recursion (algorithm 7.4)."""
        if self.previous is not None:
            self._add_pair(point - self.previous[0], gradient - self.previous[1])
        self.previous = (point, gradient)
        result, alphas = gradient, []
        for s, y, rho in reversed(self.pairs):
            alphas.append(rho * (s * result).sum(1, True))
            result = result - alphas[-1] * y
        first_scale = FIRST_STEP / gradient.abs().amax(1, True).clamp_min(1e-30)
        result = result * torch.where(self.scale > 0, self.scale, first_scale)
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            result = result + s * (alpha - rho * (y * result).sum(1, True))
        return -result

    def _add_pair(self, s: Tensor, y: Tensor) -> None:
        """Store a pair for the images with positive curvature; a rejected step differs by rounding alone."""
        product, norm = (s * y).sum(1, True), y.square().sum(1, True)
        is_convex = (product > 1e-10 * norm) & ~self.rejected
        self.scale = torch.where(is_convex, product / norm, self.scale)
        self.pairs.append(CurvaturePair(s, y, torch.where(is_convex, 1 / product, 0)))
        self.finished &= (s == 0).all(1, True)  # an edit between steps starts an image again

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step depends on besides the parameter."""
        names = ("scale", "finished", "rejected", "step_length")
        state = {name: getattr(self, name) for name in names}
        if self.previous is not None:
            state |= {"previous_point": self.previous[0], "previous_gradient": self.previous[1]}
        if self.pairs:
            columns = zip(CurvaturePair._fields, zip(*self.pairs, strict=True), strict=True)
            state |= {name: torch.stack(column) for name, column in columns}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if "previous_point" in state:
            self.previous = state["previous_point"], state["previous_gradient"]
        if "rho" in state:
            columns = (state[name] for name in CurvaturePair._fields)
            self.pairs.extend(map(CurvaturePair, *columns))
        self.scale, self.finished = state["scale"], state["finished"]
        self.rejected, self.step_length = state["rejected"], state["step_length"]
