"""Generative networks that methods use: denoisers of diffusion models, and generators (decoders)."""

from .denoisers import Denoiser, Prediction
from .generators import Generator
from .image_adapters import ImageAdapter, load_image_adapter
from .pipelines import Pipeline, load_pipeline

__all__ = [
    "Denoiser",
    "Generator",
    "ImageAdapter",
    "Pipeline",
    "Prediction",
    "load_image_adapter",
    "load_pipeline",
]
