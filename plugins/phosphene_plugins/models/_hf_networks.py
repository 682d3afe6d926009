"""Networks and image processors of transformers as Phosphene uses them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.utils import logging

from phosphene import ModelError
from phosphene.errors import type_name
from phosphene.models import fill_weights, preprocess

from ._downloads import find_on_hub

#: Largest difference from a processor's output, of 255: libraries round resized pixels otherwise.
_ROUNDING = 3

#: The files in which a processor is saved.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


#: The files of tokenizers: the tokens themselves, one of the first five, and their settings.
_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"),
    *("merges.txt", "special_tokens_map.json", "tokenizer_config.json"),
)


def build(class_name: str, config: Any, weights: Path | Mapping[str, Tensor] | None, uri: str) -> nn.Module:
    """The network in float32, with the weights in a folder or a state dict, or random ones.

    Raises ModelError where weights of the network are missing, which would stay random.
    """
    network_class = getattr(transformers, class_name, None)
    if network_class is None:
        raise ModelError(f"transformers {transformers.__version__} has no {class_name}, which {uri} needs")
    if isinstance(weights, Path):
        options = {"use_safetensors": True, "local_files_only": True}
        return _read(network_class, weights, uri, config=config, **options)
    random = network_class.from_config if class_name.startswith("Auto") else network_class._from_config
    try:
        network = random(config, dtype=torch.float32)
    except ImportError as error:  # a few architectures need libraries of their own
        reason = " ".join(str(error).split())
        raise ModelError(f"{uri} cannot be built: {reason}") from error
    if weights is None:
        return network
    try:
        fill_weights(network, weights, "passed", uri)
    except ModelError:  # a file of transformers' may have older names, which it converts
        return _read(type(network), None, uri, config=config, state_dict=dict(weights))
    return network


def _read(network_class: Any, folder: Path | None, uri: str, **options: Any) -> nn.Module:
    with quiet():  # what is missing is raised below
        network, info = network_class.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"the weights of {uri} lack {len(missing)} tensors of {type(network).__name__}, such as "
            f"{', '.join(missing[:3])}: choose the head that they were trained with"
        )
    return network


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars; both settings are restored."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def as_image_network(
    network: nn.Module, task: str, reverse_channels: bool, uri: str
) -> tuple[nn.Module, Callable[[Any], Tensor] | None]:
    """A network whose first argument is the images, and a function from its output to features.

    The network itself where it takes images first, else a module around it.
    """
    parameters = list(inspect.signature(network.forward).parameters)
    if (
        task == "embedding"
        and network.main_input_name != "pixel_values"
        and hasattr(network, "get_image_features")
    ):
        network = ImageInput(network, "get_image_features", reverse_channels)
    elif "pixel_values" not in parameters:
        raise ModelError(f"{uri} is {type_name(network)}, which takes no images (pixel_values)")
    elif "spatial_shapes" in parameters:
        raise ModelError(
            f"{uri} is {type_name(network)}, which takes patches with their positions, not images "
            "(N, C, H, W): put it into a module that cuts an image into patches, and pass that module"
        )
    elif parameters[0] != "pixel_values" or reverse_channels:
        network = ImageInput(network, "forward", reverse_channels)
    return network, image_features if task == "embedding" else None


class ImageInput(nn.Module):
    """A network of transformers whose images are not the first argument, or are BGR."""

    def __init__(self, network: nn.Module, method: str, reverse_channels: bool) -> None:
        super().__init__()
        self.network, self.method, self.reverse_channels = network, method, reverse_channels

    def forward(self, images: Tensor) -> Any:
        images = images.flip(1) if self.reverse_channels else images
        # The module is called, not its method forward, so that its hooks run.
        call = self.network if self.method == "forward" else getattr(self.network, self.method)
        return call(pixel_values=images)


class DetectionBoxes(nn.Module):
    """A detector of transformers, whose output is converted to boxes by its image processor.

    For images (N, 3, H, W) a list of ``boxes`` (M, 4) in pixels, ``labels`` and ``scores`` (M,), one box for
    each query, on the graph.
    """

    def __init__(self, network: nn.Module, processor: Any) -> None:
        super().__init__()
        self.network, self.processor = network, processor

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        sizes = [(images.shape[2], images.shape[3])] * len(images)
        output = self.network(images)
        boxes: list[dict[str, Tensor]] = self.processor.post_process_object_detection(
            output, threshold=0.0, target_sizes=sizes
        )
        return boxes


def detection_boxes(network: nn.Module, folder: Path, config: Any, uri: str) -> DetectionBoxes:
    """The detector with the conversion of its saved image processor, or of the one of its architecture."""
    if any((folder / file).is_file() for file in _PROCESSOR_FILES):
        processor = _read_processor(folder, uri)
    else:
        kinds = IMAGE_PROCESSOR_MAPPING.get(type(config), None) or {}
        kind = next(iter(kinds.values() if isinstance(kinds, dict) else filter(None, kinds)), None)
        processor = kind() if kind is not None else None
    if not hasattr(processor, "post_process_object_detection"):
        raise ModelError(
            f"the {type(processor).__name__} of {uri} does not convert its output to boxes: "
            "load_model(network, task='detection', output=...)"
        )
    return DetectionBoxes(network, processor)


class TextFeatures:
    """The embedding (D,) of a text by the text tower of a CLIP or its kind, comparable with its images'."""

    def __init__(self, network: Any, folder: Path, hub: Mapping[str, Any] | None, uri: str) -> None:
        self.network, self.folder, self.hub, self.uri = network, folder, hub, uri

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.hub, self.uri)

    def __call__(self, text: str) -> Tensor:
        config = self.network.config
        # SigLIP was trained on texts that are padded to its full length.
        padding = "max_length" if config.model_type.startswith("siglip") else False
        length = config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [text], padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        accepted = inspect.signature(self.network.get_text_features).parameters
        inputs = {name: ids.to(self.network.device) for name, ids in tokens.items() if name in accepted}
        return image_features(self.network.get_text_features(**inputs))[0]


