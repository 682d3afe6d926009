"""Data sets: folders, tensors and the bundled scenes and textures, read in batches."""

from .bundled import SceneDataset, TextureDataset
from .datasets import Batch, Dataset, TensorDataset, stack
from .folders import FolderDataset
from .localization import Localization, dilate_masks, localization, peak_hits
from .open import open_dataset
from .resumable import resumable, resumable_batches

__all__ = [
    "Batch",
    "Dataset",
    "FolderDataset",
    "Localization",
    "SceneDataset",
    "TensorDataset",
    "TextureDataset",
    "dilate_masks",
    "localization",
    "open_dataset",
    "peak_hits",
    "resumable",
    "resumable_batches",
    "stack",
]
