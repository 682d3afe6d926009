"""HotFlip on the text side of an image-text network: words of its question replaced, by the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phosphene import InputError, Model, ModelError, at_least_float32, progress_bar

from ..models._image_text import ImageTextNetwork
from ._hotflip import embedding_leaves, replacement_trials


@dataclass(frozen=True)
class QuestionAttack:
    """Questions (N texts) before and after, and whether the attack succeeded.

    ``tokens`` (N, L) of the changed questions; ``replaced`` (N,), how many of them differ; ``margins`` (N,),
    z_y - max_(k != y) z_k at the end; ``success`` (N,); ``predicted`` (N,), the answers' indices.
    """

    question: str
    questions: tuple[str, ...]
    tokens: Tensor
    replaced: Tensor
    margins: Tensor
    predicted: Tensor
    success: Tensor


def attack_question(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    replacements: int = 2,
    candidates: int = 64,
    targeted: bool = False,
) -> QuestionAttack:
    """HotFlip on the question of an image-text network: its most harmful words are replaced, one by one.

    gain(i, v) = (e_v - e_(w_i)) . dm/de_i,   m = z_y - max_(k != y) z_k

    e are the embeddings of the tokens, w_i the token at position i. In every step the ``candidates`` single
    replacements of the lowest estimate (of a targeted attack the highest) are evaluated, and the best one is
    applied, until the margin m changes its sign or ``replacements`` steps are done. The images stay the same:
    the counterpart is ``pgd`` on the same model, which changes the images and not the text. The result is a
    sequence of tokens, which a tokenizer may divide otherwise when it reads their text.

    Args:
        model: from ``load_model("hf:...", question=...)``.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) indices of the correct answers, or of the answers to reach.

    Raises:
        ModelError: a model that has no question.
        InputError: a question without a token that could be replaced.

    Example::

        model = load_model("hf:folder", question="what is in the image?", answers=["a star", "a ring"])
        result = attack_question(model, images, labels, replacements=1)
        result.questions, result.success

    Source:
        Ebrahimi et al. 2018, section 3 (HotFlip), with the words of Zou et al. 2023, algorithm 1.
    """
    network = model.module
    if not isinstance(network, ImageTextNetwork):
        raise ModelError(
            f"{model.name} has no question: load a network of images and text, "
            'load_model("hf:folder", question="what is in the image?")'
        )
    original = network.question
    special = torch.tensor(sorted(set(network.tokenizer.all_special_ids)), device=original.device)
    positions = (~torch.isin(original, special)).nonzero()[:, 0]
    positions = positions[positions > 0]
    if len(positions) == 0:
        raise InputError(f"{model.name} was loaded without a question, or with special tokens alone")
    sign = -1 if targeted else 1
    rows, margins, predicted = [], [], []
    with model.guard():
        for image, label in progress_bar(zip(images, labels.tolist(), strict=True), "questions", len(images)):
            pixels = model.normalize(image[None].to(model.device, model.dtype))
            tokens = original.clone()
            for _ in range(replacements):
                margin, gradient = _margin_gradient(network, pixels, tokens, label)
                if sign * margin < 0:
                    break
                tokens = _best_replacement(
                    network, pixels, tokens, label, gradient, positions, special, candidates, sign
                )
            with torch.no_grad():
                logits = network.logits(pixels, tokens[None])
            rows.append(tokens)
            margins.append(_margins(logits, label)[0])
            predicted.append(logits.argmax(1)[0])
    final = torch.stack(margins)
    changed = torch.stack(rows)
    return QuestionAttack(
        question=network.text(original),
        questions=tuple(map(network.text, rows)),
        tokens=changed,
        replaced=(changed != original).sum(1),
        margins=final,
        predicted=torch.stack(predicted),
        success=sign * final < 0,
    )


def _margins(logits: Tensor, label: int) -> Tensor:
    """z_y - max_(k != y) z_k of logits (B, K), (B,)."""
    values = at_least_float32(logits)
    others = values.index_fill(1, torch.tensor([label], device=values.device), -torch.inf)
    return values[:, label] - others.amax(1)


def _margin_gradient(
    network: ImageTextNetwork, pixels: Tensor, tokens: Tensor, label: int
) -> tuple[float, Tensor]:
    """The margin and its gradient (L, D) with respect to the embeddings of the question's tokens."""
    with torch.enable_grad(), embedding_leaves(network.embedding) as calls:
        margin = _margins(network.logits(pixels, tokens[None]), label)
        # A generator embeds the question once for each answer.
        gradients = torch.autograd.grad(margin.sum(), [leaf for _, leaf in calls], allow_unused=True)
    used = [g[0, : len(tokens)] for g in gradients if g is not None]
    return float(margin.detach()), torch.stack(used).sum(0)


@torch.no_grad()
def _best_replacement(
    network: ImageTextNetwork,
    pixels: Tensor,
    tokens: Tensor,
    label: int,
    gradient: Tensor,
    positions: Tensor,
    special: Tensor,
    candidates: int,
    sign: int,
) -> Tensor:
    """The tokens after the single replacement of the lowest margin among the most promising ones."""
    vectors = network.embedding.weight
    trials = replacement_trials(sign * gradient, vectors, tokens, positions, special, candidates)
    logits = network.logits(pixels.expand(len(trials), -1, -1, -1), trials)
    return trials[(sign * _margins(logits, label)).argmin()]
