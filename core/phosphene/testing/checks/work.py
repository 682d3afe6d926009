"""Checks of the work: batches, cost, pixels passed, precision, large images, another process, the oracle."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch

from ...errors import PhospheneError
from ...finite_values import NonFiniteResultError
from ...models.batch_size import max_batch
from ...results import AdversarialExamples, Attribution, Synthesis
from ...roles import ROLES
from ..cases import MOST_PASSES, Case, declared_cost, make_images, properties_of, sizes
from ..networks import image_size, redraw_weights, standardize_logits
from ..observation import (
    Observation,
    assert_same_result,
    count_passes,
    mean_rank_correlation,
    raise_in_pass,
    tensors_in,
    without_tensors,
)
from .base import register_check, result_of
from .single_run import _per_image_fields

if TYPE_CHECKING:
    from ...models import Model
    from .base import AnyMethod

#: Networks on which a method is tried until it accepts one.
USUAL_NETWORKS = ("gap", "functional", "flat", "tokens", "shapes-vgg", "gelu")


def accepted_case(method: AnyMethod, case: Case, networks: Sequence[str] = USUAL_NETWORKS) -> Case | None:
    """The case on the first network that the method accepts."""
    accepted = accepted_run(method, case, networks)
    return None if accepted is None else accepted[0]


def accepted_run(
    method: AnyMethod, case: Case, networks: Sequence[str] = USUAL_NETWORKS
) -> tuple[Case, Any] | None:
    """The case on the first network that the method accepts, and its result."""
    for network in networks:
        candidate = replace(case, network=network)
        if (result := result_of(method, candidate)) is not None:
            return candidate, result
    return None


# --- batches -----------------------------------------------------------------------------------


@register_check(
    "method",
    "No pass through the network has more than twice as many images as the batch size.",
    "split copies, masks and units into batches: for some in tensor.split(batch_size(model))",
    lambda method: (
        "it takes no model" if not method.spec.input("model")
        else "a training has a batch size of its own" if "training" in method.spec.needs
        else "it declares that its images depend on each other (batch_independent=False)"
        if not method.spec.batch_independent
        else None if method.result.per_image or method.spec.input("dataset")
        else "its result has no rows of images (per_image), by which a batch could be split"
    ),
    exemptible=True,
)  # fmt: skip
def within_the_batch_size(method: AnyMethod) -> None:
    for case in (Case(pictures="noise", count=3, dataset=9), Case("functional", count=5)):
        model = case.model()
        inputs, params = case.inputs(method, model), case.arguments(method)
        # A parameter may set another size; an image and its baseline may share a pass.
        batches = [v for n, v in method.validate(params).items() if n.startswith("batch") and v]
        limit = 2 * max([2, *batches])
        try:
            with max_batch(2), count_passes(model.module) as passes:
                method(**inputs, **params)
        except PhospheneError:
            continue
        assert passes.largest <= limit, f"{passes.largest} images in one pass, the batch size is {limit // 2}"


@register_check(
    "method",
    "Large inputs have the same results as in one batch, from the first image to the last.",
    "what is carried from one batch to the next: offsets, ties, running sums",
    lambda method: (
        None
        if any(i.role in ("dataset", "images") for i in method.spec.inputs) and method.spec.input("model")
        else "it reads no images through a model"
    ),
)
def batches_are_joined(method: AnyMethod) -> None:
    if not method.spec.batch_independent:
        return
    several = any(i.role == "dataset" for i in method.spec.inputs)
    for pictures in ("noise", "scenes", "binary")[: 3 if several else 1]:
        case = Case(pictures=pictures, count=5, dataset=9, double=True)
        if (accepted := accepted_run(method, case)) is None:
            return
        case, together = accepted  # in one batch
        with max_batch(4):
            split = result_of(method, case)
        assert split is not None, "it is refused with a batch size of 4"
        try:
            assert_same_result(split, together, rtol=1e-5, atol=1e-7)
        except AssertionError as error:
            raise AssertionError(f"in batches of 4: {error}") from None


#: Images of a large batch, and the number of the first one of its part.
_LARGE_BATCH, _FIRST = 11, 3


@register_check(
    "method",
    "The images of a large batch have the same results in a smaller one, each for its own predicted class.",
    "parts of a batch: target.select(range(start, end)), labels[start:end]",
    lambda method: (
        "it declares that its images depend on each other (batch_independent=False)"
        if not method.spec.batch_independent
        else None
        if method.spec.input("model") and method.spec.input("images")
        else "it takes no images of a model"
    ),
    exemptible=True,
)
def large_batches_equal_their_parts(method: AnyMethod) -> None:
    case = Case(pictures="noise", count=_LARGE_BATCH, double=True)
    for network in ("gap", "functional", "tokens"):
        case = replace(case, network=network)
        model = _with_varied_predictions(case)
        inputs = case.inputs(method, model)
        part = {
            i.name: ROLES[i.role].select(inputs[i.name], range(_FIRST, _LARGE_BATCH))
            for i in method.spec.inputs
            if ROLES[i.role].per_image and inputs[i.name] is not None
        }
        arguments = case.arguments(method)
        try:
            together = method(**inputs, **arguments)
            alone = method(**(inputs | part), **arguments)
        except PhospheneError:
            continue
        for name in _per_image_fields(method, together):
            rows = getattr(together, name)[_FIRST:]
            try:
                assert_same_result(getattr(alone, name), rows, rtol=1e-5, atol=1e-7)
            except AssertionError as error:
                raise AssertionError(
                    f"{name} of images {_FIRST} to {_LARGE_BATCH - 1} in a batch of their own, against their "
                    f"rows in a batch of {_LARGE_BATCH}, on {network!r}: {error}"
                ) from None
        return
    raise SkipTest("it refused the networks")


def _with_varied_predictions(case: Case) -> Model:
    """The case's network, whose predicted classes differ between the images."""
    model = case.model()
    images = make_images(case.pictures, case.count, 3, image_size(model)).to(model.device, model.dtype)
    standardize_logits(model, images)
    return model


