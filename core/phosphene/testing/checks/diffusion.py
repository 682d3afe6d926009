"""Check of methods that add noise to images for a diffusion model: as much as their time step has."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ..cases import Case
from .base import register_check, result_of
from .relations import prose_in_one_line

if TYPE_CHECKING:
    from .base import AnyMethod

#: The largest ratio of the noise to that of its time step, and the least noise that is some.
_RATIO, _SOME = 1.1, 0.02


_ADDS = (
    r"\badds? [^.]{0,40}noise|noise [^.]{0,40}\badded|\bnoised|sqrt\(1 ?[-−] ?\w*(alpha|abar)"
    r"|forward (diffusion|process)"
)


def _adds_no_noise(method: AnyMethod) -> str | None:
    roles = [declared.role for declared in method.spec.inputs]
    if "denoiser" not in roles or "images" not in roles:
        return "it reads no images with a diffusion model"
    if method.seed is None:
        return "it has no seed, so the noise is not random"
    if not re.search(_ADDS, prose_in_one_line(method)):
        return "its text does not say that it adds noise"
    return None


@register_check(
    "method",
    "Images to which noise is added have the noise of the time step at which the network is evaluated.",
    "x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n: denoiser.levels(t) are the roots, of the network's t",
    _adds_no_noise,
    exemptible=True,
)
def noise_has_the_level_of_its_time_step(method: AnyMethod) -> None:
    case = Case(pictures="noise", count=1)
    model = case.model()
    inputs = case.inputs(method, model)
    name, source = (
        next(i.name for i in method.spec.inputs if i.role == role) for role in ("denoiser", "images")
    )
    calls: list[tuple[Tensor, int]] = []
    original = type(inputs[name])

    class Recorded(original):  # type: ignore[valid-type, misc]
        """The same model, whose copies with other words are recorded as well."""

        def predict(self, x: Tensor, t: int) -> Any:
            calls.append((x.detach().clone(), t))
            return super().predict(x, t)

    denoiser = copy.copy(inputs[name])
    denoiser.__class__ = Recorded
    if result_of(method, case, model, **{name: denoiser}) is None or not calls:
        raise SkipTest("it refused the case")
    clean = denoiser.encode(inputs[source])
    x, t = calls[0]
    if x.shape[1:] != clean.shape[1:]:
        raise SkipTest("the network is passed images of another size")
    signal, noise = denoiser.levels(int(t))
    measured = float((x[:1].double() - signal * clean.double()).std())
    if noise < _SOME or measured < _SOME or torch.equal(x[:1], clean[:1]):
        raise SkipTest("it adds no noise")
    deviations = clean[0].double() - clean[0].double().mean()
    slope = float((x[0].double() * deviations).sum() / deviations.square().sum())
    if abs(slope - signal) > 0.15:
        raise SkipTest("the network is passed other images first")
    assert 1 / _RATIO <= measured / noise <= _RATIO, (
        f"at time step {t} the network is passed noise of standard deviation {measured:.3f} around "
        f"{signal:.3f} times the images, and {noise:.3f} is that of the time step"
    )
