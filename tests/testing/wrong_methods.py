"""Methods that each break one promise, and the check that should notice."""

# The functions are read by @method, not by people: their summaries say what is wrong with them.
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

#: name of the check -> the methods that it should catch
WRONG: list[tuple[str, Method[Any, Any]]] = []

SOURCE = Reference(key="nobody1900", title="Nothing", authors="Nobody", year=1900, url="https://example.org")
ONE_PASS = Cost(forward=size.images, backward=size.images)


def caught_by(check: str, **spec: Any) -> Callable[[Callable[..., Any]], Method[Any, Any]]:
    def register(function: Callable[..., Any]) -> Method[Any, Any]:
        declared = {
            "family": "wrong", "references": [SOURCE], "needs": ["gradients"], "cost": ONE_PASS,
        } | spec  # fmt: skip
        made = method(**declared)(function)
        WRONG.append((check, made))
        return made

    return register


def gradient(model: Any, images: Tensor, target: Any) -> Tensor:
    """d score / d pixel, (N, C, H, W)."""
    pixels = images.detach().requires_grad_()
    return torch.autograd.grad(scores(model, pixels, target).sum(), pixels)[0]


def pictured(model: Any, images: Tensor, maps: Tensor, target: Any) -> Attribution:
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")


# --- the model and the inputs -------------------------------------------------------------------


@caught_by("model_unchanged")
def leaks_a_hook(model: Model, images: Images, target: Target = None) -> Attribution:
    """Leave a hook behind."""
    next(iter(model.layers.values())).register_forward_hook(lambda *_: None)
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("model_unchanged")
def trains_the_model(model: Model, images: Images, target: Target = None) -> Attribution:
    """Move a weight."""
    with torch.no_grad():
        next(model.module.parameters()).add_(1e-3)
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("model_unchanged", cost=Cost(forward=2 * size.images, backward=size.images))
def moves_batch_statistics(model: Model, images: Images, target: Target = None) -> Attribution:
    """Put batch norm into train mode, run, and put it back."""
    for part in model.module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.train()
    with torch.no_grad():
        model(images)
    model.module.eval()
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("model_unchanged")
def replaces_forward(model: Model, images: Images, target: Target = None) -> Attribution:
    """Patch the first layer's forward and forget it there."""
    layer = next(iter(model.layers.values()))
    original = layer.forward
    layer.forward = lambda *a: original(*a)  # type: ignore[method-assign]
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("clean_after_errors")
def restores_too_late(model: Model, images: Images, target: Target = None) -> Attribution:
    """Change a weight for the run and restore it, but not when the run breaks."""
    weight = next(model.module.parameters())
    with torch.no_grad():
        kept = weight.clone()
        weight.mul_(1.01)
    maps = gradient(model, images, target).abs().amax(1)
    with torch.no_grad():
        weight.copy_(kept)
    return pictured(model, images, maps, target)


@caught_by("inputs_unchanged")
def changes_its_input(model: Model, images: Images, target: Target = None) -> Attribution:
    """Centre the pictures in place."""
    maps = gradient(model, images, target).abs().amax(1)
    images.mul_(0.5).add_(0.25)
    return pictured(model, images, maps, target)


@caught_by("model_unchanged")
def renames_the_classes(model: Model, images: Images, target: Target = None) -> Attribution:
    """Give the classes names, for everybody."""
    model.classes = tuple(f"class {n}" for n in range(model.class_count))
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


_buffers: dict[Any, Tensor] = {}


@caught_by("results_unchanged_later")
def gives_its_buffer_away(model: Model, images: Images, target: Target = None) -> Attribution:
    """Return a buffer that the next call writes over."""
    maps = gradient(model, images, target).abs().amax(1)
    buffer = _buffers.setdefault((maps.shape, maps.dtype), torch.empty_like(maps))
    return pictured(model, images, buffer.copy_(maps), target)


@caught_by("results_unchanged_later")
def gives_a_weight_away(model: Model, images: Images, target: Target = None) -> Synthesis:
    """Return a view of the weights, which later training changes."""
    tiles = images.detach() * gradient(model, images, target).sign().abs()
    scale = next(model.module.parameters()).detach().flatten()[:1]
    return Synthesis(images=tiles, scores=scale[None].expand(1, len(tiles)), targets=("tile",) * len(tiles))


@caught_by("target_matters")
def explains_what_it_likes(model: Model, images: Images, target: Target = None) -> Attribution:
    """Explain the likeliest class, whichever was asked for."""
    pixels = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(pixels).amax(1).sum(), pixels)
    return pictured(model, images, slope.abs().amax(1), target)


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
Norm = Annotated[str, Field(pattern="^linf$", description="what the ball is measured in")]


