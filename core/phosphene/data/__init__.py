"""Data sets: files, annotations, tensors, torch data sets and the bundled scenes, read in batches."""

from ..rows import LabelRows, Rows
from .annotations import CocoDataset, VocDataset
from .bundled import PartSceneDataset, SceneDataset, TextureDataset
from .datasets import Batch, Dataset, Parts, TensorDataset, stack
from .fold_tasks import ComputedShard, FoldTask
from .folders import FileDataset, FolderDataset
from .folds import Fold, ShardExecutor, State, shard_ranges, shard_state, use_shard_executor
from .items import Item, ItemDataset
from .localization import Localization, dilate_masks, localization, peak_hits
from .manifests import ManifestDataset
from .open import open_dataset
from .resumable import resumable, resumable_batches
from .torch_datasets import TorchDataset

__all__ = [
    "Batch",
    "CocoDataset",
    "ComputedShard",
    "Dataset",
    "FileDataset",
    "Fold",
    "FoldTask",
    "FolderDataset",
    "Item",
    "ItemDataset",
    "LabelRows",
    "Localization",
    "ManifestDataset",
    "PartSceneDataset",
    "Parts",
    "Rows",
    "SceneDataset",
    "ShardExecutor",
    "State",
    "TensorDataset",
    "TextureDataset",
    "TorchDataset",
    "VocDataset",
    "dilate_masks",
    "localization",
    "open_dataset",
    "peak_hits",
    "resumable",
    "resumable_batches",
    "shard_ranges",
    "shard_state",
    "stack",
    "use_shard_executor",
]
