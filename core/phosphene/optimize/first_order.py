"""First-order optimizers, per image: SGD, SGD with normalized gradients, and Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from .evaluation import Evaluation, Evaluator


class FirstOrder:
    """``torch.optim`` on the image's parameter: elementwise, so that images do not influence each other."""

    def __init__(self, evaluate: Evaluator, lr: float, name: str) -> None:
        self.image, self.name = evaluate.image, name
        self.optimizer = (torch.optim.Adam if name == "adam" else torch.optim.SGD)([self.image.parameter], lr)

    def step(self, evaluation: Evaluation) -> Evaluation | None:
        """Update the parameter. Returns None: the loss is not evaluated at the new one."""
        gradient = evaluation.gradient
        if self.name == "normalized-sgd":
            mean_square = gradient.square().mean(tuple(range(1, gradient.ndim)), keepdim=True)
            gradient = gradient / mean_square.sqrt().clamp_min(1e-30)
        self.image.parameter.grad = gradient
        self.optimizer.step()
        self.image.project()
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step count of Adam; empty for SGD."""
        state = self.optimizer.state[self.image.parameter]
        return {name: value for name, value in state.items() if value is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.optimizer.state[self.image.parameter] = state
