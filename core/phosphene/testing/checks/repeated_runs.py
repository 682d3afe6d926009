"""Checks that run a method several times: seeds, batches, errors half-way, saving, threads, memory."""

from __future__ import annotations

import base64
import io
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from PIL import Image

from ...data.datasets import TensorDataset
from ...errors import PhospheneError, type_name
from ...models.batch_size import max_batch
from ...progress import ProgressEvent, report_progress
from ...registry.lookup import methods
from ...results import Result
from ...results.reading import read_result
from ...roles import AS_OBJECT, ROLES, InputContext, model_for_inputs
from ...runs.saved_results import load_result
from ...runs.streams import run_stream
from ...torch_state import fork_random_state
from ..candidates import larger_parameters
from ..cases import MOST_PASSES, Case, fixed_cases
from ..networks import make_network, network_names
from ..observation import (
    assert_same_result,
    changes,
    count_passes,
    input_tensors,
    new_tensors,
    raise_in_pass,
    record_structure,
    state_of,
    tensors_in,
)

if TYPE_CHECKING:
    from .base import AnyMethod

from .base import register_check
from .single_run import _per_image_fields


def run_case(method: AnyMethod, case: Case, **changed: Any) -> tuple[Any, dict[str, Any]] | None:
    """A case's result and inputs; None where the method refuses the case."""
    try:
        inputs = case.inputs(method, case.model())
        return method(**(inputs | case.arguments(method) | changed)), inputs
    except PhospheneError:
        return None


def on_other_networks(case: Case) -> Iterator[Case]:
    """The case, and the same on all other networks: a method may accept few of them."""
    yield case
    yield from (replace(case, network=name) for name in network_names() if name != case.network)


def _depends_on_batch(method: AnyMethod) -> str | None:
    if not method.spec.batch_independent:
        return "it declares that its images depend on each other (batch_independent=False)"
    return None


@register_check(
    "case",
    "The same seed returns the same bits, independent of earlier calls.",
    "draw from torch.Generator().manual_seed(seed) or declare a Seed parameter, which seeds torch",
)
def same_seed_same_bits(method: AnyMethod, case: Case) -> None:
    if (first := run_case(method, case)) is None:
        return
    with fork_random_state():
        torch.manual_seed(1)
        again = run_case(method, case)
    assert again is not None, "the second call was refused"
    assert_same_result(first[0], again[0])


@register_check(
    "method",
    "Another seed returns another result.",
    "the Seed parameter: use it, or remove it",
    lambda method: None if method.seed else "it has no seed",
)
def seed_matters(method: AnyMethod) -> None:
    comparisons, seed = 0, str(method.seed)
    # The seed may matter for one choice of one parameter only: these cases come first.
    fixed = sorted(fixed_cases(method, all_pairs=False), key=lambda case: not case.params)
    for case in (Case(), Case("functional", "noise"), *fixed):
        first = run_case(method, replace(case, params={**case.params, seed: 0}))
        for n in (1, 2) if first is not None else ():
            other = run_case(method, replace(case, params={**case.params, seed: n}))
            if first is not None and other is not None:
                comparisons += 1
                try:
                    assert_same_result(first[0], other[0])
                except AssertionError:
                    return
    assert not comparisons, f"seeds 0, 1 and 2 returned the same result {comparisons} times"


@register_check(
    "method",
    "Another target returns another result.",
    "use scores(model, images, target), or remove the target",
    lambda method: None if method.spec.input("target") else "it takes no target",
    exemptible=True,
)
def target_matters(method: AnyMethod) -> None:
    comparisons = 0
    # Where the score does not depend on the image, results may be equal for all classes.
    for case in (Case(), Case("functional", "noise"), *on_other_networks(Case(pictures="noise"))):
        results = (run_case(method, replace(case, target=n)) for n in (0, 1, 2))
        tensors = ([t.clone() for _, t in tensors_in(r[0])] for r in results if r is not None)
        if (first := next(tensors, None)) is None:
            continue
        for other in tensors:
            comparisons += 1
            if not all(torch.equal(*pair) for pair in zip(first, other, strict=True)):
                return
    assert not comparisons, f"targets 0, 1 and 2 returned the same result {comparisons} times"


