"""Any vision network behind one convention: ``Model`` and its loaders."""

from .loading import Loader, load_model
from .model import Model

__all__ = ["Loader", "Model", "load_model"]
