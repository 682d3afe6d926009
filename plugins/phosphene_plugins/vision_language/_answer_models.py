"""``AnswerModel``: a network that answers questions about an image, word by word, as methods use it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import InputError, ModelError, at_least_float32, fork_random_state
from phosphene.builtin.answers import ANSWERS, END, VOCABULARY, load_answers
from phosphene.images import resize


@dataclass(frozen=True)
class Pass:
    """One pass of a text of L tokens: ``logits`` (L, V) of the token after each, on the graph.

    ``attentions``: by layer (1, heads, S, S'), the tensors that the logits were computed from; ``rows`` (L,):
    the query of each text token; ``columns`` (T,): the keys of the image tokens.
    """

    logits: Tensor
    attentions: list[Tensor]
    rows: Tensor
    columns: Tensor


class AnswerModel(ABC):
    """A network of images and text: image tokens (T, D), and a decoder of text that reads them.

    ``name``; ``input_size``: height and width that images are resized to; ``grid``: height and width of the
    image tokens, T = h w, in rows. Subclass it for a network of your own.
    """

    name: str
    input_size: tuple[int, int]
    grid: tuple[int, int]

    @abstractmethod
    def image_tokens(self, image: Tensor) -> Tensor:
        """The tokens (T, D) of an image (1, 3, H, W) of the input size, pixels in [0, 1], on the graph."""

    @abstractmethod
    def read(self, tokens: Tensor, ids: Sequence[int]) -> Pass:
        """A pass of the numbers of L text tokens, with the image's tokens."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The numbers of a question's tokens."""

    @abstractmethod
    def encode_answer(self, text: str) -> list[int]:
        """The numbers of an answer's tokens, without the end."""

    @abstractmethod
    def decode(self, number: int) -> str:
        """The text of a token."""

    @property
    @abstractmethod
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""

    @property
    def special(self) -> frozenset[int]:
        """The tokens that are no words of a text, such as its ends."""
        return self.ends

    def embedding(self, tokens: Tensor) -> nn.Embedding:
        """The layer by which ``read`` embeds the words beside these image tokens. Raises ModelError."""
        raise ModelError(f"{self.name} does not say how its words are embedded: implement embedding(tokens)")

    @property
    @abstractmethod
    def uri(self) -> str | None:
        """What ``load_answer_model`` loads it from; None for an object."""

    def prepare(self, image: Tensor) -> Tensor:
        """The image (1, 3, H, W), resized to the input size."""
        if image.shape[1] == 1:
            image = image.expand(-1, 3, -1, -1)
        if image.shape[1] != 3:
            raise InputError(f"{self.name} takes RGB images, not images of {image.shape[1]} channels")
        return image if image.shape[2:] == self.input_size else resize(image, self.input_size).clamp(0, 1)


class ShapesAnswersModel(AnswerModel):
    """The bundled network: three questions about drawn scenes."""

    input_size, grid = (64, 64), (8, 8)
    name = uri = f"builtin:{ANSWERS}"
    ends = frozenset([VOCABULARY.index(END)])

    def __init__(self) -> None:
        with fork_random_state():
            self.trunk, self.network = load_answers()
        self._moved: dict[Any, Any] = {}

    def image_tokens(self, image: Tensor) -> Tensor:
        image = at_least_float32(image)
        trunk, network = self._like(image)
        tokens: Tensor = network.image_tokens(trunk(image))[0]
        return tokens

    def read(self, tokens: Tensor, ids: Sequence[int]) -> Pass:
        count = len(tokens)
        longest = len(self.network.word_positions)
        if len(ids) > longest:
            raise InputError(
                f"{self.name} takes texts of {longest} words, question and answer, not {len(ids)}"
            )
        _, network = self._like(tokens)
        logits, attentions = network(tokens[None], torch.tensor([list(ids)], device=tokens.device))
        positions = torch.arange(count + len(ids), device=tokens.device)
        return Pass(logits[0], attentions, positions[count:], positions[:count])

    def encode(self, text: str) -> list[int]:
        words = text.lower().replace("?", " ").split()
        if unknown := [word for word in words if word not in VOCABULARY]:
            raise InputError(
                f"{self.name} has no word {unknown[0]!r}; it answers 'what shape', 'what background' and "
                "'describe'"
            )
        return [VOCABULARY.index(word) for word in words]

    def encode_answer(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, number: int) -> str:
        return VOCABULARY[number]

    def embedding(self, tokens: Tensor) -> nn.Embedding:
        layer: nn.Embedding = self._like(tokens)[1].words
        return layer

    def _like(self, tensor: Tensor) -> tuple[Any, Any]:
        """The trunk and the decoder on the device and in the precision of a tensor."""
        weight, key = self.network.head.weight, (tensor.device, tensor.dtype)
        if (weight.device, weight.dtype) == key:
            return self.trunk, self.network
        if key not in self._moved:
            parts = (self.trunk, self.network)
            self._moved[key] = tuple(copy.deepcopy(part).to(tensor.device, tensor.dtype) for part in parts)
        return self._moved[key]


def generate_answer(model: AnswerModel, tokens: Tensor, prompt: Sequence[int], most: int) -> list[int]:
    """The likeliest token at each step, up to ``most``, without the one that ends the answer."""
    numbers: list[int] = []
    with torch.no_grad():
        while len(numbers) < most:
            best = int(model.read(tokens, [*prompt, *numbers]).logits[-1].argmax())
            if best in model.ends:
                break
            numbers.append(best)
    return numbers


def load_answer_model(value: str) -> AnswerModel:
    """``builtin:shapes-answers``, or ``hf:folder`` with a LLaVA or a BLIP. Raises InputError for others."""
    scheme, _, name = value.partition(":")
    if value == ShapesAnswersModel.uri:
        return ShapesAnswersModel()
    if scheme == "hf" and name:
        from ._hf_answer_models import load_hf_answer_model

        return load_hf_answer_model(name)
    raise InputError(
        f"{value!r} is no network that answers questions: builtin:{ANSWERS}, or hf:folder with a LLaVA "
        "or BLIP"
    )
