"""Methods that each break one promise, and the check that must fail."""

# The summary of each method is its defect.
import atexit
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import (
    InputError,
    Method,
    ModelError,
    Reference,
    Result,
    batch_size,
    method,
    progress_bar,
    scores,
)
from phosphene.images import min_max
from phosphene.results import (
    AdversarialExamples,
    Attribution,
    FilterBank,
    Panel,
    Synthesis,
    TrainedNetwork,
)
from phosphene.roles import Dataset, Images, Labels, LayerName, Model, Seed, Target
from phosphene.spec import (
    Cost,
    MapPerPixel,
    Nonnegative,
    PixelRange,
    SameShape,
    UnitRange,
    WithinBall,
    length,
    param,
    size,
)

#: (name of the check that must fail, method)
WRONG: list[tuple[str, Method[Any, Any]]] = []

SOURCE = Reference(key="none1900", title="None", authors="None", year=1900, url="https://example.org")
ONE_PASS = Cost(forward=size.images, backward=size.images)


def caught_by(check: str, **spec: Any) -> Callable[[Callable[..., Any]], Method[Any, Any]]:
    def register(function: Callable[..., Any]) -> Method[Any, Any]:
        declared = {
            "family": "wrong", "references": [SOURCE], "needs": ["gradients"], "cost": ONE_PASS,
        } | spec  # fmt: skip
        registered = method(**declared)(function)
        WRONG.append((check, registered))
        return registered

    return register


def gradient(model: Any, images: Tensor, target: Any) -> Tensor:
    """Gradient of the score with respect to the pixels (N, C, H, W)."""
    pixels = images.detach().requires_grad_()
    return torch.autograd.grad(scores(model, pixels, target).sum(), pixels)[0]


def attribution(model: Any, images: Tensor, maps: Tensor, target: Any) -> Attribution:
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassDistances(Result):
    """``distances`` (N,) of the images of a data set to the mean of their classes."""

    distances: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(self.distances.float()[None, None].expand(3, 8, -1), "distances")]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduced(Result):
    """Images (N, C, H, W), the images with less detail, and their predicted classes (N,)."""

    shapes: ClassVar[Mapping[str, str]] = {"images": "N C H W", "reduced": "N C H W", "predicted": "N"}
    per_image: ClassVar[tuple[str, ...]] = ("images", "reduced", "predicted")

    images: Tensor
    reduced: Tensor
    predicted: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image, "reduced")] for image in self.reduced]


# --- the model and the inputs -------------------------------------------------------------------


@caught_by("model_unchanged")
def leaves_a_forward_hook(model: Model, images: Images, target: Target = None) -> Attribution:
    """A forward hook is not removed."""
    next(iter(model.layers.values())).register_forward_hook(lambda *_: None)
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("model_unchanged")
def changes_a_weight(model: Model, images: Images, target: Target = None) -> Attribution:
    """A weight is changed."""
    with torch.no_grad():
        next(model.module.parameters()).add_(1e-3)
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("model_unchanged", cost=Cost(forward=2 * size.images, backward=size.images))
def updates_batch_norm_statistics(model: Model, images: Images, target: Target = None) -> Attribution:
    """Batch norm runs in training mode, which updates its running statistics."""
    for part in model.module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.train()
    with torch.no_grad():
        model(images)
    model.module.eval()
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("model_unchanged")
def patches_forward(model: Model, images: Images, target: Target = None) -> Attribution:
    """The forward method of the first layer is replaced and not restored."""
    layer = next(iter(model.layers.values()))
    original = layer.forward
    layer.forward = lambda *a: original(*a)  # type: ignore[method-assign]
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("clean_after_errors")
def does_not_restore_a_weight_after_an_error(
    model: Model, images: Images, target: Target = None
) -> Attribution:
    """A changed weight is restored after a run, but not after an error."""
    weight = next(model.module.parameters())
    with torch.no_grad():
        original = weight.clone()
        weight.mul_(1.01)
    maps = gradient(model, images, target).abs().amax(1)
    with torch.no_grad():
        weight.copy_(original)
    return attribution(model, images, maps, target)


@caught_by("inputs_unchanged")
def modifies_its_input(model: Model, images: Images, target: Target = None) -> Attribution:
    """The images are scaled in place."""
    maps = gradient(model, images, target).abs().amax(1)
    images.mul_(0.5).add_(0.25)
    return attribution(model, images, maps, target)


@caught_by("model_unchanged")
def sets_class_names(model: Model, images: Images, target: Target = None) -> Attribution:
    """The class names of the model are overwritten."""
    model.classes = tuple(f"class {n}" for n in range(model.class_count))
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


_buffers: dict[Any, Tensor] = {}


@caught_by("results_unchanged_later")
def returns_a_reused_buffer(model: Model, images: Images, target: Target = None) -> Attribution:
    """The maps are a buffer that the next call overwrites."""
    maps = gradient(model, images, target).abs().amax(1)
    buffer = _buffers.setdefault((maps.shape, maps.dtype), torch.empty_like(maps))
    return attribution(model, images, buffer.copy_(maps), target)


@caught_by("results_unchanged_later")
def returns_a_view_of_a_weight(model: Model, images: Images, target: Target = None) -> Synthesis:
    """The scores are a view of a weight, which later training changes."""
    tiles = images.detach() * gradient(model, images, target).sign().abs()
    scale = next(model.module.parameters()).detach().flatten()[:1]
    return Synthesis(images=tiles, scores=scale[None].expand(1, len(tiles)), targets=("tile",) * len(tiles))


@caught_by("target_matters")
def ignores_the_target(model: Model, images: Images, target: Target = None) -> Attribution:
    """The predicted class is always explained."""
    pixels = images.detach().requires_grad_()
    (pixel_gradients,) = torch.autograd.grad(model(pixels).amax(1).sum(), pixels)
    return attribution(model, images, pixel_gradients.abs().amax(1), target)


# --- attacks ------------------------------------------------------------------------------------

