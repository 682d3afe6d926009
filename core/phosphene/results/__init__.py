"""What methods give back: tensors that show themselves, save themselves and say how they came about."""

from .base import Panel, Provenance, Result, check_place, load_result, shortened
from .making import AdversarialExamples, Stylization, Synthesis, TrainedNetwork
from .seeing import (
    ActivationMaps,
    Attribution,
    Embedding,
    FilterBank,
    Neighbors,
    Patches,
    Segmentation,
)

__all__ = [
    "ActivationMaps",
    "AdversarialExamples",
    "Attribution",
    "Embedding",
    "FilterBank",
    "Neighbors",
    "Panel",
    "Patches",
    "Provenance",
    "Result",
    "Segmentation",
    "Stylization",
    "Synthesis",
    "TrainedNetwork",
    "check_place",
    "load_result",
    "shortened",
]
