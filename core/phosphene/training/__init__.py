"""Training networks on a data set: the loop, labels, and the trained model as a result."""

from .labels import classes_of, split, trainable
from .loop import EVALUATIONS, Loss, Metrics, TrainingHistory, train
from .trained_model import TrainedModel, WeightsOnly

__all__ = [
    "EVALUATIONS",
    "Loss",
    "Metrics",
    "TrainedModel",
    "TrainingHistory",
    "WeightsOnly",
    "classes_of",
    "split",
    "train",
    "trainable",
]
