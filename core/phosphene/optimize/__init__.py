"""Image optimization: parametrizations, regularizers, augmentations and the optimization loop."""

from .augmentations import (
    TRANSFORMS,
    Transform,
    TransformName,
    affine,
    blur,
    brightness,
    compose,
    jitter,
    jpeg,
    jpeg_round_trip,
    perspective,
    printed,
    rescale,
    resize_and_pad,
    rotate,
    straight_through,
)
from .cppn import CppnImage
from .evaluation import PerImage
from .gram import gram_matrix
from .image_optimizer import (
    AfterStep,
    Optimization,
    Optimizer,
    concatenate_stages,
    optimize_image,
    pad_rows,
)
from .parametrizations import (
    FourierImage,
    LatentImage,
    Parametrization,
    PhaseImage,
    PixelImage,
    fourier_frequencies,
)
from .regularizers import clip_gradient, clip_smallest, l2_penalty, total_variation

__all__ = [
    "AfterStep",
    "CppnImage",
    "FourierImage",
    "LatentImage",
    "Optimization",
    "Optimizer",
    "Parametrization",
    "PerImage",
    "PhaseImage",
    "PixelImage",
    "TRANSFORMS",
    "Transform",
    "TransformName",
    "affine",
    "blur",
    "brightness",
    "clip_gradient",
    "clip_smallest",
    "compose",
    "concatenate_stages",
    "fourier_frequencies",
    "gram_matrix",
    "jitter",
    "jpeg",
    "jpeg_round_trip",
    "l2_penalty",
    "optimize_image",
    "pad_rows",
    "perspective",
    "printed",
    "rescale",
    "resize_and_pad",
    "rotate",
    "straight_through",
    "total_variation",
]
