"""Checks of images that are computed from images or for a model: positions, range, fixed points."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ...errors import PhospheneError
from ...models.introspection import recording_structure
from ...results import AdversarialExamples, Attribution, Stylization, Synthesis
from ..cases import Case
from .base import register_check, result_of
from .claims import title_of

if TYPE_CHECKING:
    from .base import AnyMethod


def _images_of(method: AnyMethod, result: Any, shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    """The fields of a result that are images computed from the method's images."""
    for name, value in result.fields():
        copied = name == "sources" or (name == "images" and not isinstance(result, Synthesis))
        if not copied and isinstance(value, Tensor) and value.shape == shape and value.is_floating_point():
            yield name, value


def _maps_no_images(method: AnyMethod) -> str | None:
    if method.spec.input("images") is None:
        return "it takes no images"
    return "it returns maps" if issubclass(method.result, Attribution) else None


@register_check(
    "method",
    "An image that is computed from another one is at the same position, not shifted.",
    "undo each random shift by the opposite one; pad on all sides",
    _maps_no_images,
    exemptible=True,
)
def images_are_not_shifted(method: AnyMethod) -> None:
    for network in ("gap", "functional", "shapes-vgg"):
        case = Case(network, "noise", count=2)
        model = case.model()
        try:
            inputs = case.inputs(method, model)
            result = method(**inputs, **case.arguments(method))
        except PhospheneError:
            continue
        images = inputs[str(getattr(method.spec.input("images"), "name", "images"))]
        for name, computed in _images_of(method, result, images.shape):
            for n, (one, other) in enumerate(zip(images, computed, strict=True)):
                shift, at, at_zero = _shift_between(one, other)
                assert at < 0.3 or at - at_zero < 0.1 or max(map(abs, shift)) <= 1, (
                    f"{name} of image {n} correlates with the image by {at:.2f} shifted by {shift} pixels, "
                    f"by {at_zero:.2f} unshifted"
                )
        return


def _shift_between(one: Tensor, other: Tensor) -> tuple[tuple[int, int], float, float]:
    """The circular shift (down, right) of largest correlation, that correlation, and that without a shift."""
    first, second = (tensor.detach().double().mean(0) for tensor in (one, other))
    first, second = first - first.mean(), second - second.mean()
    size = float(first.norm() * second.norm())
    if size == 0:
        return (0, 0), 0.0, 0.0
    correlation = torch.fft.ifft2(torch.fft.fft2(second) * torch.fft.fft2(first).conj()).real / size
    height, width = correlation.shape
    down, right = divmod(int(correlation.argmax()), width)
    shift = (down - height * (2 * down > height), right - width * (2 * right > width))
    return shift, float(correlation.max()), float(correlation[0, 0])


#: Names of methods that change no image of one color.
_FILTERS = r"bit.?depth|quanti[sz]|squeez|median|\bblur|smooth|jpeg|compress|denois|total variation|\bfilter"


@register_check(
    "method",
    "A filter or a quantization leaves a black and a white image as they are.",
    "the levels of a quantization: 0 and 1 are two of them; borders that are padded with zeros",
    lambda method: (
        _maps_no_images(method)
        or (
            None
            if re.search(_FILTERS, title_of(method))
            and not issubclass(method.result, (AdversarialExamples, Synthesis, Stylization))
            else "it is no filter or quantization"
        )
    ),
    exemptible=True,
)
def black_and_white_are_unchanged(method: AnyMethod) -> None:
    declared = method.spec.input("images")
    assert declared is not None
    for value in (0.0, 1.0):
        case = Case(count=1)
        images = torch.full((1, 3, 24, 24), value)
        if (result := result_of(method, case, None, **{declared.name: images})) is None:
            raise SkipTest("it refused an image of one color")
        for name, computed in _images_of(method, result, images.shape):
            change = float((computed - value).abs().max())
            assert change < 0.02, f"{name} of an image of {value:g} differs from it by {change:.3g}"


@register_check(
    "method",
    "The image that is returned has the mean and the spread of the one that the network was passed last.",
    "the returned pixels: in [0, 1] and not normalized, of the last step",
    lambda method: (
        None
        if issubclass(method.result, Synthesis) and method.spec.input("model")
        else "it generates no image for a model"
    ),
    exemptible=True,
)
def returns_the_pixels_that_were_passed(method: AnyMethod) -> None:
    for network in ("functional", "gap", "shapes-vgg"):
        case = Case(network, count=1)
        model = case.model()
        last: list[Tensor] = []
        mean, std = (t[:, None, None] for t in (model.mean, model.std))

        def record(_: Any, args: Any, last: list[Tensor] = last, mean: Any = mean, std: Any = std) -> None:
            if args and not recording_structure.get() and args[0].ndim == 4:
                last[:] = [args[0].detach() * std.to(args[0]) + mean.to(args[0])]

        handle = model.module.register_forward_pre_hook(record)
        try:
            result = result_of(method, case, model)
        finally:
            handle.remove()
        if result is None or not last:
            continue
        passed, returned = (t.double().transpose(0, 1).flatten(1) for t in (last[0], result.images))
        shift = float((passed.mean(1) - returned.mean(1)).abs().max())
        spread = float(passed.std() / returned.std().clamp(min=1e-6))
        assert shift < 0.2 and 1 / 3 < spread < 3, (
            f"the mean of a channel differs by up to {shift:.2f}, the standard deviations have the ratio "
            f"{spread:.2f}\non the network {network!r}"
        )
        return
