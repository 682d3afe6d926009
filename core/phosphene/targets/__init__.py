"""Targets (objectives): one scalar per image, which methods differentiate, maximize or minimize."""

from .gradients import input_gradient, layer_gradients, scores
from .objectives import Channel, Class, Custom, Direction, Layer, Neuron, Objective, Predicted
from .parse import parse_target

__all__ = [
    "Channel",
    "Class",
    "Custom",
    "Direction",
    "Layer",
    "Neuron",
    "Objective",
    "Predicted",
    "input_gradient",
    "layer_gradients",
    "parse_target",
    "scores",
]
