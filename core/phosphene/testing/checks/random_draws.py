"""Checks of random numbers: drawn anew, with the probability that is named, and without a preferred side."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ...results import TrainedNetwork
from ..candidates import larger_parameters, largest_accepted
from ..cases import Case, properties_of
from ..techniques import same_meaning
from .arithmetic import same_tensors
from .base import register_check, result_of
from .images import _images_of, _transforms_no_images
from .relations import RandomDraws, text_of
from .work import accepted_case

if TYPE_CHECKING:
    from .base import AnyMethod


def _is_not_random(method: AnyMethod) -> str | None:
    return None if method.seed is not None else "it has no seed"


# --- equal numbers -------------------------------------------------------------------------------------

_DRAWN_ONCE = (
    r"common random|same [^.]{0,40}(in|at|for) (each|every|all)( \w+)? (steps?|points?|iterations?)"
    r"|drawn once|fixed (noise|directions|random)|antithetic"
)


class _Draws(RandomDraws):
    """The random tensors that a method draws: their operation, shape and values."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, tuple[int, ...], bytes]] = []

    def record(self, name: str, value: Any) -> None:
        """Record the numbers of one operation, where they cannot be equal by chance."""
        if (
            isinstance(value, Tensor)
            and not value.is_meta
            and value.numel() >= (4 if value.is_floating_point() else 64)
        ):
            values = value.detach().cpu().contiguous().flatten()
            self.drawn.append((name, tuple(value.shape), values.view(torch.uint8).numpy().tobytes()))


@register_check(
    "method",
    "Of one image, no step draws the random numbers of an earlier one again.",
    "create the generator once, before the loop: Generator().manual_seed(seed) inside it starts anew",
    lambda method: (
        _is_not_random(method)
        or (
            "its steps may each be evaluated with the same numbers"
            if issubclass(method.result, TrainedNetwork)
            else None
        )
        or ("its text says so" if re.search(_DRAWN_ONCE, " ".join(text_of(method).split())) else None)
    ),
    exemptible=True,
)
def random_numbers_are_drawn_anew(method: AnyMethod) -> None:
    case = accepted_case(method, Case(pictures="noise", count=1))
    if case is None:
        raise SkipTest("it refused the networks")
    arguments = case.arguments(method)
    counts = [
        name
        for name, schema in properties_of(method.spec.params_schema).items()
        if schema.get("type") == "integer"
        and (same_meaning(name, ("steps",)) or re.search(r"samples|masks|copies|repeats|draws", name))
    ]
    if not counts:
        raise SkipTest("it has no parameter for a number of steps or samples")
    for name in counts:
        # Two attacks of one seed, or two images that start from the same noise, are no steps.
        repeated = []
        for most in (3, 6):
            case = replace(case, params={name: largest_accepted(method, arguments, name, most)})
            draws = _draws(method, case)
            repeated.append(len(draws) - len(set(draws)))
        assert repeated[1] <= repeated[0], (
            f"with {case.params} {repeated[1]} of {len(draws)} random tensors have the values of an earlier "
            f"one, with half as many {repeated[0]}\non {case}"
        )


def _draws(method: AnyMethod, case: Case) -> list[tuple[str, tuple[int, ...], bytes]]:
    """The random tensors of a call. Raises SkipTest where it is refused."""
    with _Draws() as draws:
        if result_of(method, case) is None:
            raise SkipTest(f"it refused {case}")
    return draws.drawn


# --- probabilities -------------------------------------------------------------------------------------

_CHANCE = r"^(prob|probability|p|chance)$|_(prob|probability)$"
_OF_LEAVING = r"\bkeep|\bkept|unchanged|identity|retain|surviv|without|left (out|as)|skip"


