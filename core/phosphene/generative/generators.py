"""``Generator``: a decoder from latent codes to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..errors import InputError


class Generator(nn.Module):
    """A decoder z -> image of codes that are, one by one, like draws of N(0, 1).

    decoder: codes (N, ``*latent_size``) -> pictures (N, C, H, W) in [0, 1], a network or a function of yours;
    encoder, where there is one: pictures of that size -> codes.
    """

    #: What it was loaded from.
    uri: str | None = None

    def __init__(
        self,
        latent_size: Sequence[int],
        decoder: Callable[[Tensor], Tensor],
        encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.latent_size = tuple(latent_size)
        self.decoder, self.encoder = decoder, encoder

    def decode(self, z: Tensor) -> Tensor:
        """The pictures of codes: (N, C, H, W), clipped into [0, 1]."""
        return self.decoder(z).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """The codes of pictures. Raises InputError where there is no encoder."""
        if self.encoder is None:
            raise InputError("this generator has no encoder, so no picture leads to a code")
        return self.encoder(images)

    def forward(self, z: Tensor) -> Tensor:
        return self.decode(z)
