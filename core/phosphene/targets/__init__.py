"""Targets (objectives): one scalar per image, which methods differentiate, maximize or minimize."""

from .boxes import Box
from .gradients import input_gradient, layer_gradients, scores
from .objective_classifier import ObjectiveClassifier
from .objectives import (
    AbsentObjective,
    Channel,
    Class,
    Contrast,
    Custom,
    Direction,
    Layer,
    Neuron,
    Objective,
    Predicted,
    class_values,
)
from .parse import parse_target
from .regions import Region
from .similarity import Similar

__all__ = [
    "AbsentObjective",
    "Box",
    "Channel",
    "Class",
    "Contrast",
    "Custom",
    "Direction",
    "Layer",
    "Neuron",
    "Objective",
    "ObjectiveClassifier",
    "Predicted",
    "Region",
    "Similar",
    "class_values",
    "input_gradient",
    "layer_gradients",
    "parse_target",
    "scores",
]