@register_check(
    "case",
    "A result does not change afterwards.",
    "results that are views of a weight or of a reused buffer: clone them",
)
def results_unchanged_later(method: AnyMethod, case: Case) -> None:
    model = case.model()
    try:
        inputs = case.inputs(method, model)
        result = method(**inputs, **case.arguments(method))
    except PhospheneError:
        return
    copies = [(path, tensor, tensor.clone()) for path, tensor in tensors_in(result)]

    def assert_unchanged(what: str) -> None:
        for path, tensor, copy in copies:
            assert torch.equal(tensor, copy), f"{path} of an earlier result changed with {what}"

    with suppress(PhospheneError):
        replace(case, pictures="scenes" if case.pictures == "noise" else "noise").run(method, model)
    assert_unchanged("the next call")
    with torch.no_grad():
        for weight in model.module.state_dict().values():
            weight.add_(1)
        assert_unchanged("the model's weights")
        for tensor in input_tensors(inputs).values():
            tensor.zero_()
        assert_unchanged("the caller's inputs")


def _batch_case(case: Case) -> Case:
    """The case as a batch of three images in double precision."""
    # Where a gradient is nothing but rounding, its sign is arbitrary.
    if case.pictures not in ("scenes", "noise") or case.network in ("constant", "saturated"):
        case = replace(case, pictures="noise", network="gap")
    return replace(case, double=True, count=3)


@register_check(
    "case",
    "A batch has the same results as its images one at a time.",
    "statistics over the batch axis; noise drawn per batch instead of once, (1, C, H, W)",
    _depends_on_batch,
    tested=_batch_case,
)
def batch_equals_single(method: AnyMethod, case: Case) -> None:
    case = _batch_case(case)
    if (together := run_case(method, case)) is None:
        return
    with max_batch(2):
        split = run_case(method, case)
    assert split is not None, "it is refused with a batch size of two"
    _assert_close(method, split[0], together[0], "at most two images at once")
    result, inputs = together
    if not (fields := _per_image_fields(method, result)):
        return
    for n in range(case.count):
        alone = {
            i.name: ROLES[i.role].select(inputs[i.name], range(n, n + 1))
            for i in method.spec.inputs
            if ROLES[i.role].per_image and inputs[i.name] is not None
        }
        single = case.run(method, None, **alone)
        for name in fields:
            rows = getattr(result, name)[n : n + 1]
            _assert_close(method, getattr(single, name), rows, f"{name} of image {n} alone")


#: Roles of networks that stay in single precision in a case in double precision; their convolutions are
#: rounded differently in batches of other sizes.
_SINGLE_PRECISION = ("denoiser", "generator", "stylizer", "adaptive_stylizer", "predicted_stylizer")
#: The rounding of such a network, through some steps, in images from 0 to 1.
_ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def _in_single_precision(method: AnyMethod) -> bool:
    return any(declared.role in _SINGLE_PRECISION for declared in method.spec.inputs)


#: So many numbers of a result that float32 represents exactly are no coincidence in double precision.
_MANY = 48


@register_check(
    "method",
    "Images and networks in double precision have results that were computed in it.",
    ".float(), a tensor made without dtype=images.dtype, or a library that computes in single precision",
    lambda method: (
        "it takes no images"
        if not method.spec.input("images")
        else "one of its networks stays in single precision"
        if _in_single_precision(method)
        else None
    ),
    exemptible=True,
)
def computed_in_double_precision(method: AnyMethod) -> None:
    for network in ("gap", "functional", "tokens"):
        case = Case(network, "noise", double=True)
        if (run := run_case(method, case)) is None:
            continue
        result, inputs = run
        copied = torch.cat([t.flatten().double() for t in input_tensors(inputs).values()])
        for name, tensor in tensors_in(result):
            if tensor.dtype != torch.float64 or name.startswith("inputs"):
                continue
            numbers = tensor[~torch.isin(tensor, copied.to(tensor.device))].unique()
            # Sums and quotients of few bits, such as counts and levels, are exact in both.
            numbers = numbers[(numbers * 2**12).frac() != 0]
            assert len(numbers) < _MANY or bool((numbers != numbers.float().double()).any()), (
                f"{name} is float64, but each of its {len(numbers)} different numbers is one of float32"
            )
        return


