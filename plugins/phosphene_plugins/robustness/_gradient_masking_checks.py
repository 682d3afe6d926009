"""The signs of masked gradients: what was measured, judged one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models._ensembles import without_scheme
from ._gradient_masking_result import Check, Verdict

#: What is so for no more of the images than this is an accident, and so is what an attack finds on only one.
FEW = 0.05


#: Along its own gradient a margin grows by most of what that promises; along a useful stand-in by this much.
_KEPT = 0.2


#: The same picture may be given logits that differ by so much of the largest: some GPUs add in any order.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Climb:
    """How a white-box attack of so many ``steps`` went, which ended at ``points`` (N, C, H, W).

    ``after`` (N,) how many steps the model was fooled, more than ``steps`` where it never was; ``start``,
    ``highest`` (N,) the logits' margin at the image, and the highest met.
    """

    points: Tensor
    after: Tensor
    steps: int
    start: Tensor
    highest: Tensor

    @property
    def won(self) -> Tensor:
        """(N,) whether the model was fooled."""
        return self.after <= self.steps

    def won_after(self, count: int) -> Tensor:
        """The share fooled after so many steps."""
        return (self.after <= count).double().mean()


def _share(of: Tensor) -> float:
    return float(of.double().mean()) if len(of) else 0.0


def _check(name: str, suspicious: bool | None, reason: str, **numbers: float) -> Check:
    """A check with its verdict; nothing could be told where ``suspicious`` is None."""
    verdict: Verdict = "could not tell" if suspicious is None else "suspicious" if suspicious else "pass"
    return Check(name, verdict, reason, numbers)


def same_answer(first: Tensor, again: Tensor) -> Check:
    """The same pictures twice, logits (N, K): a random answer needs a gradient that is a mean."""
    apart = float((first - again).abs().max() / first.abs().max().clamp(min=torch.finfo(first.dtype).tiny))
    changed = _share(first.argmax(1) != again.argmax(1))
    if apart <= _ROUNDING:
        return _check("the same answer twice", False, "the same pictures get the same logits", apart=apart)
    reason = (
        f"the same pictures get logits that differ by up to {apart:.1%} of the largest, and {changed:.0%} of "
        "them another answer: a single gradient is one draw's; take the mean of many (eot)"
    )
    return _check("the same answer twice", True, reason, apart=apart, changed=changed)


def a_gradient(loss: Tensor, margin: Tensor) -> Check:
    """The gradients (N, C, H, W) of the cross-entropy and of the logits' margin: are they there?"""
    zero, broken = _zero(loss), _broken(loss)
    numbers = {"zero": _share(zero), "not_finite": _share(broken)}
    if numbers["not_finite"] > FEW:
        reason = f"it is NaN or infinite on {numbers['not_finite']:.0%} of the images"
    elif numbers["zero"] > FEW:
        dead = _share(_zero(margin))
        why = (
            f"and that of the logits' margin on {dead:.0%}: something on the way has no slope, "
            "as rounding has (give it one: BPDA)"
            if dead > FEW
            else "but that of the logits' margin is there: the loss hides it, see the next check"
        )
        reason = f"that of the cross-entropy is exactly zero on {numbers['zero']:.0%} of the images, {why}"
    else:
        return _check("a gradient", False, "it is there and finite", **numbers)
    return _check("a gradient", True, reason, **numbers)


def not_saturated(loss: Tensor, margin: Tensor, by_loss: Climb, by_ratio: Climb) -> Check:
    """Whether softmax still has a slope: does the cross-entropy lead as far as a ratio of logits does?"""
    name = "loss not saturated"
    hidden = _share(_zero(loss) & ~_zero(margin))
    gap = float(-by_loss.start.median())
    numbers = {"hidden": hidden, "gap": gap, "by_loss": _share(by_loss.won), "by_ratio": _share(by_ratio.won)}
    misled = numbers["by_ratio"] > numbers["by_loss"] and _finds_more(by_ratio.won, by_loss.won)
    if _zero(margin).all():
        return _check(name, None, "no gradient is there to compare", **numbers)
    ways = (
        f"PGD fools {numbers['by_loss']:.0%} by the cross-entropy, {numbers['by_ratio']:.0%} by a ratio of "
        f"logits (DLR); the true class leads by {gap:.3g} (median)"
    )
    if hidden <= FEW and not misled:
        return _check(name, False, ways, **numbers)
    why = (
        f"softmax is 1 to the last digit on {hidden:.0%} of the images"
        if hidden > FEW
        else "a loss that misleads"
    )
    return _check(name, True, f"{why}. {ways}: attack by that, apgd with loss=dlr", **numbers)


