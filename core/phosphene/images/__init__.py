"""Images: files, color maps and overlays, resizing, blur, noise, baselines and charts."""

from .baselines import Baseline, baseline_images
from .blur import gaussian_blur
from .color import Centers, colorize, enlarge, enlarge_maps, min_max, overlay, resize, symmetric, to_display
from .decode import array_images, decode_image, read_image, to_rgb
from .io import (
    data_uri,
    to_pil,
    write_gif,
    write_mp4,
    write_png,
)
from .noise import noise_images
from .paths import IMAGE_SUFFIXES, MASK_SUFFIX, find_images
from .video import read_video

__all__ = [
    "Baseline",
    "Centers",
    "IMAGE_SUFFIXES",
    "MASK_SUFFIX",
    "array_images",
    "baseline_images",
    "colorize",
    "data_uri",
    "decode_image",
    "enlarge",
    "enlarge_maps",
    "find_images",
    "gaussian_blur",
    "min_max",
    "noise_images",
    "overlay",
    "read_image",
    "read_video",
    "resize",
    "symmetric",
    "to_display",
    "to_pil",
    "to_rgb",
    "write_gif",
    "write_mp4",
    "write_png",
]