ATTACK = {
    "invariants": [
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial"),
        SameShape(field="adversarial"),
    ],
    "cost": Cost(forward=3 * size.images, backward=size.images),
}  # fmt: skip
Eps = Annotated[float, Field(gt=0, le=1, description="radius")]
Norm = Annotated[str, Field(pattern="^linf$", description="norm of the ball")]


def gradient_sign_step(model: Any, images: Tensor, labels: Tensor, eps: float, clip: bool = True) -> Tensor:
    points = images.detach().requires_grad_()
    (pixel_gradients,) = torch.autograd.grad(F.cross_entropy(model(points), labels, reduction="sum"), points)
    perturbed = images + eps * pixel_gradients.sign()
    return perturbed.clamp(0, 1) if clip else perturbed


def adversarial_examples(
    model: Any, images: Tensor, adversarial: Tensor, labels: Tensor
) -> AdversarialExamples:
    with torch.no_grad():
        before, after = model(images), model(adversarial)
    return AdversarialExamples.from_logits(model, images, adversarial, labels, before, after, targeted=False)


@caught_by("within_ball(radius='eps', norm='norm')", **ATTACK)
def exceeds_the_ball(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The step is 0.001 longer than eps."""
    return adversarial_examples(model, images, gradient_sign_step(model, images, labels, eps + 1e-3), labels)


@caught_by("pixel_range(field='adversarial')", **ATTACK)
def exceeds_the_pixel_range(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The pixels are not clipped."""
    return adversarial_examples(
        model, images, gradient_sign_step(model, images, labels, eps, clip=False), labels
    )


@caught_by("honest_success", **ATTACK)
def reports_success_for_every_image(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """Success is True for every image."""
    result = adversarial_examples(model, images, gradient_sign_step(model, images, labels, eps), labels)
    return replace(result, success=torch.ones_like(result.success))


@caught_by("honest_success", **ATTACK)
def evaluates_other_images_than_it_returns(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """Success is evaluated for larger perturbations than those returned."""
    result = adversarial_examples(
        model, images, (images + 4 * (gradient_sign_step(model, images, labels, eps) - images)), labels
    )
    return replace(result, adversarial=gradient_sign_step(model, images, labels, eps / 8))


# --- numbers ------------------------------------------------------------------------------------


@caught_by("finite")
def divides_by_the_standard_deviation(model: Model, images: Images, target: Target = None) -> Attribution:
    """The standard deviation of a constant image is 0."""
    maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps / images.std((1, 2, 3), keepdim=True)[:, 0], target)


@caught_by("finite", invariants=[UnitRange()])
def divides_by_the_maximum(model: Model, images: Images, target: Target = None) -> Attribution:
    """The maximum of an empty map is 0."""
    maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps / maps.amax((1, 2), keepdim=True), target)


@caught_by("declared_result", cost=Cost(forward=size.images, backward=size.images))
def drops_the_last_image(model: Model, images: Images, target: Target = None) -> Attribution:
    """The map of the last of several images is missing."""
    maps = gradient(model, images, target).abs().amax(1)
    keep = max(1, len(images) - 1)
    return replace(attribution(model, images, maps, target), maps=maps[:keep])


@caught_by("map_per_pixel(field='maps')", invariants=[MapPerPixel()])
def crops_odd_sides(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps have even sides only."""
    maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps[:, : maps.shape[1] // 2 * 2, : maps.shape[2] // 2 * 2], target)


@caught_by("nonnegative(field='maps')", invariants=[Nonnegative()])
def returns_signed_maps(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps are declared nonnegative and have signs."""
    return attribution(model, images, gradient(model, images, target).mean(1), target)


@caught_by("declared_result")
def returns_float32(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps are float32 for images of any dtype."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1).float(), target)


@caught_by("declared_result")
def returns_maps_with_a_graph(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps keep their autograd graph."""
    pixels = images.detach().requires_grad_()
    (pixel_gradients,) = torch.autograd.grad(scores(model, pixels, target).sum(), pixels)
    return attribution(model, images, (pixels * pixel_gradients).abs().amax(1), target)


@caught_by("answers")
def assumes_four_axes(
    model: Model, images: Images, target: Target = None, *,
    layer: Annotated[LayerName | None, Field(description="which layer")] = None,
) -> Attribution:  # fmt: skip
    """The output of a layer is indexed as (N, C, H, W), whatever its layout."""
    features = model.features(images, layer or model.last_map)
    maps = features[:, :, 0, 0][:, None, :].abs().detach()
    return attribution(model, images, maps, target)


# --- seeds and batches ----------------------------------------------------------------------------

NoiseCost = Cost(forward=size.images, backward=size.images)


@caught_by("same_seed_same_bits")
def uses_unseeded_noise(model: Model, images: Images, target: Target = None) -> Attribution:
    """The noise is unseeded."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(random.getrandbits(31)))
    noisy = (images + 0.1 * noise.to(images)).clamp(0, 1)
    return attribution(model, images, gradient(model, noisy, target).abs().amax(1), target)


@caught_by("no_side_effects")
def uses_the_global_generator(model: Model, images: Images, target: Target = None) -> Attribution:
    """Noise is drawn from torch's global generator without a declared seed."""
    noisy = (images + 0.1 * torch.rand_like(images)).clamp(0, 1)
    return attribution(model, images, gradient(model, noisy, target).abs().amax(1), target)


@caught_by("seed_matters")
def ignores_its_seed(
    model: Model, images: Images, target: Target = None, *, seed: Seed = None
) -> Attribution:
    """The noise is the same for every seed."""
    noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    noisy = (images + 0.1 * noise).clamp(0, 1)
    return attribution(model, images, gradient(model, noisy, target).abs().amax(1), target)


@caught_by("batch_equals_single")
def scales_by_the_batch_maximum(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps are divided by the maximum over all images."""
    maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps / maps.max().clamp(min=1e-12), target)


@caught_by("batch_equals_single")
def draws_noise_per_batch_row(
    model: Model, images: Images, target: Target = None, *, seed: Seed = None
) -> Attribution:
    """The noise of an image depends on its index in the batch."""
    noisy = (images + 0.1 * torch.rand_like(images)).clamp(0, 1)
    return attribution(model, images, gradient(model, noisy, target).abs().amax(1), target)


# --- work -------------------------------------------------------------------------------------------


@caught_by("within_cost")
def exceeds_the_declared_cost(model: Model, images: Images, target: Target = None) -> Attribution:
    """Two forward passes run where one is declared."""
    with torch.no_grad():
        model(images)
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("within_cost", cost=Cost(forward=size.images))
def omits_the_backward_pass_from_its_cost(model: Model, images: Images, target: Target = None) -> Attribution:
    """No backward pass is declared."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("shows_progress", cost=Cost(forward=60 * size.images, backward=60 * size.images))
def reports_no_progress(model: Model, images: Images, target: Target = None) -> Attribution:
    """Sixty passes run without a progress bar."""
    maps = sum(gradient(model, images, target).abs().amax(1) for _ in range(60))
    return attribution(model, images, maps, target)


@caught_by("clean_after_errors", cost=Cost(forward=3 * size.images, backward=3 * size.images))
def catches_keyboard_interrupts(model: Model, images: Images, target: Target = None) -> Attribution:
    """An interrupted run returns as if it were complete."""
    maps = images.new_zeros(len(images), *images.shape[2:])
    try:
        for _ in progress_bar(range(3), "gradients"):
            maps = maps + gradient(model, images, target).abs().amax(1)
    except KeyboardInterrupt:
        pass
    return attribution(model, images, maps, target)


@caught_by("clean_after_errors")
def catches_all_errors(model: Model, images: Images, target: Target = None) -> Attribution:
    """An error in the model gives a map of zeros."""
    try:
        maps = gradient(model, images, target).abs().amax(1)
    except Exception:
        maps = images.new_zeros(len(images), *images.shape[2:])
    return attribution(model, images, maps, target)


# --- side effects ---------------------------------------------------------------------------------


@caught_by("no_side_effects")
def writes_to_the_working_directory(model: Model, images: Images, target: Target = None) -> Attribution:
    """A cache file is written to the working directory."""
    Path("cache.txt").write_text("cache")
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_a_temporary_file(model: Model, images: Images, target: Target = None) -> Attribution:
    """A temporary file is not removed."""
    handle, _ = tempfile.mkstemp()
    os.close(handle)
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


_open_files: list[Any] = []


@caught_by("no_side_effects")
def leaves_a_file_open(model: Model, images: Images, target: Target = None) -> Attribution:
    """A file is opened and not closed."""
    _open_files.append(Path(__file__).open())  # noqa: SIM115
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_a_thread_running(model: Model, images: Images, target: Target = None) -> Attribution:
    """A thread outlives the call."""
    threading.Thread(target=threading.Event().wait, args=(0.5,)).start()
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_anomaly_detection_on(model: Model, images: Images, target: Target = None) -> Attribution:
    """Anomaly detection stays on."""
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_cudnn_benchmark_on(model: Model, images: Images, target: Target = None) -> Attribution:
    """``torch.backends.cudnn.benchmark`` stays on."""
    torch.backends.cudnn.benchmark = True
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_leak")
def starts_a_daemon_thread_per_call(model: Model, images: Images, target: Target = None) -> Attribution:
    """Each call starts a daemon thread."""
    threading.Thread(target=threading.Event().wait, args=(5,), daemon=True).start()
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("batch_equals_single")
def scales_transformers_by_the_batch_maximum(
    model: Model, images: Images, target: Target = None
) -> Attribution:
    """Only transformers are accepted, and their maps depend on the batch."""
    if not hasattr(model.module, "class_token"):
        raise ModelError(f"{model.name} has no class token, which this method needs; use a transformer")
    maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps / maps.max().clamp(min=1e-12), target)


@caught_by("no_side_effects")
def prints_to_standard_output(model: Model, images: Images, target: Target = None) -> Attribution:
    """A line is printed."""
    print("working ...")
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


_stored_results: list[Tensor] = []


@caught_by("no_leak")
def stores_every_result(model: Model, images: Images, target: Target = None) -> Attribution:
    """Every map is stored in a global list."""
    _stored_results.append(gradient(model, images, target).abs().amax(1))
    return attribution(model, images, _stored_results[-1].clone(), target)


_shared_maps: dict[str, Tensor] = {}


@caught_by("concurrent_runs_equal", cost=Cost(forward=2 * size.images, backward=2 * size.images))
def shares_a_global_between_runs(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps are summed in a global dictionary, which concurrent runs overwrite."""
    _shared_maps["maps"] = images.new_zeros(len(images), *images.shape[2:])
    for _ in range(2):
        pixel_gradients = gradient(model, images, target).abs().amax(1)
        _shared_maps["maps"] = _shared_maps["maps"] + pixel_gradients
        threading.Event().wait(0.02)
    return attribution(model, images, _shared_maps["maps"], target)


# --- declarations -----------------------------------------------------------------------------


def _wrong_oracle() -> None:
    assert 1 + 1 == 3, "1 + 1 is 2"


@caught_by("oracle", oracle=_wrong_oracle)
def contradicts_its_oracle(model: Model, images: Images, target: Target = None) -> Attribution:
    """The oracle fails."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("documented")
def has_an_undocumented_parameter(
    model: Model, images: Images, target: Target = None, *, power: int = 1
) -> Attribution:
    """A parameter has no description."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1) ** power, target)


@caught_by("valid_defaults")
def has_a_default_out_of_bounds(
    model: Model, images: Images, target: Target = None, *,
    power: Annotated[int, Field(ge=1, description="exponent")] = 0,
) -> Attribution:  # fmt: skip
    """A default is outside its declared bounds."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1) ** power, target)


@caught_by("valid_defaults", cost=Cost(forward=size.images * length(param.layers), backward=size.images))
def has_no_cost_by_default(
    model: Model, images: Images, target: Target = None, *,
    layers: Annotated[list[LayerName] | None, Field(description="layers to read; default: none")] = None,
) -> Attribution:  # fmt: skip
    """The cost cannot be evaluated for the default parameters: None has no length."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("refuses_bad_parameters")
def accepts_invalid_parameters(
    model: Model, images: Images, target: Target = None, *,
    layer: Annotated[LayerName | None, Field(description="which layer")] = None,
    power: Annotated[Any, Field(description="exponent", json_schema_extra={"type": "number"})] = 1.0,
) -> Attribution:  # fmt: skip
    """A parameter declared as a number accepts text."""
    maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps if isinstance(power, str) else maps ** float(power), target)


@caught_by("answers", cost=None)
def refuses_without_a_reason(model: Model, images: Images, target: Target = None) -> Attribution:
    """Every image is refused with an empty message."""
    from phosphene import InputError

    raise InputError("no")


@caught_by("answers")
def refuses_every_input(model: Model, images: Images, target: Target = None) -> Attribution:
    """Every image is refused."""
    from phosphene import InputError

    raise InputError("this method accepts no images, of any size or kind")


@caught_by("figure_not_blank")
def returns_blank_images(model: Model, images: Images, target: Target = None) -> Synthesis:
    """Every image is grey."""
    grey = torch.full_like(images, 0.5)
    return Synthesis(images=grey, scores=grey.new_zeros(1, len(grey)), targets=("grey",) * len(grey))


class ReversedRows(Attribution):
    """The rows of some images are those of others."""

    def select(self, rows: Sequence[int]) -> "ReversedRows":
        return super().select([len(self.maps) - 1 - row for row in rows])


@caught_by("streams_equal_the_call")
def selects_other_rows(model: Model, images: Images, target: Target = None) -> ReversedRows:
    """The result of one image is that of another."""
    result = attribution(model, images, gradient(model, images, target).abs().amax(1), target)
    return ReversedRows(images=result.images, maps=result.maps, targets=result.targets)


# --- the arithmetic of attributions ------------------------------------------------------------------

Power = Annotated[float, Field(gt=0, le=4, description="exponent")]
Layer = Annotated[LayerName | None, Field(description="which layer (default: the last feature map)")]


def cam_maps(model: Any, images: Tensor, target: Any, layer: str) -> Tensor:
    """Grad-CAM (N, h, w) before its ReLU."""
    with model.tap(layer) as tap:
        total = scores(model, images.detach().requires_grad_(), target).sum()
        features = tap[layer]
    (gradients,) = torch.autograd.grad(total, features)
    return (gradients.mean((2, 3), keepdim=True) * features).sum(1).detach()


@caught_by("explains_the_target")
def transposes_its_maps(model: Model, images: Images, target: Target = None) -> Attribution:
    """Height and width of the maps are exchanged."""
    maps = gradient(model, images, target).abs().amax(1).transpose(1, 2)
    return attribution(model, images, maps.reshape(len(images), *images.shape[2:]), target)


@caught_by("explains_the_target")
def mirrors_its_maps(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps are mirrored."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1).flip(-1), target)


@caught_by("explains_the_target")
def shifts_its_maps(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps are four pixels too low."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1).roll(4, 1), target)


@caught_by("explains_the_target")
def negates_its_maps(model: Model, images: Images, target: Target = None) -> Attribution:
    """Evidence has the wrong sign."""
    return attribution(model, images, -(gradient(model, images, target) * images).sum(1), target)


@caught_by("explains_the_target")
def explains_the_next_class(model: Model, images: Images, target: Target = None) -> Attribution:
    """The class after the named one is explained."""
    pixels = images.detach().requires_grad_()
    logits = model(pixels)
    index = torch.as_tensor(getattr(target, "index", 0), device=images.device).expand(len(images))
    chosen = logits.roll(-1, 1).gather(1, (index % logits.shape[1])[:, None])
    (pixel_gradients,) = torch.autograd.grad(chosen.sum(), pixels)
    return attribution(model, images, pixel_gradients.abs().amax(1), target)


@caught_by("explains_the_target")
def explains_the_first_target_everywhere(model: Model, images: Images, target: Target = None) -> Attribution:
    """Of several targets, one for each image, the first is explained in all images."""
    pixels = images.detach().requires_grad_()
    index = getattr(target, "index", None)
    chosen = index[0] if isinstance(index, tuple) else index
    logits = model(pixels)
    total = logits.amax(1).sum() if chosen is None else logits[:, chosen].sum()
    (pixel_gradients,) = torch.autograd.grad(total, pixels)
    return attribution(model, images, pixel_gradients.abs().amax(1), target)


@caught_by("weights_matter", cost=Cost(forward=size.images))
def returns_the_brightness(model: Model, images: Images) -> Attribution:
    """The model is run, and its output is not used."""
    with torch.no_grad():
        model(images)
    return Attribution(images=images, maps=images.mean(1), targets=("all",) * len(images))


@caught_by("weights_matter", cost=Cost(forward=0))
def marks_the_center(model: Model, images: Images) -> Attribution:
    """Every map is a Gaussian at the center, with the brightness as a faint texture."""
    height, width = images.shape[2:]
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    bump = torch.exp(-(rows[:, None] ** 2) - columns**2).to(images)
    return Attribution(images=images, maps=bump + 0.01 * images.mean(1), targets=("all",) * len(images))


@caught_by("images_matter", cost=Cost(forward=size.images, backward=size.images))
def explains_a_grey_image(model: Model, images: Images, target: Target = None) -> Attribution:
    """The gradient is taken at a grey image."""
    maps = gradient(model, torch.full_like(images, 0.5), target).abs().amax(1)
    return attribution(model, images, maps, target)


@caught_by("values_lie_in_the_documented_range")
def forgets_the_norm_of_a_cosine(model: Model, images: Images, target: Target = None) -> Attribution:
    """The cosine is not divided by the gradient's norm.

    Returns:
        Attribution with ``maps`` (N, H, W) in [-1, 1].
    """
    maps = (200 * gradient(model, images, target) * images).sum(1) / images.norm(dim=1).clamp(min=1e-6)
    return attribution(model, images, maps, target)


@dataclass(frozen=True, eq=False, kw_only=True)
class Areas(Result):
    images: Tensor
    areas: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image)] for image in self.images]


@caught_by(
    "areas_of_a_constant_score_are_that_score", family="scores", cost=Cost(forward=5 * size.images), needs=[]
)
def divides_five_points_by_four(model: Model, images: Images, target: Target = None) -> Areas:
    """The area under the score of a darker and darker image: the mean of five points, of which four count."""
    curve = torch.stack([scores(model, images * level, target) for level in (1, 0.75, 0.5, 0.25, 0)])
    return Areas(images=images, areas=curve.sum(0) / 4)


@caught_by("tiles_are_in_the_order_of_the_weights", needs=[], cost=Cost())
def sorts_only_the_tiles(model: Model) -> FilterBank:
    """Filters in the order of their norms; the weights are in another one."""
    layer = next(n for n, part in model.layers.items() if isinstance(part, torch.nn.Conv2d))
    weights = model.layers[layer].weight.detach().clone()
    gray = weights.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    order = weights.flatten(1).norm(dim=1).argsort(descending=True)
    return FilterBank(
        layer=layer, weights=weights, tiles=min_max(gray, (1, 2, 3))[order], captions=("",) * len(order)
    )


@caught_by("maximizes_the_logit_as_documented", cost=Cost(forward=5, backward=5))
def ascends_the_log_probability(model: Model, target: Target = None) -> Synthesis:
    """An image of a larger and larger logit of a class."""
    image = torch.full((1, *model.input_size), 0.5, dtype=model.dtype)
    for _ in range(5):
        pixels = image.requires_grad_()
        value = target.score(model(pixels).log_softmax(1)).sum()
        (slope,) = torch.autograd.grad(value, pixels)
        image = (pixels + slope / slope.norm().clamp(min=1e-12)).clamp(0, 1).detach()
    return Synthesis(images=image, scores=image.new_zeros(1, 1), targets=("image",))


@caught_by("parameters_matter")
def ignores_its_power(
    model: Model, images: Images, target: Target = None, *, power: Power = 2.0
) -> Attribution:
    """The exponent is not applied."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("parameters_matter", quick={"samples": 2},
           cost=Cost(forward=size.images * param.samples, backward=size.images * param.samples))  # fmt: skip
def ignores_its_noise_level(
    model: Model, images: Images, target: Target = None, *,
    samples: Annotated[int, Field(ge=1, le=100, description="number of noisy copies")] = 10,
    sigma: Annotated[float, Field(ge=0, le=1, description="standard deviation of the noise")] = 0.1,
    seed: Seed = None,
) -> Attribution:  # fmt: skip
    """The standard deviation is a constant."""
    total = torch.zeros_like(images)
    for _ in progress_bar(range(samples), "noisy copies"):
        total += gradient(model, images + 0.1 * torch.randn_like(images[:1]), target)
    return attribution(model, images, (total / samples).abs().amax(1), target)


@caught_by("choices_differ(reduce)")
def compares_a_choice_with_another_word(
    model: Model, images: Images, target: Target = None, *,
    reduce: Annotated[Literal["max", "mean", "norm"], Field(description="statistic of the channels")] = "max",
) -> Attribution:  # fmt: skip
    """The choice "norm" is compared with "l2", and falls through to the mean."""
    magnitude = gradient(model, images, target).abs()
    maps = magnitude.norm(dim=1) if reduce == "l2" else magnitude.mean(1)  # type: ignore[comparison-overlap]
    return attribution(model, images, magnitude.amax(1) if reduce == "max" else maps, target)


@caught_by("reads_the_named_layer")
def reads_the_input_of_the_layer(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """Of the named layer the input is read."""
    maps = model.maps(model.input_of(images, layer or model.last_map), images).mean(1).detach()
    return attribution(model, images, maps, target)


@caught_by("reads_the_named_layer", cost=Cost(forward=size.images))
def reads_the_last_map_always(model: Model, images: Images, *, layer: Layer = None) -> Attribution:
    """The last feature map is read, whatever layer is named."""
    assert layer is None or layer in model.layers
    maps = model.maps(model.features(images, model.last_map), images).mean(1)
    return Attribution(images=images, maps=maps.detach(), targets=("mean",) * len(images))


@caught_by("reads_the_named_layer", needs=["gradients"])
def grad_cam_of_the_layer_before(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """Grad-CAM of the layer before the named one."""
    names = [name for name, info in model.structure.layers.items() if info.shape and len(info.shape) == 3]
    name = layer or model.last_map
    position = names.index(name) if name in names else 1
    maps = cam_maps(model, images, target, names[max(0, position - 1)])
    return attribution(model, images, maps.relu(), target)


_by_name: dict[Any, Tensor] = {}


@caught_by("results_are_not_stale")
def caches_by_identity(model: Model, images: Images, target: Target = None) -> Attribution:
    """Maps are cached by the identity of the network and the shape of the images."""
    key = (id(model.module), tuple(images.shape), target.names(model, len(images)))
    if key not in _by_name:
        _by_name[key] = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, _by_name[key].clone(), target)


# --- the arithmetic of attacks ------------------------------------------------------------------------


@caught_by("attack_moves_the_loss", **ATTACK)
def descends_the_loss(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The step lowers the loss of the label."""
    step = gradient_sign_step(model, images, labels, eps) - images
    return adversarial_examples(model, images, (images - step).clamp(0, 1), labels)


@caught_by("attack_succeeds", **ATTACK)
def returns_the_images(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The perturbation is computed and not added."""
    gradient_sign_step(model, images, labels, eps)
    return adversarial_examples(model, images, images.clone(), labels)


@caught_by("uses_its_radius", **ATTACK)
def divides_eps_by_255(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The radius, in pixels of [0, 1], is divided by 255 once more."""
    return adversarial_examples(model, images, gradient_sign_step(model, images, labels, eps / 255), labels)


@caught_by("labels_matter", **ATTACK)
def attacks_the_prediction(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The loss is that of the predicted classes, not of the labels."""
    with torch.no_grad():
        predicted = model(images).argmax(1)
    return adversarial_examples(model, images, gradient_sign_step(model, images, predicted, eps), labels)


@caught_by("honest_before", **ATTACK)
def reports_the_labels_as_predictions(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The classes before the attack are the labels."""
    result = adversarial_examples(model, images, gradient_sign_step(model, images, labels, eps), labels)
    return replace(result, before=labels.clone())


@caught_by("probabilities_are_reported", **ATTACK)
def hides_that_outputs_are_probabilities(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The result has the outputs' activation of a network that returns logits."""
    result = adversarial_examples(model, images, gradient_sign_step(model, images, labels, eps), labels)
    return replace(result, output_activation="")


@caught_by("larger_eps_perturbs_more", **ATTACK)
def perturbs_less_with_a_larger_radius(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The step is inversely proportional to eps."""
    step = min(eps, 1e-4 / eps)
    return adversarial_examples(model, images, gradient_sign_step(model, images, labels, step), labels)


@caught_by(
    "parameters_matter", **(ATTACK | {"cost": Cost(forward=4 * size.images, backward=2 * size.images)})
)
def takes_one_step_for_any_number(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf",
    steps: Annotated[int, Field(ge=1, le=100, description="number of steps")] = 10,
) -> AdversarialExamples:  # fmt: skip
    """Every step starts at the image, so that all steps are the same."""
    adversarial = images
    for _ in range(min(steps, 2)):
        adversarial = gradient_sign_step(model, images, labels, eps)
    return adversarial_examples(model, images, adversarial, labels)


@caught_by("pixels_in_range", **(ATTACK | {"cost": Cost(forward=4 * size.images, backward=2 * size.images)}))
def leaves_the_pixel_range_between_steps(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """The second gradient is taken outside of [0, 1]."""
    first = gradient_sign_step(model, images, labels, 5 * eps, clip=False)
    second = gradient_sign_step(model, first, labels, eps) - first
    perturbed = (images + second.clamp(-eps, eps)).clamp(0, 1)
    return adversarial_examples(model, images, perturbed, labels)


# --- batches, cost, precision -------------------------------------------------------------------------


@caught_by("within_the_batch_size", quick={"samples": 4},
           cost=Cost(forward=size.images * param.samples, backward=size.images * param.samples))  # fmt: skip
def passes_all_copies_at_once(
    model: Model, images: Images, target: Target = None, *,
    samples: Annotated[int, Field(ge=1, le=100, description="number of scaled copies")] = 10,
) -> Attribution:  # fmt: skip
    """All scaled copies of the images are one batch."""
    scales = torch.linspace(0.5, 1, samples).to(images)
    copies = (scales[:, None, None, None, None] * images).flatten(0, 1).requires_grad_()
    logits = model(copies)
    index = getattr(target, "index", None) or 0
    chosen = torch.as_tensor(index, device=images.device).expand(len(images)).repeat(samples)
    (gradients,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), copies)
    maps = gradients.unflatten(0, (samples, len(images))).mean(0).abs().amax(1)
    return attribution(model, images, maps, target)


@caught_by("within_the_batch_size", needs=["dataset"], cost=Cost(forward=size.dataset))
def embeds_a_data_set_at_once(model: Model, dataset: Dataset) -> Synthesis:
    """A data set is one batch."""
    (batch,) = dataset.batches(len(dataset))
    scores = model(batch.images.to(model.device, model.dtype)).amax(1)
    mean = batch.images.to(model.dtype).mean(0, keepdim=True)
    return Synthesis(images=mean, scores=scores.mean()[None, None], targets=("mean",))


@caught_by("independent_of_the_dataset_order", needs=["dataset"], cost=None)
def codes_classes_by_their_first_image(dataset: Dataset) -> ClassDistances:
    """The rows of the class means are sorted by name, the codes of the images by first appearance."""
    means = torch.cat([batch.images.double().mean((2, 3)) for batch in dataset.batches(4)])
    labels = dataset.labels(range(len(dataset)))
    if labels is None:
        raise InputError("the data set has no classes")
    names = list(dict.fromkeys(labels))
    rows = ([n for n, label in enumerate(labels) if label == name] for name in sorted(names))
    centers = torch.stack([means[row].mean(0) for row in rows])
    codes = [names.index(label) for label in labels]
    return ClassDistances(distances=(means - centers[codes]).norm(dim=1))


@caught_by("batches_are_joined", needs=["dataset"], cost=Cost(forward=size.dataset))
def averages_the_means_of_batches(model: Model, dataset: Dataset) -> Synthesis:
    """The mean of a data set is the mean of its batches' means, whatever their sizes."""
    means, confidence = [], []
    for batch in dataset.batches(batch_size(model)):
        images = batch.images.to(model.device, model.dtype)
        confidence.append(model(images).softmax(1).amax(1).mean())
        means.append(images.mean(0))
    mean = torch.stack(means).mean(0, keepdim=True)
    return Synthesis(images=mean, scores=torch.stack(confidence).mean()[None, None], targets=("mean",))


@caught_by("batches_are_joined", needs=["dataset"], cost=Cost(forward=size.dataset))
def returns_indices_within_the_batch(model: Model, dataset: Dataset) -> Synthesis:
    """The image of the largest logit is looked up by its index in the batch."""
    best, index, first = -float("inf"), 0, None
    for batch in dataset.batches(batch_size(model)):
        images = batch.images.to(model.device, model.dtype)
        first = images if first is None else first
        top = model(images).amax(1)
        if float(top.max()) > best:
            best, index = float(top.max()), int(top.argmax())
    assert first is not None
    scores = first.new_full((1, 1), best)
    return Synthesis(images=first[index : index + 1].clone(), scores=scores, targets=("largest",))


@caught_by("transformed_images_flip", needs=[], cost=Cost(forward=size.images))
def keeps_every_second_pixel(model: Model, images: Images) -> Reduced:
    """Every second pixel is enlarged by two, half a pixel off the center of its cell."""
    reduced = F.interpolate(images[:, :, ::2, ::2], images.shape[2:], mode="bilinear")
    with torch.no_grad():
        return Reduced(images=images, reduced=reduced, predicted=model(reduced).argmax(1))


@caught_by("images_are_not_shifted", needs=[], cost=Cost(forward=size.images))
def averages_pixels_to_the_right(model: Model, images: Images) -> Reduced:
    """Each pixel is averaged with the one on its right: the image is shifted by half a pixel."""
    reduced = (images + images.roll(-1, 3)) / 2
    with torch.no_grad():
        return Reduced(images=images, reduced=reduced, predicted=model(reduced).argmax(1))


@caught_by("cost_is_near_the_work", cost=Cost(forward=100 * size.images, backward=100 * size.images))
def declares_a_hundred_passes(model: Model, images: Images, target: Target = None) -> Attribution:
    """A hundred times the real cost is declared."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("half_precision")
def underflows_in_half_precision(model: Model, images: Images, target: Target = None) -> Attribution:
    """Squares of gradients are divided by the smallest of them, which half precision rounds to 0."""
    maps = gradient(model, images, target).abs().amax(1) * 1e-3
    squares = maps * maps
    return attribution(model, images, squares / squares.amax((1, 2), keepdim=True), target)


@caught_by("same_in_another_process", cost=Cost(forward=size.images, backward=size.images))
def weights_maps_by_a_hash(model: Model, images: Images, target: Target = None) -> Attribution:
    """A weight is drawn with a seed that is the hash of a name."""
    number = 1 + abs(hash(model.name)) % 1000
    return attribution(model, images, gradient(model, images, target).abs().amax(1) * number, target)


_FIRST_MEANS: dict[Any, Tensor] = {}


@caught_by("same_in_another_process", cost=Cost(forward=size.images, backward=size.images))
def subtracts_the_mean_of_an_earlier_call(
    model: Model, images: Images, dataset: Dataset, target: Target = None
) -> Attribution:
    """The mean of a data set is stored by the shape of its images."""
    if images.shape[1:] not in _FIRST_MEANS:
        _FIRST_MEANS[images.shape[1:]] = dataset.read(range(len(dataset))).mean(0)
    maps = (gradient(model, images, target) * (images - _FIRST_MEANS[images.shape[1:]])).sum(1)
    return attribution(model, images, maps, target)


@caught_by("finite_pixels", cost=Cost(forward=2 * size.images, backward=size.images))
def probes_with_infinite_pixels(model: Model, images: Images, target: Target = None) -> Attribution:
    """The network is run on images divided by zero."""
    with torch.no_grad():
        model(images / (images - images))
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("large_images")
def allows_at_most_256_pixels(model: Model, images: Images, target: Target = None) -> Attribution:
    """Rows are numbered by a table of 256."""
    rows = torch.arange(256)[: images.shape[2]].to(images) * 0 + 1
    maps = gradient(model, images, target).abs().amax(1) * rows[:, None]
    return attribution(model, images, maps, target)


@caught_by("counts_may_be_too_large", cost=Cost(forward=size.images))
def takes_the_k_largest_channels(
    model: Model, images: Images, *,
    k: Annotated[int, Field(ge=1, le=1000, description="number of channels")] = 2,
) -> Attribution:  # fmt: skip
    """More channels than the layer has are an error of torch."""
    features = model.maps(model.features(images, model.last_map), images).detach()
    maps = features.topk(k, 1).values.mean(1)
    return Attribution(images=images, maps=maps, targets=("mean",) * len(images))


# --- training -----------------------------------------------------------------------------------------


def _linear(features: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features, 1))


Steps = Annotated[int, Field(ge=1, le=500, description="number of steps")]
TRAINING = {
    "needs": ["training"],
    "network": _linear,
    "batch_independent": False,
    "quick": {"steps": 3},
    "cost": None,
}  # fmt: skip


def train_brightness(dataset: Any, steps: int, sign: float, update: bool, name: str) -> TrainedNetwork:
    """A linear regression of the brightness of images."""
    (batch,) = dataset.batches(len(dataset))
    images = batch.images.float()
    network = _linear(images[0].numel())
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            loss = (network(images)[:, 0] - images.mean((1, 2, 3))).square().mean()
            optimizer.zero_grad()
            (sign * loss).backward()
            if update:
                optimizer.step()
            losses.append(loss.detach())
    network.requires_grad_(False)
    return TrainedNetwork(
        network=network.eval(), method=name, config={"features": images[0].numel()},
        losses=torch.stack(losses), labels=("brightness",), previews=images[:1],
    )  # fmt: skip


@caught_by("training_lowers_the_loss", **TRAINING)
def trains_uphill(dataset: Dataset, *, steps: Steps = 40, seed: Seed = None) -> TrainedNetwork:
    """The loss is maximized."""
    return train_brightness(dataset, steps, -1.0, True, "wrong.trains_uphill")


@caught_by("training_lowers_the_loss", **TRAINING)
def never_updates_its_weights(dataset: Dataset, *, steps: Steps = 40, seed: Seed = None) -> TrainedNetwork:
    """The optimizer takes no step."""
    return train_brightness(dataset, steps, 1.0, False, "wrong.never_updates_its_weights")


# --- leaks ----------------------------------------------------------------------------------------------


def leak(change: Callable[[Any], Any], summary: str, name: str, check: str = "no_side_effects") -> None:
    """Register a gradient that changes something of the process or of the model."""

    def function(model: Model, images: Images, target: Target = None) -> Attribution:
        change(model)
        return attribution(model, images, gradient(model, images, target).abs().amax(1), target)

    function.__name__, function.__doc__ = name, summary
    globals()[name] = caught_by(check)(function)


def _write_home(model: Any) -> None:
    (Path.home() / ".attribution").write_text("cache")


def _write_elsewhere(model: Any) -> None:
    Path(__file__).with_name(".attribution_cache").write_text("cache")
    Path(__file__).with_name(".attribution_cache").unlink()


def _open_figure(model: Any) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.figure()


def _patch_relu(model: Any) -> None:
    original = F.relu
    F.relu = lambda *a, **k: original(*a, **k)


def _set_signal_handler(model: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda *_: None)


def _count_calls(model: Any) -> None:
    model.module.counter = object()


def _change_rc_params(model: Any) -> None:
    import matplotlib

    matplotlib.rcParams["font.size"] = matplotlib.rcParams["font.size"] + 1


def _flip_matmul_precision(model: Any) -> None:
    current = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if current == "highest" else "highest")


leak(lambda model: setattr(torch.backends.cudnn, "deterministic", True),
     "cuDNN stays deterministic.", "leaves_cudnn_deterministic")  # fmt: skip
leak(_flip_matmul_precision, "The precision of matrix products is changed.", "changes_the_matmul_precision")
leak(lambda model: torch.set_flush_denormal(True), "Denormal numbers stay 0.", "flushes_denormals")
leak(lambda model: warnings.simplefilter("ignore", FutureWarning),
     "A warning filter is added.", "adds_a_warning_filter")  # fmt: skip
leak(lambda model: logging.getLogger().addHandler(logging.NullHandler()),
     "A handler is added to the root logger.", "adds_a_logging_handler")  # fmt: skip
leak(_patch_relu, "F.relu is replaced.", "replaces_relu")
leak(lambda model: sys.path.append("/nowhere"), "sys.path is extended.", "extends_the_path")
leak(_open_figure, "A figure of pyplot stays open.", "leaves_a_figure_open")
leak(_change_rc_params, "matplotlib's font size is changed.", "changes_the_font_size")
leak(lambda model: gc.disable(), "Garbage collection is off afterwards.", "disables_garbage_collection")
leak(
    lambda model: atexit.register(print),
    "A function is registered with atexit.",
    "registers_an_exit_function",
)
leak(_write_home, "A file is written to the home directory.", "writes_to_the_home_directory")
leak(_write_elsewhere, "A file is written beside the source and removed.", "writes_beside_its_source")
leak(lambda model: subprocess.run(["true"], check=False), "A process is started.", "starts_a_process")
leak(_set_signal_handler, "A signal handler is installed.", "installs_a_signal_handler")
leak(lambda model: sys.setrecursionlimit(sys.getrecursionlimit() + 1),
     "The recursion limit is raised.", "raises_the_recursion_limit")  # fmt: skip
leak(lambda model: setattr(model, "last_gradient", 1), "An attribute is added to the model.",
     "adds_an_attribute_to_the_model", "model_unchanged")  # fmt: skip
leak(_count_calls, "An attribute is added to the network.", "adds_an_attribute_to_the_network",
     "model_unchanged")  # fmt: skip


def _oracle_that_changes_a_setting() -> None:
    torch.backends.cudnn.deterministic = True


@caught_by("oracle_has_no_side_effects", oracle=_oracle_that_changes_a_setting)
def changes_a_setting_in_its_oracle(model: Model, images: Images, target: Target = None) -> Attribution:
    """The oracle changes a setting."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


# --- pixels, channels, samples, radii, generated classes ---------------------------------------------


@caught_by("explains_pixels")
def multiplies_by_normalized_pixels(model: Model, images: Images, target: Target = None) -> Attribution:
    """The gradient is multiplied by the normalized pixels."""
    products = model.normalize(images) * gradient(model, images, target)
    return attribution(model, images, products.sum(1), target)


@caught_by("independent_of_the_channel_order")
def reads_the_first_channel(model: Model, images: Images, target: Target = None) -> Attribution:
    """Only the gradient of the first color counts."""
    return attribution(model, images, gradient(model, images, target).abs()[:, 0], target)


@caught_by("equivariant")
def shifts_by_one_pixel(model: Model, images: Images, target: Target = None) -> Attribution:
    """The map is shifted by one pixel."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1).roll(1, -1), target)


@caught_by("lies_where_the_units_are_centered", cost=Cost(forward=size.images))
def enlarges_cells_as_shares_of_the_image(model: Model, images: Images) -> Attribution:
    """The result does not have the centers of the layer's units."""
    maps = model.maps(model.features(images, model.last_map), images).relu().sum(1)
    return Attribution(images=images, maps=maps, targets=("all",) * len(images))


@caught_by("samples_reduce_the_noise", quick={"samples": 3},
           cost=Cost(forward=size.images * param.samples, backward=size.images * param.samples))  # fmt: skip
def returns_the_last_sample(
    model: Model, images: Images, target: Target = None, *,
    samples: Annotated[int, Field(ge=1, le=1000, description="number of noisy copies")] = 20,
    seed: Seed = None,
) -> Attribution:  # fmt: skip
    """The last noisy copy's gradient is returned, not the mean."""
    maps = images[:, 0]
    for _ in progress_bar(range(samples), "noisy copies"):
        noise = 0.1 * torch.randn(1, *images.shape[1:]).to(images)
        maps = gradient(model, images + noise, target).abs().amax(1)
    return attribution(model, images, maps, target)


@caught_by("stays_within_its_radius", quick={"steps": 2}, cost=None)
def steps_out_of_the_ball(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255,
    steps: Annotated[int, Field(ge=1, le=100, description="number of steps")] = 10,
) -> AdversarialExamples:  # fmt: skip
    """The steps are clipped to [0, 1] and not projected onto the ball."""
    adversarial = images
    for _ in progress_bar(range(steps), "steps"):
        adversarial = gradient_sign_step(model, adversarial, labels, 0.01)
    return adversarial_examples(model, images, adversarial, labels)


@caught_by("maximizes_the_target", needs=["gradients"], quick={"steps": 8}, cost=None)
def maximizes_the_negative(
    model: Model, target: Target, *,
    steps: Annotated[int, Field(ge=1, le=100, description="number of steps")] = 10,
) -> Synthesis:  # fmt: skip
    """The score is minimized."""
    images = torch.full((1, *model.input_size), 0.5, dtype=model.dtype)
    for _ in progress_bar(range(steps), "steps"):
        images = (images - 0.02 * gradient(model, images, target).sign()).clamp(0, 1)
    with torch.no_grad():
        values = scores(model, images, target)[None]
    return Synthesis(images=images, scores=values, targets=target.names(model, 1))


@caught_by("counts_its_queries", **(ATTACK | {"cost": Cost(forward=12 * size.images, backward=size.images)}))
def counts_one_query(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """Of ten queries one is counted."""
    adversarial = gradient_sign_step(model, images, labels, eps)
    with torch.no_grad():
        for _ in range(9):
            model(adversarial)
    result = adversarial_examples(model, images, adversarial, labels)
    return replace(result, queries=torch.ones_like(result.labels))
