"""``shapes-words``: the bundled classifier with embeddings of texts that name its classes."""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .scenes import CLASSES

#: The bundled model of images and words: the network of ``shapes-vgg``.
WORDS = "shapes-words"


class ClassWords:
    """The embedding (D,) of a text: the mean of the classifier's unit rows of the classes that it names.

    It stands for the text tower of a CLIP, with a vocabulary of ten words. Raises InputError for a text that
    names no class.
    """

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier

    def __call__(self, text: str) -> Tensor:
        words = re.findall(r"[a-z]+", text.lower())
        rows = [index for index, name in enumerate(CLASSES) if name in words]
        if not rows:
            names = ", ".join(CLASSES)
            raise InputError(f"builtin:{WORDS} has ten words, {names}, and none of them is in {text!r}")
        embedding: Tensor = F.normalize(self.classifier.weight, dim=1)[rows].mean(0)
        return embedding