def stepped(model: Any, images: Tensor, labels: Tensor, eps: float, clip: bool = True) -> Tensor:
    points = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(points), labels, reduction="sum"), points)
    moved = images + eps * slope.sign()
    return moved.clamp(0, 1) if clip else moved


def judged(model: Any, images: Tensor, adversarial: Tensor, labels: Tensor) -> AdversarialExamples:
    with torch.no_grad():
        before, after = model(images), model(adversarial)
    return AdversarialExamples.from_logits(model, images, adversarial, labels, before, after, targeted=False)


@caught_by("within_ball(radius='eps', norm='norm')", **ATTACK)
def leaves_the_ball_by_a_hair(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """Step a thousandth too far."""
    return judged(model, images, stepped(model, images, labels, eps + 1e-3), labels)


@caught_by("pixel_range(field='adversarial')", **ATTACK)
def leaves_the_pixel_range(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """Forget to clip."""
    return judged(model, images, stepped(model, images, labels, eps, clip=False), labels)


@caught_by("honest_success", **ATTACK)
def mislabels_success(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """Call every image a success."""
    result = judged(model, images, stepped(model, images, labels, eps), labels)
    return replace(result, success=torch.ones_like(result.success))


@caught_by("honest_success", **ATTACK)
def judges_another_picture(
    model: Model, images: Images, labels: Labels, *, eps: Eps = 8 / 255, norm: Norm = "linf"
) -> AdversarialExamples:
    """Judge what it made before it clipped and halved the change."""
    result = judged(model, images, (images + 4 * (stepped(model, images, labels, eps) - images)), labels)
    return replace(result, adversarial=stepped(model, images, labels, eps / 8))


# --- numbers ------------------------------------------------------------------------------------


@caught_by("finite")
def breaks_on_a_flat_picture(model: Model, images: Images, target: Target = None) -> Attribution:
    """Divide by the spread of the picture."""
    maps = gradient(model, images, target).abs().amax(1)
    return pictured(model, images, maps / images.std((1, 2, 3), keepdim=True)[:, 0], target)


@caught_by("finite", invariants=[UnitRange()])
def breaks_where_nothing_matters(model: Model, images: Images, target: Target = None) -> Attribution:
    """Scale by the largest value, also when it is zero."""
    maps = gradient(model, images, target).abs().amax(1)
    return pictured(model, images, maps / maps.amax((1, 2), keepdim=True), target)


@caught_by("declared_result", cost=Cost(forward=size.images, backward=size.images))
def drops_the_last_image(model: Model, images: Images, target: Target = None) -> Attribution:
    """Answer for all images but the last of several."""
    maps = gradient(model, images, target).abs().amax(1)
    keep = max(1, len(images) - 1)
    return replace(pictured(model, images, maps, target), maps=maps[:keep])


@caught_by("map_per_pixel(field='maps')", invariants=[MapPerPixel()])
def rounds_odd_sizes(model: Model, images: Images, target: Target = None) -> Attribution:
    """Make maps of even sides only."""
    maps = gradient(model, images, target).abs().amax(1)
    return pictured(model, images, maps[:, : maps.shape[1] // 2 * 2, : maps.shape[2] // 2 * 2], target)


@caught_by("nonnegative(field='maps')", invariants=[Nonnegative()])
def keeps_the_sign(model: Model, images: Images, target: Target = None) -> Attribution:
    """Promise magnitudes, give signed values."""
    return pictured(model, images, gradient(model, images, target).mean(1), target)


@caught_by("declared_result")
def answers_in_single_precision(model: Model, images: Images, target: Target = None) -> Attribution:
    """Turn every map into float32."""
    return pictured(model, images, gradient(model, images, target).abs().amax(1).float(), target)


@caught_by("declared_result")
def keeps_the_graph(model: Model, images: Images, target: Target = None) -> Attribution:
    """Give maps that still hang on the graph."""
    pixels = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(scores(model, pixels, target).sum(), pixels)
    return pictured(model, images, (pixels * slope).abs().amax(1), target)


@caught_by("answers")
def crashes_on_channels_last(
    model: Model, images: Images, target: Target = None, *,
    layer: Annotated[LayerName | None, Field(description="which layer")] = None,
) -> Attribution:  # fmt: skip
    """Index a layer's output as if it always had four axes."""
    features = model.features(images, layer or model.last_map)
    maps = features[:, :, 0, 0][:, None, :].abs().detach()
    return pictured(model, images, maps, target)


# --- seeds and batches ----------------------------------------------------------------------------

NoiseCost = Cost(forward=size.images, backward=size.images)


@caught_by("same_seed_same_bits")
def ignores_the_seed(model: Model, images: Images, target: Target = None) -> Attribution:
    """Add unseeded noise."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(random.getrandbits(31)))
    noisy = (images + 0.1 * noise.to(images)).clamp(0, 1)
    return pictured(model, images, gradient(model, noisy, target).abs().amax(1), target)


@caught_by("no_side_effects")
def draws_from_everybodys_stream(model: Model, images: Images, target: Target = None) -> Attribution:
    """Take noise from torch's own generator without declaring a seed."""
    noisy = (images + 0.1 * torch.rand_like(images)).clamp(0, 1)
    return pictured(model, images, gradient(model, noisy, target).abs().amax(1), target)


@caught_by("seed_matters")
def has_a_seed_for_show(
    model: Model, images: Images, target: Target = None, *, seed: Seed = None
) -> Attribution:
    """Draw the same noise whatever the seed."""
    noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    noisy = (images + 0.1 * noise).clamp(0, 1)
    return pictured(model, images, gradient(model, noisy, target).abs().amax(1), target)


@caught_by("batch_equals_single")
def scales_over_the_batch(model: Model, images: Images, target: Target = None) -> Attribution:
    """Scale by the largest value of all images."""
    maps = gradient(model, images, target).abs().amax(1)
    return pictured(model, images, maps / maps.max().clamp(min=1e-12), target)


@caught_by("batch_equals_single")
def draws_noise_per_row(
    model: Model, images: Images, target: Target = None, *, seed: Seed = None
) -> Attribution:
    """Give every row of the batch noise of its own."""
    noisy = (images + 0.1 * torch.rand_like(images)).clamp(0, 1)
    return pictured(model, images, gradient(model, noisy, target).abs().amax(1), target)


# --- work -------------------------------------------------------------------------------------------


@caught_by("within_cost")
def blows_the_declared_cost(model: Model, images: Images, target: Target = None) -> Attribution:
    """Promise one pass, take two."""
    with torch.no_grad():
        model(images)
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("within_cost", cost=Cost(forward=size.images))
def hides_the_backward_pass(model: Model, images: Images, target: Target = None) -> Attribution:
    """Promise no backward pass."""
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("shows_progress", cost=Cost(forward=60 * size.images, backward=60 * size.images))
def works_in_silence(model: Model, images: Images, target: Target = None) -> Attribution:
    """Take sixty passes and say nothing."""
    maps = sum(gradient(model, images, target).abs().amax(1) for _ in range(60))
    return pictured(model, images, maps, target)


@caught_by("clean_after_errors", cost=Cost(forward=3 * size.images, backward=3 * size.images))
def swallows_ctrl_c(model: Model, images: Images, target: Target = None) -> Attribution:
    """Stop early and pretend to be done."""
    maps = images.new_zeros(len(images), *images.shape[2:])
    try:
        for _ in progress_bar(range(3), "looking"):
            maps = maps + gradient(model, images, target).abs().amax(1)
    except KeyboardInterrupt:
        pass
    return pictured(model, images, maps, target)


@caught_by("clean_after_errors")
def swallows_errors(model: Model, images: Images, target: Target = None) -> Attribution:
    """Give zeros where the model broke."""
    try:
        maps = gradient(model, images, target).abs().amax(1)
    except Exception:
        maps = images.new_zeros(len(images), *images.shape[2:])
    return pictured(model, images, maps, target)


# --- the world around ---------------------------------------------------------------------------------


@caught_by("no_side_effects")
def writes_to_the_working_directory(model: Model, images: Images, target: Target = None) -> Attribution:
    """Keep a cache where the user happens to be."""
    Path("cache.txt").write_text("here I was")
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_a_temporary_file(model: Model, images: Images, target: Target = None) -> Attribution:
    """Forget a temporary file."""
    handle, _ = tempfile.mkstemp()
    os.close(handle)
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


_files: list[Any] = []


@caught_by("no_side_effects")
def leaves_a_file_open(model: Model, images: Images, target: Target = None) -> Attribution:
    """Open a file and never close it."""
    _files.append(Path(__file__).open())  # noqa: SIM115
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_a_thread(model: Model, images: Images, target: Target = None) -> Attribution:
    """Start a thread that outlives the call."""
    threading.Thread(target=threading.Event().wait, args=(0.5,)).start()
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_anomaly_detection_on(model: Model, images: Images, target: Target = None) -> Attribution:
    """Switch anomaly detection on for good."""
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_side_effects")
def leaves_benchmarking_on(model: Model, images: Images, target: Target = None) -> Attribution:
    """Let cuDNN choose its algorithms by the clock from now on."""
    torch.backends.cudnn.benchmark = True
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("no_leak")
def starts_a_daemon_every_time(model: Model, images: Images, target: Target = None) -> Attribution:
    """Start a thread in the background with each call."""
    threading.Thread(target=threading.Event().wait, args=(5,), daemon=True).start()
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("batch_equals_single")
def scales_transformers_over_the_batch(model: Model, images: Images, target: Target = None) -> Attribution:
    """Refuse most networks, and be wrong on the rest."""
    if not hasattr(model.module, "class_token"):
        raise ModelError(f"{model.name} has no class token, which this method needs; use a transformer")
    maps = gradient(model, images, target).abs().amax(1)
    return pictured(model, images, maps / maps.max().clamp(min=1e-12), target)


@caught_by("no_side_effects")
def prints(model: Model, images: Images, target: Target = None) -> Attribution:
    """Talk to standard output."""
    print("working ...")
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


_kept: list[Tensor] = []


@caught_by("no_leak")
def keeps_every_result(model: Model, images: Images, target: Target = None) -> Attribution:
    """Hold on to every map it ever made."""
    _kept.append(gradient(model, images, target).abs().amax(1))
    return pictured(model, images, _kept[-1].clone(), target)


_current: dict[str, Tensor] = {}


@caught_by("concurrent_runs_equal", cost=Cost(forward=2 * size.images, backward=2 * size.images))
def shares_a_global(model: Model, images: Images, target: Target = None) -> Attribution:
    """Add up maps in a global, which another run may be using."""
    _current["maps"] = images.new_zeros(len(images), *images.shape[2:])
    for _ in range(2):
        slope = gradient(model, images, target).abs().amax(1)
        _current["maps"] = _current["maps"] + slope
        threading.Event().wait(0.02)
    return pictured(model, images, _current["maps"], target)


# --- what it says of itself -----------------------------------------------------------------------------


def _wrong_oracle() -> None:
    assert 1 + 1 == 3, "one and one is three"


@caught_by("oracle", oracle=_wrong_oracle)
def contradicts_its_oracle(model: Model, images: Images, target: Target = None) -> Attribution:
    """Be wrong on the case where the answer is known."""
    return pictured(model, images, gradient(model, images, target).abs().amax(1), target)


@caught_by("documented")
def says_nothing_of_its_parameter(
    model: Model, images: Images, target: Target = None, *, power: int = 1
) -> Attribution:
    """Have a parameter without a description."""
    return pictured(model, images, gradient(model, images, target).abs().amax(1) ** power, target)


@caught_by("valid_defaults")
def has_a_default_out_of_bounds(
    model: Model, images: Images, target: Target = None, *,
    power: Annotated[int, Field(ge=1, description="exponent")] = 0,
) -> Attribution:  # fmt: skip
    """Have a default that its own schema refuses."""
    return pictured(model, images, gradient(model, images, target).abs().amax(1) ** power, target)


@caught_by("refuses_bad_parameters")
def accepts_any_word(
    model: Model, images: Images, target: Target = None, *,
    layer: Annotated[LayerName | None, Field(description="which layer")] = None,
    power: Annotated[Any, Field(description="exponent", json_schema_extra={"type": "number"})] = 1.0,
) -> Attribution:  # fmt: skip
    """Declare a number and take anything."""
    maps = gradient(model, images, target).abs().amax(1)
    return pictured(model, images, maps if isinstance(power, str) else maps ** float(power), target)


@caught_by("answers", cost=None)
def refuses_without_a_word(model: Model, images: Images, target: Target = None) -> Attribution:
    """Refuse every picture with an empty sentence."""
    from phosphene import InputError

    raise InputError("no")


@caught_by("answers")
def never_answers(model: Model, images: Images, target: Target = None) -> Attribution:
    """Refuse every picture there is."""
    from phosphene import InputError

    raise InputError("these pictures are not to my liking, and no others would be")


@caught_by("figure_not_blank")
def shows_a_blank_page(model: Model, images: Images, target: Target = None) -> Synthesis:
    """Give grey pictures."""
    grey = torch.full_like(images, 0.5)
    return Synthesis(images=grey, scores=grey.new_zeros(1, len(grey)), targets=("grey",) * len(grey))
