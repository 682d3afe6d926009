"""The bundled vision transformer: the first stages of shapes-vgg, a class token, and blocks of attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import CLASSES, SIZE

#: The name of the trained network.
VIT = "shapes-vit"
#: Width of the tokens, number of blocks, heads of each, and pixels per side of a patch.
WIDTH, DEPTH, HEADS, PATCH = 64, 4, 4, 8
#: Channels of the stem's stages, those of shapes-vgg.
STEM_WIDTHS = (24, 48, 96)


class Attention(nn.Module):
    """Multi-head self-attention, fused."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens


class ShapesViT(nn.Module):
    """A small vision transformer on the first three stages of shapes-vgg, its blocks named as in timm.

    Takes normalized images (N, 3, 64, 64), returns logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in STEM_WIDTHS:
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.stem = nn.Sequential(*layers)
        self.patch_embed = nn.Conv2d(channels, WIDTH, 1)
        count = (SIZE // PATCH) ** 2
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + count, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(CLASSES))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.05)
                nn.init.zeros_(module.bias)

    def tokens(self, maps: Tensor) -> Tensor:
        """From the stem's maps (N, 96, 8, 8) the normalized tokens (N, 65, 64), the class token first."""
        patches = self.patch_embed(maps).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(maps), -1, -1), patches], 1) + self.pos_embed
        return self.norm(self.blocks(tokens))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(self.stem(images))[:, 0])
