"""``open_clip:``: prompts are classes, both towers' weights come from files, and a prompt is a target."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from phosphene import (
    InputError,
    MissingExtra,
    Model,
    ModelError,
    UnknownName,
    load_model,
    load_result,
    methods,
)
from phosphene.cli.main import main
from phosphene.models.loading import loaders
from phosphene.targets import scores

DOG, CAT = "a photo of a dog", "a photo of a cat"
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 8}
#: Networks of a few thousand parameters, apart from the embedding of the tokenizer's vocabulary.
TINY: dict[str, dict[str, Any]] = {
    "ViT-B-32": {"embed_dim": 8, "text_cfg": TEXT, "vision_cfg": VIT},
    "RN50": {"embed_dim": 8, "text_cfg": TEXT, "vision_cfg": RESNET},
    "coca_ViT-B-32": {
        "embed_dim": 16,
        "text_cfg": TEXT | {"width": 16, "context_length": 11, "embed_cls": True, "output_tokens": True},
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "width": 16, "context_length": 11, "attn_pooler_heads": 2},
    },
}


def tiny(name: str, seed: int = 0, **options: Any) -> Model:
    """A tiny randomly initialized model without layers that are zero."""
    torch.manual_seed(seed)
    model = load_model(f"open_clip:{name}({DOG}; {CAT}; a tree)", **TINY[name], **options)
    for part in model.module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(part.weight)
    return model


def towers(name: str, seed: int = 1, **more: Any) -> Any:
    """A CLIP of open_clip, with both towers."""
    torch.manual_seed(seed)
    return open_clip.create_model(name, **TINY[name], **more).eval()


def random_images(model: Model, count: int = 2) -> Tensor:
    return torch.rand(count, *model.input_size, generator=torch.Generator().manual_seed(5))


def test_a_text_is_a_target_like_a_prompt(tmp_path: Path) -> None:
    for name in TINY:
        model = tiny(name)
        images = random_images(model)
        weights = model.module.prompts.weight
        assert isinstance(weights, Tensor)
        expected = torch.cosine_similarity(model.embed(images), weights[:1].detach())
        torch.testing.assert_close(scores(model, images, f"similar:{DOG}"), expected)
        copied = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(scores(copied, images, f"similar:text:{DOG}"), expected)


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code


def reference_logits(clip: Any, model: Model, images: Tensor) -> Tensor:
    """The logits of open_clip itself for images and prompts."""
    prompts = open_clip.get_tokenizer("ViT-B-32", context_length=clip.context_length)(list(model.classes))
    with torch.no_grad():
        image, text = (
            clip.encode_image(model.normalize(images), normalize=True),
            clip.encode_text(prompts, normalize=True),
        )
        return clip.logit_scale.exp() * image @ text.T + (0 if clip.logit_bias is None else clip.logit_bias)


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_logits_are_those_of_both_towers_from_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    clip, path = towers(name), tmp_path / f"clip{suffix}"
    with torch.no_grad():
        clip.logit_scale.fill_(2.0)
    state = clip.state_dict()
    # As open_clip's own training saves it, too.
    save_file(state, path) if suffix == ".safetensors" else torch.save(
        {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path
    )
    model = load_model(f"open_clip:{name}", weights=path, prompts=[DOG, CAT], **TINY[name])
    images = random_images(model)
    torch.testing.assert_close(model(images), reference_logits(clip, model, images))
    assert model.classes == (DOG, CAT) and model.name == f"open_clip:{name}"
    assert not any("token" in key or key.startswith("text") for key in model.module.state_dict())
    assert model.source is not None
    source = dict(model.source)
    loaded = load_model(source.pop("uri"), **source)
    assert loaded.digest == model.digest
    assert load_model(f"open_clip:{name}({DOG}; a tree)", weights=state, **TINY[name]).digest != model.digest


def test_logit_bias_is_applied() -> None:
    options = {"init_logit_bias": -3.0, "init_logit_scale": 1.0}
    clip = towers("ViT-B-32", **options)
    model = load_model(
        "open_clip:ViT-B-32", weights=clip.state_dict(), prompts=[DOG], **TINY["ViT-B-32"], **options
    )
    torch.testing.assert_close(
        model(random_images(model)), reference_logits(clip, model, random_images(model))
    )


def test_weights_of_another_image_size_and_a_defense_before_it(tmp_path: Path) -> None:
    clip, path = towers("ViT-B-32"), tmp_path / "clip.safetensors"
    save_file(clip.state_dict(), path)
    larger = TINY["ViT-B-32"] | {"vision_cfg": VIT | {"image_size": 48}}
    assert load_model(f"open_clip:ViT-B-32({DOG})", weights=path, **larger).input_size == (3, 48, 48)
    plain = load_model(f"open_clip:ViT-B-32({DOG}; {CAT})", weights=path, **TINY["ViT-B-32"])
    uri = f"defended:bit_depth(bits=1)|open_clip:ViT-B-32({DOG}; {CAT})"
    defended = load_model(uri, weights=path, **TINY["ViT-B-32"])
    images = random_images(plain)
    torch.testing.assert_close(defended(images), plain(images.round()))


@pytest.mark.parametrize(("name", "layer", "side"), [
    ("ViT-B-32", "visual.transformer.resblocks.1.ln_1", 4), ("RN50", "visual.layer4", 2),
])  # fmt: skip
def test_grad_cam_of_a_prompt_lies_on_the_towers_own_grid(name: str, layer: str, side: int) -> None:
    model = tiny(name)
    images = random_images(model)
    assert model.last_map == layer
    result = methods["grad_cam"](model, images, CAT)
    assert result.maps.shape == (2, side, side) and result.targets == (CAT, CAT)
    with model.tap(layer, leaf=True) as tap:
        model(images)[:, 1].sum().backward()
    maps, slopes = (model.maps(t, images) for t in (tap[layer].detach(), tap[layer].grad))
    torch.testing.assert_close(result.maps, (slopes.mean((2, 3), keepdim=True) * maps).sum(1).relu())
    assert methods["grad_cam"](model, images, DOG).maps.ne(result.maps).any()


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_attack_towards_a_prompt_reaches_it(name: str) -> None:
    model = tiny(name)
    images = random_images(model)
    for target_prompt in model.classes or ():
        labels = [target_prompt] * len(images)
        result = methods["pgd"](
            model, images, labels, targeted=True, eps=0.5, step_size=0.05, steps=20, seed=0
        )
        is_more_likely = model(result.adversarial).log_softmax(1) > model(images).log_softmax(1)
        index = model.class_index(target_prompt)
        assert is_more_likely[:, index].all() or result.success.all()
    assert result.success.any()


def test_text_is_embedded_once_without_gradient() -> None:
    model = tiny("ViT-B-32")
    assert not model.module.prompts.weight.grad_fn
    model.module.visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    assert model(random_images(model)).shape == (2, 3)  # no text tower: only the image tower runs


@pytest.fixture
def tiny_configuration(tmp_path: Path) -> Iterator[str]:
    """A user's configuration, registered with open_clip."""
    factory = sys.modules["open_clip.factory"]
    before = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    (tmp_path / "my-tiny.json").write_text(json.dumps(TINY["ViT-B-32"]))
    open_clip.add_model_config(tmp_path / "my-tiny.json")
    yield "my-tiny"
    factory._MODEL_CONFIG_PATHS[:], factory._MODEL_CONFIGS = before