def uphill(along: Tensor, random: Tensor, promised: Tensor) -> Check:
    """By how much the margin grows along the gradient (N,) and random directions (D, N), and was to (N,)."""
    name, moved = "gradient leads uphill", promised > 0
    if not moved.any():
        return _check(name, None, "there is no gradient to follow")
    better = _share((along >= random.amax(0))[moved])
    kept = float((along[moved] / promised[moved]).median())
    numbers = {"better": better, "kept": kept, "along": float(along.mean()), "random": float(random.mean())}
    reason = (
        f"along it the logits' margin grows as much as along any of {len(random)} random directions on "
        f"{better:.0%} of the images, by {kept:.2g} times what it promises (median)"
    )
    suspicious = better < 0.5 or kept < _KEPT
    if suspicious:
        reason += ": it is not the model's own slope, and a poor likeness of it"
    return _check(name, suspicious, reason, **numbers)


def beaten(name: str, by: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Check:
    """Whether an attack, (N,) bool, finds what weaker ones find; ``others`` by their names, perhaps none."""
    ((strong, won),) = by.items()
    if not others:
        return _check(name, None, "no other model was given (models=...)")
    numbers = {strong: _share(won)}
    numbers |= {other: _share(theirs) for other, theirs in others.items()}
    ways = ", ".join(f"{without_scheme(way)} {rate:.0%}" for way, rate in numbers.items())
    worst = max(others, key=lambda other: _share(others[other] & ~won))
    if _finds_more(others[worst], won):
        alone = f"{_share(others[worst] & ~won):.0%} by {without_scheme(worst)} and not by {strong}"
        return _check(name, True, f"fooled by {ways}; {alone}", **numbers)
    if not any(numbers.values()):
        return _check(name, None, "neither fools the model on any image: try a larger eps", **numbers)
    return _check(name, False, f"fooled by {ways}", **numbers)


def more_steps(climb: Climb) -> Check:
    """Whether success, or where none is to be had the margin, rises with the steps."""
    name, steps = "more steps find more", climb.steps
    first, last = float(climb.won_after(1)), float(climb.won_after(steps))
    left = ~climb.won
    rose = _share((climb.highest > climb.start + _ROUNDING * climb.start.abs())[left])
    numbers = {"first": first, "last": last, "rose": rose}
    told = f"{first:.0%} are fooled after one step, {last:.0%} after {steps}"
    if last == 1 or last > first:
        return _check(name, False, told, **numbers)
    if steps == 1:
        return _check(name, None, f"{told}: with one step there are no more", **numbers)
    return _check(name, rose < 0.5, f"{told}; of the others the margin rose on {rose:.0%}", **numbers)


def unbounded(won: Mapping[float, Tensor]) -> Check:
    """Success (N,) by the ball's radius, the last of them 1: does it grow, until nothing withstands?"""
    rates = [_share(theirs) for theirs in won.values()]
    told = ", ".join(f"{rate:.0%} at {radius:.3g}" for radius, rate in zip(won, rates, strict=True))
    numbers = {f"{radius:.6g}": rate for radius, rate in zip(won, rates, strict=True)}
    falls = max((a - b for a, b in zip(rates, rates[1:], strict=False)), default=0.0)
    name = "unbounded eps fools all"
    if rates[-1] < 1:
        reason = f"at eps = 1 any picture may be made, and yet {1 - rates[-1]:.0%} are not fooled: {told}"
        return _check(name, True, reason, **numbers)
    if falls > FEW:
        return _check(
            name, True, f"a larger ball holds the smaller one, and yet finds less: {told}", **numbers
        )
    return _check(name, False, f"fooled are {told}", **numbers)


def _finds_more(won: Tensor, reference: Tensor) -> bool:
    """Whether an attack (N,) wins where the other (N,) does not, on more images than by accident."""
    return int((won & ~reference).sum()) > max(1, FEW * len(won))


def _zero(gradients: Tensor) -> Tensor:
    """(N,) where a gradient is exactly zero."""
    return ~gradients.flatten(1).any(1)


def _broken(gradients: Tensor) -> Tensor:
    """(N,) where a gradient is not a number, or infinite."""
    return ~gradients.isfinite().flatten(1).all(1)
