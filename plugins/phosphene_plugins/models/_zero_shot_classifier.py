"""A vision-language model as a classifier: what its text tower makes of the prompts is a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZeroShot(nn.Module):
    """The logits (N, K) of normalised pictures (N, 3, H, W): scale * cos(picture, prompt k) + bias.

    Of a CLIP's two towers the picture's is kept, and of the other what it makes of the prompts' ``tokens``
    (K, T), which no gradient reaches.
    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", 3.1.
    """

    def __init__(self, clip: Any, tokens: Tensor) -> None:
        super().__init__()
        self.visual: nn.Module = clip.visual
        with torch.no_grad():
            text = clip.logit_scale.exp() * clip.encode_text(tokens, normalize=True)
            self.prompts = nn.Linear(text.shape[1], text.shape[0], bias=clip.logit_bias is not None)
            self.prompts.weight.copy_(text)
            if clip.logit_bias is not None:
                self.prompts.bias.fill_(clip.logit_bias.item())

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.visual(pictures)
        features = features[0] if isinstance(features, tuple) else features  # a CoCa gives its tokens, too
        return self.prompts(F.normalize(features, dim=-1))
