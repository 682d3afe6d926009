"""Checks of methods that generate an image for a target."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import PhospheneError
from ...results import Synthesis
from ..candidates import larger_parameters
from ..cases import Case
from .attacks import logits_of
from .base import register_check

if TYPE_CHECKING:
    from .base import AnyMethod

#: The classes whose images are compared, and the passes of each run.
COMPARED, LIMIT = 3, 250


def _no_target(method: AnyMethod) -> str | None:
    if not issubclass(method.result, Synthesis) or not method.spec.input("model"):
        return "it generates no image for a model"
    return None if method.spec.input("target") else "it takes no target"


@register_check(
    "method",
    "The image for a class has a larger logit of that class than the images for other classes.",
    "the sign of the objective, the class that it reads, the space of the returned pixels",
    _no_target,
    exemptible=True,
)
def maximizes_the_target(method: AnyMethod) -> None:
    missed, compared = [], 0
    for network in ("functional", "gap", "tokens", "shapes-vgg"):
        if (logits := _logits_by_target(method, Case(network, count=1))) is None:
            continue
        compared += COMPARED
        for k in range(COMPARED):
            if int(logits[:, k].argmax()) != k:
                own, largest = float(logits[k, k]), float(logits[:, k].max())
                missed.append(f"class {k} of {network!r}: {own:.3g}, of another class's image {largest:.3g}")
        if compared >= 2 * COMPARED:
            break
    assert 2 * len(missed) <= compared, f"logits of the class of the image: {'; '.join(missed)}"


def _logits_by_target(method: AnyMethod, case: Case) -> Tensor | None:
    """Row i: the first logits of the image for class i. None where the method refuses the case."""
    case, rows = replace(case, params=larger_parameters(method, case, LIMIT)), []
    for target in range(COMPARED):
        model = case.model()
        try:
            result = replace(case, target=target).run(method, model)
            rows.append(logits_of(model, torch.as_tensor(vars(result)["images"])).mean(0)[:COMPARED].double())
        except PhospheneError:
            return None
    return torch.stack(rows)
