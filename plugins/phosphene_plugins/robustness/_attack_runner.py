"""Running registered attacks by name, all with the same norm, seed and radii."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phosphene import InputError, Method, Model, methods
from phosphene.attacks import Norm
from phosphene.results import AdversarialExamples


@dataclass(frozen=True)
class AttackRunner:
    """A registered attack with its ``arguments``, to be run once for each of ``radii``.

    A minimum-norm attack has the one radius inf. A runner is sent to other processes: it holds no functions.
    """

    method: str
    arguments: Mapping[str, Any]
    radii: tuple[float, ...]

    @property
    def name(self) -> str:
        """The name of the attack without its family."""
        return self.method.rpartition(".")[2]

    def run(self, model: Model, images: Tensor, labels: Tensor, radius: float) -> AdversarialExamples:
        """The attack of images (n, C, H, W) with labels (n,), within ``radius``."""
        result: AdversarialExamples = methods[self.method](model, images, labels, **self._at(radius))
        return result

    def passes(self, model: Model, image: Tensor) -> int | None:
        """The cost of one image, forward passes plus twice the backward passes; None where it is unknown."""
        method = methods[self.method]
        params = method.validate(self._at(self.radii[-1]))
        cost = method.passes({"model": model, "images": image}, params)
        return None if cost is None else len(self.radii) * (cost[0] + 2 * cost[1])

    def _at(self, radius: float) -> dict[str, Any]:
        return dict(self.arguments) | ({} if math.isinf(radius) else {"eps": radius})


def make_runner(
    name: str, params: Mapping[str, Any], eps: Sequence[float], norm: Norm, seed: int, model: Model
) -> AttackRunner:
    """The runner of an untargeted attack with these parameters.

    Raises InputError for a method that is no such attack and for parameters that are fixed here, ModelError
    for a model that the attack cannot run on.
    """
    method: Method[..., Any] = methods[name]
    fields = method.spec.params.model_fields
    required = [i.role for i in method.spec.inputs if i.required]
    if (
        required != ["model", "images", "labels"]
        or not issubclass(method.result, AdversarialExamples)
        or not {"fixed-radius", "minimum-norm"} & {*method.spec.tags}
    ):
        raise InputError(
            f"{method.spec.name} is no untargeted attack with a fixed radius or a minimum norm; "
            "pgd, apgd, fab, deepfool, square and auto_attack are"
        )
    common = {"norm": norm, "seed": seed, "eps": eps[-1], "targeted": False}
    common = {n: v for n, v in common.items() if n in fields}
    if conflicts := common.keys() & params.keys():
        raise InputError(f"params sets {sorted(conflicts)[0]!r} of {name}, which is the same for all attacks")
    method.validate(dict(params) | common)
    if "gradients" in method.spec.needs:
        model.require_gradients()
    common.pop("eps", None)
    return AttackRunner(
        method.spec.name, dict(params) | common, tuple(eps) if "eps" in fields else (math.inf,)
    )
