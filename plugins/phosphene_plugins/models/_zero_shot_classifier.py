"""Zero-shot classification with CLIP: the text embeddings of the prompts as a linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZeroShotClassifier(nn.Module):
    """From normalized images (N, 3, H, W) to logits (N, K): scale * cos(image, prompt k) + bias.

    The image tower of a CLIP model is a submodule; the text tower runs once, without gradients, on the
    prompts' ``tokens`` (K, T). Source: Radford et al. 2021, "Learning Transferable Visual Models From
    Natural Language Supervision", 3.1.
    """

    def __init__(self, clip: Any, tokens: Tensor) -> None:
        super().__init__()
        self.visual: nn.Module = clip.visual
        with torch.no_grad():
            embeddings = clip.logit_scale.exp() * clip.encode_text(tokens, normalize=True)
            self.prompts = nn.Linear(
                embeddings.shape[1], embeddings.shape[0], bias=clip.logit_bias is not None
            )
            self.prompts.weight.copy_(embeddings)
            if clip.logit_bias is not None:
                self.prompts.bias.fill_(clip.logit_bias.item())

    def forward(self, images: Tensor) -> Tensor:
        features = self.visual(images)
        features = features[0] if isinstance(features, tuple) else features  # CoCa also returns its tokens
        return self.prompts(F.normalize(features, dim=-1))


class TextTower:
    """The normalized embedding (D,) of a text by the text tower of a CLIP model, on the CPU."""

    def __init__(self, clip: Any, tokenize: Callable[[str], Tensor]) -> None:
        # A shallow copy without the image tower, which belongs to the classifier and moves with it.
        self.clip = copy.copy(clip)
        self.clip._modules = {name: part for name, part in clip._modules.items() if name != "visual"}
        self.tokenize = tokenize

    def __call__(self, text: str) -> Tensor:
        embedding: Tensor = self.clip.encode_text(self.tokenize(text), normalize=True)[0]
        return embedding