def test_command_line_accepts_a_prompt_as_target_and_label(tiny_configuration: str, tmp_path: Path) -> None:
    weights = tmp_path / "clip.safetensors"
    torch.manual_seed(0)
    save_file(open_clip.create_model(tiny_configuration).state_dict(), weights)
    uri = f"open_clip:{tiny_configuration}({DOG}; {CAT})"
    rest = ["--model", uri, "--weights", str(weights), "--image", "builtin:scenes/2", "--quiet", "--out"]
    command("run", "grad_cam", "--target", CAT, *rest, str(tmp_path / "map"))
    assert load_result(tmp_path / "map").targets == (CAT, CAT)  # type: ignore[attr-defined]
    attack = ["run", "pgd", "--labels", f"{CAT},{DOG}", "--targeted", "--eps", "0.5", "--steps", "3"]
    command(*attack, *rest, str(tmp_path / "attack"))
    result = load_result(tmp_path / "attack")
    assert result.labels.tolist() == [1, 0] and result.targeted  # type: ignore[attr-defined]
    command("replay", str(tmp_path / "map"))


@pytest.mark.parametrize(("uri", "options", "error", "message"), [
    ("ViT-B-32", {}, InputError, "needs them as prompts: 'open_clip:ViT-B-32\\(a photo of a dog"),
    (f"ViT-B-32({DOG})", {"prompts": [CAT]}, InputError, "prompts twice"),
    (f"ViT-B-32({DOG}; )", {}, InputError, "none of them empty"),
    ("ViT-B-32", {"prompts": DOG}, InputError, "a list of sentences"),
    (f"ViT-B-33({DOG})", {}, UnknownName, "did you mean 'ViT-B-32'"),
    (f"ViT-B-32.openia({DOG})", {}, UnknownName, "did you mean 'openai'"),
    (f"ViT-B-32({DOG})", {"weights": "laion2b"}, UnknownName, "did you mean 'laion2b_"),
    (f"ViT-B-32({DOG})", {"flavour": 3}, InputError, "cannot be built"),
    (f"ViT-B-32({DOG})", {"weights": {"a": torch.zeros(1)}}, ModelError, "do not fit open_clip:ViT-B-32"),
    (f"ViT-M-32-alt({DOG})", {"pretrained": True}, ModelError, "no pretrained weights for open_clip:ViT"),
    (f"ViT-B-16-SigLIP({DOG})", {}, ModelError, "pip install transformers"),
])  # fmt: skip
def test_invalid_uris_are_refused_with_a_reason(uri: str, options: Any, error: Any, message: str) -> None:
    if message.endswith("transformers") and importlib.util.find_spec("transformers"):
        pytest.skip("transformers is installed")
    with pytest.raises(error, match=message):
        load_model(f"open_clip:{uri}", **TINY["ViT-B-32"], **options)


