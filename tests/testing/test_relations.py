"""Relations: networks with the declared symmetry, exact checks of declared relations, ready-made ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import SkipTest

import pytest
import torch
from pydantic import Field
from right_attributions import RIGHT_ATTRIBUTIONS
from torch import Tensor
from wrong_attributions import WRONG_ATTRIBUTIONS
from wrong_methods import adversarial_examples, attribution, gradient_sign_step

from phosphene import Method, ModelError, PluginError, UnknownName, input_gradient, method, methods
from phosphene.results import AdversarialExamples, Attribution, Synthesis
from phosphene.roles import Dataset, Images, Labels, Model, Target
from phosphene.spec import (
    Calls,
    Complete,
    Equivariant,
    InvariantTo,
    LinearIn,
    Localizes,
    MethodSpec,
    Monotone,
    Relation,
    ScalesWith,
    ZeroWhen,
    param,
)
from phosphene.spec.relations import transformed
from phosphene.testing import check_method
from phosphene.testing.checks.relations import relation_check
from phosphene.testing.symmetric_networks import RELATION_NETWORKS, relation_network

READY_MADE = ["localizes", "equivariant", "complete"]


@pytest.mark.parametrize(
    ("name", "wrong"), WRONG_ATTRIBUTIONS, ids=[m.spec.short_name for _, m in WRONG_ATTRIBUTIONS]
)
def test_wrong_attribution_fails_its_check(name: str, wrong: Method[Any, Any]) -> None:
    (outcome,) = check_method(wrong, profile="quick", only=[name]).outcomes
    assert outcome.verdict == "failed", str(outcome)
    assert "relation_network(" in outcome.reason
    assert "wrong_attributions.py, line" in outcome.hint
    with pytest.raises(AssertionError):
        exec(outcome.example, {})


@pytest.mark.parametrize("right", RIGHT_ATTRIBUTIONS, ids=[m.spec.short_name for m in RIGHT_ATTRIBUTIONS])
def test_right_attribution_passes_the_ready_made_relations(right: Method[Any, Any]) -> None:
    assert check_method(right, profile="quick", only=["explains_the_target"]).ok
    report = check_method(right, profile="quick", only=READY_MADE)
    assert report.ok, str(report)
    assert report.outcomes[0].verdict == "passed", (
        "localizes applies to every attribution of a model's images"
    )
    assert not report.arithmetic_tested
    assert "its arithmetic is not tested: declare an oracle or relations" in str(report).splitlines()[1]


@pytest.mark.parametrize(
    "name", [n for n in RELATION_NETWORKS if n.partition("-")[0] in ("hflip", "vflip", "transpose", "shift")]
)
def test_network_is_symmetric_under_its_transformation_only(name: str) -> None:
    network = relation_network(name)
    logits = network.model(network.images)
    for transform in ("hflip", "vflip", "transpose", "shift"):
        if transform == "transpose" and network.images.shape[2] != network.images.shape[3]:
            continue
        change = (network.model(transformed(network.images, transform)) - logits).abs().max()  # type: ignore[arg-type]
        assert change < 1e-12 if transform == name.partition("-")[0] else change > 1e-3, transform


def test_scores_of_the_half_blind_network_do_not_depend_on_the_ignored_pixels() -> None:
    network = relation_network("half-blind")
    assert network.ignored is not None
    changed = torch.where(network.ignored, 1 - network.images, network.images)
    torch.testing.assert_close(network.model(changed), network.model(network.images))


def test_relations_are_json() -> None:
    relations = (
        Equivariant("hflip", where={"steps": 2}), LinearIn("target"), Complete("baseline"),
        Monotone("steps", values=(1, 2), measure="maps", when=param.baseline.one_of("zero")),
    )  # fmt: skip
    spec = methods["integrated_gradients"].spec.model_copy(update={"relations": relations})
    document = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert document["relations"][0]["kind"] == "equivariant"
    del document["params_schema"]
    assert MethodSpec.model_validate(document | {"params": spec.params}).relations == relations
    document["relations"][0]["kind"] = "equivarient"
    with pytest.raises(UnknownName, match="equivariant"):
        MethodSpec.model_validate(document | {"params": spec.params})


def test_text_of_a_relation_is_as_it_is_declared() -> None:
    assert str(Equivariant("hflip")) == "equivariant('hflip')"
    text = str(Complete("baseline", where={"steps": 32}, when=param.baseline.one_of("zero")))
    assert text.startswith("complete('baseline', where={'steps': 32}, when=baseline")


def test_relation_of_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(UnknownName, match="stepps"):
        declare(relations=[Complete(0.0, where={"stepps": 3})])


def declare(**spec: Any) -> Method[Any, Any]:
    @method(family="right", needs=["gradients"], **spec)
    def upside_down(model: Model, images: Images, target: Target = None) -> Attribution:
        """Gradient with its rows in reverse order, by convention."""
        return attribution(
            model, images, input_gradient(model, images, target).abs().amax(1).flip(-2), target
        )

    return upside_down


def test_exemption_with_a_reason_skips_a_ready_made_relation() -> None:
    reason = "rows are counted from the bottom of the image"
    report = check_method(declare(exempt={"localizes": reason}), profile="quick", only=READY_MADE)
    outcome = next(o for o in report.outcomes if o.check == "localizes")
    assert outcome.verdict == "skipped" and outcome.reason == f"exempt: {reason}"
    assert not check_method(declare(), profile="quick", only=["localizes"]).ok


def test_exemption_needs_a_reason_and_an_existing_check() -> None:
    with pytest.raises(PluginError, match="sentence"):
        declare(exempt={"localizes": "no"})
    with pytest.raises(UnknownName, match="did you mean 'localizes'"):
        check_method(declare(exempt={"localises": "rows are counted from the bottom"}))
    with pytest.raises(PluginError, match="every method has to pass"):
        check_method(declare(exempt={"model_unchanged": "it has to change the weights"}))


class PositiveSum(Relation):
    """The map of brighter images has a larger sum."""

    kind: Literal["positive_sum"] = "positive_sum"

    def check(self, calls: Calls) -> None:
        brighter = calls(inputs={"images": (calls.inputs["images"] + 0.2).clamp(max=1)})
        assert brighter.maps.sum() > calls.result.maps.sum(), "the sum does not grow with brightness"


def test_relation_of_a_plugin_is_tested() -> None:
    @method(family="right", relations=[PositiveSum()])
    def brightness(model: Model, images: Images) -> Attribution:
        """Mean over the color channels."""
        return Attribution(images=images, maps=images.mean(1), targets=("mean",) * len(images))

    (outcome,) = check_method(brightness, profile="quick", only=["positive_sum()"]).outcomes
    assert outcome.verdict == "passed", str(outcome)


def test_methods_of_the_documentation_page_pass_the_checks_that_it_names() -> None:
    namespace: dict[str, Any] = {}
    page = (Path(__file__).parents[2] / "docs" / "relations.md").read_text()
    for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(code, "docs/relations.md", "exec"), namespace)
    path_gradients = namespace["path_gradients"]
    declared = [str(relation) for relation in path_gradients.spec.relations]
    report = check_method(path_gradients, profile="quick", only=["localizes", *declared])
    assert report.arithmetic_tested
    assert [outcome.verdict for outcome in report.outcomes] == ["passed"] * 8, str(report)
    report = check_method(namespace["counter_evidence"], profile="quick", only=READY_MADE)
    assert [outcome.verdict for outcome in report.outcomes] == ["skipped", "passed", "skipped"], str(report)
    networks = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in row.split("`")}
    assert {
        name for name in RELATION_NETWORKS if name.partition("-")[0] not in ("vflip", "transpose")
    } <= networks


def run_relation(method: Method[Any, Any], relation: Relation) -> None:
    relation_check(relation).function(method)


@method(family="wrong", needs=["gradients"], quick={"eps": 0.1})
def half_at_a_large_radius(
    model: Model, images: Images, labels: Labels, *,
    eps: Annotated[float, Field(ge=0, le=1, description="radius")] = 0.03,
) -> AdversarialExamples:  # fmt: skip
    """The step is 0 where the radius is above 0.05."""
    adversarial = gradient_sign_step(model, images, labels, eps if eps < 0.05 else 0.0)
    return adversarial_examples(model, images, adversarial, labels)


@method(family="wrong")
def sorted_data_set(model: Model, dataset: Dataset) -> Synthesis:
    """Rows are in the order of their brightness instead of that of the data set."""
    images = dataset.read(range(len(dataset)))
    images = images[images.mean((1, 2, 3)).argsort()]
    return Synthesis(images=images, scores=images.mean((1, 2, 3))[None], targets=("image",) * len(images))


def test_monotone_compares_the_measure_over_the_values() -> None:
    grows = Monotone("eps", values=(0.005, 0.02, 0.08), measure="loss")
    run_relation(methods["pgd"], grows)
    run_relation(methods["pgd"], grows.model_copy(update={"measure": "success"}))
    with pytest.raises(AssertionError, match="distance falls as eps grows: .* 0 at eps=0.08"):
        run_relation(half_at_a_large_radius, grows.model_copy(update={"measure": "distance"}))
    with pytest.raises(AssertionError, match="distance rises"):
        run_relation(methods["pgd"], grows.model_copy(update={"measure": "distance", "falls": True}))


def test_rows_permute_with_the_data_set() -> None:
    run_relation(methods["embed"], InvariantTo("dataset_order", fields=("features",)))
    run_relation(methods["set_distance"], InvariantTo("dataset_order", fields=("kernel",)))  # a scalar
    with pytest.raises(AssertionError, match="images after a change of the dataset order"):
        run_relation(sorted_data_set, InvariantTo("dataset_order"))


def test_attacks_are_equivariant_without_a_random_start() -> None:
    for transform in ("hflip", "transpose", "shift"):
        run_relation(methods["pgd"], Equivariant(transform, where={"random_start": False}))
    with pytest.raises(AssertionError, match="adversarial of the images under 'hflip'"):
        run_relation(methods["pgd"], Equivariant("hflip", where={"random_start": True}))


def test_scale_of_the_images_changes_a_result_by_a_power() -> None:
    run_relation(methods["saliency"], ScalesWith("images", power=0))
    run_relation(methods["gradient_x_input"], ScalesWith("images", power=1))
    with pytest.raises(AssertionError, match=r"0.7 \*\* 2 times maps"):
        run_relation(methods["gradient_x_input"], ScalesWith("images", power=2))


def test_relation_that_does_not_apply_is_skipped_with_the_reason() -> None:
    when = ZeroWhen("constant", when=param.average.one_of("square"))
    with pytest.raises(SkipTest, match="average"):
        run_relation(methods["smooth_grad"], when)
    run_relation(methods["smooth_grad"], when.model_copy(update={"where": {"average": "square"}}))
    with pytest.raises(SkipTest, match="GAP"):
        run_relation(methods["cam"], ZeroWhen("constant", networks=("flat",)))


def test_unknown_network_is_refused_with_the_nearest_name_before_any_call() -> None:
    for networks in (("half-blnd",), ("constant", "half-blnd"), ("halves", "half-blnd")):
        for relation in (ZeroWhen("constant", networks=networks), Localizes(networks=networks)):
            with pytest.raises(UnknownName, match="half-blind"):
                run_relation(methods["saliency"], relation)


def gradient_of_a_transformer(model: Any, images: Tensor, target: Any) -> Tensor:
    if not any(parameter.ndim == 3 for parameter in model.module.parameters()):
        raise ModelError("the network has no class token")
    return input_gradient(model, images, target).abs().amax(1)


@method(family="right", needs=["gradients"])
def transformer_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Saliency of networks with a class token."""
    return attribution(model, images, gradient_of_a_transformer(model, images, target), target)


