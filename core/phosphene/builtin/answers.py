"""``shapes-answers``: a small network that answers questions about scenes, word by word."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch_state import cpu_by_default
from .networks import load_generator, load_network, normalize
from .scenes import BACKGROUNDS, CLASSES

#: The bundled network that answers questions.
ANSWERS = "shapes-answers"
END = "<end>"
#: The words of questions and answers.
VOCABULARY = (END, "what", "shape", "background", "describe", "a", "on", *CLASSES, *BACKGROUNDS)
QUESTIONS = ("what shape", "what background", "describe")

_GRID, _WIDTH, _HEADS, _LAYERS, _WORDS = 8, 64, 4, 2, 8


def correct_answer(question: str, label: int, background: int) -> str:
    """The answer to a question about a scene with this class and background."""
    shape, ground = f"a {CLASSES[label]}", BACKGROUNDS[background]
    return {"what shape": shape, "what background": ground}.get(question, f"{shape} on {ground}")


class _Block(nn.Module):
    """Causal self-attention of all tokens and a two-layer perceptron, with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (N, S, D) and the attention (N, heads, S, S)."""
        count, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(count, length, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        attention = scores.masked_fill(mask, -torch.inf).softmax(-1)
        x = x + self.out((attention @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), attention


class ShapesAnswers(nn.Module):
    """A decoder of words after 8 x 8 image tokens, which are maps of ``shapes-vgg`` at two depths.

    Image tokens attend to each other, words to all image tokens and to the words before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(96 + 128, _WIDTH)
        self.image_positions = nn.Parameter(0.02 * torch.randn(_GRID**2, _WIDTH))
        self.word_positions = nn.Parameter(0.02 * torch.randn(_WORDS, _WIDTH))
        self.words = nn.Embedding(len(VOCABULARY), _WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, len(VOCABULARY))

    def image_tokens(self, features: Tensor) -> Tensor:
        """The tokens (N, 64, D) of features (N, 224, 8, 8)."""
        tokens: Tensor = self.project(features.flatten(2).transpose(1, 2)) + self.image_positions
        return tokens

    def forward(self, tokens: Tensor, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (N, L, V) after each word of ``ids`` (N, L), and the attention of each block."""
        x = torch.cat([tokens, self.words(ids) + self.word_positions[: ids.shape[1]]], 1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mask[:, : _GRID**2] = False
        attentions = []
        for block in self.blocks:
            x, attention = block(x, mask)
            attentions.append(attention)
        return self.head(self.norm(x[:, _GRID**2 :])), attentions


class Trunk(nn.Module):
    """The two maps of ``shapes-vgg`` that the image tokens are computed from: (N, 224, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = load_network("shapes-vgg").get_submodule("features")

    def forward(self, images: Tensor) -> Tensor:
        """Maps of images (N, 3, 64, 64), pixels in [0, 1]."""
        images, maps = normalize(images), []
        for index, layer in enumerate(self.layers.children()):
            images = layer(images)
            if index == 13:  # the third stage's last ReLU
                maps.append(F.avg_pool2d(images, 2))
        return torch.cat([*maps, images], 1)


@cpu_by_default()
def load_answers() -> tuple[Trunk, ShapesAnswers]:
    """The trunk and the trained decoder, in eval mode, on the CPU."""
    return Trunk().eval(), load_generator(ShapesAnswers, ANSWERS)