def load_tokenizer(folder: Path, hub: Mapping[str, Any] | None, uri: str) -> Any:
    """The tokenizer in a folder, or of a repository; ModelError where there is none."""
    if hub is not None:
        for file in _TOKENIZER_FILES:
            find_on_hub(hub["repository"], file, revision=hub["revision"], cache=hub["cache"])
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES[:5]):
        raise ModelError(
            f"{uri} has no tokenizer, which turns a text into numbers: save it there, "
            "tokenizer.save_pretrained(folder)"
        )
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def text_features(
    network: nn.Module, folder: Path, hub: Mapping[str, Any] | None, uri: str
) -> TextFeatures | None:
    """The embedding of texts by a network of images and text; None for a network of images alone."""
    has_text = isinstance(network, ImageInput) and network.method == "get_image_features"
    if not has_text or not hasattr(network.network, "get_text_features"):
        return None
    return TextFeatures(network.network, folder, hub, uri)


def image_features(output: Any) -> Tensor:
    """Features (N, D) in the output of a network without a head: projected, pooled, or a map's mean."""
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        if (features := getattr(output, name, None)) is not None:
            return features.flatten(1)
    if maps := getattr(output, "feature_maps", None):
        return maps[-1].mean((2, 3))
    raise ModelError(
        f"this network returns {type_name(output)} without pooled features; choose some: "
        "load_model(..., output=lambda result: result.last_hidden_state.mean(1))"
    )


# --- preprocessing ------------------------------------------------------------------------------------------


def image_settings(folder: Path, config: Any, uri: str, pretrained: bool) -> dict[str, Any]:
    """How the network's processor prepares images, as arguments of ``Model``, and ``reverse_channels``.

    Normalization is measured on plain images, and the geometry compared with the processor's output, so that
    what is returned reproduces it. Raises ModelError for a processor that does something else.
    """
    if not any((folder / file).is_file() for file in _PROCESSOR_FILES):
        if pretrained:
            raise ModelError(
                f"{uri} has no preprocessor_config.json, which says how images are prepared: save its "
                "processor there, or build the network yourself and pass it, load_model(network, mean=..., "
                "std=..., input_size=...)"
            )
        return {"reverse_channels": False, **_configured_size(config)}
    processor = _read_processor(folder, uri)
    mean, std, reverse_channels = _measure_normalization(processor, uri)
    settings = {"mean": mean, "std": std, "interpolation": _interpolation(processor)}
    for geometry in _geometries(processor):
        candidate = settings | geometry
        if all(_reproduces(candidate, processor, size, reverse_channels) for size in ((67, 113), (301, 200))):
            return candidate | {"reverse_channels": reverse_channels}
    raise ModelError(
        f"the {type(processor).__name__} of {uri} prepares images in a way that Model has no options for: "
        "build the network yourself and pass it, load_model(network, mean=..., std=..., input_size=...)"
    )


def _configured_size(config: Any) -> dict[str, Any]:
    """The input size in a configuration, where it has one."""
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None) or 3
    if side is None:
        return {"mean": [0.0] * channels, "std": [1.0] * channels}
    height, width = (side, side) if isinstance(side, int) else side
    return {"input_size": (channels, height, width)}


def _read_processor(folder: Path, uri: str) -> Any:
    """The image processor; its version on PIL images where transformers has one."""
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    except (KeyError, ValueError, ImportError) as error:
        raise ModelError(f"the image processor of {uri} cannot be built: {error}") from error


