"""Input roles: how each kind of input is annotated, read, checked, recorded and tested."""

from .adaptive_stylizer import AdaptiveStylizer
from .base import AS_OBJECT, InputContext, InputRole, SampleRequest, check_type, image_count, model_for_inputs
from .checkpoints import Checkpoint, Checkpoints
from .dataset import Dataset
from .denoiser import Denoiser, DenoiserRole
from .features import Features
from .generator import Generator
from .guide import Guide
from .images import (
    Content,
    DifferentSizesError,
    Images,
    check_images,
    check_pixels,
    image_files,
    read_images,
)
from .labels import Labels
from .masks import Masks
from .model import Model
from .other_model import OtherModel
from .parameters import Frames, LayerName, Seed
from .predicted_stylizer import PredictedStylizer
from .sources import Sources
from .start import Start
from .styles import Styles
from .stylizer import Stylizer
from .table import ROLES
from .target import Target
from .texture import Texture
from .video import Video

__all__ = [
    "AS_OBJECT",
    "AdaptiveStylizer",
    "Checkpoint",
    "Checkpoints",
    "Content",
    "Dataset",
    "Denoiser",
    "DenoiserRole",
    "DifferentSizesError",
    "Features",
    "Frames",
    "Generator",
    "Guide",
    "Images",
    "InputContext",
    "InputRole",
    "Labels",
    "LayerName",
    "Masks",
    "Model",
    "OtherModel",
    "PredictedStylizer",
    "ROLES",
    "SampleRequest",
    "Seed",
    "Sources",
    "Start",
    "Styles",
    "Stylizer",
    "Target",
    "Texture",
    "Video",
    "check_images",
    "check_pixels",
    "check_type",
    "image_count",
    "image_files",
    "model_for_inputs",
    "read_images",
]
