"""``ColorWords``: a text-conditioned diffusion model in closed form, whose attention is a posterior."""

from __future__ import annotations

import copy
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError
from phosphene.generative import Denoiser

#: RGB color; center (row, column) and spread (row, column) in units of the image's sides; log weight.
WORDS: dict[str, tuple[tuple[float, ...], tuple[float, float], tuple[float, float], float]] = {
    "sky": ((0.50, 0.75, 0.97), (0.20, 0.5), (0.10, 2.0), 0.0),
    "night": ((0.07, 0.08, 0.24), (0.20, 0.5), (0.10, 2.0), 0.0),
    "sun": ((0.99, 0.82, 0.18), (0.24, 0.78), (0.040, 0.040), 6.0),
    "moon": ((0.93, 0.92, 0.84), (0.16, 0.26), (0.030, 0.030), 6.0),
    "cloud": ((0.92, 0.93, 0.95), (0.17, 0.32), (0.022, 0.060), 6.0),
    "mountain": ((0.42, 0.36, 0.40), (0.55, 0.30), (0.070, 0.090), 6.0),
    "sea": ((0.08, 0.33, 0.60), (0.66, 0.5), (0.07, 2.0), 0.0),
    "grass": ((0.34, 0.62, 0.24), (0.92, 0.5), (0.07, 2.0), 0.0),
    "sand": ((0.90, 0.78, 0.52), (0.92, 0.5), (0.07, 2.0), 0.0),
    "snow": ((0.96, 0.97, 0.99), (0.92, 0.5), (0.07, 2.0), 0.0),
}
#: Standard deviation of x_0 around the color of its word.
SPREAD = 0.06
#: log weight of a word without a color.
_NEVER = -1e4


class WordAttention(nn.Module):
    """Cross-attention softmax(Q K^T) V of positions to words, its parts named as in diffusers."""

    is_cross_attention, heads, scale = True, 1, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, positions: Tensor, words: Tensor) -> Tensor:
        query, key, value = self.to_q(positions), self.to_k(words), self.to_v(words[..., :3])
        attended: Tensor = (query @ key.mT).softmax(-1) @ value
        return attended


