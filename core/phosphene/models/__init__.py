"""Vision networks behind one convention: ``Model``, and ``load_model`` for URIs, modules and functions."""

from .attention import AttentionLayer
from .detections import Detection
from .loading import Loader, fill_weights, load_model, read_weights, refuse_user_code
from .logits import Function
from .model import Model
from .optimized_copy import without_optimized
from .output_activation import OutputActivation, warning_for_attacks
from .parameter_limit import limit_parameters, parameter_limit
from .preprocessing import preprocess
from .saved_source import (
    SavedSettings,
    SavedSource,
    check_saved_options,
    load_saved_model,
    saved_options,
)
from .tasks import Task, infer_task
from .token_maps import Layout

__all__ = [
    "AttentionLayer",
    "Detection",
    "Function",
    "Layout",
    "Loader",
    "Model",
    "OutputActivation",
    "SavedSettings",
    "SavedSource",
    "Task",
    "check_saved_options",
    "fill_weights",
    "infer_task",
    "limit_parameters",
    "load_model",
    "load_saved_model",
    "parameter_limit",
    "preprocess",
    "read_weights",
    "refuse_user_code",
    "saved_options",
    "warning_for_attacks",
    "without_optimized",
]
