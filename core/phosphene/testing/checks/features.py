"""Check of features as inputs: results from features equal those from the model and the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...models.optimized_copy import MIN_PASSES
from ...registry.lookup import methods
from ..cases import Case
from ..observation import assert_same_result, count_passes
from .base import register_check
from .work import accepted_case

if TYPE_CHECKING:
    from .base import AnyMethod

#: Images of the data sets: enough for an optimized copy of the model, whose features differ in the last digits.
_IMAGES = MIN_PASSES + 2


@register_check(
    "method",
    "Results from features equal those from the model and the images, bit for bit.",
    "features in place of a data set: nothing else may be read from the data set or the model",
    lambda method: (
        None if any(i.role == "features" for i in method.spec.inputs) else "it takes no features as input"
    ),
)
def features_replace_images(method: AnyMethod) -> None:
    case = accepted_case(method, Case(pictures="noise", dataset=_IMAGES))
    if case is None:
        return
    model = case.model()
    inputs, params = case.inputs(method, model), case.arguments(method)
    expected = dict(method(**inputs, **params).fields())
    features: dict[str, Any] = {}
    for declared in (i for i in method.spec.inputs if i.role == "features"):
        (name,) = declared.replaces
        features[declared.name] = methods["embed"](model, inputs[name])
        try:  # both are passed: which one counts would be a guess
            method(**inputs | {declared.name: features[declared.name]}, **params)
        except InputError as error:
            assert declared.name in str(error) and name in str(error), f"it names one reading only: {error}"
        else:
            raise AssertionError(f"{declared.name} is accepted together with {name}")
        _assert_same(method, inputs, {declared.name: features[declared.name]}, params, expected)
    _assert_same(method, inputs, features, params, expected)
    owner = method.spec.input("model")
    if owner is None or owner.name in method.spec.replaced_inputs(features):
        with count_passes(model.module) as passes:
            _assert_same(method, inputs, features, params, expected)
        assert passes.started == 0, f"{passes.started} passes through a model whose features were passed"


def _assert_same(
    method: AnyMethod,
    inputs: dict[str, Any],
    features: dict[str, Any],
    params: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    """Assert that a call with features has the same fields, where it has them, as with images."""
    replaced = method.spec.replaced_inputs(features)
    rest = {name: value for name, value in inputs.items() if name not in replaced}
    result = dict(method(**rest | features, **params).fields())
    # Names of sets are those of the data sets, or of the folders of the features.
    both = [n for n, v in expected.items() if n != "names" and v is not None and result[n] is not None]
    assert_same_result({n: result[n] for n in both}, {n: expected[n] for n in both}, rtol=0, atol=0)
