"""Results of methods: tensors with figures, files and provenance, a class per kind of result."""

from ..files import check_output_folder
from .activation_maps import ActivationMaps
from .adversarial_examples import AdversarialExamples
from .attribution import Attribution
from .base import Panel, Result, shorten_title, write_figure
from .embedding import Embedding
from .filter_bank import FilterBank
from .neighbors import Neighbors
from .panel import panel
from .patches import Patches
from .provenance import Provenance
from .result_stream import ResultStream
from .segmentation import Segmentation
from .sequence import ResultSequence
from .stylization import Stylization
from .synthesis import Synthesis
from .trained_network import TrainedNetwork

__all__ = [
    "ActivationMaps",
    "AdversarialExamples",
    "Attribution",
    "Embedding",
    "FilterBank",
    "Neighbors",
    "Panel",
    "Patches",
    "Provenance",
    "Result",
    "ResultStream",
    "ResultSequence",
    "Segmentation",
    "Stylization",
    "Synthesis",
    "TrainedNetwork",
    "check_output_folder",
    "panel",
    "shorten_title",
    "write_figure",
]
