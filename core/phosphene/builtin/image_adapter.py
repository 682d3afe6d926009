"""``shapes-image-adapter``: image prompts for ``shapes-diffusion``."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..generative.image_adapters import ImageAdapter
from ..torch_state import cpu_by_default, fork_random_state
from .denoiser import COARSE, FINE, MIDDLE
from .networks import load_generator, load_network, normalize
from .scenes import CLASSES

#: The bundled image prompt adapter.
IMAGE_ADAPTER = "shapes-image-adapter"
#: Channels of the stages of ``shapes-vgg``, whose means are the image embedding, and its length.
_STAGES = (24, 48, 96, 128)
EMBEDDING = sum(_STAGES)
#: Tokens of an image, and their length.
TOKENS, WIDTH = 4, 64


class ShapesImageAdapter(nn.Module):
    """The trained parts of the adapter: tokens of an image embedding, and their keys and values.

    ``mean`` and ``std`` (E,) are those of the stage means of training images, ``classes`` (10, E) the mean
    embeddings of scenes of a class, minus those of all scenes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(EMBEDDING, TOKENS * WIDTH), nn.Unflatten(1, (TOKENS, WIDTH)), nn.LayerNorm(WIDTH)
        )
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
            _StageMeans(self.mean, self.std),
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


class _StageMeans(nn.Module):
    """The embedding (N, E) of images (N, 3, H, W) in [0, 1]: standardized means of each stage's last ReLU.

    The first stages of ``shapes-vgg`` follow color and texture, the last one the class.
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
        embedding: Tensor = (torch.cat([*means, x.mean((2, 3))], 1) - self.mean) / self.std
        return embedding


@cpu_by_default()
def load_bundled_image_adapter() -> ImageAdapter:
    """The trained adapter of ``shapes-diffusion`` with its image encoder, in eval mode, on the CPU."""
    trained = load_generator(ShapesImageAdapter, IMAGE_ADAPTER)
    return trained.adapter().eval().requires_grad_(False)
