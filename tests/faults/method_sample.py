"""Cases of every method for the tests on other devices: in the normal run one method per family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from phosphene import PhospheneError, methods
from phosphene.testing.cases import Case
from phosphene.testing.networks import network_names

#: One method per family, preferably one that once failed.
SAMPLE = {
    "activations.top_patches", "attacks.pgd", "attribution.saliency_segmentation", "defenses.interval_bounds",
    "embeddings.outliers", "filters.first_layer_filters", "robustness.auto_attack",
    "scores.compare_attributions", "style.fast_style_add", "synthesis.class_visualization",
    "textures.efros_leung",
}  # fmt: skip


def every_method() -> list[Any]:
    """All methods; those outside the sample are nightly, with time in which UMAP's code compiles."""
    nightly = (pytest.mark.nightly, pytest.mark.timeout(1200))
    return [pytest.param(name, marks=() if name in SAMPLE else nightly, id=name) for name in sorted(methods)]


def cases() -> Iterator[Case]:
    """A case on each network in single precision: a method may accept few of them."""
    yield Case()
    yield from (Case(network=name) for name in network_names() if name not in ("gap", "double"))


def run_first_accepted(name: str, device: torch.device | None = None) -> Any:
    """The result of the first case that the method accepts, with the model on a device."""
    method, refusals = methods[name], []
    for case in cases():
        model = case.model()
        if device is not None:
            model.module.to(device)
        try:
            return method(**(case.inputs(method, model) | case.arguments(method)))
        except PhospheneError as refusal:
            refusals.append(str(refusal))
    raise AssertionError(f"{name} refused every network: {refusals}")
