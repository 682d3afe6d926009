"""Check of a published technique against the first-party method that implements it as well."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import PhospheneError
from ...images.color import enlarge_maps
from ...models import Model, load_model
from ...registry.lookup import methods
from ...results import AdversarialExamples, Attribution, Stylization, Synthesis, TrainedNetwork
from ...spec.relations import baseline_of
from ...torch_state import fork_random_state, seed_generators
from ..candidates import largest_accepted
from ..cases import Case, _choices, properties_of
from ..observation import tensors_in
from ..techniques import Twin, first_party_twins, same_meaning
from .arithmetic import _as_layer
from .base import register_check
from .relations import RandomDraws, RelationCalls, draws_random_numbers, prose_of, text_of
from .work import accepted_case

if TYPE_CHECKING:
    from .base import AnyMethod

#: Points of a quadrature, at which right ones agree, and steps of an attack.
_POINTS, _STEPS = 128, 8
#: The largest difference of the maps, as a fraction of their norm: of equal sums, and of other quadratures or
#: enlarged maps. The largest fraction of pixels in which adversarial images differ.
_EQUAL, _NEAR, _PIXELS = 1e-3, 0.02, 0.002
#: Parameters of a grid of windows, and a side of windows that divides those of the relation networks' images.
_GRID, _CELL = r"window|stride|patch|kernel|cell|grid|block|tile", 8
#: Parameters that change the work or the display of a result, not its values up to a factor.
_WORK = re.compile(r"batch|chunk|workers|normali[sz]e|enlarge|upsample|resize|full_size|per_pixel")
#: Parameters that a result shows by its shape, and the layer, for which each is tried.
_SAME_DEFAULT = ("layer", "components")
#: Names of uniform baselines by their value.
_UNIFORM = {0.0: ("zero", "black"), 0.5: ("gray", "grey"), 1.0: ("white",)}
#: Words for another score than the logit, and for channels that are joined in another way.
_OTHER_SCORE = r"probab|softmax|confidence|cross-?entropy|log-?likelihood|\bloss\b|contrast|margin"
_REDUCTIONS = {
    "max_c": ("the maximum", r"\bmax|largest"),
    "sum_c": ("the sum", r"\bsum|\+|\btotal"),
    "||": ("the norm", r"\bnorm\b|\|\|"),
}


@functools.lru_cache(8)
def _twins(method: AnyMethod) -> list[Twin]:
    return first_party_twins(method)


def _no_twin(method: AnyMethod) -> str | None:
    if not method.spec.references and not method.spec.relations:
        return "it cites no source"
    return None if _twins(method) else "no first-party method has its source and its name"


@register_check(
    "method",
    "A published technique has the same result as the first-party method of that technique.",
    "the source's equation, term by term. A variant says so in its title or summary ('... without ...'); a "
    "deliberate difference is declared by exempt={'second_opinion': 'the reason'}",
    _no_twin,
    exemptible=True,
)
def second_opinion(method: AnyMethod) -> None:
    # With several first-party methods of its source and its name, it has to agree with one of them.
    failures: list[AssertionError] = []
    skipped: list[str] = []
    for twin in _twins(method):
        try:
            _compare(method, twin)
        except AssertionError as failure:
            failures.append(failure)
        except SkipTest as note:
            skipped.append(str(note))
        else:
            return
    if skipped:
        raise SkipTest("; ".join(dict.fromkeys(skipped)))
    raise failures[0]


def _compare(method: AnyMethod, twin: Twin) -> None:
    if issubclass(method.result, Attribution):
        _compare_attributions(method, twin)
    elif issubclass(method.result, AdversarialExamples):
        _compare_attacks(method, twin)
    else:
        _compare_values(method, twin)


def _difference(method: AnyMethod, twin: Twin, size: str, setting: str) -> str:
    library = twin.method.spec
    return (
        f"{method.spec.name} and {library.name}, the first-party method of the same technique, differ {size} "
        f"{setting}; {twin.evidence}. Either it has a mistake, or it is a variant: then exempt={{"
        "'second_opinion': 'the reason'} or a source of its own says so"
    )


# --- parameters ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """The parameters of both methods with the same meaning."""

    own: dict[str, Any]
    library: dict[str, Any]

    def __str__(self) -> str:
        values = {n: v for n, v in self.own.items() if isinstance(v, (int, float, str))}
        return f"with {', '.join(f'{n}={v!r}' for n, v in values.items())}" if values else "by default"


def _is_off(name: str, value: Any) -> bool:
    """Whether a parameter with this default adds nothing to a technique that does not have it."""
    if re.search(r"samples|restarts|copies|repeats", name):
        return value in (None, 0, 1)
    return value in (None, False, 0, (), [], "", "none") or (name in ("relu", "rectify") and value is True)


def _names_default(name: str, value: Any, text: str) -> bool:
    """Whether a text names the default of a parameter that its method does not have."""
    words = {
        ("norm", "linf"): r"\bsign\b|\bl_?inf",
        ("baseline", "zero"): r"black|\bzero",
        ("baseline", "gray"): r"\bgr[ae]y|\b0\.5\b",
    }.get((name, value))
    return words is not None and re.search(words, text) is not None


#: The most settings of the parameters that only one of them has.
_MOST_SETTINGS = 16


def _settings(
    method: AnyMethod, twin: Twin, values: Mapping[str, Any], classifier: str | None = None
) -> list[_Setting]:
    """Equal values for parameters that both have, by library names. Of those that only one has each choice,
    and the values that switch it off: agreement under one of these settings suffices. ``classifier``: the
    layer that a library's layers may also be, where only it can name layers.

    Raises SkipTest where a parameter that only one has may change the result whatever its value.
    """
    library, text = twin.method, text_of(method)
    own_fields, library_fields = method.spec.params.model_fields, library.spec.params.model_fields
    own = _defaults(method)
    passed: dict[str, Any] = {}
    own_values: dict[str, list[Any]] = {}
    library_values: dict[str, list[Any]] = {}
    for name in own_fields:
        if name == method.seed:
            continue
        if (other := same_meaning(name, library_fields)) is not None:
            value = values.get(other, own.get(name))
            own[name] = value
            passed[other] = _accepted(library, other, value)
        elif name in ("random_start", "random_init"):
            own[name] = False
        elif not _is_off(name, own.get(name)) and not _WORK.search(name):
            own_values[name] = [own.get(name), *_other_values(method, own, name)]
            if len(own_values[name]) == 1:
                raise SkipTest(f"only {method.spec.name} has {name}, with the default {own.get(name)!r}")
    usual = _defaults(library)
    axes = {axis for shape in library.result.shapes.values() for axis in shape.split()}
    for name in library_fields:
        if name in passed or name == library.seed:
            continue
        value = values.get(name, usual.get(name))
        if name in twin.named:  # "MI-FGSM" without a parameter for the momentum: the paper's 1
            value = 1.0
        elif name == "random_start":
            value = False
        elif name == "step_size" and re.search(r"eps(ilon)? ?/ ?(n|t|steps|iterations)\b", text):
            value = values["eps"] / values["steps"]
        elif name not in _SAME_DEFAULT and not _is_off(name, value) and not _names_default(name, value, text):
            choices = _choices(properties_of(library.spec.params_schema)[name])
            if choices:
                library_values[name] = [value, *(choice for choice in choices if choice != value)]
            elif name not in axes:  # the length of an axis of other fields changes no value
                raise SkipTest(f"only {library.spec.name} has {name}, with the default {value!r}")
        passed[name] = value
        if name in library.layers and classifier is not None and name not in library_values:
            forms = _as_layer(properties_of(library.spec.params_schema)[name], classifier)
            library_values[name] = [value, *forms]
    extras = itertools.product(*own_values.values(), *library_values.values())
    settings = []
    for chosen in itertools.islice(extras, _MOST_SETTINGS):
        own_chosen = dict(zip(own_values, chosen, strict=False))
        library_chosen = dict(zip(library_values, chosen[len(own_values) :], strict=True))
        settings.append(
            _Setting(_validated(method, own | own_chosen), _validated(library, passed | library_chosen))
        )
    return settings


def _other_values(method: AnyMethod, params: Mapping[str, Any], name: str) -> list[Any]:
    """The other choices of a parameter, or the number that switches it off or is neutral: 0 or 1."""
    schema = properties_of(method.spec.params_schema)[name]
    usual = params.get(name)
    others = [v for v in _choices(schema) or (0, 1) if v != usual]
    if isinstance(usual, (list, tuple, str)):
        others = [value for value in others if value not in (0, 1)]
    return [value for value in others if _accepts(method, params, name, value)]


def _accepts(method: AnyMethod, params: Mapping[str, Any], name: str, value: Any) -> bool:
    try:
        method.validate({**params, name: value})
    except PhospheneError:
        return False
    return True


def _defaults(method: AnyMethod) -> dict[str, Any]:
    """The defaults, and the quick values of parameters without one."""
    fields = method.spec.params.model_fields
    quick = {name: v for name, v in method.spec.quick.items() if fields[name].is_required()}
    try:
        return {n: v for n, v in method.validate(quick).items() if n != method.seed}
    except PhospheneError as refusal:
        raise SkipTest(f"a parameter of {method.spec.name} has no default: {refusal}") from None


def _accepted(library: AnyMethod, name: str, value: Any) -> Any:
    """A value as the library's parameter writes it: 0.0 may be "zero"."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    spellings = _UNIFORM.get(float(value), ()) if number else ()
    for candidate in (value, *spellings, *_same_baseline(value)):
        if _accepts(library, {}, name, candidate):
            return candidate
    raise SkipTest(f"{library.spec.name} has no {name}={value!r}")