# --- cost ----------------------------------------------------------------------------------------


@register_check(
    "method",
    "The declared cost is at most about three times what a call needs.",
    "cost=Cost(forward=..., backward=...)",
    lambda method: (
        "it declares no cost" if method.spec.cost is None
        else None if method.spec.input("model") else "it takes no model"
    ),
    exemptible=True,
)  # fmt: skip
def cost_is_near_the_work(method: AnyMethod) -> None:
    assert method.spec.cost is not None
    ratios: dict[str, list[tuple[int, int]]] = {"forward": [], "backward": []}
    for network in ("gap", "functional", "shapes-vgg", "tokens"):
        for count in (1, 3):
            case = Case(network, "noise", count=count)
            declared = declared_cost(method, case)
            model = case.model()
            if declared is None:
                continue
            try:
                with count_passes(model.module) as passes:
                    result = case.run(method, model)
            except PhospheneError:
                continue
            if not any(i.role in ("images", "dataset") for i in method.spec.inputs if i.required):
                images = getattr(result, "images", None)
                count = 1 if images is None else len(images)
                declared = method.spec.cost.evaluate(
                    method.validate(case.arguments(method)), **(sizes(method, case) | {"images": count})
                )
            backward = max(passes.backward, passes.from_output)
            ratios["forward"].append((declared[0], passes.forward))
            ratios["backward"].append((declared[1], backward))
            if all(_near(*pairs[-1]) for pairs in ratios.values()):
                return
    for direction, pairs in ratios.items():
        if pairs and not any(_near(*pair) for pair in pairs) and not _stops_early(pairs):
            if (name := _unreadable(method)) is not None:
                raise SkipTest(f"an expression cannot read the items of {name}, so the cost is a bound")
            declared_passes, actual = min(pairs, key=lambda pair: pair[0] - pair[1])
            raise AssertionError(
                f"{declared_passes} images {direction} are declared, {actual} went {direction}"
            )