def _assert_close(method: AnyMethod, actual: Any, expected: Any, what: str) -> None:
    tolerance = _ROUNDING if _in_single_precision(method) else {"rtol": 1e-6, "atol": 1e-8}
    try:
        assert_same_result(actual, expected, **tolerance)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


@register_check(
    "case",
    "After an error or Ctrl-C half-way, the error is raised and the model is unchanged.",
    "except clauses that catch too much; changes that are not restored in a finally",
)
def clean_after_errors(method: AnyMethod, case: Case) -> None:
    model = case.model()
    events: list[ProgressEvent] = []
    try:
        record_structure(model, case.inputs(method, model))
        with count_passes(model.module) as passes, report_progress(events.append):
            case.run(method, model)
    except PhospheneError:
        return
    before, random_state = state_of(model), torch.get_rng_state()

    def assert_raised(error: BaseException, where: str, failure: AbstractContextManager[None]) -> None:
        try:
            with failure:
                case.run(method, model)
        except BaseException as caught:
            if caught is not error and not _is_cause(caught, error):
                raise
        else:
            # A pass may end below the layer that was to fail.
            if error.__traceback__ is not None:
                raise AssertionError(f"{type(error).__name__} {where} was swallowed")
        changed = changes(before, state_of(model))
        assert not changed, f"after {type(error).__name__} {where}, changed: {'; '.join(changed)}"
        assert torch.equal(torch.get_rng_state(), random_state), "the random state changed"
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), (
            "gradients are off afterwards"
        )

    # A method that reads weights alone runs no pass.
    total = passes.started
    for at in sorted({1, (total + 1) // 2, total} if total else ()):
        for error in (ArithmeticError("a layer failed"), KeyboardInterrupt()):
            assert_raised(error, f"in forward pass {at} of {total}", raise_in_pass(model.module, at, error))
    if events:
        stop = KeyboardInterrupt()

        def cancel(event: ProgressEvent) -> None:
            raise stop

        assert_raised(stop, "at the first progress event", report_progress(cancel))


def _is_cause(caught: BaseException, error: BaseException) -> bool:
    """Whether an error was raised again as another one; an interruption must not be."""
    return isinstance(error, Exception) and error in (caught.__cause__, caught.__context__)


@register_check(
    "case",
    "A saved result loads as it was, and replays bit for bit.",
    "fields of the result type that cannot be saved; inputs that are not recorded",
)
def saves_and_replays(method: AnyMethod, case: Case) -> None:
    model = case.model()
    try:
        result = case.run(method, model)
    except PhospheneError:
        return
    with tempfile.TemporaryDirectory() as folder:
        # A method that is not registered builds its own networks, too.
        find = {method.spec.name: method}
        back = read_result(result.save(Path(folder, "result")), lambda name: find.get(name) or methods[name])
        assert type(back) is type(result), f"{type_name(back)} was loaded"
        assert_same_result(back, result)
        assert back.provenance == result.provenance, "the loaded provenance differs"
        assert_same_result(back.inputs, result.inputs)
        inputs: dict[str, Any] = {}
        for declared in method.spec.inputs:
            value = model if declared.role == "model" else back.inputs.get(declared.name)
            if isinstance(value, str) and value.endswith(AS_OBJECT):
                return  # a data set in memory or a callable is not saved
            context = InputContext(model_for_inputs(model, inputs), inputs, load_result)
            inputs[declared.name] = ROLES[declared.role].make(value, context)
        assert back.provenance is not None
        again = method(**inputs, **back.provenance.params)
    try:
        assert_same_result(again, result)
    except AssertionError as error:
        raise AssertionError(f"the replay differs: {error}") from None


def _is_no_stream(method: AnyMethod) -> str | None:
    if method.spec.input("images") is None or not method.result.per_image:
        return "its result has no row for each input image"
    if method.seed is not None:
        return "it is random, and each batch of a stream has a seed of its own"
    return _depends_on_batch(method)


@register_check(
    "method",
    "Streamed over a data set in batches, it returns the same bits as for all images at once.",
    "fields of per_image; an override of Result.concatenate without one of Result.select",
    _is_no_stream,
)
def streams_equal_the_call(method: AnyMethod) -> None:
    if find_spec("pyarrow") is None:
        raise SkipTest("the index of a stream needs pyarrow")
    images = method.spec.input("images")
    assert images is not None
    rounding = _ROUNDING if _in_single_precision(method) else {}
    for case in on_other_networks(Case(count=3)):
        model = case.model()
        arguments = case.inputs(method, model) | case.arguments(method)
        try:
            with max_batch(2):
                expected = method(**arguments)
        except PhospheneError:
            continue
        with tempfile.TemporaryDirectory() as folder:
            arguments[images.name] = TensorDataset(arguments[images.name])
            out = Path(folder, "stream")
            stream = run_stream(method, out=out, batch_size=2, progress=False, **arguments)
            assert_same_result(stream[:], expected, **rounding)
            singles = [stream[number] for number in range(len(stream))]
            assert_same_result(type(expected).concatenate(singles), expected, **rounding)
        return


@register_check(
    "method",
    "On a trained network and bundled scenes, the figure is not blank.",
    "panels(), and the scaling of maps",
)
def figure_not_blank(method: AnyMethod) -> None:
    # Some methods draw an image of a single class.
    cases = [Case("shapes-vgg"), Case("shapes-vgg", target=0), *on_other_networks(Case("shapes-vgg"))]
    accepted = next(((case, run[0]) for case in cases if (run := run_case(method, case)) is not None), None)
    if accepted is None:
        return  # the method refuses every network
    case, result = accepted
    if _is_blank(result):  # a few steps from an even gray change little
        longer = replace(case, params=larger_parameters(method, case, limit=MOST_PASSES))
        if (run := run_case(method, longer)) is not None:
            result = run[0]
    assert not _is_blank(result), "every panel is blank"
    page = result._repr_html_()
    assert "<img" in page, "a notebook would show no image"
    drawn = Image.open(io.BytesIO(base64.b64decode(page.partition("base64,")[2].partition('"')[0])))
    colors = torch.frombuffer(bytearray(drawn.convert("RGB").tobytes()), dtype=torch.uint8).view(-1, 3)
    drawn_on_ground = colors[(colors != colors[0]).any(1)]
    assert len(drawn_on_ground) and (drawn_on_ground != drawn_on_ground[0]).any(), "the figure is blank"


def _is_blank(result: Any) -> bool:
    """Whether no panel has a contrast that is visible."""
    images = [panel.image for group in result.panels() for panel in group]
    return not any(image.amax() - image.amin() > 0.05 for image in images)


@register_check(
    "case",
    "Two concurrent runs on one model have the same results as each alone.",
    "state stored in the module, the model or a global",
)
def concurrent_runs_equal(method: AnyMethod, case: Case) -> None:
    if (first := run_case(method, case)) is None:
        return
    model = case.model(recorded=False)  # which both runs may do at the same time
    results: list[Any] = [None, None]

    def work(index: int) -> None:
        try:
            results[index] = case.run(method, model)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise AssertionError(
                f"beside another run it raised {type(result).__name__}: {result}"
            ) from result
        assert isinstance(result, Result)
        assert_same_result(result, first[0])


@register_check(
    "method",
    "Repeated runs take no more memory.",
    "lists and caches that hold results; closures that hold graphs",
)
def no_leak(method: AnyMethod) -> None:
    case = next((c for c in on_other_networks(Case(count=1)) if run_case(method, c) is not None), None)
    if case is None:
        return
    model = case.model()
    with new_tensors() as count:
        tensors, threads = [], []
        for _ in range(3):
            case.run(method, model)
            tensors.append(count())
            threads.append(threading.active_count())
    for what, counts in (("tensors", tensors), ("threads", threads)):
        assert not counts[0] < counts[1] < counts[2], f"{what} alive after each run: {counts}"


@register_check(
    "method",
    "It runs on a GPU and returns its results there.",
    "tensors created without device=",
    lambda method: None if torch.cuda.is_available() else "there is no CUDA device",
)
def runs_on_cuda(method: AnyMethod) -> None:
    model = make_network("gap")
    model.module.cuda()
    result = Case().run(method, model)
    wrong = [path for path, tensor in tensors_in(result) if tensor.device.type != "cuda"]
    assert not wrong, f"on the CPU: {', '.join(wrong)}"
