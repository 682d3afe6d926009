"""``shapes-image-adapter``: image prompts for ``shapes-diffusion``."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..generative.image_adapters import ImageAdapter
from ..torch_state import cpu_by_default, fork_random_state
from .denoiser import COARSE, FINE, MIDDLE
from .networks import load_generator, load_network, normalize
from .scenes import CLASSES

#: The bundled image prompt adapter.
IMAGE_ADAPTER = "shapes-image-adapter"
#: Channels of the stages of ``shapes-vgg``, whose means are the first part of the image embedding.
_STAGES = (24, 48, 96, 128)
#: The second part: mean colors and features of the last stage in each of 4 x 4 cells of the image.
_GRID = 4
_CELL = 3 + _STAGES[-1]
#: Length of the image embedding.
EMBEDDING = sum(_STAGES) + _GRID**2 * _CELL
#: Tokens of the whole image, which are followed by one of each cell, and their length.
TOKENS, WIDTH = 4, 64


class ShapesImageAdapter(nn.Module):
    """The trained parts of the adapter: tokens of an image embedding, and their keys and values.

    ``mean`` and ``std`` (E,) are those of the features of training images, ``classes`` (10, E) the mean
    embeddings of scenes of a class, minus those of all scenes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.projection = _Tokens()
        # In the order of the denoiser's attention layers.
        channels = (COARSE, MIDDLE, FINE)
        self.keys = nn.ModuleList(nn.Linear(WIDTH, width, bias=False) for width in channels)
        self.values = nn.ModuleList(nn.Linear(WIDTH, width, bias=False) for width in channels)
        for layer in self.values:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.zeros(EMBEDDING))
        self.register_buffer("std", torch.ones(EMBEDDING))
        self.register_buffer("classes", torch.zeros(len(CLASSES), EMBEDDING))

    def adapter(self) -> ImageAdapter:
        """The image adapter of these parts."""
        assert isinstance(self.mean, Tensor) and isinstance(self.std, Tensor)
        return ImageAdapter(
            _Features(self.mean, self.std),
            self.projection,
            self.keys,
            self.values,
            embed_text=self.embed_text,
            uri=f"builtin:{IMAGE_ADAPTER}",
        )

    def embed_text(self, text: str) -> Tensor:
        """The mean (E,) of the embeddings of the classes that a text names.

        Raises InputError for a text that names no class.
        """
        words = re.findall(r"[a-z]+", text.lower())
        rows = [index for index, name in enumerate(CLASSES) if name in words]
        if not rows:
            names = ", ".join(CLASSES)
            raise InputError(f"builtin:{IMAGE_ADAPTER} has ten words, {names}, and none is in {text!r}")
        assert isinstance(self.classes, Tensor)
        return self.classes[rows].mean(0)


class _Tokens(nn.Module):
    """Tokens (N, 20, D) of embeddings (N, E): four of the whole image, one of each cell at its position."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Linear(sum(_STAGES), TOKENS * WIDTH)
        self.cell = nn.Linear(_CELL, WIDTH)
        self.position = nn.Parameter(torch.randn(_GRID**2, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, embedding: Tensor) -> Tensor:
        means, cells = embedding.split((sum(_STAGES), _GRID**2 * _CELL), 1)
        tokens = self.stages(means).unflatten(1, (TOKENS, WIDTH))
        positions = self.cell(cells.unflatten(1, (_GRID**2, _CELL))) + self.position
        normalized: Tensor = self.norm(torch.cat([tokens, positions], 1))
        return normalized


class _Features(nn.Module):
    """The embedding (N, E) of images (N, 3, H, W) in [0, 1]: standardized means of colors and features.

    Of the whole image the means of each stage's last ReLU, the first of which follow color and texture, and
    of each cell the mean color and the last stage, which follows the class.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        with fork_random_state():  # the network's weights are initialized before they are loaded
            self.layers = load_network("shapes-vgg").get_submodule("features")

    def forward(self, images: Tensor) -> Tensor:
        x, means = normalize(images), []
        for layer in self.layers.children():
            if isinstance(layer, nn.MaxPool2d):
                means.append(x.mean((2, 3)))
            x = layer(x)
        means.append(x.mean((2, 3)))
        cells = torch.cat([F.adaptive_avg_pool2d(part, _GRID) for part in (images, x)], 1)
        embedding: Tensor = torch.cat([*means, cells.flatten(2).mT.flatten(1)], 1)
        return (embedding - self.mean) / self.std


@cpu_by_default()
def load_bundled_image_adapter() -> ImageAdapter:
    """The trained adapter of ``shapes-diffusion`` with its image encoder, in eval mode, on the CPU."""
    trained = load_generator(ShapesImageAdapter, IMAGE_ADAPTER)
    return trained.adapter().eval().requires_grad_(False)