def _unreadable(method: AnyMethod) -> str | None:
    """A parameter of several numbers, of which a cost can read the length only."""
    for name, schema in properties_of(method.spec.params_schema).items():
        branches = [b for b in schema.get("anyOf", [schema]) if b.get("type") == "array"]
        items = [item for b in branches for item in (b.get("prefixItems") or [b.get("items", {})])]
        if any(item.get("type") in ("integer", "number") for item in items):
            return name
    return None


def _stops_early(pairs: list[tuple[int, int]]) -> bool:
    """Whether the share of the declared passes that ran depends on the network and the images."""
    shares = [actual / declared for declared, actual in pairs if declared]
    return len(shares) > 1 and max(shares) > 1.25 * min(shares)


def _near(declared: int, actual: int) -> bool:
    return declared <= 3 * actual + 3


# --- pixels ------------------------------------------------------------------------------------------


@register_check(
    "run",
    "The pixels passed to the network are finite.",
    "divisions by zero and steps without bound",
    lambda method: None if method.spec.input("model") else "it takes no model",
)
def finite_pixels(method: AnyMethod, run: Observation) -> None:
    # Such a pass is refused, which is right for a parameter without bound, such as a learning rate.
    refused_parameters = run.refusal is not None and run.case.params
    assert run.passes.finite or refused_parameters, "the network was passed NaN or infinity"


@register_check(
    "observation",
    "The pixels passed to the network are in [0, 1].",
    "clamp(0, 1) after each step, before the pass; or do not declare PixelRange",
    lambda method: (
        None
        if issubclass(method.result, (AdversarialExamples, Synthesis))
        and any(i.kind == "pixel_range" for i in method.spec.invariants)
        else "it promises no range of pixels (PixelRange)"
    ),
    exemptible=True,
)
def pixels_in_range(method: AnyMethod, run: Observation) -> None:
    low, high = run.passes.lowest, run.passes.highest
    tolerance = 1e-3 if run.model.dtype in (torch.float32, torch.float64) else 2e-2
    assert low >= -tolerance and high <= 1 + tolerance, (
        f"the network was passed pixels in [{low:.3g}, {high:.3g}]"
    )


# --- precision, size --------------------------------------------------------------------------------


@register_check(
    "method",
    "In half precision the result is finite and near that in single precision.",
    "numbers that underflow, such as 1e-8; sums and norms of many values, linear algebra, Fourier transforms "
    "and resizing: compute them in at_least_float32(values)",
    lambda method: None if method.spec.input("model") else "it takes no model",
    exemptible=True,
)
def half_precision(method: AnyMethod) -> None:
    # A gradient of zero divided by a small number that float16 does not have is not finite.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an attack without a direction
            Case("constant", "noise", precision="float16").run(method)
    except NonFiniteResultError as error:
        raise AssertionError(
            f"in float16, where the score is constant: {error}\n1e-8 is 0 in float16: divide by "
            "x.clamp(min=torch.finfo(x.dtype).tiny)"
        ) from error
    except Exception:  # reported below, on a network that the method accepts
        pass
    if (accepted := accepted_run(method, Case(pictures="noise"))) is None:
        return
    case, single = accepted
    for precision in ("bfloat16", "float16"):
        try:
            half = replace(case, precision=precision).run(method)
        except NonFiniteResultError as error:
            raise AssertionError(f"in {precision}: {error}") from error
        except PhospheneError:
            continue
        except Exception as error:
            raise AssertionError(f"in {precision} it raised {type(error).__name__}: {error}") from error
        # Differences of scores without gradients may be smaller than the rounding of the scores.
        if not isinstance(half, Attribution) or "gradients" not in method.spec.needs:
            continue
        if half.maps.shape == single.maps.shape:
            correlation = mean_rank_correlation(half.maps, single.maps)
            assert correlation > 0.3, (
                f"in {precision}, the rank correlation with the maps in float32 is {correlation:.2f}"
            )


#: Passes of 300 pixels that are waited for where a method declares no cost.
LARGE_PASSES = 16


class _EnoughPasses(Exception):
    """Ends a long run on large images."""


