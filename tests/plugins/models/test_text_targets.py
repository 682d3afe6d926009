"""A text is a target of every attribution and attention method, for CLIP and SigLIP of both loaders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf
from torch import Tensor

from phosphene import InputError, Model, ModelError, load_model, methods, run
from phosphene.targets import scores

TEXT = "a dog"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ["[UNK]", "<s>", "</s>", "a", "dog", "cat"]
#: Every method with a target, and why some network cannot have it.
METHODS = [
    info.name
    for info in methods.find()
    if info.family in ("attribution", "attention") and methods[info.name].spec.input("target")
]
REASONS = {
    "attribution.cam": "cam explains a class",
    "attribution.deconvnet": "found no ReLU",
    "attribution.guided_backprop": "found no ReLU",
    "attribution.guided_grad_cam": "found no ReLU",
    "attribution.lrp": "has no rule",
    "attention.gradient_attention": "attention between patch tokens on a grid",
    "attention.legrad": "attention between patch tokens on a grid",
}


def open_clip_model(name: str, vision: dict[str, Any], folder: Path) -> Model:
    text = {"context_length": 12, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
    model = load_model(f"open_clip:{name}({TEXT}; a cat)", embed_dim=8, text_cfg=text, vision_cfg=vision)
    for part in model.module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(part.weight)
    return model


def open_clip_vit(folder: Path) -> Model:
    vit = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    return open_clip_model("ViT-B-32", vit, folder)


def open_clip_resnet(folder: Path) -> Model:
    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 8}
    return open_clip_model("RN50", resnet, folder)


def saved(network: Any, processor: Any, folder: Path) -> Model:
    """The network with its processor and a tokenizer of three words, loaded from a folder."""
    network.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=16, pad_token="[UNK]")
    fast.save_pretrained(folder)
    return load_model(f"hf:{folder}", pretrained=True)


def towers() -> dict[str, Any]:
    tokens = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
    return {
        "text_config": {**SMALL, "num_hidden_layers": 1, **tokens},
        "vision_config": {**SMALL, "image_size": 32, "patch_size": 8},
    }


def hf_clip(folder: Path) -> Model:
    sizes = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
    network = tf.CLIPModel(tf.CLIPConfig(**towers(), projection_dim=8))
    return saved(network, tf.CLIPImageProcessor(**sizes), folder)


def hf_siglip(folder: Path) -> Model:
    network = tf.SiglipModel(tf.SiglipConfig(**towers()))
    return saved(network, tf.SiglipImageProcessor(size={"height": 32, "width": 32}), folder)


def answers(model: Model, name: str, target: Any) -> Tensor | None:
    """The maps or effects of a method for two images; None where it refuses the network by its reason."""
    images = torch.rand(2, *model.input_size, generator=torch.Generator().manual_seed(5))
    params = {n: v for n, v in methods[name].spec.quick.items() if n != "size"}
    if "seed" in methods[name].spec.params_schema["properties"]:
        params["seed"] = 0
    try:
        result: Any = run(name, model=model, images=images, target=target, **params)
    except (InputError, ModelError) as error:
        if name in REASONS and re.search(REASONS[name], str(error)):
            return None
        raise
    maps: Tensor = result.maps if hasattr(result, "maps") else result.drops
    return maps


@pytest.mark.parametrize(
    "build",
    [
        hf_siglip,
        pytest.param(hf_clip, marks=pytest.mark.nightly),
        pytest.param(open_clip_vit, marks=pytest.mark.nightly),
        pytest.param(open_clip_resnet, marks=pytest.mark.nightly),
    ],
)
def test_every_method_takes_a_text(build: Callable[[Path], Model], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(tmp_path)
    assert model.embed_text is not None
    vector = model.embed_text(TEXT).detach()
    images = torch.rand(2, *model.input_size, generator=torch.Generator().manual_seed(5))
    expected = torch.cosine_similarity(model.embed(images), vector[None])
    torch.testing.assert_close(scores(model, images, f"similar:text:{TEXT}"), expected)
    answered = 0
    for name in METHODS:
        maps = answers(model, name, f"similar:text:{TEXT}")
        if maps is None:
            continue
        answered += 1
        assert maps.any(), f"{name} returns zeros"
        if model.task == "embedding":  # the output is the embedding: the same score as a function of it
            written = answers(model, name, lambda z: torch.cosine_similarity(z, vector[None]))
            assert written is not None
            torch.testing.assert_close(maps, written, msg=lambda text, name=name: f"{name}: {text}")
    assert answered >= len(METHODS) - len(REASONS)
