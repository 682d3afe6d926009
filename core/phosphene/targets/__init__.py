"""Targets: what is differentiated or maximised, one scalar per image."""

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
