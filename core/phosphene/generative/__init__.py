"""Generative networks that methods use: denoisers of diffusion models, and generators (decoders)."""

from .denoisers import Denoiser, Pipeline, Prediction, load_pipeline
from .generators import Generator

__all__ = [
    "Denoiser",
    "Generator",
    "Pipeline",
    "Prediction",
    "load_pipeline",
]
