"""``AdaptiveNetwork``: the result of ``adaptive_style_fit``, a decoder with its encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, fork_random_state
from phosphene.models import load_saved_model
from phosphene.parameter_text import read_document
from phosphene.results import TrainedNetwork

from ._adain import channel_statistics, match_statistics
from ._decoder import log2_stride

#: Padding around an image that is encoded, in positions of the layer.
MARGIN = 4

#: Means and standard deviations (S, C, 1, 1) of the features of S styles.
StyleStatistics: TypeAlias = tuple[Tensor, Tensor]


class _Encoder(BaseModel):
    """The record of the encoder in the field ``config``."""

    model_config = ConfigDict(extra="forbid")

    source: dict[str, Any] | None
    name: str
    digest: str


class _Config(BaseModel):
    """The field ``config`` of a saved stylizer."""

    model_config = ConfigDict(extra="forbid")

    layer: str
    halvings: Annotated[int, Field(strict=True, ge=0, le=10)]
    encoder: _Encoder
    widths: Annotated[tuple[Annotated[int, Field(strict=True, ge=1, le=65536)], ...], Field(max_length=12)]
    channels: Annotated[int, Field(strict=True, ge=1, le=4096)]


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaptiveNetwork(TrainedNetwork):
    """A decoder and its encoder: ``network`` decodes the features of ``encoder`` at ``layer`` to images.

    A saved folder holds the decoder, and the encoder by name. An encoder that was passed as an object has to
    be passed again after loading: ``dataclasses.replace(stylizer, encoder_model=model)``.
    """

    #: The encoder, where it was passed as an object; it is not saved.
    encoder_model: Model | None = field(default=None, repr=False, metadata={"saved": False})

    @classmethod
    def from_decoder(cls, encoder: Model, decoder: nn.Module, layer: str, **fields: Any) -> AdaptiveNetwork:
        """From a decoder (N, C, h, w) -> (N, 3, H, W) of a layer's features, trained elsewhere.

        Its output should be pixels in [0, 1]. It can be applied at once, but is not saved: a folder holds
        weights and no code.
        """
        encoder_record = {"source": encoder.source, "name": encoder.name, "digest": encoder.digest}
        config = {
            "layer": encoder.layer_name(layer),
            "halvings": log2_stride(encoder, layer),
            "encoder": encoder_record,
        }
        fields["config"] = fields.get("config", {}) | config
        untrained = {"losses": torch.empty(0), "labels": (), "previews": torch.empty(0, 3, 1, 1)}
        return cls(
            network=decoder.eval().requires_grad_(False),
            encoder_model=encoder,
            **{"method": "style.adaptive_style_fit", **untrained, **fields},
        )

    @classmethod
    def restore(cls, fields: dict[str, Any], find_method: Any, **rest: Any) -> AdaptiveNetwork:
        """The result with its decoder. Raises InputError for an invalid configuration."""
        read_document(_Config, fields["config"], lambda path: "the field 'config'")
        restored = super().restore(fields, find_method, **rest)
        assert isinstance(restored, AdaptiveNetwork)
        return restored

    def export_network(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """A network from ``images`` (N, C, H, W) and a ``style`` (N, C, H', W') each to stylized images.

        Raises ModelError for an encoder whose layers ``torch.fx`` cannot cut off.
        """
        network = StyleProgram(self)
        generator = torch.Generator().manual_seed(0)
        weight = next(self.network.parameters())
        channels = self.encoder.input_size[0]
        # Of different sizes: torch.export takes equal ones of an example to be equal always.
        sizes = {"images": (64, 96), "style": (56, 80)}
        inputs = {
            n: torch.rand(2, channels, *size, generator=generator).to(weight) for n, size in sizes.items()
        }
        with torch.no_grad():
            computed = network(**inputs)
            expected = self.stylize(
                inputs["images"][:1], self.style_statistics(inputs["style"][:1]), torch.ones(1, 1)
            )
        if not torch.allclose(computed[:1], expected, rtol=1e-3, atol=1e-4):
            raise ModelError(
                f"the network of adaptive_style_fit cannot be exported: cut off at {self.layer!r}, "
                f"{self.encoder.name} computes other features"
            )
        return network, inputs

    @property
    def layer(self) -> str:
        """The encoder's layer whose features are stylized."""
        name: str = self.config["layer"]
        return name

    @property
    def stride(self) -> int:
        """Pixels between two positions of the layer."""
        stride: int = 2 ** self.config["halvings"]
        return stride

    @cached_property
    def encoder(self) -> Model:
        """The model whose features the decoder was trained on, loaded again where necessary.

        Raises ModelError where it was passed as an object, or where its weights have changed.
        """
        if self.encoder_model is not None:
            return self.encoder_model
        record = self.config["encoder"]
        remedy = "use dataclasses.replace(stylizer, encoder_model=model)"
        if record["source"] is None:
            raise ModelError(f"the encoder ({record['name']}) was passed as an object: {remedy}")
        # Building the encoder draws random weights: without the fork the caller's random state would advance.
        with fork_random_state():
            encoder = load_saved_model(record["source"])
        if encoder.digest != record["digest"]:
            raise ModelError(f"{record['name']} has other weights than the encoder of this decoder: {remedy}")
        return encoder

    def pad(self, images: Tensor, margin: int = 0) -> Tensor:
        """Images padded by replication to a multiple of the stride, plus ``margin`` strides on every side."""
        right, down = (-side % self.stride + margin * self.stride for side in images.shape[:1:-1])
        left = up = margin * self.stride
        return F.pad(images, (left, right, up, down), mode="replicate") if right or down else images

    def map_size(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the layer's feature map of these images."""
        height, width = (-(-side // self.stride) for side in images.shape[2:])
        return height, width

    def encode(self, images: Tensor) -> Tensor:
        """f(x): feature maps (N, C, h, w) of images of any size.

        Images are padded and the maps cropped: zero padding changes the features near the edges, which the
        decoder would turn into a frame.

        Raises InputError for images with another number of channels.
        """
        if images.shape[1] != (channels := self.encoder.input_size[0]):
            raise InputError(f"the encoder takes {channels} channels, the images have {images.shape[1]}")
        parameter = next(self.network.parameters())
        self.encoder.module.to(parameter.device)
        padded = self.pad(images, MARGIN)
        with self.encoder.guard():
            features = self.encoder.maps(self.encoder.features(padded, self.layer), padded, self.layer).to(
                parameter
            )
        height, width = self.map_size(images)
        top, left = (features.shape[2] - height) // 2, (features.shape[3] - width) // 2
        return features[..., top : top + height, left : left + width]

    def decode(self, features: Tensor, like: Tensor) -> Tensor:
        """g(t): images of feature maps, as large as the images ``like``, approximately in [0, 1]."""
        decoded = self.network(features)
        size = tuple(self.stride * count for count in self.map_size(like))
        if decoded.shape[2:] != size:  # A decoder without padding returns smaller images.
            decoded = F.interpolate(decoded, size, mode="bilinear")
        return decoded[..., : like.shape[2], : like.shape[3]]

    def style_statistics(self, styles: Tensor) -> StyleStatistics:
        """mu(f(s)) and sigma(f(s)) (S, C, 1, 1) of each of the style images (S, 3, H', W')."""
        return channel_statistics(self.encode(styles), per_image=True)

    def stylize(
        self, images: Tensor, statistics: StyleStatistics, blend_weights: Tensor, alpha: float = 1.0
    ) -> Tensor:
        """g((1 - alpha) f(c) + alpha sum_s b_s AdaIN(f(c), f(s))) of images (N, 3, H, W), weights (N, S).

        AdaIN is linear in the style's mean and deviation, so blending these blends its outputs.
        """
        content = self.encode(images)
        mean, std = (
            torch.einsum("ns,schw->nchw", blend_weights.to(content), statistic.to(content))
            for statistic in statistics
        )
        blended = content.lerp(match_statistics(content, mean, std), alpha)
        return self.decode(blended, images).clamp(0, 1).to(images)


class StyleProgram(nn.Module):
    """g(AdaIN(f(c), f(s))) of images c and styles s, with the encoder f as a network that ends at a layer.

    Raises ModelError for an encoder that ``torch.fx`` cannot trace, and a layer without maps (N, C, h, w).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, stylizer: AdaptiveNetwork) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        encoder, layer = stylizer.encoder, stylizer.layer
        with encoder.guard():
            images = torch.zeros(1, *encoder.input_size, device=encoder.device, dtype=encoder.dtype)
            features = encoder.features(images, layer)
            if not torch.equal(encoder.maps(features, images, layer), features):
                raise ModelError(
                    f"the network of adaptive_style_fit cannot be exported: layer {layer!r} of "
                    f"{encoder.name} has tokens, not maps (N, C, h, w)"
                )
            try:
                network = create_feature_extractor(encoder.module, {layer: "features"})
            except Exception as error:  # torch.fx raises whatever the network's code runs into
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ModelError(
                    f"the network of adaptive_style_fit cannot be exported: torch.fx cannot cut off its "
                    f"encoder {encoder.name} at {layer!r}: {reason:.200}"
                ) from error
        self.encoder, self.decoder = network.eval().requires_grad_(False), stylizer.network
        self.transforms = [transform for _, transform in encoder.defenses]
        self.stride, self.margin = stylizer.stride, MARGIN
        for name, values in (("mean", encoder.mean), ("std", encoder.std)):
            self.register_buffer(name, values.to(images)[:, None, None])

    def forward(self, images: Tensor, style: Tensor) -> Tensor:
        content, styled = self._encode(images), self._encode(style)
        decoded = self.decoder(match_statistics(content, *channel_statistics(styled, per_image=True)))
        size = [self.stride * count for count in self._map_size(images)]
        if list(decoded.shape[2:]) != size:
            decoded = F.interpolate(decoded, size, mode="bilinear")
        return _crop(decoded, images.shape[2], images.shape[3]).clamp(0, 1)

    def _map_size(self, images: Tensor) -> list[int]:
        """Rows and columns of the layer's map; of positive numbers: ONNX rounds negative ones otherwise."""
        return [(side + self.stride - 1) // self.stride for side in images.shape[2:]]

    def _encode(self, images: Tensor) -> Tensor:
        height, width = self._map_size(images)
        start = self.margin * self.stride
        down, right = (
            self.stride * n - side for n, side in zip((height, width), images.shape[2:], strict=True)
        )
        padded = F.pad(images, (start, right + start, start, down + start), mode="replicate")
        for transform in self.transforms:
            padded = transform(padded)
        features = self.encoder((padded - self.mean) / self.std)["features"]
        top, left = (features.shape[2] - height) // 2, (features.shape[3] - width) // 2
        return features[..., top : top + height, left : left + width]


def _crop(maps: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns, by indices.

    A slice would fix in an exported program whether the size is a multiple of the stride.
    """
    rows, columns = (torch.arange(count, device=maps.device) for count in (height, width))
    return maps.index_select(2, rows).index_select(3, columns)


def require_adaptive_network(stylizer: object, method: str) -> AdaptiveNetwork:
    """The stylizer. Raises InputError where it is not a result of ``adaptive_style_fit``."""
    if not isinstance(stylizer, AdaptiveNetwork):
        origin = getattr(stylizer, "method", "another source")
        raise InputError(f"{method} applies a network of adaptive_style_fit, not one of {origin}")
    return stylizer