def _same_baseline(value: Any) -> Iterator[Any]:
    """The spellings of a uniform baseline of the library."""
    if isinstance(value, str) and (images := baseline_of(torch.zeros(1, 1, 1, 1), value)) is not None:
        yield from _UNIFORM.get(float(images), ())


def _validated(method: AnyMethod, params: dict[str, Any]) -> dict[str, Any]:
    try:
        method.validate(params)
    except PhospheneError as refusal:
        raise SkipTest(f"{method.spec.name} refused the setting: {refusal}") from None
    return params


def _count(method: AnyMethod, twin: Twin, name: str, most: int) -> dict[str, int]:
    """The largest count up to ``most`` that both accept."""
    if name not in twin.method.spec.params.model_fields:
        return {}
    own = next((n for n in method.spec.params.model_fields if same_meaning(n, (name,))), None)
    if own is not None:
        most = largest_accepted(method, _defaults(method), own, most)
    return {name: most}


def _inputs_of_twin(method: AnyMethod, twin: Twin, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A method's inputs by the names that they have in its twin, matched by their roles."""
    values = {declared.role: inputs[declared.name] for declared in method.spec.inputs}
    return {i.name: values[i.role] for i in twin.method.spec.inputs if i.role in values}


def _run_both(method: AnyMethod, twin: Twin, setting: _Setting, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The results of both on the same inputs, by role. Raises SkipTest where one is random or refuses."""
    shared = _inputs_of_twin(method, twin, inputs)
    model = next((inputs[i.name] for i in method.spec.inputs if i.role == "model"), None)
    try:
        with RandomDraws() as draws:
            own = method(**inputs, **setting.own)
        if draws.count and draws_random_numbers(method, model, inputs, setting.own, own):
            raise SkipTest("it draws random numbers")
        seeded = {} if twin.method.seed is None else {twin.method.seed: 7}
        with RandomDraws() as draws:
            library = twin.method(**shared, **setting.library, **seeded)
        if draws.count and draws_random_numbers(twin.method, model, shared, setting.library, library):
            raise SkipTest(f"{twin.method.spec.name} draws random numbers")
    except PhospheneError as refusal:
        raise SkipTest(f"it was refused: {refusal}") from None
    return own, library


# --- attributions --------------------------------------------------------------------------------------


def _compare_attributions(method: AnyMethod, twin: Twin) -> None:
    text, usual = prose_of(method), prose_of(twin.method)
    if re.search(_OTHER_SCORE, text) and not re.search(_OTHER_SCORE, usual):
        raise SkipTest("its text names another score than the logit")
    if not twin.method.layers:
        for symbol, (what, pattern) in _REDUCTIONS.items():
            if symbol in usual and not re.search(pattern, text):
                raise SkipTest(
                    f"its text does not name {what} over the channels, as the first-party one does"
                )
    counts = _count(method, twin, "steps", _POINTS)
    grid = _exact_grid(method, twin)
    notes: list[str] = []
    compared = 0
    for network in ("curved",) if counts else ("gap", "flat", "tokens"):
        if network == "tokens" and compared:
            break
        try:
            calls = RelationCalls.start(method, network, Case().arguments(method))
        except PhospheneError as refusal:
            notes.append(f"it was refused: {refusal}")
            continue
        for layer in _layers(calls.model, method, twin):
            errors: list[tuple[float, float, _Setting]] = []
            try:
                settings = _settings(method, twin, counts | grid | layer)
            except SkipTest as note:
                notes.append(str(note))
                continue
            for setting in settings:
                try:
                    own, library = _run_both(method, twin, setting, calls.inputs)
                except SkipTest as note:
                    notes.append(str(note))
                    continue
                error = _difference_of_maps(own.maps, library)
                near = bool(counts) or own.maps.shape != library.maps.shape
                allowed = _NEAR if near else _EQUAL
                if error > allowed and twin.method.layers and not layer:
                    error = min(error, _difference_at_other_layers(own, twin, setting, calls))
                errors.append((error, allowed, setting))
                if error <= allowed:
                    break
            if not errors:
                continue
            compared += 1
            error, allowed, setting = min(errors, key=lambda row: row[0] / row[1])
            assert error <= allowed, _difference(
                method,
                twin,
                f"by {error:.1%} of the norm of the maps, up to a factor ({allowed:.1%} is allowed),"
                if error < float("inf")
                else "so that one has a map of zeros and the other has not,",
                f"{setting}, on relation_network({network!r}), its images and target {calls.setting.target}",
            )
    if not compared:
        raise SkipTest("; ".join(dict.fromkeys(notes)) or "no network was accepted")


def _exact_grid(method: AnyMethod, twin: Twin) -> dict[str, int]:
    """Windows side by side that fit the images exactly: at borders, conventions differ."""
    names = [
        name
        for name, schema in properties_of(twin.method.spec.params_schema).items()
        if re.search(_GRID, name)
        and "integer" in [branch.get("type") for branch in schema.get("anyOf", [schema])]
    ]
    if missing := [name for name in names if not same_meaning(name, method.spec.params.model_fields)]:
        raise SkipTest(f"only {twin.method.spec.name} has {missing[0]}")
    return dict.fromkeys(names, _CELL)


def _layers(model: Model, method: AnyMethod, twin: Twin) -> list[dict[str, Any]]:
    """The layers at which both are compared: by name where both have the parameter."""
    names = [n for n in twin.method.layers if any(same_meaning(o, (n,)) for o in method.layers)]
    if not names:
        return [{}]
    maps = [n for n, info in model.structure.layers.items() if len(info.shape or ()) == 3]
    return [{names[0]: layer} for layer in dict.fromkeys((model.last_map, *maps[:1]))]


def _difference_at_other_layers(own: Any, twin: Twin, setting: _Setting, calls: RelationCalls) -> float:
    """The least difference from the twin's map of any layer: without a name, both need not read the same."""
    (name,) = twin.method.layers[:1]
    shared = _inputs_of_twin(calls.method, twin, calls.inputs)
    errors = [float("inf")]
    for layer, info in calls.model.structure.layers.items():
        if len(info.shape or ()) != 3:
            continue
        try:
            library = twin.method(**shared, **(setting.library | {name: layer}))
        except PhospheneError:
            continue
        errors.append(_difference_of_maps(own.maps, library))
    return min(errors)


def _difference_of_maps(own: Tensor, library: Any) -> float:
    """The norm of the difference as a fraction of that of the maps, up to a positive factor and a resampling.

    Maps that are scaled by image, so that all have the same maximum, are compared image by image.
    """
    own = own.double()
    errors = []
    for maps in _resampled(library, own.shape[1:]):
        if maps.shape == own.shape:
            errors.append(_scaled_difference(own, maps.double()))
        elif maps.shape[0] == own.shape[0]:  # the own maps are smaller
            larger = enlarge_maps(own, maps.shape[1:])
            errors.append(_scaled_difference(larger, maps.double()))
    return min(errors, default=float("inf"))


def _resampled(library: Any, size: tuple[int, ...]) -> Iterator[Tensor]:
    """The maps of a result at a size, enlarged in each usual way."""
    maps = library.maps
    signed = library.signed_maps if isinstance(getattr(library, "signed_maps", None), Tensor) else None
    yield maps
    if maps.shape[1:] == size or maps.shape[1] > size[0]:
        return
    for small, rectified in ((maps, False), (signed, True)):
        if small is None:
            continue
        enlarged = [enlarge_maps(small, size)]
        if library.centers is not None:
            enlarged.append(enlarge_maps(small, size, library.centers))
        for mode in ("nearest", "bilinear", "bicubic"):
            corners = (None,) if mode == "nearest" else (False, True)
            for align in corners:
                enlarged.append(
                    F.interpolate(small[:, None], size=size, mode=mode, align_corners=align)[:, 0]
                )
        for tensor in enlarged:
            yield tensor.relu() if rectified else tensor


def _scaled_difference(own: Tensor, other: Tensor) -> float:
    if _same_extremes(own):
        from_zero = float(own.flatten(1).amin(1).abs().max()) < 1e-6
        own, other = _unit_norm(own, from_zero), _unit_norm(other, from_zero)
    own, other = own.flatten(), other.flatten()
    size = float(own.norm())
    if size == 0 or float(other.norm()) == 0:
        return 0.0 if size == float(other.norm()) else float("inf")
    factor = max(0.0, float(own @ other / (other @ other)))
    return float((own - factor * other).norm()) / size


def _same_extremes(maps: Tensor) -> bool:
    """Whether the largest absolute value or the norm of each image's map is the same, where it is not 0."""
    rows = maps.flatten(1)[maps.flatten(1).any(1)]
    for sizes in (rows.abs().amax(1), rows.norm(dim=1), rows.abs().sum(1)):
        if len(rows) > 1 and float(sizes.max() - sizes.min()) <= 1e-5 * float(sizes.max()):
            return True
    return False


def _unit_norm(maps: Tensor, from_zero: bool) -> Tensor:
    """Each map with a norm of 1; ``from_zero``: and a least value of 0."""
    rows = maps.flatten(1)
    if from_zero:
        rows = rows - rows.amin(1, keepdim=True)
    return (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).view_as(maps)


# --- attacks -------------------------------------------------------------------------------------------


class _Curved(nn.Module):
    """A network whose gradient changes in size and in shape on the way; its predictions do not change."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, stride=2)
        self.head = nn.Linear(12 * (size // 2) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (3 * self.second((6 * self.first(x)).relu())).square().div(4).tanh()
        logits: Tensor = self.head(x.flatten(1))
        return logits


@functools.cache
def _curved_model() -> Model:
    size = 12
    with fork_random_state():
        seed_generators(23)
        network = _Curved(size).double().eval()
        with torch.no_grad():
            network.head.weight.mul_(2)
            network.head.bias.copy_(torch.tensor([9.0, 0.0, 0.5, -0.5]))
    return load_model(network, input_size=(3, size, size), mean=[0.5] * 3, std=[0.25] * 3)


def _compare_attacks(method: AnyMethod, twin: Twin) -> None:
    names = twin.method.spec.params.model_fields
    if "eps" not in names:
        raise SkipTest("an attack without a radius may end in another point of the boundary")
    if re.search(r"\b(margin|logit difference|c&?w loss|dlr)\b", prose_of(method)):
        raise SkipTest("its text names another loss")
    own_eps = next((n for n in method.spec.params.model_fields if same_meaning(n, ("eps",))), None)
    if own_eps is None or not 0 < float(_defaults(method).get(own_eps) or 0) < 1:
        raise SkipTest("its radius is not in units of pixels in [0, 1]")
    eps = 0.1
    values: dict[str, Any] = {"eps": eps} | _count(method, twin, "steps", _STEPS)
    if "step_size" in names:
        values["step_size"] = eps / 4
    if "momentum" in names and twin.named == ():
        values["momentum"] = 0.0
    if "momentum" in twin.named:
        values["momentum"] = 0.9
    inputs = _attack_inputs(method)
    differences, notes = [], []
    for setting in _settings(method, twin, values):
        try:
            own, library = _run_both(method, twin, setting, inputs)
        except SkipTest as note:
            notes.append(str(note))
            continue
        fraction, largest = _difference_of_attacks(own, library)
        differences.append((fraction, largest, setting))
        if fraction <= _PIXELS:
            return
    if not differences:
        raise SkipTest("; ".join(dict.fromkeys(notes)))
    fraction, largest, setting = min(differences, key=lambda row: row[0])
    raise AssertionError(
        _difference(
            method,
            twin,
            f"in {fraction:.1%} of the pixels of their adversarial images, by up to {largest:.3g}",
            f"{setting}, from the images themselves, in double precision",
        )
    )


def _difference_of_attacks(own: Any, library: Any) -> tuple[float, float]:
    """The fraction of pixels in which the images differ that neither attack changed to another class, and by
    how much they differ at most.
    """
    still = ~(own.success | library.success)
    if not still.any():
        raise SkipTest("each attack succeeded, after which it may stop")
    pixels = (own.adversarial - library.adversarial).abs()[still]
    return float((pixels > 1e-6).double().mean()), float(pixels.max())


def _attack_inputs(method: AnyMethod) -> dict[str, Any]:
    """The curved network, four images and their predicted classes, in double precision."""
    model = _curved_model()
    generator = torch.Generator().manual_seed(4)
    images = 0.2 + 0.6 * torch.rand(4, 3, 12, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        labels = model(images).argmax(1)
    case = Case(double=True, count=len(images), size=(12, 12))
    inputs = case.inputs(method, model)
    for declared in method.spec.inputs:
        if declared.role in ("images", "labels"):
            inputs[declared.name] = images if declared.role == "images" else labels
    return inputs


#: Additions to the iterative method. Parameters of which one value switches an addition off, whatever the
#: others are: a probability, a neighborhood. Others of the same addition, and those of a further one.
_ADDITIONS = r"divers|\bdi\b|\bdim\b|variance|translation|scale[- ]invarian|admix"
_SWITCHES: tuple[tuple[str, float, str], ...] = (
    (r"prob|^p$|chance", 0, r"size|resize|smallest|rate|low|pad"),
    (r"neighbou?rhood|^beta$|bound", 1e-6, r"samples|copies|count|number|neighbou?rs$|^n$"),
)
_OFF: tuple[tuple[str, float], ...] = (
    (r"copies|scales|^m$|^m_?\d$", 1),
    (r"kernel", 1),
    (r"portion|^eta$|mix|strength", 0),
)


def _extends_no_iterative_method(method: AnyMethod) -> str | None:
    spec = method.spec
    title = f"{spec.name} {spec.title} {spec.summary}".lower()
    if not issubclass(method.result, AdversarialExamples) or "fgsm" not in title:
        return "it is no variant of an iterative FGSM"
    if not re.search(_ADDITIONS, title):
        return "its title names no addition that can be switched off"
    if re.search(r"nesterov|look-?ahead|margin|\b(c&?w|dlr) loss", prose_of(method)):
        return "its text names another change, which cannot be switched off"
    return None


@register_check(
    "method",
    "An iterative FGSM without its addition (probability 0, one copy, no neighborhood) is the plain one.",
    "a condition that is inverted; a sum where the mean is meant; what the addition leaves in the next step",
    _extends_no_iterative_method,
    exemptible=True,
)
def without_its_addition_it_is_the_iterative_method(method: AnyMethod) -> None:
    plain = methods["attacks.bim"]
    fields = method.spec.params.model_fields
    common = {n: same_meaning(n, plain.spec.params.model_fields) for n in fields if n != method.seed}
    if not {"eps", "steps", "step_size"} <= set(common.values()):
        raise SkipTest("it has no radius, steps and step size")
    usual = _defaults(method)
    extras = [n for n, other in common.items() if other is None and not _is_off(n, usual.get(n))]
    eps = 0.1
    values = {"eps": eps, "steps": _STEPS, "step_size": eps / 4}
    inputs = _attack_inputs(method)
    settings = list(_switched_off(method, extras, usual))
    if not settings:
        raise SkipTest("no parameter switches its addition off")
    for alternatives in settings:
        fractions = []
        for momentum in (0.0, 1.0):
            named = {n: values.get(o, usual[n]) for n, o in common.items() if o is not None}
            named |= {n: momentum for n, o in common.items() if o == "momentum"}
            shared = _inputs_of_twin(method, Twin(plain, (), ""), inputs)
            library = plain(**shared, **values, momentum=momentum)
            for off in alternatives:
                try:
                    own = method(**inputs, **_validated(method, usual | named | off))
                except PhospheneError as refusal:
                    raise SkipTest(f"it was refused: {refusal}") from None
                fractions.append((_difference_of_attacks(own, library)[0], str(off)))
        fraction, off_text = min(fractions)
        assert fraction <= 5 * _PIXELS, (
            f"with {off_text} it differs from attacks.bim, with or without momentum, in {fraction:.1%} of "
            "the pixels of the adversarial images, in double precision"
        )


def _switched_off(
    method: AnyMethod, extras: list[str], usual: Mapping[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """For each switch, settings of which one has to be the plain method: with and without other additions."""
    others = {
        n: value
        for n in extras
        for words, value in _OFF
        if re.search(words, n) and _accepts(method, usual, n, value)
    }
    switches = [
        (name, value, same)
        for name in extras
        for words, value, same in _SWITCHES
        if re.search(words, name) and _accepts(method, usual, name, value)
    ]
    for name, value, same in switches:
        further = {n: v for n, v in others.items() if n != name and not re.search(same, n)}
        yield [{name: value}, *([{name: value, **further}] if further else [])]
    if others and not switches and len(others) == len(extras):
        yield [others]


# --- numbers -------------------------------------------------------------------------------------------


def _compare_values(method: AnyMethod, twin: Twin) -> None:
    """Tensors and numbers of fields with the same names and shapes; coordinates up to the sign of an axis."""
    if issubclass(method.result, (Stylization, Synthesis, TrainedNetwork)):
        raise SkipTest("optimized images and trained networks need not be equal")
    case = accepted_case(method, Case(pictures="noise", dataset=9, double=True))
    if case is None:
        raise SkipTest("it refused the networks")
    model = case.model()
    inputs = case.inputs(method, model)
    errors, notes = [], []
    linear = [name for name, layer in model.layers.items() if isinstance(layer, nn.Linear)]
    for setting in _settings(method, twin, {}, linear[-1] if linear else None):
        try:
            own, library = _run_both(method, twin, setting, inputs)
        except SkipTest as note:
            notes.append(str(note))
            continue
        if not (fields := list(_field_differences(own, library))):
            raise SkipTest("their results have no field in common")
        error, name = max(fields)
        errors.append((error, name, setting))
        if error <= _EQUAL:
            return
    if not errors:
        raise SkipTest("; ".join(dict.fromkeys(notes)))
    error, name, setting = min(errors, key=lambda row: row[0])
    raise AssertionError(
        _difference(method, twin, f"in {name} by {error:.1%} of its norm", f"{setting}, on {case}")
    )


def _field_differences(own: Any, library: Any) -> Iterator[tuple[float, str]]:
    """The norm of the difference of each field with the same name and shape, as a fraction of the norm."""
    others = dict(tensors_in(library))
    for name, value in tensors_in(own):
        other = others.get(name)
        if other is None or not value.is_floating_point() or value.ndim > 3 or value.shape != other.shape:
            continue
        value, other = value.double().cpu(), other.double().cpu()
        if name == "points":
            signs = (value * other).sum(0).sign()
            other = other * torch.where(signs == 0, torch.ones_like(signs), signs)
        yield float((value - other).norm()) / (float(other.norm()) or 1.0), name
