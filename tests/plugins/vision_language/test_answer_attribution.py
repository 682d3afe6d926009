"""Answers of the bundled network, and of tiny networks of transformers with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf

from phosphene import InputError, ModelError, PhospheneError, run
from phosphene.builtin.answers import QUESTIONS, correct_answer
from phosphene.builtin.scenes import draw_scenes
from phosphene_plugins.vision_language._answer_models import load_answer_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
WORDS = ["[PAD]", "<s>", "</s>", "[UNK]", "<image>", "what", "is", "this", "a", "dog", "cat"]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def save(network: Any, folder: Path) -> str:
    """The network with a tokenizer of a few words and the processor's mean and std."""
    network.eval().save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tf.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>", pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    sizes = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    tf.CLIPImageProcessor(**sizes, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return f"hf:{folder}"


def llava(folder: Path) -> tuple[str, Callable[[torch.Tensor, list[int]], torch.Tensor]]:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**SMALL, vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    network = tf.LlavaForConditionalGeneration(config)

    def logits(pixels: torch.Tensor, ids: list[int]) -> torch.Tensor:
        position = ids.index(4)
        expanded = [*ids[:position], *[4] * 16, *ids[position + 1 :]]
        output = network(input_ids=torch.tensor([expanded]), pixel_values=pixels).logits[0]
        return torch.cat([output[:position], output[position + 15 :]])

    return save(network, folder), logits


def blip(folder: Path) -> tuple[str, Callable[[torch.Tensor, list[int]], torch.Tensor]]:
    text = {**SMALL, "vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = tf.BlipConfig(
        text_config={**text, "encoder_hidden_size": 16, "pad_token_id": 0, "max_position_embeddings": 16},
        vision_config=VISION,
        projection_dim=8,
    )
    network = tf.BlipForConditionalGeneration(config)

    def logits(pixels: torch.Tensor, ids: list[int]) -> torch.Tensor:
        result: torch.Tensor = network(pixel_values=pixels, input_ids=torch.tensor([ids])).logits[0]
        return result

    return save(network, folder), logits


@pytest.mark.parametrize("build", [llava, blip])
def test_networks_of_transformers_answer_as_they_do_by_themselves(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    uri, logits = build(tmp_path)
    model = load_answer_model(uri)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = model.encode("what is this")
    pixels = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        own = model.read(model.image_tokens(image), [*ids, 8, 9])
        torch.testing.assert_close(own.logits, logits(pixels, [*ids, 8, 9]), rtol=1e-4, atol=1e-5)
    sums = own.attentions[0][0, :, own.rows[-1]].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    for measure in ("grad_cam", "gradient_attention", "attention", "gradient_x_input"):
        options: dict[str, Any] = {"question": "what is this", "measure": measure, "tokens": 3}
        options["score"] = "logit"
        free: Any = run("answer_attribution", images=image, answer_model=uri, **options)
        assert free.maps.shape == (1, 3, 4, 4)
        result: Any = run("answer_attribution", images=image, answer_model=uri, answer="a dog", **options)
        assert result.words == (("a", "dog", ""),) and result.answers == ("a dog",)
        assert result.maps[0, :2].isfinite().all() and not result.maps[0, 2].any()
        assert result.maps[0, :2].flatten(1).any(1).all(), measure
        log_probabilities = own.logits.log_softmax(-1)
        expected = log_probabilities[len(ids) - 1, 8].exp()
        torch.testing.assert_close(result.probabilities[0, 0], expected, rtol=1e-4, atol=1e-6)
        if measure == "gradient_x_input":  # by a difference of the score along the tokens
            tokens = model.image_tokens(image).detach().double()
            patches = slice(-16, None)
            model.network.double()  # type: ignore[attr-defined]
            step, total = 0.01, float(result.maps[0, 1].sum())
            scores = []
            for sign in (1, -1):
                moved = tokens.clone()
                moved[patches] *= 1 + sign * step
                scores.append(float(model.read(moved, [*ids, 8]).logits[-1, 9]))
            assert total == pytest.approx((scores[0] - scores[1]) / (2 * step), rel=1e-2, abs=1e-5)


def test_questions_and_folders_that_cannot_be_answered_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    uri, _ = llava(tmp_path / "llava")
    tf.ViTForImageClassification(tf.ViTConfig(**VISION)).save_pretrained(tmp_path / "vit")
    blip(tmp_path / "bare")[0]
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    cases: list[tuple[type[PhospheneError], dict[str, Any], str]] = [
        (InputError, {"question": "who"}, "has no word 'who'; it answers 'what shape'"),
        (InputError, {"answer": "a star on sand", "tokens": 2}, "the answer has 4 tokens"),
        (InputError, {"question": "a a a a a a", "answer": "a star on sand"}, "texts of 8 words"),
        (InputError, {"answer_model": "timm:resnet18"}, "no network that answers"),
        (InputError, {"answer_model": f"hf:{tmp_path}/none"}, "no config.json"),
        (InputError, {"answer_model": uri, "question": "<image> <image> what"}, "2 of them"),
        (ModelError, {"answer_model": f"hf:{tmp_path}/vit"}, "answers are explained of Llava"),
        (ModelError, {"answer_model": f"hf:{tmp_path}/bare"}, "no preprocessor_config.json"),
    ]
    for kind, options, words in cases:
        with pytest.raises(kind, match=words):
            run("answer_attribution", images="builtin:scenes/1", **options)


def test_maps_of_the_bundled_network_follow_the_question() -> None:
    """The map of the shape's word lies on the object, that of the background's word beside it."""
    scenes = draw_scenes(30, split="test", seed=0)
    inside = {}
    for question in QUESTIONS[:2]:
        result: Any = run("answer_attribution", images=scenes.images, question=question, tokens=3)
        pairs = zip(scenes.labels.tolist(), scenes.backgrounds.tolist(), strict=True)
        right = [a == correct_answer(question, *p) for a, p in zip(result.answers, pairs, strict=True)]
        assert sum(right) > 24
        row = 1 if question == "what shape" else 0  # "a star", "sand"
        masks = torch.nn.functional.avg_pool2d(scenes.masks[:, None].float(), 8)[:, 0]
        maps = result.maps[:, row]
        share = (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-12)
        inside[question] = float(share.mean()), float(masks.mean())
    shape, background = inside.values()
    assert shape[0] > 2.5 * shape[1] and background[0] < 0.2 * background[1], inside