class ColorWords(Denoiser):
    """The optimal denoiser of landscapes in which every position has the color of one word of the prompt.

    Position p is drawn by word w with probability pi_w(p), softmax over the prompt of a Gaussian log weight
    around the word's location; x_0(p) ~ N(c_w, s^2 I) with the word's color c_w. For x_t = a x_0 + sigma eps
    and v = a^2 s^2 + sigma^2 the posterior of the word is

    r_w(p) = softmax_w(log pi_w(p) - ||x_t(p) - a c_w||^2 / (2 v)),

    linear in features of the word once ||x_t||^2 cancels: a layer of cross-attention with the probabilities
    r. Then E[x_0 | x_t] = (1 - a^2 s^2 / v) sum_w r_w c_w + (a s^2 / v) x_t. The empty prompt is the mixture
    of all ``WORDS``; other words draw nothing. x_0 has half the image's resolution.

    A learned word is eight numbers: c_w in [-1, 1], the center (row, column), the logarithm of the spread
    (row, column), and the log weight.
    """

    multiple, image_size = 2, (64, 64)
    token_width = 8
    uri = "builtin:color-words"

    def __init__(self) -> None:
        super().__init__((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")).cumprod(0))
        rows = [_embedding(*word) for word in WORDS.values()]
        unknown = [0.0] * 8 + [_NEVER]
        self.table = nn.Parameter(torch.tensor([*rows, unknown], device="cpu"), requires_grad=False)
        self.attention = WordAttention()
        self.words = self.table[: len(WORDS)]

    def forward(self, x: Tensor, t: int) -> Tensor:
        a, sigma = self.levels(t)
        v = a**2 * SPREAD**2 + sigma**2
        row, column = torch.meshgrid(
            *((torch.arange(side, device=x.device) + 0.5) / side for side in x.shape[2:]), indexing="ij"
        )
        one = torch.ones_like(row)
        fixed = torch.stack([-(a**2) / (2 * v) * one, row**2, row, column**2, column, one]).to(x)
        features = torch.cat([a / v * x, fixed.expand(len(x), -1, -1, -1)], 1).flatten(2).mT
        words = self.words.to(x).expand(len(x), -1, -1)
        color = self.attention(features, words).mT.unflatten(2, x.shape[2:])
        share = a * SPREAD**2 / v
        return (x - a * ((1 - a * share) * color + share * x)) / sigma

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        return [(word, [n]) for n, word in enumerate(_split(text))]

    def prompted(self, text: str) -> ColorWords:
        vocabulary, view = list(WORDS), copy.copy(self)
        words = _split(text.lower())
        if words and not set(words) & set(vocabulary):
            raise InputError(f"{self.uri} draws none of these words; it draws {', '.join(vocabulary)}")
        if words:
            # The last row of the table draws nothing.
            numbers = [vocabulary.index(word) if word in WORDS else len(WORDS) for word in words]
            view.words = self.table[numbers]
        else:
            view.words = self.table[: len(WORDS)]
        return view

    def with_tokens(self, text: str, tokens: Tensor) -> ColorWords:
        if tokens.ndim != 2 or tokens.shape[1] != 8:
            raise InputError(f"tokens have the shape (n, 8) for this model, not {tuple(tokens.shape)}")
        if "*" not in text:
            raise InputError(f"the text {text!r} has no *, which stands for the learned tokens")
        learned = _token_rows(tokens).to(self.table)
        view = copy.copy(self)
        rows = []
        for word in re.findall(r"\w+|\*", text.lower()):
            number = list(WORDS).index(word) if word in WORDS else len(WORDS)
            rows.append(learned if word == "*" else self.table[number : number + 1])
        view.words = torch.cat(rows)
        return view

    def token_embedding(self, word: str) -> Tensor:
        """Of a word without a color: gray, in the center, as wide as half the image."""
        color, center, spread, weight = WORDS.get(word.lower(), ((0.5,) * 3, (0.5, 0.5), (0.5, 0.5), 0.0))
        numbers = [2 * value - 1 for value in color] + [*center, *map(math.log, spread), weight]
        return torch.tensor(numbers, device=self.table.device)

    def encode(self, images: Tensor) -> Tensor:
        """x_0 of images in [0, 1]: 2 I - 1 at half the resolution."""
        return super().encode(F.avg_pool2d(images, 2))

    def decode(self, x: Tensor) -> Tensor:
        """Images of x_0, at twice its resolution."""
        return super().decode(F.interpolate(x, scale_factor=2, mode="bilinear"))


def _split(text: str) -> list[str]:
    """The words of a text, without punctuation."""
    return re.findall(r"\w+", text)


def _token_rows(tokens: Tensor) -> Tensor:
    """The rows (n, 9) of the table of learned words (n, 8), as ``_embedding`` has those of ``WORDS``."""
    color, center, weight = tokens[:, :3], tokens[:, 3:5], tokens[:, 7]
    spread = tokens[:, 5:7].exp()
    quadratic, linear = -0.5 / spread**2, center / spread**2
    constant = weight - 0.5 * (center / spread).square().sum(1)
    position = torch.stack([quadratic, linear], 2).flatten(1)
    return torch.cat([color, color.square().sum(1, keepdim=True), position, constant[:, None]], 1)


def _embedding(
    color: tuple[float, ...], center: tuple[float, float], spread: tuple[float, float], weight: float
) -> list[float]:
    """c_w, ||c_w||^2, and the coefficients of row^2, row, column^2, column and 1 in the log weight."""
    c = [2 * value - 1 for value in color]
    position = [k for m, h in zip(center, spread, strict=True) for k in (-0.5 / h**2, m / h**2)]
    constant = weight - sum(0.5 * (m / h) ** 2 for m, h in zip(center, spread, strict=True))
    return [*c, sum(value**2 for value in c), *position, constant]
