"""Trains the bundled shapes-answers: a decoder of answers to three questions about drawn scenes.

The image tokens are maps of shapes-vgg, whose weights do not change and whose maps are computed once. AdamW
with a learning rate that falls linearly; the loss is the mean cross-entropy of the answer and its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model_cards import parameter_count, write_card, write_file
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from phosphene.builtin.answers import (
    ANSWERS,
    END,
    QUESTIONS,
    VOCABULARY,
    ShapesAnswers,
    Trunk,
    correct_answer,
)
from phosphene.builtin.scenes import Scenes, draw_scenes

# data
SCENES, TEST_SCENES = 4_000, 500
# optimizer
STEPS, BATCH = 1_500, 64
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05


def train(out: Path, *, scenes: int = SCENES, steps: int = STEPS, seed: int) -> None:
    """Train the decoder and write its weights and card to ``out``."""
    network = fit(draw_scenes(scenes, seed=seed), steps=steps, seed=seed)
    # Stored in half precision, and tested as it is stored.
    weights = save({key: value.contiguous() for key, value in network.half().state_dict().items()})
    network = network.float()
    write_file(out / f"{ANSWERS}.safetensors", weights)
    correct = accuracies(network, draw_scenes(TEST_SCENES, seed=seed, split="test"))
    facts: dict[str, Any] = {
        "parameters": parameter_count(network),
        "training": f"AdamW, {steps} batches of {BATCH}; image tokens of shapes-vgg; half precision",
        "training_scenes": scenes,
        "training_seed": seed,
        "test_scenes": TEST_SCENES,
        **{f"correct answers to {question!r}": share for question, share in correct.items()},
    }
    summary = "A decoder of answers to questions about drawn scenes, word by word."
    write_card(out / f"{ANSWERS}.md", summary, weights, **facts)
    tqdm.write(f"{ANSWERS}: {correct}")


def encode(text: str) -> list[int]:
    """The numbers of the words."""
    return [VOCABULARY.index(word) for word in text.split()]


@torch.no_grad()
def trunk_maps(scenes: Scenes) -> Tensor:
    """The maps (N, 224, 8, 8) of all scenes."""
    trunk = Trunk().eval()
    return torch.cat([trunk(part) for part in scenes.images.split(256)])


def fit(scenes: Scenes, *, steps: int, seed: int) -> ShapesAnswers:
    """Train a new decoder on the scenes; returns it in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ShapesAnswers()
        maps = trunk_maps(scenes)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (1 - step / steps)
    )
    for _ in tqdm(range(steps), "training"):
        rows = torch.randint(len(scenes), (BATCH,), generator=draw)
        question = QUESTIONS[int(torch.randint(len(QUESTIONS), (), generator=draw))]
        answers = [
            correct_answer(question, int(scenes.labels[row]), int(scenes.backgrounds[row])) for row in rows
        ]
        texts = torch.tensor([encode(f"{question} {answer} {END}") for answer in answers])
        start = len(question.split())
        logits, _ = network(network.image_tokens(maps[rows]), texts[:, :-1])
        loss = F.cross_entropy(logits[:, start - 1 :].flatten(0, 1), texts[:, start:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracies(network: ShapesAnswers, scenes: Scenes) -> dict[str, float]:
    """The share of correct answers to each question."""
    tokens = network.image_tokens(trunk_maps(scenes))
    shares = {}
    for question in QUESTIONS:
        texts = torch.tensor(encode(question)).expand(len(scenes), -1)
        for _ in range(5):
            logits, _ = network(tokens, texts)
            texts = torch.cat([texts, logits[:, -1:].argmax(2)], 1)
        pairs = zip(scenes.labels.tolist(), scenes.backgrounds.tolist(), strict=True)
        correct = [encode(f"{question} {correct_answer(question, *pair)} {END}") for pair in pairs]
        hits = [text[: len(right)] == right for text, right in zip(texts.tolist(), correct, strict=True)]
        shares[question] = sum(hits) / len(hits)
    return shares
