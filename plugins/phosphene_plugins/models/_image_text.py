"""Captioning and question-answering networks of transformers as classifiers of answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import InputError, ModelError
from phosphene.errors import type_name


class ImageTextNetwork(nn.Module):
    """A network of images and text with a fixed question, which returns a logit for each answer.

    A generator (captioner) has the ``answers`` that it is asked about: the logits (N, K) are their
    log-probabilities given image and question, summed over their tokens. A network with a classifier of
    answers (ViLT) returns its own logits.

    question: the tokens (L,) before the answer, special tokens included.
    answers: the tokens of each answer with the end token, or None for a classifier.
    tokenizer: of transformers, by which ``text`` returns the text of tokens.
    """

    question: Tensor

    def __init__(
        self, network: nn.Module, question: Tensor, answers: Sequence[Tensor] | None, tokenizer: Any
    ) -> None:
        super().__init__()
        self.network, self.answers, self.tokenizer = network, answers, tokenizer
        self.register_buffer("question", question, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images, self.question.expand(len(images), -1))

    def logits(self, images: Tensor, questions: Tensor) -> Tensor:
        """Logits (N, K) for a question of each image, tokens (N, L)."""
        if self.answers is None:
            logits: Tensor = self.network(input_ids=questions, pixel_values=images).logits
            return logits
        scores = []
        for answer in self.answers:
            words = answer.to(questions.device).expand(len(images), -1)
            tokens = torch.cat([questions, words], 1)
            outputs = self.network(input_ids=tokens, pixel_values=images).logits
            # The last positions belong to the text; each predicts the token after it.
            predictions = outputs[:, -words.shape[1] - 1 : -1].log_softmax(2)
            scores.append(predictions.gather(2, words[:, :, None]).sum((1, 2)))
        return torch.stack(scores, 1)

    def text(self, tokens: Tensor) -> str:
        """The text of tokens (L,), without special tokens."""
        text: str = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return text

    @property
    def embedding(self) -> nn.Embedding:
        """The layer that embeds the tokens of the text."""
        layer = self.network.get_input_embeddings()  # type: ignore[operator]
        assert isinstance(layer, nn.Embedding)
        return layer


def image_text_network(
    network: Any, tokenizer: Any, question: str | None, answers: Sequence[str] | None, uri: str
) -> tuple[ImageTextNetwork, list[str] | None]:
    """The network with its question and answers, and the names of its classes if they are the answers."""
    accepted = inspect.signature(network.forward).parameters
    placeholders = any(hasattr(network.config, n) for n in ("image_token_id", "image_token_index"))
    if not {"pixel_values", "input_ids"} <= accepted.keys() or placeholders:
        raise ModelError(
            f"{uri} is {type_name(network)}, which does not take an image beside a text as they are "
            "(pixel_values and input_ids); networks such as GIT, BLIP and ViLT do"
        )
    is_classifier = "QuestionAnswering" in type(network).__name__ and hasattr(network, "classifier")
    if is_classifier and answers is not None:
        raise InputError(f"{uri} has answers of its own, its classes: leave out answers")
    if is_classifier and not question:
        raise InputError(f'{uri} answers questions: pass one, question="what is in the image?"')
    if not is_classifier and not answers:
        raise InputError(
            f'{uri} generates text: pass the texts to compare, as answers=["a dog in grass", "a cat"]'
        )
    text_config = getattr(network.config, "text_config", network.config)
    first = getattr(text_config, "bos_token_id", None)
    first = first if first is not None and not is_classifier else tokenizer.cls_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if first is None or last is None:
        raise ModelError(f"the tokenizer of {uri} has no token for the start or the end of a text")

    def tokens(text: str) -> list[int]:
        numbers: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return numbers

    start = [first, *tokens(question or "")]
    if is_classifier:
        return ImageTextNetwork(network, torch.tensor([*start, last]), None, tokenizer), None
    assert answers is not None
    rows = [torch.tensor([*tokens(answer), last]) for answer in answers]
    return ImageTextNetwork(network, torch.tensor(start), rows, tokenizer), list(answers)
