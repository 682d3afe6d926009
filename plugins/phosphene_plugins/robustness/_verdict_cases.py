"""Verdicts on measurements that are written out, for the oracle of ``gradient_masking_checks``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._gradient_masking_result import Check
from ._masking_verdicts import (
    AttackTrajectory,
    check_beats_weaker_attack,
    check_deterministic,
    check_gradient_ascends,
    check_gradient_exists,
    check_loss_not_saturated,
    check_more_steps_help,
    check_unbounded_attack_succeeds,
)


def _assert_check(check: Check, verdict: str, reason: str = "", **numbers: float) -> None:
    """Assert a check's verdict, a part of its reason, and all its numbers."""
    assert check.verdict == verdict and reason in check.reason, check
    torch.testing.assert_close({**check.numbers}, numbers)


def _first(count: int) -> Tensor:
    """(20,) bool, true for the first images: one of them counts as chance, two do not."""
    return torch.arange(20) < count


def _gradients(zero: int = 0, not_finite: int = 0) -> Tensor:
    """(20, 1, 2, 2): of the first images zero, of the last ones with a NaN; all others have one zero."""
    gradients = torch.ones(20, 1, 2, 2)
    gradients[:, 0, 0, 0] = 0.0
    gradients[_first(zero)] = 0.0
    gradients[_first(not_finite).flip(0), 0, 1, 0] = torch.nan
    return gradients


def _trajectory(success: Tensor, steps: int = 3, first: int = 2, rose: int = 0) -> AttackTrajectory:
    """An attack that succeeds on these images at its step ``first``; the margin rises on the last ones."""
    margins = -torch.arange(1.0, 21)
    best = margins + 2e-4 * margins.abs() * _first(rose).flip(0)
    return AttackTrajectory(
        torch.zeros(20, 1, 2, 2), torch.where(success, first, steps + 1), steps, margins, best
    )


def _verdicts_on_gradients() -> None:
    logits = torch.tensor([[3.0, -4.0, 0.0], [1.0, 2.0, 0.0]])
    changed = torch.tensor([[3.0, -4.0, 0.0], [2.2, 2.0, 0.0]])
    rounded = logits + torch.tensor([3.6e-4, 0.0, 0.0])
    _assert_check(check_deterministic(logits, changed), "suspicious", difference=0.3, changed=0.5)
    _assert_check(check_deterministic(logits, rounded), "pass", difference=9e-5)
    _assert_check(check_deterministic(0 * logits, 0 * logits), "pass", difference=0.0)

    exists = check_gradient_exists
    _assert_check(exists(_gradients(1, 1), _gradients(20)), "pass", zero=0.05, not_finite=0.05)
    _assert_check(exists(_gradients(0, 2), _gradients()), "suspicious", "on 10%", zero=0.0, not_finite=0.1)
    _assert_check(exists(_gradients(3), _gradients(2)), "suspicious", "BPDA", zero=0.15, not_finite=0.0)
    _assert_check(exists(_gradients(2), _gradients(1)), "suspicious", "saturates", zero=0.1, not_finite=0.0)

    def saturation(
        zero: int, zero_margin: int, by_loss: Tensor, by_ratio: Tensor, verdict: str, reason: str
    ) -> None:
        check = check_loss_not_saturated(
            _gradients(zero), _gradients(zero_margin), _trajectory(by_loss), _trajectory(by_ratio)
        )
        _assert_check(
            check, verdict, reason, saturated=max(0, zero - zero_margin) / 20, median_margin=11.0,
            by_loss=float(by_loss.float().mean()), by_ratio=float(by_ratio.float().mean()),
        )  # fmt: skip

    saturation(20, 20, _first(0), _first(0), "inconclusive", "no gradients")
    saturation(3, 1, _first(4), _first(4), "suspicious", "rounds to 1 on 10%")
    saturation(2, 1, _first(4), _first(5), "pass", "20% with the cross-entropy, on 25%")
    saturation(0, 0, _first(4), _first(6), "suspicious", "weaker loss")
    saturation(0, 0, _first(4), _first(3).flip(0), "pass", "median margin of the true class is 11")
    saturation(0, 0, _first(4), _first(4).flip(0), "pass", "")

    along, predicted = torch.tensor([1.0, 0.3, 0.1, 0.4]), torch.tensor([2.0, 1.0, 1.0, 0.0])
    random = torch.tensor([[1.0, 0.2, 0.3, 0.0], [0.5, 0.1, 0.2, 0.9]])
    numbers = {"better_than_random": 2 / 3, "gain_ratio": 0.3, "along_gradient": 0.45, "along_random": 0.4}
    ascends = check_gradient_ascends
    _assert_check(ascends(along, random, predicted), "pass", "each of 2 random directions on 67%", **numbers)
    _assert_check(ascends(along, random, 0 * predicted), "inconclusive")
    check = ascends(along, random, 2 * predicted)
    _assert_check(check, "suspicious", "along it", **numbers | {"gain_ratio": 0.15})
    assert check.reason.endswith("a poor approximation of it")
    check = ascends(along[1:], random[:, 1:], predicted[1:] / 4)  # better on one of two images
    assert check.verdict == "pass" and check.numbers["better_than_random"] == 0.5
    assert ascends(along[1:3], random[:, 1:3] + 0.15, predicted[1:3] / 4).verdict == "suspicious"