def test_unknown_prompt_suggests_the_nearest_one() -> None:
    with pytest.raises(UnknownName, match=f"did you mean '{CAT}'"):
        methods["saliency"](tiny("ViT-B-32"), torch.rand(1, 3, 32, 32), "a photo of a bat")


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(101, "Network is unreachable")


def test_published_weights_come_from_the_hub_cache_or_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, refuse)
    options = {"prompts": [DOG, CAT], "cache_dir": str(tmp_path), **TINY["ViT-B-32"]}
    with pytest.raises(ModelError, match=r"clip_224.openai/open_clip_model.safetensors .*a local file"):
        load_model("open_clip:ViT-B-32", pretrained=True, **options)
    folder = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    (folder / "refs").mkdir(parents=True), (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    clip = towers("ViT-B-32", force_quick_gelu=True)  # OpenAI's weights are trained with it
    save_file(clip.state_dict(), folder / "snapshots" / "0" / "open_clip_model.safetensors")
    for uri, arguments in (("ViT-B-32.openai", {"pretrained": True}), ("ViT-B-32", {"weights": "openai"})):
        model = load_model(f"open_clip:{uri}", **arguments, **options)  # type: ignore[arg-type]
        assert model.name == "open_clip:ViT-B-32.openai"
        torch.testing.assert_close(
            model(random_images(model)), reference_logits(clip, model, random_images(model))
        )
    # A file with the same weights has the same digest.
    filled = load_model("open_clip:ViT-B-32.openai", weights=clip.state_dict(), **options)
    assert filled.digest == model.digest
    assert torch.equal(filled(random_images(model)), model(random_images(model)))


def test_logging_of_the_program_is_unchanged() -> None:
    before = list(logging.root.handlers), logging.root.level
    tiny("ViT-B-32")
    assert (list(logging.root.handlers), logging.root.level) == before


def test_missing_extra_is_named_and_listing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    names = loaders()["open_clip"].names()
    assert {"ViT-B-32", "ViT-B-32.laion2b_s34b_b79k"} <= set(names)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr("phosphene_plugins.models.open_clip.find_spec", lambda name: None)
    assert not loaders()["open_clip"].names()
    with pytest.raises(MissingExtra, match=r"phosphene\[open_clip\]"):
        load_model(f"open_clip:ViT-B-32({DOG})")
