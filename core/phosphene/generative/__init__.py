"""Generative networks as methods use them: diffusion models and decoders."""

from .denoisers import Denoiser, Pipeline, Prediction, load_pipeline
from .generators import Generator

__all__ = [
    "Denoiser",
    "Generator",
    "Pipeline",
    "Prediction",
    "load_pipeline",
]