@register_check(
    "method",
    "Images of 300 pixels are accepted.",
    "sizes that are assumed; memory that grows with the square of the pixels",
    lambda method: None if method.spec.input("images") else "it takes no images",
    exemptible=True,
)
def large_images(method: AnyMethod) -> None:
    # The attention of a diffusion model takes time with the square of the pixels.
    width = 60 if method.spec.input("denoiser") else 260
    case = Case("gap", "noise", count=1, size=(300, width))
    cost = declared_cost(method, case)
    if cost is not None and sum(cost) > 60:
        return  # the time of many passes is no property of the size
    model = case.model()
    try:
        with raise_in_pass(model.module, at=1 + LARGE_PASSES, error=_EnoughPasses()):
            result = result_of(method, case, model)
    except _EnoughPasses:
        return
    for path, tensor in tensors_in(result) if result is not None else ():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{path} contains NaN or infinity"


@register_check(
    "method",
    "A count larger than what there is to count is answered or refused with a message.",
    "k larger than the number of classes, channels or images: min(k, ...), or an InputError",
)
def counts_may_be_too_large(method: AnyMethod) -> None:
    for name, schema in properties_of(method.spec.params_schema).items():
        branches = schema.get("anyOf", [schema])
        integer = next((b for b in branches if b.get("type") == "integer"), None)
        if integer is None or name == method.seed:
            continue
        value = min(60, integer.get("maximum", 60))
        for network in ("gap", "tokens"):
            case = Case(network, "noise", count=1, params={name: value})
            cost = declared_cost(method, case)
            if cost is None or sum(cost) > MOST_PASSES:
                continue
            try:
                result_of(method, case)
            except Exception as error:
                raise AssertionError(f"{name}={value} raised {type(error).__name__}: {error}") from error


# --- another process -----------------------------------------------------------------------------------

_SCRIPT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import importlib
from phosphene import methods
from phosphene.testing import Case
from phosphene.testing.checks.work import digest_of, run_other_calls
module, name, case = sys.argv[2:]
owner = importlib.import_module(module)
from phosphene import Method
method = getattr(owner, name, None)
method = method if isinstance(method, Method) else methods[name]
case = eval(case, {"Case": Case})
run_other_calls(method, case)
print(digest_of(case.run(method)))
"""


def run_other_calls(method: AnyMethod, case: Case) -> None:
    """Call with other images, then with other weights, of the same shapes."""
    for pictures, seed in (("scenes", None), (case.pictures, 3)):
        model = case.model()
        if seed is not None:
            redraw_weights(model.module, seed)
        result_of(method, replace(case, pictures=pictures), model)


def digest_of(result: Any) -> str:
    """SHA-256 of a result's tensors and other values."""
    digest = hashlib.sha256()
    for path, tensor in sorted(tensors_in(result), key=lambda item: item[0]):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        digest.update(f"{path}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(bytes(values.tolist()))
    digest.update(json.dumps(without_tensors(result), default=str, sort_keys=True).encode())
    return digest.hexdigest()


@register_check(
    "method",
    "Another process with another hash seed, and other calls before, returns the same bits.",
    "the order of sets; hash(); caches by name, layer or shape, whose values are those of an earlier call",
)
def same_in_another_process(method: AnyMethod) -> None:
    # Not the network that the other checks pass first: a cache across models would have its values.
    accepted = (accepted_case(method, Case(pictures="noise"), [n]) for n in reversed(USUAL_NETWORKS))
    case = next((case for case in accepted if case is not None), None)
    function = inspect.unwrap(method)
    if case is None or function.__module__ == "__main__":
        return
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    name = method.spec.short_name if method.distribution == "unregistered" else method.spec.name
    arguments = [json.dumps(sys.path), function.__module__, name, repr(case)]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        capture_output=True, text=True, check=False, env=environment, cwd=Path.cwd(),
    )  # fmt: skip
    assert process.returncode == 0, f"in another process: {process.stderr.strip().splitlines()[-1:]}"
    digest = process.stdout.strip().splitlines()[-1]
    assert digest == digest_of(case.run(method)), (
        f"the result differs in another process with PYTHONHASHSEED={seed}, after calls with other "
        "images and weights"
    )