def _process(processor: Any, image: np.ndarray) -> Tensor:
    """What the processor returns for an image (H, W, 3) of bytes: pixels (3, h, w)."""
    batch = processor(images=[Image.fromarray(image)], return_tensors="pt")
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ModelError(f"{type_name(processor)} returns {shape} for an image, not pixels (1, 3, H, W)")
    return pixels[0].float()


def _measure_normalization(processor: Any, uri: str) -> tuple[list[float], list[float], bool]:
    """Mean and std of pixels in [0, 1], and whether the channels are reversed to BGR."""

    def center(color: tuple[int, int, int]) -> Tensor:
        pixels = _process(processor, np.full((64, 64, 3), color, np.uint8))
        return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].double()

    black = center((0, 0, 0))
    slopes = torch.stack([center(color) - black for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))], 1)
    reverse = bool(slopes[0, 2].abs() > slopes[0, 0].abs())
    slopes, black = (slopes.flip(0), black.flip(0)) if reverse else (slopes, black)
    scale = slopes.diag()
    if (slopes - scale.diag()).abs().max() > 1e-4 * scale.abs().max() or scale.min() <= 0:
        raise ModelError(f"the {type(processor).__name__} of {uri} mixes color channels")
    measured = {"image_mean": -black / scale, "image_std": 1 / scale}
    mean, std = (_configured(processor, name, values) for name, values in measured.items())
    return mean, std, reverse


def _configured(processor: Any, name: str, measured: Tensor) -> list[float]:
    """The attribute of the processor, where it is what was measured in float32, else the measured values."""
    values = getattr(processor, name, None)
    values = [float(value) for value in values] if isinstance(values, (list, tuple)) else []
    if len(values) == 3 and (torch.tensor(values, dtype=torch.float64) - measured).abs().max() < 1e-5:
        return values
    return [round(value, 6) + 0.0 for value in measured.tolist()]  # no -0.0


def _interpolation(processor: Any) -> str:
    resample = getattr(processor, "resample", None)
    if resample is None:
        return "bilinear"
    return Image.Resampling(resample).name.lower() if isinstance(resample, int) else resample.value


def _geometries(processor: Any) -> Iterator[dict[str, Any]]:
    """The ways in which a processor with these attributes may resize and crop, the likeliest first."""

    def sides(value: Any) -> dict[str, int]:
        names = ("height", "width", "shortest_edge", "longest_edge")
        get = value.get if isinstance(value, dict) else lambda name: getattr(value, name, None)
        return {name: int(side) for name in names if (side := get(name))} if value else {}

    def geometry(height: int, width: int, mode: str, resized: float | None = None) -> dict[str, Any]:
        crop_pct = 1.0 if resized is None else min(height, width) / resized
        return {"input_size": (3, height, width), "crop_mode": mode, "crop_pct": crop_pct}

    size, crop = sides(getattr(processor, "size", None)), sides(getattr(processor, "crop_size", None))
    crop_pct = getattr(processor, "crop_pct", None)
    is_cropped = getattr(processor, "do_center_crop", False) and crop.keys() >= {"height", "width"}
    cropped = (crop["height"], crop["width"]) if is_cropped else None
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest:
        if cropped:
            yield geometry(*cropped, "center-floor", shortest)
            yield geometry(*cropped, "center-floor", int(256 / 224 * shortest))  # LeViT
        if crop_pct:  # ConvNeXT
            yield geometry(shortest, shortest, "center-floor", int(shortest / crop_pct))
            yield geometry(shortest, shortest, "squash")
        yield geometry(shortest, longest or shortest, "resize")
        yield geometry(shortest, longest or shortest, "resize-16")  # YOLOS
        yield geometry(shortest, shortest, "center-floor")
    if size.keys() >= {"height", "width"}:
        if cropped:
            yield geometry(*cropped, "squash-floor", size["height"])
        if crop_pct:
            yield geometry(size["height"], size["width"], "center-floor", int(size["height"] / crop_pct))
        yield geometry(size["height"], size["width"], "squash")
    if longest and not shortest:
        yield geometry(longest, longest, "pad")
    yield {"crop_mode": "none"}


def _reproduces(settings: dict[str, Any], processor: Any, size: tuple[int, int], reverse: bool) -> bool:
    """Whether an image of this size (H, W) is prepared as the processor does it, up to rounded pixels."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    options = {name: settings.get(name, 1.0) for name in ("crop_pct", "crop_mode", "interpolation")}
    input_size = settings.get("input_size", (3, *size))
    pixels = preprocess(Image.fromarray(image), input_size, mean=settings["mean"], **options)
    theirs = _process(processor, image)
    if theirs.shape != pixels.shape:
        return False
    theirs = theirs.flip(0) if reverse else theirs
    return bool((theirs * std + mean - pixels).abs().max() <= _ROUNDING / 255)
