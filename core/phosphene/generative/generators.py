"""``Generator``: a decoder from latent codes to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..errors import InputError


class Generator(nn.Module):
    """A decoder z -> image, for latent codes whose components are distributed approximately as N(0, 1).

    Args:
        latent_size: Shape of one latent code.
        decoder: Network or function, codes (N, ``*latent_size``) -> images (N, C, H, W) in [0, 1].
        encoder: Network or function, images of that size -> codes; default: none.

    Example::
        import torch
        from phosphene.generative import Generator

        generator = Generator([3], lambda z: z.sigmoid()[:, :, None, None].expand(-1, -1, 16, 16))
        generator(torch.zeros(2, 3)).shape  # (2, 3, 16, 16)
    """

    #: Path or name that it was loaded from.
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
        """Images (N, C, H, W) of latent codes, clipped to [0, 1]."""
        return self.decoder(z).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Latent codes (N, ``*latent_size``) of images. Raises InputError where there is no encoder."""
        if self.encoder is None:
            raise InputError("this generator has no encoder, so images cannot be encoded")
        return self.encoder(images)

    def forward(self, z: Tensor) -> Tensor:
        return self.decode(z)
