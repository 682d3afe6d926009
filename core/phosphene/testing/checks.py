"""The checks: what every method owes, and what a spec declares on top, each as one small function."""

from __future__ import annotations

import io
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ..errors import PhospheneError
from ..models.batch_size import max_batch
from ..parameter_text import read_option, value_text
from ..progress import ProgressEvent, report_progress
from ..results import AdversarialExamples, Result, TrainedNetwork
from ..roles import AS_OBJECT, ROLES, InputContext, model_for_inputs
from ..runs.saved_results import load_result
from ..spec.invariants import Invariant
from ..spec.spec import MethodSpec
from .cases import Case, plain_cases, properties_of, sizes
from .networks import make_network, network_names
from .observation import (
    Observation,
    assert_alike,
    breaking,
    changes,
    input_tensors,
    new_tensors,
    record_structure,
    state_of,
    tensors_in,
    traffic,
)

if TYPE_CHECKING:
    from ..registry.method import Method

    AnyMethod = Method[..., Any]

#: Work of more forward passes than this is long enough to be watched.
LONG = 40
#: A quick call that takes more seconds than this is none.
SLOW = 30


On = Literal["method", "run", "observation", "case"]


@dataclass(frozen=True)
class Check:
    """One promise and the function that tests it; it raises AssertionError where the promise is broken.

    ``look``: where to look when it fails. ``on``: "method" is called once with the method,
    "run" with one run of every case, "observation" with those that gave a result, "case" with some
    cases, to run as it likes.
    ``concerns`` gives the reason why a method need not be checked, if there is one.
    """

    name: str
    promise: str
    look: str
    on: On
    function: Callable[..., None]
    concerns: Callable[[AnyMethod], str | None] = lambda method: None


CHECKS: dict[str, Check] = {}


