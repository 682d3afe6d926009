"""Verdicts on masked gradients: one function per check, from measurements to a ``Check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models._ensembles import strip_schemes
from ._gradient_masking_result import Check, Verdict

#: The share of the images, and the one image, that count as chance: a check is suspicious only above both.
CHANCE = 0.05
#: The smallest plausible ratio of a margin's growth along the gradient to the growth that it predicts.
_MIN_GAIN_RATIO = 0.2
#: Relative difference of two passes that counts as rounding: some GPUs add in varying order.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class AttackTrajectory:
    """The course of a white-box attack of ``steps`` steps.

    ``points`` (N, C, H, W) are its last points; ``steps_to_success`` (N,) the steps until each image was
    misclassified, more than ``steps`` where it never was; ``initial_margin``, ``best_margin`` (N,) the margin
    of the logits at the image, and the highest on the way.
    """

    points: Tensor
    steps_to_success: Tensor
    steps: int
    initial_margin: Tensor
    best_margin: Tensor

    @property
    def success(self) -> Tensor:
        """(N,) bool, which images were misclassified."""
        return self.steps_to_success <= self.steps

    def success_rate_after(self, steps: int) -> Tensor:
        """The share of the images that were misclassified within so many steps."""
        return (self.steps_to_success <= steps).cpu().double().mean()


def check_deterministic(first: Tensor, second: Tensor) -> Check:
    """Two passes of the same images give the same logits (N, K)."""
    name = "deterministic"
    scale = first.abs().max().clamp(min=torch.finfo(first.dtype).tiny)
    difference = float((first - second).abs().max() / scale)
    changed = _share(first.argmax(1) != second.argmax(1))
    if difference <= _ROUNDING:
        return _check(name, False, "the same images get the same logits", difference=difference)
    reason = (
        f"logits of the same images differ by up to {difference:.1%} of the largest, and the predicted class "
        f"of {changed:.0%} of them: a single gradient is one random sample; average several (eot_samples)"
    )
    return _check(name, True, reason, difference=difference, changed=changed)


def check_gradient_exists(loss_gradients: Tensor, margin_gradients: Tensor) -> Check:
    """The gradients (N, C, H, W) of the cross-entropy are finite and not zero."""
    name = "gradient exists"
    zero, not_finite = _is_zero(loss_gradients), _is_not_finite(loss_gradients)
    numbers = {"zero": _share(zero), "not_finite": _share(not_finite)}
    if numbers["not_finite"] > CHANCE:
        reason = f"it is NaN or infinite on {numbers['not_finite']:.0%} of the images"
        return _check(name, True, reason, **numbers)
    if numbers["zero"] <= CHANCE:
        return _check(name, False, "the gradient of the cross-entropy is finite and not zero", **numbers)
    zero_margin = _share(_is_zero(margin_gradients))
    if zero_margin > CHANCE:
        cause = (
            f"and that of the logits' margin on {zero_margin:.0%}: an operation such as rounding has "
            "derivative zero (replace its backward pass: BPDA)"
        )
    else:
        cause = "but that of the logits' margin is not: the loss saturates, see the next check"
    reason = (
        f"the gradient of the cross-entropy is exactly zero on {numbers['zero']:.0%} of the images, {cause}"
    )
    return _check(name, True, reason, **numbers)


def check_loss_not_saturated(
    loss_gradients: Tensor, margin_gradients: Tensor, by_loss: AttackTrajectory, by_ratio: AttackTrajectory
) -> Check:
    """The softmax is not saturated: attacks on the cross-entropy succeed as often as on a ratio of logits."""
    name = "loss not saturated"
    saturated = _share(_is_zero(loss_gradients) & ~_is_zero(margin_gradients))
    gap = float(-by_loss.initial_margin.median())
    numbers = {
        "saturated": saturated,
        "median_margin": gap,
        "by_loss": _share(by_loss.success),
        "by_ratio": _share(by_ratio.success),
    }
    is_weaker = numbers["by_ratio"] > numbers["by_loss"] and _exceeds_chance(
        by_ratio.success, by_loss.success
    )
    if _is_zero(margin_gradients).all():
        return _check(name, None, "there are no gradients to compare", **numbers)
    comparison = (
        f"PGD succeeds on {numbers['by_loss']:.0%} with the cross-entropy, on {numbers['by_ratio']:.0%} with "
        f"a ratio of logits (DLR); the median margin of the true class is {gap:.3g}"
    )
    if saturated <= CHANCE and not is_weaker:
        return _check(name, False, comparison, **numbers)
    cause = (
        f"the softmax rounds to 1 on {saturated:.0%} of the images"
        if saturated > CHANCE
        else "the cross-entropy is the weaker loss"
    )
    return _check(name, True, f"{cause}. {comparison}: use apgd with loss=dlr", **numbers)


def check_gradient_ascends(along_gradient: Tensor, along_random: Tensor, predicted: Tensor) -> Check:
    """The margin grows along the gradient (N,) as ``predicted`` (N,), more than along random ones (D, N)."""
    name, has_gradient = "gradient ascends", predicted > 0
    if not has_gradient.any():
        return _check(name, None, "there is no gradient to follow")
    better = _share((along_gradient >= along_random.amax(0))[has_gradient])
    gain_ratio = float((along_gradient[has_gradient] / predicted[has_gradient]).median())
    numbers = {
        "better_than_random": better,
        "gain_ratio": gain_ratio,
        "along_gradient": float(along_gradient.mean()),
        "along_random": float(along_random.mean()),
    }
    reason = (
        f"along it the logits' margin grows at least as much as along each of {len(along_random)} random "
        f"directions on {better:.0%} of the images, by {gain_ratio:.2g} times the predicted growth (median)"
    )
    suspicious = better < 0.5 or gain_ratio < _MIN_GAIN_RATIO
    if suspicious:
        reason += ": it is not the gradient of the model, and a poor approximation of it"
    return _check(name, suspicious, reason, **numbers)


def check_beats_weaker_attack(name: str, strong: Mapping[str, Tensor], weaker: Mapping[str, Tensor]) -> Check:
    """The ``strong`` attack succeeds (N,) wherever the ``weaker`` ones do, each by its name."""
    ((strong_name, success),) = strong.items()
    if not weaker:
        return _check(name, None, "no other models to compare with (models=...)")
    numbers = {strong_name: _share(success)}
    numbers |= {other: _share(theirs) for other, theirs in weaker.items()}
    rates = ", ".join(f"{strip_schemes(attack)} {rate:.0%}" for attack, rate in numbers.items())
    best = max(weaker, key=lambda other: _share(weaker[other] & ~success))
    if _exceeds_chance(weaker[best], success):
        missed = f"{_share(weaker[best] & ~success):.0%} by {strip_schemes(best)} but not by {strong_name}"
        return _check(name, True, f"success rates: {rates}; {missed}", **numbers)
    if not any(numbers.values()):
        return _check(name, None, "no attack succeeds on any image: try a larger eps", **numbers)
    return _check(name, False, f"success rates: {rates}", **numbers)


def check_more_steps_help(attack: AttackTrajectory) -> Check:
    """The success rate rises with the steps or, on images that are not broken, the margin does."""
    name, steps = "more steps help", attack.steps
    first, last = float(attack.success_rate_after(1)), float(attack.success_rate_after(steps))
    threshold = attack.initial_margin + _ROUNDING * attack.initial_margin.abs()
    margin_rose = _share((attack.best_margin > threshold)[~attack.success])
    numbers = {"first": first, "last": last, "margin_rose": margin_rose}
    rates = f"success rate {first:.0%} after one step, {last:.0%} after {steps}"
    if last == 1 or last > first:
        return _check(name, False, rates, **numbers)
    if steps == 1:
        return _check(name, None, f"{rates}: there is only one step", **numbers)
    return _check(
        name, margin_rose < 0.5, f"{rates}; the margin rose on {margin_rose:.0%} of the others", **numbers
    )


def check_unbounded_attack_succeeds(success: Mapping[float, Tensor]) -> Check:
    """Success (N,) by radius: the rate does not fall as the ball grows, and is 1 at the last radius, 1."""
    name = "unbounded attack succeeds"
    rates = [_share(reached) for reached in success.values()]
    listing = ", ".join(f"{rate:.0%} at {radius:.3g}" for radius, rate in zip(success, rates, strict=True))
    numbers = {f"{radius:.6g}": rate for radius, rate in zip(success, rates, strict=True)}
    largest_drop = max((a - b for a, b in zip(rates, rates[1:], strict=False)), default=0.0)
    if rates[-1] < 1:
        reason = f"at eps = 1 the ball holds every image, but {1 - rates[-1]:.0%} are not broken: {listing}"
        return _check(name, True, reason, **numbers)
    if largest_drop > CHANCE:
        reason = f"a larger ball contains the smaller one, but the success rate falls: {listing}"
        return _check(name, True, reason, **numbers)
    return _check(name, False, f"success rates: {listing}", **numbers)


def _check(name: str, suspicious: bool | None, reason: str, **numbers: float) -> Check:
    """A check with its verdict; inconclusive where ``suspicious`` is None."""
    verdict: Verdict = "inconclusive" if suspicious is None else "suspicious" if suspicious else "pass"
    return Check(name, verdict, reason, numbers)


def _share(mask: Tensor) -> float:
    return float(mask.cpu().double().mean()) if len(mask) else 0.0


def _exceeds_chance(success: Tensor, reference: Tensor) -> bool:
    """Whether an attack (N,) succeeds where the other (N,) does not on more images than by chance."""
    return int((success & ~reference).sum()) > max(1, CHANCE * len(success))


def _is_zero(gradients: Tensor) -> Tensor:
    """(N,) bool, gradients that are exactly zero."""
    return ~gradients.flatten(1).any(1)


def _is_not_finite(gradients: Tensor) -> Tensor:
    """(N,) bool, gradients with a NaN or infinite component."""
    return ~gradients.isfinite().flatten(1).all(1)
