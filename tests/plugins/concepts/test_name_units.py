"""Names of units through a CLIP of open_clip, and the bundled model of ten words."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from phosphene import InputError, load_model, run
from phosphene.builtin.scenes import CLASSES, draw_scenes
from phosphene_plugins.concepts._common_words import COMMON_WORDS

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
VISION = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(0)
    uri = "open_clip:ViT-B-32(a dog; a cat; a tree)"
    return load_model(uri, embed_dim=8, text_cfg=TEXT, vision_cfg=VISION)


def test_units_have_names_of_prompts_or_of_words(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dataset": "builtin:scenes/12", "text_model": clip, "layer": "features.5"}
    result: Any = run("name_units", **options)
    assert result.words == ("a dog", "a cat", "a tree") and result.similarity.shape == (48, 3)
    assert {*result.names} <= {*result.words, ""}
    scenes = draw_scenes(12, split="test").images
    # The tokenizer was loaded with the model; reading its vocabulary takes longer than embedding 300 texts.
    monkeypatch.setattr(open_clip, "get_tokenizer", None)
    common: Any = run("name_units", **options, words="common", template="a photo of a {}")
    assert common.words == COMMON_WORDS and len(set(COMMON_WORDS)) == len(COMMON_WORDS) > 300
    # The cosines that the names are computed from are those of both towers.
    images = torch.nn.functional.interpolate(scenes, (32, 32), mode="bilinear", antialias=True)
    cubes = []
    units = load_model("builtin:shapes-vgg").features(scenes, "features.5").mean((2, 3)).double()
    image = torch.nn.functional.normalize(clip.embed(images).detach().double(), dim=1)
    text = torch.stack([clip.embed_text(word).detach().double() for word in result.words])
    for values in (units, image @ torch.nn.functional.normalize(text, dim=1).T):
        cubes.append(torch.nn.functional.normalize((values - values.mean(0)) ** 3, dim=0))
    cubed: Any = run("name_units", **options, measure="cosine_cubed")
    active = cubed.similarity.any(1)
    expected = (cubes[0].T @ cubes[1]).float().detach()
    torch.testing.assert_close(cubed.similarity[active], expected[active], rtol=1e-2, atol=2e-2)


def test_words_and_models_without_texts_are_refused(clip: Any) -> None:
    for options, words in [
        ({"text_model": "builtin:shapes-vgg"}, "embeds images alone"),
        ({"words": ["star", "ring", "star"]}, "'star' is in the list twice"),
        ({"words": ["star", "dog"]}, "none of them is in 'dog'"),
        ({"dataset": "builtin:scenes/1"}, "the data set has 1"),
        ({"template": "a photo"}, "template"),
    ]:
        with pytest.raises(InputError, match=words):
            run("name_units", **{"dataset": "builtin:scenes/4"} | options)


def test_units_of_the_bundled_classifier_are_named_after_the_class_that_they_raise() -> None:
    result: Any = run("name_units", dataset="builtin:scenes/150")
    weight = load_model("builtin:shapes-vgg").module.classifier.weight  # type: ignore[union-attr]
    by_weight = [CLASSES[index] for index in weight.argmax(0).tolist()]  # type: ignore[union-attr,operator]
    agreement = sum(a == b for a, b in zip(result.names, by_weight, strict=True)) / len(by_weight)
    assert agreement > 0.5  # chance: 0.1
    assert result.table()["name"] == list(result.names)


def test_texts_are_targets_of_the_bundled_words() -> None:
    scenes = draw_scenes(60, split="test")
    model = load_model("builtin:shapes-words")
    texts = torch.stack([model.embed_text(f"a {name}") for name in CLASSES])  # type: ignore[misc]
    cosines = torch.nn.functional.normalize(model.embed(scenes.images), dim=1) @ texts.T
    assert (cosines.argmax(1) == scenes.labels).float().mean() > 0.95
    with pytest.raises(InputError, match="has ten words"):
        run("saliency", model="builtin:shapes-words", images="builtin:scenes/1", target="similar:text:a dog")
