"""Training networks on a data set: the loop, labels and splits, and the trained model as a result."""

from .gradient_steps import (
    GradientSteps,
    Loss,
    OneProcess,
    ProcessGroup,
    TrainingExecutor,
    use_training_executor,
)
from .labels import (
    MAX_HELD_OUT,
    class_indices,
    label_index,
    label_reader,
    require_classes,
    single_precision,
    train_test_split,
    trainable_copy,
)
from .loop import EVALUATIONS, Metrics, TrainingHistory, linear_decay, train
from .trained_model import TrainedModel, WeightsOnly

__all__ = [
    "EVALUATIONS",
    "MAX_HELD_OUT",
    "GradientSteps",
    "Loss",
    "Metrics",
    "OneProcess",
    "ProcessGroup",
    "TrainedModel",
    "TrainingExecutor",
    "TrainingHistory",
    "WeightsOnly",
    "class_indices",
    "label_index",
    "label_reader",
    "linear_decay",
    "require_classes",
    "single_precision",
    "train",
    "train_test_split",
    "trainable_copy",
    "use_training_executor",
]
