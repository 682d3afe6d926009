"""Captioning and question-answering networks of transformers: scores of answers, attacks on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import InputError, Model, ModelError, load_model, methods
from phosphene_plugins.attacks.question_attack import attack_question
from phosphene_plugins.models._image_text import ImageTextNetwork

tf = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "in", "the", "image"]
WORDS += ["a", "star", "ring", "of", "two", "red", "big"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


def save_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tf.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def save(network: Any, folder: Path, name: str) -> None:
    network.config.architectures = [name]
    network.save_pretrained(folder)
    save_tokenizer(folder)
    tf.CLIPImageProcessor(
        size={"height": 16, "width": 16},
        do_center_crop=False,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3] * 3,
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=["git", "blip"])
def captioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    vision = SMALL | {"image_size": 16, "patch_size": 8}
    text = SMALL | {
        "vocab_size": len(WORDS),
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "git":
            network = tf.GitForCausalLM(tf.GitConfig(vision_config=vision, **text))
            save(network, folder, "GitForCausalLM")
        else:
            config = tf.BlipConfig(vision_config=vision, text_config=text | {"projection_dim": 8})
            network = tf.BlipForConditionalGeneration(config)
            for weight in network.parameters():
                torch.nn.init.normal_(weight, std=0.3)
            save(network, folder, "BlipForConditionalGeneration")
    return folder


def load(folder: Path, **options: Any) -> Model:
    return load_model(f"hf:{folder}", pretrained=True, **options)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_logits_are_log_probabilities_of_the_answers(captioner: Path, images: torch.Tensor) -> None:
    answers = ["a star", "two big ring"]
    model = load(captioner, answers=answers, question="the image of")
    assert model.classes == tuple(answers) or list(model.classes) == answers
    network = model.module
    assert isinstance(network, ImageTextNetwork)
    ids = {word: number for number, word in enumerate(WORDS)}
    for column, answer in enumerate(answers):
        words = [ids[w] for w in f"[CLS] the image of {answer} [SEP]".split()]
        total = torch.zeros(3)
        for n in range(4, len(words)):  # word by word, without teacher forcing
            with torch.no_grad():
                tokens = torch.tensor([words[:n]]).expand(3, -1)
                out = network.network(input_ids=tokens, pixel_values=model.normalize(images)).logits[:, -1]
            total += out.log_softmax(1)[:, words[n]]
        torch.testing.assert_close(model(images)[:, column], total, rtol=1e-4, atol=1e-4)


def test_image_side_pgd_changes_the_answer(captioner: Path, images: torch.Tensor) -> None:
    model = load(captioner, answers=["a star", "a ring", "two red"])
    labels = model(images).argmax(1)
    other = (labels + 1) % 3
    before = model(images).log_softmax(1)[torch.arange(3), other]
    result = methods["pgd"](model, images, other, targeted=True, eps=0.3, step_size=0.05, steps=12, seed=0)
    after = model(result.adversarial).log_softmax(1)[torch.arange(3), other]
    assert (after > before).all()


def test_text_side_is_the_best_replacement_of_all(captioner: Path, images: torch.Tensor) -> None:
    """With as many candidates as there are replacements one step is the exhaustive search."""
    model = load(captioner, answers=["a star", "a ring"], question="what is the image")
    network = model.module
    assert isinstance(network, ImageTextNetwork)
    labels = model(images).argmax(1)
    result = attack_question(model, images, labels, replacements=1, candidates=10_000)
    for n, image in enumerate(images):
        trials = []
        for position in range(1, 5):
            for token in range(5, len(WORDS)):
                trial = network.question.clone()
                trial[position] = token
                if not torch.equal(trial, network.question):
                    trials.append(trial)
        with torch.no_grad():
            logits = network.logits(
                model.normalize(image[None]).expand(len(trials), -1, -1, -1), torch.stack(trials)
            )
        label = int(labels[n])
        best = (logits[:, label] - logits[:, 1 - label]).min()
        torch.testing.assert_close(result.margins[n], best, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.success, result.margins < 0) and (result.replaced == 1).all()
    assert result.question == "what is the image"
    few = attack_question(model, images, labels, replacements=2, candidates=8)
    clean = model(images)
    margins = clean.gather(1, labels[:, None])[:, 0] - clean.gather(1, 1 - labels[:, None])[:, 0]
    assert (few.margins < margins).all()
    toward = attack_question(model, images, 1 - labels, targeted=True, replacements=1, candidates=10_000)
    torch.testing.assert_close(toward.margins, -result.margins, rtol=1e-4, atol=1e-5)


def test_question_answering_with_its_own_answers(tmp_path: Path, images: torch.Tensor) -> None:
    config = tf.ViltConfig(**SMALL, image_size=16, patch_size=8, vocab_size=len(WORDS),
                           id2label={0: "star", 1: "ring"}, label2id={"star": 0, "ring": 1})  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save(tf.ViltForQuestionAnswering(config).eval(), tmp_path, "ViltForQuestionAnswering")
    model = load(tmp_path, question="what is in the image")
    assert list(model.classes) == ["star", "ring"]
    labels = model(images).argmax(1)
    attack = attack_question(model, images, labels, replacements=2, candidates=50)
    assert attack.tokens[:, 0].eq(2).all() and attack.tokens[:, -1].eq(3).all()
    assert methods["saliency"](model, images).maps.abs().max() > 0
    with pytest.raises(InputError, match="answers of its own"):
        load(tmp_path, question="what", answers=["a"])
    with pytest.raises(InputError, match="pass one, question="):
        load(tmp_path)


def test_what_is_missing_is_named(captioner: Path, images: torch.Tensor) -> None:
    with pytest.raises(InputError, match="pass the texts to compare"):
        load(captioner)
    model = load(captioner, answers=["a star", "a ring"])
    with pytest.raises(InputError, match="without a question"):
        attack_question(model, images, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ModelError, match="has no question"):
        attack_question(load_model("builtin:shapes-vgg"), images, torch.zeros(3, dtype=torch.long))
    (captioner / "vocab.txt").rename(captioner / "words")
    (captioner / "tokenizer.json").rename(captioner / "words.json")
    try:
        with pytest.raises(ModelError, match="has no tokenizer"):
            load(captioner, answers=["a star"])
    finally:
        (captioner / "words").rename(captioner / "vocab.txt")
        (captioner / "words.json").rename(captioner / "tokenizer.json")
