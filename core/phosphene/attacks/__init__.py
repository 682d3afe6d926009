"""Arithmetic that attacks share: l_p balls, steepest directions, the success criterion, the result."""

from .lp_balls import (
    Norm,
    distance,
    dual_norm,
    l2_norm,
    normalize_l2,
    per_image,
    project,
    random_point,
    shrink_to_boundary,
    steepest,
)
from .success import build_result, is_adversarial, is_zero, not_adversarial, predict_logits

__all__ = [
    "Norm",
    "build_result",
    "distance",
    "dual_norm",
    "is_adversarial",
    "is_zero",
    "l2_norm",
    "normalize_l2",
    "not_adversarial",
    "per_image",
    "predict_logits",
    "project",
    "random_point",
    "shrink_to_boundary",
    "steepest",
]