def _verdicts_on_attacks() -> None:
    def beats(strong: Tensor, verdict: str, reason: str, **weaker: Tensor) -> None:
        check = check_beats_weaker_attack("a", {"strong": strong}, weaker)
        numbers = {name: float(success.float().mean()) for name, success in weaker.items()}
        numbers |= {"strong": float(strong.float().mean())} if weaker else {}
        _assert_check(check, verdict, reason, **numbers)
        assert check.name == "a"

    beats(_first(5), "inconclusive", "no other models")
    beats(_first(0), "inconclusive", "no attack succeeds", b=_first(0))
    beats(_first(5), "pass", "strong 25%, b 25%, c 30%", b=_first(5), c=_first(6))
    beats(_first(5), "suspicious", "10% by c but not by strong", b=_first(5), c=_first(2).flip(0))
    beats(_first(0), "pass", "strong 0%, b 5%", b=_first(1))

    def more_steps(attack: AttackTrajectory, verdict: str, reason: str, *numbers: float) -> None:
        names = ("first", "last", "margin_rose")
        _assert_check(
            check_more_steps_help(attack), verdict, reason, **dict(zip(names, numbers, strict=True))
        )

    more_steps(_trajectory(_first(5)), "pass", "0% after one step, 25% after 3", 0.0, 0.25, 0.0)
    more_steps(_trajectory(_first(20), first=1), "pass", "100% after 3", 1.0, 1.0, 0.0)
    more_steps(_trajectory(_first(4), first=1, rose=8), "pass", "rose on 50%", 0.2, 0.2, 0.5)
    more_steps(_trajectory(_first(4), first=1, rose=7), "suspicious", "of the others", 0.2, 0.2, 7 / 16)
    more_steps(_trajectory(_first(4), 1, first=1), "inconclusive", "only one step", 0.2, 0.2, 0.0)

    unbounded = check_unbounded_attack_succeeds
    check = unbounded({0.01234567: _first(10), 1.0: _first(19)})
    _assert_check(check, "suspicious", "but 5% are not broken", **{"0.0123457": 0.5, "1": 0.95})
    check = unbounded({0.1: _first(10), 0.2: _first(8), 1.0: _first(20)})
    _assert_check(check, "suspicious", "50% at 0.1, 40% at 0.2", **{"0.1": 0.5, "0.2": 0.4, "1": 1.0})
    check = unbounded({0.1: _first(6), 0.2: _first(5), 1.0: _first(20)})
    _assert_check(check, "pass", "success rates: 30% at 0.1", **{"0.1": 0.3, "0.2": 0.25, "1": 1.0})
    _assert_check(unbounded({1.0: _first(20)}), "pass", "100% at 1", **{"1": 1.0})


def verdicts_on_written_out_measurements() -> None:
    """The verdict and the numbers of each check, on either side of its limits."""
    _verdicts_on_gradients()
    _verdicts_on_attacks()
