"""Cases of longer profiles of the kit that failed once, each with its check."""

import pytest
import torch
from torch import nn

from phosphene import InputError, ModelError, load_model, methods, run
from phosphene.testing import Case, check
from phosphene.testing.networks import make_network


@pytest.mark.parametrize(
    ("method", "check_name", "case"),
    [
        # The table of detections counts the adversarial examples, too.
        ("attacks.boundary", "within_cost", Case(network="detector", count=1)),
        (
            "attacks.fgsm",
            "within_cost",
            Case(network="detector", count=1, params={"augmentations": ["rotate"]}),
        ),
        # The box is found in each image before it is changed.
        ("attacks.patch", "within_cost", Case(network="detector", count=1)),
        # The nearest name of an unknown attack is looked up, in a cache.
        (
            "attacks.universal",
            "no_side_effects",
            Case(network="two", count=1, params={"attack": "0b0c0bb.c"}),
        ),
        # The inverse of a subnormal perturbation is infinite.
        ("attacks.universal", "panels_in_range", Case(network="gelu", count=1, params={"eps": 6.4e-43})),
        ("comparison.decision_boundary_map", "answers", Case(network="headless", count=1)),
        # The extent is of numbers, not a tensor.
        ("comparison.decision_boundary_map", "batch_equals_single", Case(network="heads", count=1)),
        ("concepts.concept_factorization", "finite", Case(network="flat", pictures="flat", count=1)),
        # The structure of the network was recorded inside the rules of LRP.
        ("concepts.concept_relevance", "batch_equals_single", Case(count=1, params={"layer": "0"})),
        ("robustness.ensemble_evaluation", "within_cost", Case(network="detector", count=1)),
    ],
)
def test_case_passes(method: str, check_name: str, case: Case) -> None:
    check(methods[method], check_name, case)


def test_model_without_a_classifier_has_no_decision_boundaries() -> None:
    with pytest.raises(ModelError, match="has no linear classifier"):
        run("decision_boundary_map", model=make_network("headless"), dataset="builtin:scenes/9")


def test_constant_features_have_no_concepts() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = load_model(network, input_size=(3, 8, 8))
    with pytest.raises(InputError, match="the same at all positions"):
        run("concept_factorization", model=model, images=torch.full((2, 3, 8, 8), 0.5), layer="1", concepts=1)


def test_size_of_receptive_fields_is_bounded() -> None:
    with pytest.raises(InputError, match="size"):
        run("receptive_field", size=2049)