def _chances(method: AnyMethod) -> list[str]:
    """The parameters for the probability of a random change."""
    names = []
    for name, schema in properties_of(method.spec.params_schema).items():
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
        says = schema.get("description", "").lower()
        if re.search(_CHANCE, name) and low == 0 and "minimum" in schema and high == 1:
            names += [] if re.search(_OF_LEAVING, says) else [name]
    return names


@register_check(
    "method",
    "At probability 0 nothing random happens that does not happen at probability 1.",
    "the comparison: rand() < probability is true for the share that is named",
    lambda method: _is_not_random(method) or (None if _chances(method) else "it has no probability"),
    exemptible=True,
)
def probabilities_are_those_of_the_change(method: AnyMethod) -> None:
    for name in _chances(method):
        case = Case(pictures="noise", count=2, double=True)
        case = replace(case, params=larger_parameters(method, case, limit=600))
        if (accepted := accepted_case(method, case)) is None:
            raise SkipTest("it refused the networks")
        case, fixed = accepted, []
        for value in (0.0, 1.0):
            runs = [
                result_of(method, replace(case, params={**case.params, name: value, str(method.seed): seed}))
                for seed in (1, 2, 3)
            ]
            if None in runs:
                raise SkipTest(f"it refused {name}={value:g}")
            fixed.append(all(same_tensors(runs[0], run) for run in runs[1:]))
        assert fixed[0] or not fixed[1], (
            f"with {name}=0 another seed returns another result, with {name}=1 it does not\non {case}"
        )


# --- displacements -------------------------------------------------------------------------------------

_MOVES = r"neighbou?r|offset|displac|deflect|shift|jitter|warp|translat"
#: Height and width of the ramps, and the seeds.
_RAMP, _SEEDS = (40, 56), 24


@register_check(
    "method",
    "Pixels that are moved at random are moved to the left as far as to the right, and up as far as down.",
    "torch.randint leaves out its upper end: randint(-w, w + 1)",
    lambda method: (
        _is_not_random(method)
        or _transforms_no_images(method)
        or (None if re.search(_MOVES, text_of(method)) else "its text does not say that it moves pixels")
    ),
    exemptible=True,
)
def random_moves_are_centered(method: AnyMethod) -> None:
    params = {}
    for name, schema in properties_of(method.spec.params_schema).items():
        least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        if schema.get("type") == "integer" and re.search(r"window|radius|shift|offset|distance|reach", name):
            params[name] = max(1, least)
    height, width = _RAMP
    down = torch.linspace(0.2, 0.8, height)[:, None].expand(height, width)
    across = torch.linspace(0.2, 0.8, width).expand(height, width)
    for axis, ramp, slope in (
        ("down", down, 0.6 / (height - 1)),
        ("to the right", across, 0.6 / (width - 1)),
    ):
        images = ramp.expand(1, 3, -1, -1).contiguous()
        moves = torch.cat(list(_moves(method, images, slope, params)))
        if len(moves) < 50:
            raise SkipTest("it moves few pixels")
        mean, error = float(moves.mean()), float(moves.std()) / math.sqrt(len(moves))
        assert abs(mean) <= max(0.1, 6 * error), (
            f"of a ramp, {len(moves)} pixels have the values of pixels that are {-mean:+.2f} further {axis} "
            f"on average, with {params}"
        )


def _moves(method: AnyMethod, images: Tensor, slope: float, params: dict[str, Any]) -> Iterator[Tensor]:
    """By how many pixels the values of the changed pixels moved, inside the image, for each seed."""
    (name,) = [i.name for i in method.spec.inputs if i.role == "images"]
    for seed in range(_SEEDS):
        case = Case(pictures="noise", count=1, size=_RAMP, params={**params, str(method.seed): seed})
        if (result := result_of(method, case, None, **{name: images})) is None:
            raise SkipTest("it refused a ramp")
        for _, transformed in _images_of(method, result, images.shape):
            moved = ((transformed - images) / slope)[0, 0, 12:-12, 12:-12].double()
            yield moved[moved.abs() > 0.05]
            break
