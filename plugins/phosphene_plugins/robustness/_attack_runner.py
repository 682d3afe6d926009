"""Running registered attacks by name, all with the same norm, seed and radii."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phosphene import InputError, Method, Model, methods
from phosphene.attacks import Norm
from phosphene.results import AdversarialExamples


@dataclass(frozen=True)
class AttackRunner:
    """A registered attack: ``run(model, images, labels, radius)``, to be called once for each of ``radii``.

    A minimum-norm attack has the one radius inf. ``passes(model, image)`` is the cost of one image, forward
    passes plus twice the backward passes, or None where it is unknown.
    """

    name: str
    run: Callable[[Model, Tensor, Tensor, float], AdversarialExamples]
    radii: tuple[float, ...]
    passes: Callable[[Model, Tensor], int | None]


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
    has_radius = "eps" in fields
    common = {"norm": norm, "seed": seed, "eps": eps[-1], "targeted": False}
    common = {n: v for n, v in common.items() if n in fields}
    if conflicts := common.keys() & params.keys():
        raise InputError(f"params sets {sorted(conflicts)[0]!r} of {name}, which is the same for all attacks")
    validated = method.validate(dict(params) | common)
    if "gradients" in method.spec.needs:
        model.require_gradients()
    radii = tuple(eps) if has_radius else (math.inf,)

    def run(model: Model, images: Tensor, labels: Tensor, radius: float) -> AdversarialExamples:
        arguments = dict(params) | common | ({"eps": radius} if has_radius else {})
        result: AdversarialExamples = method(model, images, labels, **arguments)
        return result

    def passes(model: Model, image: Tensor) -> int | None:
        cost = method.passes({"model": model, "images": image}, validated)
        return None if cost is None else len(radii) * (cost[0] + 2 * cost[1])

    return AttackRunner(name, run, radii, passes)