@method(family="wrong", needs=["gradients"])
def flipped_transformer_saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """The map is flipped, and 0.1 larger."""
    maps = gradient_of_a_transformer(model, images, target).flip(-2) + 0.1
    return attribution(model, images, maps, target)


@pytest.mark.parametrize(
    "relation",
    [Equivariant("hflip"), Equivariant("vflip"), Equivariant("transpose"), ScalesWith("logits", power=1),
     LinearIn("target"), ZeroWhen("constant"), InvariantTo("normalization"), InvariantTo("logit_shift")],
    ids=str,
)  # fmt: skip
def test_method_for_transformers_is_tested_on_transformers(relation: Relation) -> None:
    if isinstance(relation, LinearIn):
        with pytest.raises(AssertionError, match=r"relation_network\('tokens'\)"):
            run_relation(transformer_saliency, relation)
        return
    run_relation(transformer_saliency, relation)
    with pytest.raises(SkipTest, match="class token"):
        run_relation(transformer_saliency, relation.model_copy(update={"networks": ("gap",)}))
    if isinstance(relation, ScalesWith | ZeroWhen) or relation == Equivariant("transpose"):
        with pytest.raises(AssertionError, match="tokens"):
            run_relation(flipped_transformer_saliency, relation)


def test_ready_made_equivariance_is_tested_on_transformers() -> None:
    for tested, verdict in ((transformer_saliency, "passed"), (flipped_transformer_saliency, "failed")):
        (outcome,) = check_method(tested, profile="quick", only=["equivariant"]).outcomes
        assert outcome.verdict == verdict, str(outcome)


def test_report_of_a_failure_leads_to_the_difference() -> None:
    report = check_method(
        dict((m.spec.short_name, m) for _, m in WRONG_ATTRIBUTIONS)["off_by_one"],
        only=["equivariant('hflip')"],
    )
    text = str(report)
    for part in (
        "maps of the images under 'hflip'",
        "the largest difference is",
        "at [",
        "relation_network('hflip-gap')",
    ):
        assert part in text
