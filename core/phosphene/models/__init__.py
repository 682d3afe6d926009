"""Vision networks behind one convention: ``Model``, and ``load_model`` for URIs, modules and functions."""

from .attention import attention_maps
from .loading import Loader, fill_weights, load_model, read_weights
from .model import Model

__all__ = ["Loader", "Model", "attention_maps", "fill_weights", "load_model", "read_weights"]
