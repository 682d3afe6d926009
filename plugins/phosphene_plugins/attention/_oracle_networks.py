"""Small transformers without norms and perceptrons, whose attention and scores have a closed form."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, fork_random_state, load_model

#: Width of the tokens, side of a patch, the grid of patches, and the number of tokens with the class token.
WIDTH, PATCH, GRID, TOKENS = 8, 4, (3, 5), 16
#: The centers of the patches.
CENTERS = ((1.5, 5.5, 9.5), (1.5, 5.5, 9.5, 13.5, 17.5))
CLASSES = 3
#: What the head reads; "attention": the second of two queries that attend to all tokens.
Pool = Literal["class", "mean", "attention"]
POOLS: tuple[Pool, ...] = ("class", "mean")


class LinearAttention(nn.Module):
    """Attention with several heads, added to its input: x + sum_h A_h x V_h.

    ``sharpness`` scales queries and keys: with 0 each token attends to all tokens equally.
    """

    def __init__(self, heads: int, sharpness: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_key = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.query_key.weight.mul_(sharpness)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key = self.query_key(tokens).chunk(2, -1)
        query, key, value = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, key, self.value(tokens))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = tokens + self.project(attended.transpose(1, 2).flatten(2))
        return output

    def probabilities(self, tokens: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) by einsum, (N, heads, T, T)."""
        query, key = (t.unflatten(2, (self.heads, -1)) for t in self.query_key(tokens).chunk(2, -1))
        return (torch.einsum("nihd,njhd->nhij", query, key) / (WIDTH / self.heads) ** 0.5).softmax(-1)

    def head_values(self, tokens: Tensor) -> Tensor:
        """What each head adds to a token for each token that it attends to, (N, heads, T, width)."""
        value = self.value(tokens).unflatten(2, (self.heads, -1))
        weight = self.project.weight.unflatten(1, (self.heads, -1))
        return torch.einsum("njhd,whd->nhjw", value, weight)


class AttentionPooling(nn.Module):
    """Two queries of its own that attend to all tokens, with two heads; the second is read."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(4 * torch.randn(2, WIDTH))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.queries.expand(len(tokens), -1, -1)
        query, key, value = (
            t.unflatten(2, (2, -1)).transpose(1, 2) for t in (queries, self.key(tokens), self.value(tokens))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = attended.transpose(1, 2).flatten(2)[:, 1]
        return output

    def probabilities(self, tokens: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) by einsum, (N, 2 heads, 2 queries, T)."""
        query, key = (t.unflatten(-1, (2, -1)) for t in (self.queries, self.key(tokens)))
        return (torch.einsum("ihd,njhd->nhij", query, key) / (WIDTH / 2) ** 0.5).softmax(-1)


class LinearTransformer(nn.Module):
    """Patches with positions, a class token, blocks, and a linear head of what ``pool`` names."""

    def __init__(self, heads: tuple[int, ...], sharpness: float, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(torch.randn(1, GRID[0] * GRID[1], WIDTH))
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.Sequential(*(LinearAttention(count, sharpness) for count in heads))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.pooling = AttentionPooling() if pool == "attention" else None

    @property
    def layers(self) -> list[LinearAttention]:
        """The blocks in order."""
        return [block for block in self.blocks if isinstance(block, LinearAttention)]

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens (N, T, width) before the first block."""
        patches = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.tokens(images))
        if self.pooling is not None:
            read = self.pooling(tokens)
        else:
            read = tokens[:, 0] if self.pool == "class" else tokens.mean(1)
        logits: Tensor = self.head(read)
        return logits

    def probabilities(self, images: Tensor) -> list[Tensor]:
        """The attention of each block by einsum, (N, heads, T, T), and that of the pooling."""
        tokens, computed = self.tokens(images), []
        for block in self.layers:
            computed.append(block.probabilities(tokens))
            tokens = block(tokens)
        return computed if self.pooling is None else [*computed, self.pooling.probabilities(tokens)]


def linear_transformer(
    heads: tuple[int, ...] = (2, 4), sharpness: float = 4.0, pool: Pool = "class", **options: Any
) -> tuple[LinearTransformer, Model, Tensor]:
    """A transformer in double precision, the model of it, and two images (2, 3, 12, 20) in [0, 1].

    The network itself takes ``model.normalize(images)``. ``options``: further ones of ``load_model``.
    """
    size = (GRID[0] * PATCH, GRID[1] * PATCH)
    with fork_random_state():
        torch.manual_seed(0)
        network = LinearTransformer(heads, sharpness, pool).double().eval().requires_grad_(False)
        images = torch.rand(2, 3, *size, dtype=torch.float64)
    normalization: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    return network, load_model(network, input_size=(3, *size), **normalization, **options), images