def _check(
    on: On,
    promise: str,
    look: str,
    unless: Callable[[AnyMethod], str | None] = lambda method: None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[function.__name__] = Check(function.__name__, promise, look, on, function, unless)
        return function

    return register


def checks_of(method: AnyMethod) -> list[Check]:
    """What a method owes: the checks of all methods, and one for every invariant it declares."""
    return [*CHECKS.values(), *(_of_invariant(i) for i in method.spec.invariants)]


def _of_invariant(invariant: Invariant) -> Check:
    told = invariant.model_dump(exclude={"kind"}, exclude_none=True)
    words = ", ".join(f"{name}={value!r}" for name, value in told.items())

    def holds(method: AnyMethod, seen: Observation) -> None:
        params = method.validate(seen.result.provenance.params)
        if invariant.applies(params):
            inputs = seen.inputs | {n: t for n, t in seen.given.items() if isinstance(seen.inputs[n], Tensor)}
            invariant.check(inputs, params, seen.result)

    return Check(
        name=f"{invariant.kind}({words})",
        promise=(type(invariant).__doc__ or invariant.kind).strip().partition("\n")[0],
        look=f"the spec declares {type(invariant).__name__}({words}): keep it, or declare what is true",
        on="observation",
        function=holds,
    )


# --- what a method says of itself --------------------------------------------------------------


@_check("method", "It says what it is: summary, parameters, cost and sources.", "the @method(...) arguments")
def documented(method: AnyMethod) -> None:
    spec = method.spec
    assert spec.summary.endswith((".", ":", "?")), f"the summary is no sentence: {spec.summary!r}"
    properties = spec.params_schema.get("properties", {})
    silent = [n for n, s in properties.items() if not s.get("description") and n != method.seed]
    assert not silent, f"parameters without a description: {', '.join(silent)}"
    document = json.loads(json.dumps(spec.model_dump(mode="json")))
    del document["params_schema"]
    again = MethodSpec.model_validate(document | {"params": spec.params})
    assert again.invariants == spec.invariants and again.cost == spec.cost, "the spec does not survive JSON"


@_check("method", "Defaults, quick and demo parameters are within the schema's own bounds.", "quick=, demo=")
def valid_defaults(method: AnyMethod) -> None:
    schema = method.spec.params_schema
    required = set(schema.get("required", []))
    stated = {n: s["default"] for n, s in schema.get("properties", {}).items() if n not in required}
    for name in required:
        assert name in method.spec.quick, f"{name!r} has no default: say in quick= what a test call may give"
    needed = {n: method.spec.quick[n] for n in required}
    for values in (stated, method.spec.quick, method.spec.demonstration()[1]):
        method.validate(needed | values)


@_check(
    "method",
    "Parameters mean the same in Python, as JSON and on the command line.",
    "the parameters' annotations",
)
def same_values_everywhere(method: AnyMethod) -> None:
    given = Case().arguments(method)
    in_python = method.validate(given)
    as_json = method.spec.params(**in_python).model_dump(mode="json")
    assert method.validate(json.loads(json.dumps(as_json))) == in_python, "the schema changes what JSON says"
    for name, field in method.spec.params.model_fields.items():
        text = value_text(as_json[name])
        read = read_option(text, field)
        assert method.validate(given | {name: read}) == in_python, f"{name}: {text!r} is read as {read!r}"


@_check(
    "method",
    "On a case where the right answer is known, it gives the right answer.",
    "the oracle",
    lambda method: (
        None if method.spec.oracle else "it names no oracle: only its safety is proven, not its sense"
    ),
)
def oracle(method: AnyMethod) -> None:
    assert method.spec.oracle is not None
    method.spec.oracle()


# --- what one run shows ------------------------------------------------------------------------


@_check(
    "run",
    "A call gives a result, or is refused in a sentence.",
    "raise InputError or ModelError, saying what was wrong and what to do",
)
def answers(method: AnyMethod, seen: Observation) -> None:
    if seen.crash is not None:
        raise AssertionError(f"it broke with {type(seen.crash).__name__}: {seen.crash}") from seen.crash
    if seen.refusal is not None:
        assert len(str(seen.refusal)) > 15, f"the refusal {str(seen.refusal)!r} explains nothing"


@_check(
    "observation",
    "A result is of the declared type, with a row for every image, where and as precise as the model is.",
    "what the function returns",
)
def declared_result(method: AnyMethod, seen: Observation) -> None:
    result = seen.result
    assert type(result).__name__ == method.spec.returns, f"{type(result).__name__}, not {method.spec.returns}"
    found = list(tensors_in(result))
    assert found, "the result holds no tensor"
    # Without a network, float32; and what a training makes has a precision of its own.
    dtype = seen.model.dtype if method.spec.input("model") else None
    for path, tensor in found:
        assert tensor.device == seen.model.device, f"{path} is on {tensor.device}"
        assert not tensor.is_inference(), f"{path} was made in inference mode: no gradient can ever pass it"
        assert tensor.grad_fn is None, f"{path} still carries a graph: detach it"
        if tensor.is_floating_point() and dtype is not None and not isinstance(result, TrainedNetwork):
            assert tensor.dtype == dtype, f"{path} is {tensor.dtype}, the model {dtype}"
    for name in _given_per_image(method, result):
        rows = len(getattr(result, name))
        assert rows == seen.case.count, f"{name} has {rows} rows for {seen.case.count} images"


def _given_per_image(method: AnyMethod, result: Result) -> list[str]:
    """The fields with a row for every image of the call, without those that are None."""
    per_image = any(i.required and ROLES[i.role].per_image for i in method.spec.inputs)
    return [name for name in result.per_image if per_image and getattr(result, name) is not None]


def _image_inputs(method: AnyMethod, inputs: dict[str, Any]) -> bool:
    """Whether the number of images follows from the inputs."""
    required = (i for i in method.spec.inputs if i.required)
    return any("images" in ROLES[i.role].cost_sizes(inputs[i.name]) for i in required)


@_check("observation", "Every number in a result is finite.", "divisions by a range, a norm or a sum of zero")
def finite(method: AnyMethod, seen: Observation) -> None:
    for path, tensor in tensors_in(seen.result):
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{path} holds NaN or infinity"


@_check("run", "Inputs are not changed.", "in-place operations on an input: clone it first")
def inputs_unchanged(method: AnyMethod, seen: Observation) -> None:
    now = input_tensors(seen.inputs)
    kept = {} if seen.result is None else input_tensors(seen.result.inputs)
    for name, given in seen.given.items():
        assert not now[name].requires_grad, f"{name} was left with requires_grad"
        assert torch.equal(now[name], given), f"{name} was changed"
        if name in kept:
            assert torch.equal(kept[name], given.to(kept[name])), f"{name} was changed inside the method"


@_check(
    "run",
    "The model is as it was: weights, flags, gradients, hooks, mode.",
    "model.tap and rewrite_backward restore what they touch; register no hooks and train nothing yourself",
)
def model_unchanged(method: AnyMethod, seen: Observation) -> None:
    assert not seen.model_changes, f"it changed {'; '.join(seen.model_changes)}"


@_check(
    "run",
    "It leaves nothing behind: no file, thread, setting, random state or output.",
    "write only where the user says; give randomness its own generator; report through progress(...)",
)
def leaves_no_trace(method: AnyMethod, seen: Observation) -> None:
    assert not seen.traces, "; ".join(seen.traces)


@_check(
    "observation",
    "It never takes more forward and backward passes than its cost foretells.",
    "cost=Cost(forward=..., backward=...), and passes inside loops",
    lambda method: None if method.spec.cost else "it declares no cost",
)
def within_cost(method: AnyMethod, seen: Observation) -> None:
    assert method.spec.cost is not None
    params = method.validate(seen.result.provenance.params)
    known = sizes(method, seen.case)
    if not _image_inputs(method, seen.inputs):
        known["images"] = len(getattr(seen.result, "images", ()))
    forward, backward = method.spec.cost.evaluate(params, **known)
    went = seen.traffic
    assert went.forward <= forward, f"{went.forward} images went forward, {forward} were foretold"
    assert went.backward <= backward, f"{went.backward} images went backward, {backward} were foretold"


@_check(
    "run",
    "With its quick parameters, a call on a small network takes seconds.",
    "quick={...}: name every parameter that makes a call long, and a value that keeps it short",
)
def quick_is_quick(method: AnyMethod, seen: Observation) -> None:
    assert seen.seconds < SLOW, f"it took {seen.seconds:.0f} seconds"


@_check(
    "observation",
    "Long work tells how far it is, truthfully.",
    "for x in phosphene.progress(iterable, 'words'): ...",
)
def shows_progress(method: AnyMethod, seen: Observation) -> None:
    if not seen.events:
        passes = seen.traffic.passes
        assert passes <= LONG, f"{passes} forward passes, and not one progress event"
    counted: dict[str, int] = {}
    for event in seen.events:
        assert event.done >= 1 and (event.total is None or event.done <= event.total), f"{event} cannot be"
        # A count goes up by one, or starts again for the next batch.
        expected = counted.get(event.description, 0) + 1
        assert event.done in (expected, 1), f"{event} follows {expected - 1}"
        counted[event.description] = event.done


@_check(
    "observation",
    "What is called a success is one, by the model's own word.",
    "AdversarialExamples.judged reads it from the logits",
    lambda method: None if method.result is AdversarialExamples else "it attacks nothing",
)
def honest_success(method: AnyMethod, seen: Observation) -> None:
    result = seen.result
    with seen.model.guard(), torch.no_grad():
        logits = seen.model(result.adversarial)
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-5 * best[:, 0].abs()
    after = logits.argmax(1)
    truth = after.eq(result.labels) if result.targeted else after.ne(result.labels)
    for n in clear.nonzero().flatten().tolist():
        assert int(result.after[n]) == int(after[n]), (
            f"image {n} is said to be taken for class {int(result.after[n])}, the model says {int(after[n])}"
        )
        claimed = bool(result.success[n])
        assert claimed == bool(truth[n]), (
            f"image {n} is called {'a success' if claimed else 'a failure'}, it is not"
        )


# --- what several runs show --------------------------------------------------------------------


def _first(method: AnyMethod, case: Case, **changed: Any) -> tuple[Any, dict[str, Any]] | None:
    """A case's result and inputs; None where the method refuses it."""
    model = case.model()
    try:
        return case.run(method, model, **changed), case.inputs(method, model)
    except PhospheneError:
        return None


def _others(case: Case) -> Iterator[Case]:
    """The case, and the same on the other networks, for methods that are made for some of them."""
    yield case
    yield from (replace(case, network=name) for name in network_names() if name != case.network)


def _batched(method: AnyMethod) -> str | None:
    if not method.spec.batch_independent:
        return "it declares that its images depend on each other (batch_independent=False)"
    return None


@_check(
    "case",
    "The same seed gives the same bits, whatever ran before.",
    "draw from torch.Generator().manual_seed(seed) or declare a Seed parameter, which seeds torch",
)
def same_seed_same_bits(method: AnyMethod, case: Case) -> None:
    if (first := _first(method, case)) is None:
        return
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        again = _first(method, case)
    assert again is not None, "it was refused the second time"
    assert_alike(first[0], again[0])


@_check(
    "method",
    "Another seed gives another result.",
    "the Seed parameter: pass it on to what draws, or leave it out",
    lambda method: None if method.seed else "it draws nothing",
)
def seed_matters(method: AnyMethod) -> None:
    tried, seed = 0, str(method.seed)
    # It may matter under one choice of one parameter only.
    for case in (Case(), Case("functional", "noise"), *plain_cases(method, all_pairs=False)):
        results = [_first(method, replace(case, params={**case.params, seed: n})) for n in (0, 1, 2)]
        for other in results[1:]:
            if results[0] is not None and other is not None:
                tried += 1
                try:
                    assert_alike(results[0][0], other[0])
                except AssertionError:
                    return
    assert not tried, f"seeds 0, 1 and 2 gave the same result {tried} times"


@_check(
    "method",
    "Another target gives another result.",
    "scores(model, images, target), which reads what was asked for; or leave the target out",
    lambda method: None if method.spec.input("target") else "it takes no target",
)
def target_matters(method: AnyMethod) -> None:
    tried = 0
    # Where nothing depends on the picture, it may be the same nothing for every class.
    for case in (Case(), Case("functional", "noise"), *_others(Case(pictures="noise"))):
        results = (_first(method, replace(case, target=n)) for n in (0, 1, 2))
        made = [[t.clone() for _, t in tensors_in(r[0])] for r in results if r is not None]
        for other in made[1:]:
            tried += 1
            if not all(torch.equal(*pair) for pair in zip(made[0], other, strict=True)):
                return
    assert not tried, f"targets 0, 1 and 2 gave the same result {tried} times"


@_check(
    "case",
    "A result stays as it is, whatever happens afterwards.",
    "results that are views of a weight, or of a buffer that the next call fills: clone them",
)
def results_stay(method: AnyMethod, case: Case) -> None:
    model = case.model()
    inputs = case.inputs(method, model)
    try:
        result = method(**inputs, **case.arguments(method))
    except PhospheneError:
        return
    given = [(path, tensor, tensor.clone()) for path, tensor in tensors_in(result)]

    def stays(what: str) -> None:
        for path, tensor, kept in given:
            assert torch.equal(tensor, kept), f"{path} of an earlier result changed with {what}"

    with suppress(PhospheneError):
        replace(case, pictures="scenes" if case.pictures == "noise" else "noise").run(method, model)
    stays("the next call")
    with torch.no_grad():
        for weight in model.module.state_dict().values():
            weight.add_(1)
        stays("the model's weights")
        for tensor in input_tensors(inputs).values():
            tensor.zero_()
        stays("the caller's inputs")


@_check(
    "case",
    "A batch gives what its images give one by one.",
    "statistics over the batch axis; noise drawn per batch instead of once, (1, C, H, W)",
    _batched,
)
def batch_as_single(method: AnyMethod, case: Case) -> None:
    # Where a gradient is nothing but rounding, its sign is nobody's promise.
    value_text = case.pictures in ("scenes", "noise") and case.network not in ("constant", "saturated")
    case = replace(case, double=True, count=3, pictures=case.pictures if value_text else "noise",
                   network=case.network if value_text else "gap")  # fmt: skip
    if (whole := _first(method, case)) is None:
        return
    with max_batch(2):
        split = _first(method, case)
    assert split is not None, "it is refused when at most two images may be run at once"
    _close(split[0], whole[0], "at most two images at once")
    result, inputs = whole
    if not (fields := _given_per_image(method, result)):
        return
    for n in range(case.count):
        alone = {
            i.name: ROLES[i.role].select(inputs[i.name], range(n, n + 1))
            for i in method.spec.inputs
            if ROLES[i.role].per_image and inputs[i.name] is not None
        }
        single = case.run(method, None, **alone)
        for name in fields:
            _close(getattr(single, name), getattr(result, name)[n : n + 1], f"{name} of image {n} alone")


def _close(got: Any, want: Any, what: str) -> None:
    try:
        assert_alike(got, want, rtol=1e-6, atol=1e-8)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


@_check(
    "case",
    "When work breaks half-way, by an error or by Ctrl-C, the error comes out and the model is as it was.",
    "except clauses that catch too much; what is changed by hand and not restored in a finally",
)
def clean_after_errors(method: AnyMethod, case: Case) -> None:
    model = case.model()
    record_structure(model, case.inputs(method, model))
    told: list[ProgressEvent] = []
    try:
        with traffic(model.module) as seen, report_progress(told.append):
            case.run(method, model)
    except PhospheneError:
        return
    before, randomness = state_of(model), torch.get_rng_state()

    def comes_out(error: BaseException, where: str, trouble: AbstractContextManager[None]) -> None:
        try:
            with trouble:
                case.run(method, model)
        except BaseException as caught:
            if caught is not error and not _passed_on(caught, error):
                raise
        else:
            # A pass may end below the layer that was to break.
            if error.__traceback__ is not None:
                raise AssertionError(f"{type(error).__name__} {where} was swallowed")
        changed = changes(before, state_of(model))
        assert not changed, f"after {type(error).__name__} {where} it left changed {'; '.join(changed)}"
        assert torch.equal(torch.get_rng_state(), randomness), "the random state changed"
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "gradients were left off"

    # A method that looks at weights alone never runs the model, and has no half-way.
    for at in sorted({1, (seen.passes + 1) // 2, seen.passes} if seen.passes else ()):
        for error in (ArithmeticError("a layer broke"), KeyboardInterrupt()):
            comes_out(error, f"in forward pass {at} of {seen.passes}", breaking(model.module, at, error))
    if told:
        stop = KeyboardInterrupt()

        def cancel(event: ProgressEvent) -> None:
            raise stop

        comes_out(stop, "at the first progress event", report_progress(cancel))


def _passed_on(caught: BaseException, error: BaseException) -> bool:
    """Whether an error was passed on in other words, as it may be; an interruption may not."""
    return isinstance(error, Exception) and error in (caught.__cause__, caught.__context__)


@_check(
    "case",
    "A saved result comes back the same, and run again comes out the same.",
    "fields of the result type that cannot be saved; inputs that are not recorded",
)
def saves_and_replays(method: AnyMethod, case: Case) -> None:
    model = case.model()
    try:
        result = case.run(method, model)
    except PhospheneError:
        return
    with tempfile.TemporaryDirectory() as folder:
        place = result.save(Path(folder, "result"))
        back = load_result(place)
        assert type(back) is type(result), f"a {type(back).__name__} came back"
        assert_alike(back, result)
        assert back.provenance == result.provenance, "the provenance came back changed"
        assert_alike(back.inputs, result.inputs)
        made: dict[str, Any] = {}
        for declared in method.spec.inputs:
            value = model if declared.role == "model" else back.inputs[declared.name]
            if isinstance(value, str) and value.endswith(AS_OBJECT):
                return  # a data set in memory, or a callable: no folder holds it
            made[declared.name] = ROLES[declared.role].make(
                value, InputContext(model_for_inputs(model, made), made, load_result)
            )
        assert back.provenance is not None
        again = method(**made, **back.provenance.params)
    try:
        assert_alike(again, result)
    except AssertionError as error:
        raise AssertionError(f"run again from what was saved, it comes out different: {error}") from None


@_check(
    "observation",
    "A result shows itself in pictures: (3, H, W), finite, in [0, 1].",
    "the result type's panels(), and what they are given",
)
def pictures_in_range(method: AnyMethod, seen: Observation) -> None:
    shown = [panel.image for group in seen.result.panels() for panel in group]
    assert shown, "it has no panels"
    for image in shown:
        assert image.ndim == 3 and len(image) == 3, f"a panel has the shape {tuple(image.shape)}"
        assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1, "a panel is not in [0, 1]"


@_check(
    "method",
    "On a real network and pictures of real things, what it shows is not blank.",
    "what panels() draws; how maps are scaled",
)
def shows_something(method: AnyMethod) -> None:
    found = (_first(method, case) for case in _others(Case("shapes-vgg")))
    result = next((first[0] for first in found if first is not None), None)
    if result is None:
        return  # of what it never gives there is nothing to see
    shown = [panel.image for group in result.panels() for panel in group]
    assert any(image.amax() - image.amin() > 0.05 for image in shown), "every panel is blank"
    drawn = Image.open(io.BytesIO(result.png())).convert("RGB")
    assert len(drawn.getcolors(maxcolors=2**24) or ()) > 20, "the figure is blank"
    assert "<img" in result._repr_html_(), "a notebook would show no picture"


@_check(
    "case",
    "Two runs on one model at the same time do not disturb each other.",
    "state kept in the module, the model or a global",
)
def threads_apart(method: AnyMethod, case: Case) -> None:
    if (first := _first(method, case)) is None:
        return
    model = case.model()
    results: list[Any] = [None, None]

    def work(place: int) -> None:
        try:
            results[place] = case.run(method, model)
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise AssertionError(
                f"beside another run it broke: {type(result).__name__}: {result}"
            ) from result
        assert isinstance(result, Result)
        assert_alike(result, first[0])


@_check(
    "method",
    "Run again and again it takes no more memory.",
    "lists and caches that keep results; closures that keep graphs",
)
def no_leak(method: AnyMethod) -> None:
    case = next((c for c in _others(Case(count=1)) if _first(method, c) is not None), None)
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


@_check(
    "method",
    "It runs on a GPU and gives its results there.",
    "tensors made without device=",
    lambda method: None if torch.cuda.is_available() else "there is no CUDA device here",
)
def runs_on_cuda(method: AnyMethod) -> None:
    model = make_network("gap")
    model.module.cuda()
    result = Case().run(method, model)
    wrong = [path for path, tensor in tensors_in(result) if tensor.device.type != "cuda"]
    assert not wrong, f"on the CPU: {', '.join(wrong)}"


# --- what is refused -----------------------------------------------------------------------------


def _assert_refused(method: AnyMethod, inputs: dict[str, Any], params: dict[str, Any], what: str) -> None:
    model = next((v for v in inputs.values() if hasattr(v, "module")), make_network("double"))
    record_structure(model, inputs)
    with traffic(model.module) as seen:
        try:
            method(**inputs, **params)
        except PhospheneError as refusal:
            sentence = str(refusal)
        except Exception as crash:
            raise AssertionError(f"{what} ended in {type(crash).__name__}: {crash}") from crash
        else:
            raise AssertionError(f"{what} was accepted")
    assert seen.passes == 0, f"{what} was refused after {seen.passes} forward passes"
    assert len(sentence) > 15, f"{what}: {sentence!r} explains nothing"


@_check(
    "method",
    "Bad input is refused in a sentence, before any work.",
    "roles check what they can; check the rest in the first lines of the function",
)
def refuses_bad_input(method: AnyMethod) -> None:
    case = Case("double", count=3)
    inputs = case.inputs(method, case.model())
    params, owner = case.arguments(method), method.spec.input("model")
    for declared in method.spec.inputs:
        context = InputContext(inputs[owner.name] if owner else None, inputs)
        for what, value in ROLES[declared.role].bad_values(inputs[declared.name], context):
            _assert_refused(method, inputs | {declared.name: value}, params, f"{declared.name}: {what}")
        if declared.required:
            rest = {n: v for n, v in inputs.items() if n != declared.name}
            _assert_refused(method, rest, params, f"a call without {declared.name}")


@_check(
    "method",
    "Parameters outside their bounds, unknown ones and unknown layers are refused, before any work.",
    "bounds stand in the annotation: Annotated[float, Field(gt=0)]; layers are LayerName",
)
def refuses_bad_parameters(method: AnyMethod) -> None:
    case = Case("double", count=3)
    inputs, params = case.inputs(method, case.model()), case.arguments(method)
    _assert_refused(method, inputs, params | {"no_such_parameter": 1}, "an unknown parameter")
    for name, schema in properties_of(method.spec.params_schema).items():
        bad = ["no_such_layer", ["no_such_layer"]] if name in method.layers else out_of_bounds(schema)
        for value in bad:
            _assert_refused(method, inputs, params | {name: value}, f"{name}={value!r}")


def out_of_bounds(schema: dict[str, Any]) -> list[Any]:
    """Values just outside what a parameter's schema allows, and one of another kind."""
    branches = schema.get("anyOf", [schema])
    if any(b.get("type") == "string" and "enum" not in b for b in branches):
        return []  # a free string takes anything
    found: list[Any] = ["no such value"]
    for branch in branches:
        step = 1 if branch.get("type") == "integer" else 1e-3
        if "minimum" in branch:
            found.append(branch["minimum"] - step)
        if "maximum" in branch:
            found.append(branch["maximum"] + step)
        found += [branch[bound] for bound in ("exclusiveMinimum", "exclusiveMaximum") if bound in branch]
        if branch.get("type") == "number":
            found.append(float("nan"))
    return found
