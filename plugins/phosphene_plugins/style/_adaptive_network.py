"""What adaptive style trains and applies: a decoder that makes pictures of an encoder's maps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model
from phosphene.results import TrainedNetwork

from ._adain import renormalized, statistics

#: How many of a layer's places lie around a picture that is encoded.
MARGIN = 4


#: A style as AdaIN knows it: means and standard deviations (S, C, 1, 1).
Manner = tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """An encoder's mirror image: maps (N, C, h, w) -> pictures (N, channels, H, W), a resolution at a time.

    For each of ``widths``, coarsest first, a convolution to the next, nearest upsampling by two and a
    convolution there, all with reflection padding and, but for the last, ReLUs. There is no normalisation,
    which would undo what AdaIN did.
    """

    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__()
        conv = lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3)
        self.widen = nn.ModuleList(conv(coarse, fine) for coarse, fine in pairwise(widths))
        self.smooth = nn.ModuleList(conv(fine, fine) for fine in widths[1:-1])
        self.paint = conv(widths[-1], channels)

    def forward(self, maps: Tensor) -> Tensor:
        x = maps
        for place, layer in enumerate(self.widen):
            x = F.interpolate(layer(_padded(x)).relu(), scale_factor=2)
            if place < len(self.smooth):
                x = self.smooth[place](_padded(x)).relu()
        return self.paint(_padded(x))


def _padded(maps: Tensor) -> Tensor:
    """Maps with a mirrored edge; one of a single row or column has nothing to mirror."""
    return F.pad(maps, (1,) * 4, mode="reflect" if min(maps.shape[2:]) > 1 else "replicate")


def halvings(model: Model, layer: str) -> int:
    """How often a layer's maps are half as large as the pictures: 2 for 16 x 16 of 64 x 64."""
    sides = zip(model.input_size[1:], model.map_shape(layer)[1:], strict=True)
    return max(0, round(max(math.log2(picture / side) for picture, side in sides)))


def mirrored(model: Model, layer: str) -> list[int]:
    """The widths of a decoder from a layer on: at every resolution those of its stage, else half as many."""
    known = {halvings(model, stage): model.map_shape(stage)[0] for stage in stages_up_to(model, layer)}
    widths = [model.map_shape(layer)[0]]
    for level in reversed(range(halvings(model, layer))):
        widths.append(known.get(level, max(16, widths[-1] // 2)))
    return widths


def stages_up_to(model: Model, layer: str) -> list[str]:
    """The model's stages that run before a layer, and the layer, finest first."""
    order = list(model.structure.layers)
    return [s for s in model.stages if order.index(s) < order.index(layer)] + [layer]


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaptiveNetwork(TrainedNetwork):
    """A decoder and what it decodes: ``network`` makes pictures of what ``encoder`` gives at ``layer``.

    Its folder holds the decoder, and the encoder by name. One that was given as an object is to be given
    again: ``dataclasses.replace(stylizer, given=model)``.
    """

    #: The encoder, where it is at hand.
    given: Model | None = field(default=None, repr=False, metadata={"saved": False})

    @classmethod
    def of(cls, encoder: Model, decoder: nn.Module, layer: str, **fields: Any) -> AdaptiveNetwork:
        """Of a decoder (N, C, h, w) -> (N, 3, H, W) that is there already, of a layer's maps.

        It is to give pixels in [0, 1], and can be applied at once; but no folder holds its code.
        """
        told = {"source": encoder.source, "name": encoder.name, "digest": encoder.digest}
        known = {"layer": encoder.layer_name(layer), "halvings": halvings(encoder, layer), "encoder": told}
        fields["config"] = fields.get("config", {}) | known
        empty = {"losses": torch.empty(0), "labels": (), "previews": torch.empty(0, 3, 1, 1)}
        return cls(
            network=decoder.eval().requires_grad_(False),
            given=encoder,
            **{"method": "style.adaptive_style_fit", **empty, **fields},
        )

    @property
    def layer(self) -> str:
        """Whose maps are repainted."""
        name: str = self.config["layer"]
        return name

    @cached_property
    def encoder(self) -> Model:
        """The model whose maps it decodes, loaded again where need be; ModelError where that cannot be."""
        if self.given is not None:
            return self.given
        told = self.config["encoder"]
        again = "say dataclasses.replace(stylizer, given=model)"
        if told["source"] is None:
            raise ModelError(f"the encoder ({told['name']}) was given as an object: {again}")
        source = dict(told["source"])
        with torch.random.fork_rng([]):  # its random beginning is nobody's loss
            encoder = load_model(source.pop("uri"), **source)
        if encoder.digest != told["digest"]:
            raise ModelError(f"{told['name']} has other weights than the encoder of this decoder: {again}")
        return encoder

    def whole(self, images: Tensor, margin: int = 0) -> Tensor:
        """Pictures of any size, their edges repeated: to whole places of the layer, and so many around."""
        places = 2 ** self.config["halvings"]
        right, down = (-side % places + margin * places for side in images.shape[:1:-1])
        before = margin * places
        return F.pad(images, (before, right, before, down), mode="replicate") if right or down else images

    def places(self, images: Tensor) -> tuple[int, int]:
        """How many of the layer's places (h, w) pictures cover."""
        height, width = (-(-side // 2 ** self.config["halvings"]) for side in images.shape[2:])
        return height, width

    def encode(self, images: Tensor) -> Tensor:
        """f(x): maps (N, C, h, w) of pictures of any size.

        The encoder sees a margin around them and its maps lose it again: what it sees of the zeros that
        convolutions pad with would be painted as a frame.
        """
        if images.shape[1] != (channels := self.encoder.input_size[0]):
            raise InputError(f"the encoder takes {channels} channels, the pictures have {images.shape[1]}")
        parameter = next(self.network.parameters())
        self.encoder.module.to(parameter.device)
        wide = self.whole(images, MARGIN)
        with self.encoder.guard():
            maps = self.encoder.maps(self.encoder.features(wide, self.layer), wide).to(parameter)
        height, width = self.places(images)
        top, left = (maps.shape[2] - height) // 2, (maps.shape[3] - width) // 2
        return maps[..., top : top + height, left : left + width]

    def decode(self, maps: Tensor, like: Tensor) -> Tensor:
        """g(t): the pictures that maps stand for, as large as these, nearly in [0, 1]."""
        painted = self.network(maps)
        size = tuple(2 ** self.config["halvings"] * count for count in self.places(like))
        if painted.shape[2:] != size:  # convolutions without padding have eaten the edges
            painted = F.interpolate(painted, size, mode="bilinear")
        return painted[..., : like.shape[2], : like.shape[3]]

    def manner(self, styles: Tensor) -> Manner:
        """mu and sigma (S, C, 1, 1) of the maps of style pictures (S, 3, H', W'), each of its own."""
        return statistics(self.encode(styles), each=True)

    def paint(self, images: Tensor, manner: Manner, shares: Tensor, alpha: float = 1.0) -> Tensor:
        """g((1 - alpha) f(c) + alpha sum_s b_s AdaIN(f(c), f(s))) of images (N, 3, H, W), shares (N, S).

        AdaIN is linear in the style's mean and deviation, so that mixing these mixes its outputs.
        """
        content = self.encode(images)
        mean, deviation = (
            torch.einsum("ns,schw->nchw", shares.to(content), part.to(content)) for part in manner
        )
        mixed = content.lerp(renormalized(content, mean, deviation), alpha)
        return self.decode(mixed, images).clamp(0, 1).to(images)
