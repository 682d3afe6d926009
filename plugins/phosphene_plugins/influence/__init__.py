"""Influence: the training images that a prediction depends on."""
