"""Checks of images that are computed from images or for a model: positions, range, fixed points."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ...errors import PhospheneError
from ...models.introspection import recording_structure
from ...results import AdversarialExamples, Attribution, Stylization, Synthesis
from ...spec.relations import Equivariant, Transform, transformed
from ..candidates import larger_parameters
from ..cases import Case
from .attacks import logits_of
from .base import register_check, result_of
from .claims import title_of
from .relations import RelationCalls, prose_in_one_line

if TYPE_CHECKING:
    from ...models import Model
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


#: The least difference of the correlations with the image shifted by a pixel in opposite directions, also as
#: a fraction of the larger one, that is a shift by a part of a pixel: 0 for a symmetric filter, the larger
#: one for a mean of neighboring pixels.
_ASYMMETRY, _ASYMMETRY_SHARE = 0.12, 0.4


@register_check(
    "method",
    "An image that is computed from another one is at the same position, not shifted.",
    "undo each random shift by the opposite one; pad on all sides; [::2] is half a pixel off, not resize()",
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
            correlations = [_correlation(one, other) for one, other in zip(images, computed, strict=True)]
            for n, correlation in enumerate(correlations):
                shift, at, at_zero = _largest_shift(correlation)
                assert at < 0.3 or at - at_zero < 0.1 or max(map(abs, shift)) <= 1, (
                    f"{name} of image {n} correlates with the image by {at:.2f} shifted by {shift} pixels, "
                    f"by {at_zero:.2f} unshifted"
                )
            mean = torch.stack(correlations).mean(0)
            for down, right in ((1, 0), (0, 1), (1, 1), (1, -1)):
                ahead, behind = float(mean[down, right]), float(mean[-down, -right])
                assert abs(ahead - behind) < max(_ASYMMETRY, _ASYMMETRY_SHARE * max(ahead, behind)), (
                    f"{name} correlates with the image by {ahead:.2f} shifted by {(down, right)} pixels, by "
                    f"{behind:.2f} shifted by {(-down, -right)}: it is shifted by a part of a pixel"
                )
        return


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """The correlation (H, W) of two images' brightness under each circular shift; 0 where one is constant."""
    first, second = (tensor.detach().double().mean(0) for tensor in (one, other))
    first, second = first - first.mean(), second - second.mean()
    size = first.norm() * second.norm()
    product = torch.fft.ifft2(torch.fft.fft2(second) * torch.fft.fft2(first).conj()).real
    return product / size if size else torch.zeros_like(product)


def _largest_shift(correlation: Tensor) -> tuple[tuple[int, int], float, float]:
    """The circular shift (down, right) of largest correlation, that correlation, and that without a shift."""
    height, width = correlation.shape
    down, right = divmod(int(correlation.argmax()), width)
    shift = (down - height * (2 * down > height), right - width * (2 * right > width))
    return shift, float(correlation.max()), float(correlation[0, 0])


#: Names of methods that change no image of one color.
_FILTERS = r"bit.?depth|quanti[sz]|squeez|median|\bblur|smooth|jpeg|compress|denois|total variation|\bfilter"


