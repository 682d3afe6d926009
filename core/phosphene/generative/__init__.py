"""Generative networks that methods use: denoisers of diffusion models, and generators (decoders)."""

from .denoisers import Denoiser, Prediction
from .generators import Generator
from .pipelines import Pipeline, load_pipeline

__all__ = [
    "Denoiser",
    "Generator",
    "Pipeline",
    "Prediction",
    "load_pipeline",
]
