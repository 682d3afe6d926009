"""Methods that each break one promise, and the check that must fail."""

# The summary of each method is its defect.
import os
import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import Method, ModelError, Reference, method, progress_bar, scores
from phosphene.results import AdversarialExamples, Attribution, Synthesis
from phosphene.roles import Images, Labels, LayerName, Model, Seed, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, PixelRange, SameShape, UnitRange, WithinBall, size

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
