"""Attacks by their names, as an evaluation runs them: away from the labels, all told the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phosphene import InputError, Method, Model, methods
from phosphene.results import AdversarialExamples

from ..attacks._lp_balls import Norm


@dataclass(frozen=True)
class Attack:
    """A registered attack: ``run(model, images, labels, eps)``, once for every radius or for all of them.

    ``passes(model, image)`` is what one picture costs, forward and twice backward, where that is known.
    """

    name: str
    run: Callable[[Model, Tensor, Tensor, float], AdversarialExamples]
    radii: tuple[float, ...]
    passes: Callable[[Model, Tensor], int | None]


def attack_of(
    name: str, params: Mapping[str, Any], eps: Sequence[float], norm: Norm, seed: int, model: Model
) -> Attack:
    """An attack as it is run here; InputError for one that is none, ModelError where it cannot be run."""
    chosen: Method[..., Any] = methods[name]
    known, takes = chosen.spec.params.model_fields, [i.role for i in chosen.spec.inputs if i.required]
    if (
        takes != ["model", "images", "labels"]
        or not issubclass(chosen.result, AdversarialExamples)
        or not {"fixed-radius", "minimum-norm"} & {*chosen.spec.tags}
    ):
        raise InputError(
            f"{chosen.spec.name} is no attack away from labels with a fixed radius or the least norm; pgd, "
            "apgd, fab, deepfool, square and auto_attack are some"
        )
    fixed = "eps" in known
    told = {"norm": norm, "seed": seed, "eps": eps[-1], "targeted": False}
    told = {n: v for n, v in told.items() if n in known}
    if decided := told.keys() & params.keys():
        raise InputError(f"params gives {name} {sorted(decided)[0]!r}, which is decided for all attacks")
    whole = chosen.validate(dict(params) | told)
    if "gradients" in chosen.spec.needs:
        model.require_gradients()
    rounds = tuple(eps) if fixed else (math.inf,)

    def attack(model: Model, images: Tensor, labels: Tensor, radius: float) -> AdversarialExamples:
        given = dict(params) | told | ({"eps": radius} if fixed else {})
        result: AdversarialExamples = chosen(model, images, labels, **given)
        return result

    def passes(model: Model, image: Tensor) -> int | None:
        found = chosen.passes({"model": model, "images": image}, whole)
        return None if found is None else len(rounds) * (found[0] + 2 * found[1])

    return Attack(name, attack, rounds, passes)