@register_check(
    "method",
    "A filter or a quantization leaves black and white images, and the brightness of noise, as they are.",
    "the levels of a quantization: 0 and 1 are two of them, and rounding; borders that are padded with zeros",
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
def brightness_is_unchanged(method: AnyMethod) -> None:
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
    noise = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    result = result_of(method, Case(), None, **{declared.name: noise})
    for name, computed in _images_of(method, result, noise.shape) if result is not None else ():
        change = float((computed - noise).mean())
        assert abs(change) < 0.02, (
            f"the mean of {name} of noise differs from that of the noise by {change:.3f}"
        )


@register_check(
    "method",
    "The smoothed image of a transposed image is the transposed smoothed image.",
    "a filter along one axis only, or twice along the same",
    lambda method: (
        _maps_no_images(method)
        or (
            None
            if re.search(r"\bblur|\bmean filter|median|smooth|gaussian filter|box filter", title_of(method))
            and not issubclass(method.result, (AdversarialExamples, Synthesis, Stylization))
            and method.seed is None
            else "it smooths no images"
        )
    ),
    exemptible=True,
)
def smooths_both_axes(method: AnyMethod) -> None:
    declared = method.spec.input("images")
    assert declared is not None
    noise = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    runs = [result_of(method, Case(), None, **{declared.name: x}) for x in (noise, noise.mT.contiguous())]
    if None in runs:
        raise SkipTest("it refused noise")
    for (name, one), (_, other) in zip(*(_images_of(method, run, noise.shape) for run in runs), strict=True):
        change, error = float((one - noise).norm()), float((one.mT - other).norm())
        assert error <= 0.1 * change, (
            f"{name} of the transposed images differs from the transposed {name} by {error / change:.0%} of "
            "what the method changes"
        )


#: The largest difference of a transformed image that has to flip, as a fraction of what the method changes:
#: that by JPEG's integer arithmetic is an eighth, that by half a pixel more than half.
_FLIP_ERROR = 0.25


def _transforms_no_images(method: AnyMethod) -> str | None:
    if (reason := _maps_no_images(method)) is not None:
        return reason
    if issubclass(method.result, (AdversarialExamples, Synthesis, Stylization)):
        return "its images are attacked, generated or stylized"
    if not method.spec.batch_independent:
        return "it declares that its images depend on each other (batch_independent=False)"
    shapes = method.result.shapes
    pixels = [n for n, s in shapes.items() if s == shapes.get("images") and n not in ("images", "sources")]
    if shapes and not pixels:
        return "it returns no images that are computed from its images"
    return None if _undeclared_flips(method) else "it declares Equivariant itself, which is tested exactly"


def _undeclared_flips(method: AnyMethod) -> list[Transform]:
    declared = [r.transform for r in method.spec.relations if isinstance(r, Equivariant)]
    flips: tuple[Transform, ...] = ("hflip", "vflip")
    return [flip for flip in flips if flip not in declared]


@register_check(
    "method",
    "The transformed image of a flipped image is the flipped transformed image.",
    "pixels that are read from an edge on, [::2], half a pixel off their cells' centers; padding on one side",
    _transforms_no_images,
    exemptible=True,
)
def transformed_images_flip(method: AnyMethod) -> None:
    tested = 0
    for flip in _undeclared_flips(method):
        for head in ("gap", "flat", "tokens"):
            try:  # the sides are multiples of 16: windows and blocks of pixels divide them
                calls = RelationCalls.start(method, f"{flip}-{head}", Case().arguments(method))
                flipped = calls(inputs=calls.transformed(partial(transformed, transform=flip)))
            except PhospheneError:
                continue
            if calls.is_random:
                raise SkipTest("it draws random numbers, which do not flip with the image")
            images = calls.setting.images
            pairs = zip(*(_images_of(method, r, images.shape) for r in (calls.result, flipped)), strict=True)
            for (name, one), (_, other) in pairs:
                error = float((transformed(one, flip) - other).norm())
                change = float((one - images).norm())
                assert error <= _FLIP_ERROR * change + 1e-6 * float(images.norm()), (
                    f"{name} of the images under {flip!r} differs from the transformed {name} by "
                    f"{error / max(change, 1e-12):.0%} of what the method changes\n"
                    f"on relation_network({calls.network!r})"
                )
                tested += 1
            break
    if not tested:
        raise SkipTest("it refused the symmetric networks, or returned no images")


@register_check(
    "method",
    "The image that is returned has the mean and the spread of one that the network was passed.",
    "the returned pixels: in [0, 1] and not normalized",
    lambda method: (
        None
        if issubclass(method.result, Synthesis) and method.spec.input("model")
        else "it generates no image for a model"
    ),
    exemptible=True,
)
def returns_the_pixels_that_were_passed(method: AnyMethod) -> None:
    for network in ("functional", "gap", "shapes-vgg"):
        case = Case(network, count=1, target=0 if method.spec.input("target") else None)
        model = case.model()
        with _record_pixels(model) as passed:
            result = result_of(method, case, model)
        if result is None or not passed:
            continue
        differences = [_difference(pixels, result.images) for pixels in passed]
        shift, spread = min(differences, key=sum)
        assert shift < 0.2 and spread < math.log(3), (
            f"of the images passed to the network, the one nearest to the result differs by {shift:.2f} in "
            f"the mean of a channel, and its standard deviation is 1/{math.exp(spread):.2f} of the result's\n"
            f"on the network {network!r}"
        )
        return
    raise SkipTest("it refused the networks, or passed them no image")


@register_check(
    "method",
    "The history of scores has a value for each step, not an earlier one again.",
    "append the score of the step's own image",
    lambda method: (
        None
        if issubclass(method.result, Synthesis) and method.spec.input("model") and method.spec.input("target")
        else "it generates no image for a target"
    ),
    exemptible=True,
)
def scores_are_of_their_step(method: AnyMethod) -> None:
    for network in ("functional", "gap", "shapes-vgg"):
        case = Case(network, count=1, target=0)
        case = replace(case, params=larger_parameters(method, case, limit=100))
        model = case.model()
        with _record_pixels(model) as passed:
            result = result_of(method, case, model)
        later = next((pixels for pixels in passed if not torch.equal(pixels, passed[0])), None)
        if result is None or later is None or len(result.scores) < 2:
            continue
        first, second = (float(logits_of(model, pixels)[0, 0]) for pixels in (passed[0], later))
        scores = result.scores[:2, 0].tolist()
        assert scores[0] != scores[1] or abs(first - second) < 1e-4, (
            f"the first two scores are {scores[0]:.4g}, of the images of these steps {first:.4g} and "
            f"{second:.4g}\non the network {network!r}"
        )
        return
    raise SkipTest("it refused the networks, or takes one step")


@register_check(
    "method",
    "A stylized image has nothing at the position where the style image has it.",
    "content and style exchanged: correlations are the style's, positions the content's",
    lambda method: (
        None
        if issubclass(method.result, Stylization)
        and method.spec.input("images")
        and any(declared.role == "styles" for declared in method.spec.inputs)
        else "it takes no style images"
    ),
    exemptible=True,
)
def positions_are_those_of_the_content(method: AnyMethod) -> None:
    styles = next(declared.name for declared in method.spec.inputs if declared.role == "styles")
    for network in ("functional", "gap", "shapes-vgg"):
        case = Case(network, "noise", count=1)
        case = replace(case, params=larger_parameters(method, case, limit=300))
        model = case.model()
        inputs = case.inputs(method, model)
        images = inputs[str(getattr(method.spec.input("images"), "name", ""))]
        style = torch.rand(images.shape, generator=torch.Generator().manual_seed(8)).to(images)
        if (result := result_of(method, case, model, **{styles: style})) is None:
            continue
        change = result.stylized - images
        if change.shape != style.shape or not change.any():
            continue
        correlation = float(torch.corrcoef(torch.stack([change.flatten(), style.flatten()]))[0, 1])
        assert correlation < 0.2, (
            f"the change of the image correlates with the style image, pixel by pixel, by {correlation:.2f}"
            f"\non the network {network!r}"
        )
        return


#: Words for numbers that all color channels share.
_SHARED = (
    r"(one|same|common|single) [^.]{0,60}(of|for|to|in|at)( the)?( phases of)? (all|every|each|the)( three)? "
    r"(colou?r )?channels"
    r"|channels? (all )?(share|have the same)"
)


@register_check(
    "method",
    "Of gray images, a method whose text says that channels share its random numbers returns gray images.",
    "draw (N, 1, H, W), which is the same for all channels",
    lambda method: (
        "it returns maps"
        if issubclass(method.result, Attribution)
        else None
        if re.search(_SHARED, prose_in_one_line(method))
        else "its text does not say that the channels share random numbers"
    ),
    exemptible=True,
)
def gray_images_stay_gray_as_documented(method: AnyMethod) -> None:
    case = Case(pictures="noise")
    if method.spec.input("model"):
        raise SkipTest("a network distinguishes the channels")
    model = case.model()
    inputs = case.inputs(method, model)
    gray = {
        name: value.mean(1, keepdim=True).expand_as(value).contiguous()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3
    }
    if not gray or (result := result_of(method, case, model, **gray)) is None:
        raise SkipTest("it takes no color images")
    for name, value in result.fields():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim == 4
            and value.shape[1] == 3
        ):
            difference = float((value - value[:, :1]).abs().max())
            assert difference < 1e-3, f"{name} of gray images has channels that differ by {difference:.3g}"


@contextmanager
def _record_pixels(model: Model) -> Iterator[list[Tensor]]:
    """The images (N, C, H, W) that are passed to a network inside this block, before normalization."""
    passed: list[Tensor] = []
    mean, std = (t[:, None, None] for t in (model.mean, model.std))

    def record(_: Any, args: Any) -> None:
        if args and not recording_structure.get() and args[0].ndim == 4:
            passed.append(args[0].detach() * std.to(args[0]) + mean.to(args[0]))

    handle = model.module.register_forward_pre_hook(record)
    try:
        yield passed
    finally:
        handle.remove()


def _difference(pixels: Tensor, others: Tensor) -> tuple[float, float]:
    """The largest difference of a channel's mean, and the log of how much larger the spread is."""
    one, other = (t.double().transpose(0, 1).flatten(1) for t in (pixels, others))
    shift = float((one.mean(1) - other.mean(1)).abs().max())
    deviations = (float(t.std().clamp(min=1e-3)) for t in (one, other))
    return shift, max(0.0, -math.log(next(deviations) / next(deviations)))
