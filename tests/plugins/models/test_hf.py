"""``hf:`` - pixels, logits, class names and tasks are those of transformers; nothing else is loaded."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from PIL import Image
from tests.hub_cache import disconnect, put_into_cache
from torch import Tensor, nn

from phosphene import InputError, MissingExtra, ModelError, UnknownName, load_model, methods, replay, run
from phosphene.models import load_saved_model
from phosphene.models.loading import loaders
from phosphene.targets import Similar, parse_target, scores

LABELS = {0: "cat", 1: "dog", 2: "eel"}


def vit(**options: Any) -> dict[str, Any]:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return {**small, "image_size": 32, "patch_size": 8, **options}


def clip() -> nn.Module:
    text = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vit(), projection_dim=8))


def resnet() -> nn.Module:
    config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**config, id2label=LABELS))


def segformer() -> nn.Module:
    config = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    return tf.SegformerForSemanticSegmentation(
        tf.SegformerConfig(**config, decoder_hidden_size=8, id2label=LABELS)
    )


def mobilevit() -> nn.Module:
    sizes = {"image_size": 64, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8]}
    return tf.MobileViTForImageClassification(
        tf.MobileViTConfig(**sizes, num_attention_heads=2, id2label=LABELS)
    )


def yolos() -> nn.Module:
    config = vit(image_size=[32, 48], num_detection_tokens=5, id2label=LABELS)
    return tf.YolosForObjectDetection(tf.YolosConfig(**config))


#: Networks with their processors, the task, what reads the logits in their own output, and the classes.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, str, Callable[[Any], Tensor], Any]] = {
    "vit": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**vit(id2label=LABELS))),
        tf.ViTImageProcessor(size={"height": 32, "width": 32}),
        "classification", lambda o: o.logits, ("cat", "dog", "eel"),
    ),
    "multilabel": (
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(**vit(num_labels=4, problem_type="multi_label_classification"))
        ),
        tf.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
        "multilabel", lambda o: o.logits, None,
    ),
    "resnet": (
        resnet, tf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        "classification", lambda o: o.logits, ("cat", "dog", "eel"),
    ),
    "teacher": (
        lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**vit(id2label=LABELS))),
        tf.DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
        "classification", lambda o: o.logits, ("cat", "dog", "eel"),
    ),
    "bgr": (
        mobilevit,
        tf.MobileViTImageProcessor(size={"shortest_edge": 73}, crop_size={"height": 64, "width": 64}),
        "classification", lambda o: o.logits, ("cat", "dog", "eel"),
    ),
    "segmenter": (
        segformer, tf.SegformerImageProcessor(size={"height": 64, "width": 64}),
        "segmentation", lambda o: o.logits, ("cat", "dog", "eel"),
    ),
    "detector": (
        yolos, tf.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48}),
        "detection", lambda o: o.logits.softmax(2)[..., :-1].amax(2), ("cat", "dog", "eel"),
    ),
    "dinov2": (
        lambda: tf.Dinov2Model(tf.Dinov2Config(**vit())),
        tf.BitImageProcessor(size={"shortest_edge": 41}, crop_size={"height": 32, "width": 32}),
        "embedding", lambda o: o.pooler_output, None,
    ),
    "backbone": (
        lambda: tf.Dinov2Backbone(tf.Dinov2Config(**vit(out_features=["stage1", "stage2"]))),
        tf.BitImageProcessor(size={"shortest_edge": 41}, crop_size={"height": 32, "width": 32}),
        "embedding", lambda o: o.feature_maps[-1].mean((2, 3)), None,
    ),
    "image tower": (
        lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**vit(projection_dim=8))),
        tf.CLIPImageProcessor(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}),
        "embedding", lambda o: o.image_embeds, None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each case, as ``save_pretrained`` writes it, with random weights."""
    root = tmp_path_factory.mktemp("transformers")
    for name, (build, processor, *_) in CASES.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: root / name for name in CASES}


def photograph(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_file_are_those_of_the_processor_and_the_network(
    name: str, folders: dict[str, Path]
) -> None:
    _, _, task, read, classes = CASES[name]
    model = load_model(f"hf:{folders[name]}", pretrained=True)
    theirs = getattr(tf, json.loads((folders[name] / "config.json").read_text())["architectures"][0])
    network = theirs.from_pretrained(folders[name], dtype=torch.float32).eval()
    processor = tf.AutoImageProcessor.from_pretrained(folders[name], backend="pil")
    for image in (photograph(60, 90), photograph(90, 60), photograph(200, 150)):
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = read(network(pixels))
            pixels = model.transform(image)[None]
            logits = (
                model.detections(pixels)[0].scores[None] if task == "detection" else model.outputs(pixels)
            )
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (model.task, model.classes) == (task, classes)
    assert model.name == model.source["uri"] == f"hf:{folders[name].resolve()}"  # type: ignore[index]


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_the_fast_processor_up_to_its_rounding(
    name: str, folders: dict[str, Path]
) -> None:
    model = load_model(f"hf:{folders[name]}")
    processor = tf.AutoImageProcessor.from_pretrained(folders[name])
    pixels = processor(images=[photograph(60, 90)], return_tensors="pt")["pixel_values"]
    ours = model.normalize(model.transform(photograph(60, 90))[None])
    ours = ours.flip(1) if name == "bgr" else ours  # the module itself reverses the channels
    assert (ours - pixels).abs().max() * model.std.min() <= 3 / 255


#: Processors that networks of ours are not built for here, with their own sizes.
PROCESSORS = {
    "levit": (tf.LevitImageProcessor(), "center-floor", (3, 224, 224)),
    "poolformer": (tf.PoolFormerImageProcessor(), "center-floor", (3, 224, 224)),
    "convnext at 384": (tf.ConvNextImageProcessor(size={"shortest_edge": 384}), "squash", (3, 384, 384)),
    "efficientnet": (tf.EfficientNetImageProcessor(), "squash", (3, 346, 346)),
    "mobilenet": (tf.MobileNetV2ImageProcessor(), "center-floor", (3, 224, 224)),
    "siglip": (tf.SiglipImageProcessor(), "squash", (3, 224, 224)),
    "detr": (tf.DetrImageProcessor(), "resize", (3, 800, 1333)),
    "rt-detr": (tf.RTDetrImageProcessor(), "squash", (3, 640, 640)),
    "sam": (tf.SamImageProcessor(), "pad", (3, 1024, 1024)),
    "nothing": (tf.ViTImageProcessor(do_resize=False), "none", (3, 224, 224)),
    "bytes": (
        tf.ViTImageProcessor(do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3),
        "squash", (3, 224, 224),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_other_families_are_reproduced(name: str, tmp_path: Path) -> None:
    processor, crop_mode, size = PROCESSORS[name]
    tf.ViTConfig(**vit(), architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    assert (model.crop_mode, model.input_size) == (crop_mode, size)
    reference = tf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for image in (photograph(75, 110), photograph(210, 161)):
        expected = reference(images=[image], return_tensors="pt")["pixel_values"]
        pixels = model.normalize(model.transform(image)[None])
        assert (pixels - expected).abs().max() * model.std.min() <= 1e-5


@pytest.mark.parametrize("processor", [
    tf.DPTImageProcessor(keep_aspect_ratio=True, ensure_multiple_of=32), tf.Owlv2ImageProcessor(),
    tf.PerceiverImageProcessor(), tf.ViltImageProcessor(),
], ids=lambda processor: type(processor).__name__)  # fmt: skip
def test_preparation_that_cannot_be_reproduced_is_refused(processor: Any, tmp_path: Path) -> None:
    tf.ViTConfig(**vit(), architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"prepares images in a way that Model has no options for.*mean=\.\.\."
    ):
        load_model(f"hf:{tmp_path}")


def test_methods_run_on_a_network_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(f"hf:{folders['vit']}", pretrained=True)
    image = model.transform(photograph(60, 90))[None]
    maps = methods["saliency"](model, image, "dog").maps
    leaf = image.clone().requires_grad_()
    model(leaf)[0, 1].backward()
    torch.testing.assert_close(maps, leaf.grad.abs().amax(1))  # type: ignore[union-attr]
    assert methods["grad_cam"](model, image, "eel").maps.shape == (1, 4, 4)
    result = methods["pgd"](model, image, ["cat"], targeted=True, eps=0.3, steps=5, seed=0)
    assert (model(result.adversarial)[0].softmax(0) - model(image)[0].softmax(0))[0] > 0
    run("saliency", model=model, images=image, target="dog", progress=False, out=tmp_path / "map")
    assert replay(tmp_path / "map").same


# --- weights -----------------------------------------------------------------------------------------


def test_weights_are_random_unless_they_are_asked_for(folders: dict[str, Path]) -> None:
    uri = f"hf:{folders['vit']}"
    torch.manual_seed(1)
    first = load_model(uri)
    assert (
        load_model(uri, pretrained=True).digest == load_model(uri, weights="DEFAULT").digest != first.digest
    )
    torch.manual_seed(1)
    assert load_model(uri).digest == first.digest


def test_weights_of_a_file_or_a_training_are_loaded(folders: dict[str, Path]) -> None:
    uri = f"hf:{folders['vit']}"
    model = load_model(uri, pretrained=True)
    state = model.module.state_dict()  # transformers' own file has older names of the same weights
    wrapped = {f"model.{name}": value for name, value in state.items()}
    for weights in (folders["vit"] / "model.safetensors", state, wrapped):
        assert load_model(uri, weights=weights).digest == model.digest
    with pytest.raises(ModelError, match="lack 39 tensors of ViTForImageClassification"):
        load_model(uri, weights={"classifier.weight": state["classifier.weight"]})


def test_configuration_alone_is_enough_for_random_weights(tmp_path: Path) -> None:
    tf.ViTConfig(**vit(num_channels=1), architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}", num_labels=5)
    assert model.input_size == (1, 32, 32) and model.class_count == 5
    with pytest.raises(
        ModelError, match="contains no model.safetensors, and pickled weights are never loaded"
    ):
        load_model(f"hf:{tmp_path}", pretrained=True)


def test_pickled_weights_are_never_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folders["vit"] / file).read_bytes())
    torch.save(load_model(f"hf:{folders['vit']}").module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        load_model(f"hf:{tmp_path}", pretrained=True)


def test_weights_of_another_head_are_refused(folders: dict[str, Path]) -> None:
    uri = f"hf:{folders['dinov2']}"
    with pytest.raises(
        ModelError, match=r"lack 2 tensors of Dinov2ForImageClassification, such as classifier"
    ):
        load_model(uri, pretrained=True, head="classification")
    assert load_model(uri, head="classification", num_labels=4).class_count == 4


def test_weights_in_shards_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    network = tf.ViTForImageClassification.from_pretrained(folders["vit"])
    network.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    processor_file = "preprocessor_config.json"
    (tmp_path / processor_file).write_bytes((folders["vit"] / processor_file).read_bytes())
    sharded = load_model(f"hf:{tmp_path}", pretrained=True)
    assert sharded.digest == load_model(f"hf:{folders['vit']}", pretrained=True).digest


def test_preparation_of_trained_networks_is_not_guessed(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders["vit"] / file).read_bytes())
    with pytest.raises(
        ModelError, match="has no preprocessor_config.json, which says how images are prepared"
    ):
        load_model(f"hf:{tmp_path}", pretrained=True)


# --- the hub and its cache -----------------------------------------------------------------------------


def test_repository_in_the_cache_is_loaded_without_a_network(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disconnect(monkeypatch)
    put_into_cache(tmp_path, "someone/tiny-vit", folders["vit"])
    model = load_model("hf:someone/tiny-vit", pretrained=True, cache_dir=str(tmp_path))
    assert model.digest == load_model(f"hf:{folders['vit']}", pretrained=True).digest
    assert model.name == "hf:someone/tiny-vit" and model.classes == ("cat", "dog", "eel")


def test_repository_that_cannot_be_reached_names_the_command_that_fetches_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disconnect(monkeypatch)
    message = (
        r"someone/absent/config.json is not in the cache .*`hf download someone/absent --local-dir FOLDER`"
    )
    with pytest.raises(ModelError, match=message):
        load_model("hf:someone/absent", cache_dir=str(tmp_path))
    snapshot = put_into_cache(tmp_path, "someone/half", folders["vit"])
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"someone/half/model.safetensors are not in the cache"):
        load_model("hf:someone/half", pretrained=True, cache_dir=str(tmp_path))
    assert load_model("hf:someone/half", cache_dir=str(tmp_path)).class_count == 3


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"weights": "main"}, InputError, "no weights called 'main', only 'DEFAULT'"),
    ({"head": "clasification"}, UnknownName, "did you mean 'classification'"),
    ({"flavour": 3}, InputError, "has no 'flavour'"),
])  # fmt: skip
def test_options_that_do_not_exist_are_refused(
    options: dict[str, Any], error: Any, message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(error, match=message):
        load_model(f"hf:{folders['vit']}", **options)


@pytest.mark.parametrize(("name", "message"), [
    ("./absent", "there is no folder './absent'"),
    ("a/b/c", "a repository is hf:owner/name"),
    ("", "there is no folder ''"),
])  # fmt: skip
def test_names_that_are_no_repository_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(f"hf:{name}")


def write_config(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return f"hf:{folder}"


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('this code ran')")
    classes = {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Network"}
    uri = write_config(tmp_path, model_type="mine", architectures=["Network"], auto_map=classes)
    with pytest.raises(ModelError, match="has no architecture 'mine' .* code in a repository is never run"):
        load_model(uri)


def test_head_that_the_configuration_does_not_name_must_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"\(it names no architecture\): choose head= one of 'classification'"
    ):
        load_model(write_config(tmp_path, model_type="vit", **vit()))
    uri = write_config(tmp_path, model_type="vit", architectures=["ViTForMaskedImageModeling"], **vit())
    with pytest.raises(InputError, match="its architecture is ViTForMaskedImageModeling"):
        load_model(uri)
    model = load_model(uri, head="none")
    assert model.task == "embedding" and model.outputs(torch.rand(2, 3, 32, 32)).shape == (2, 16)


def test_networks_without_images_are_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tf.BertConfig(**small, vocab_size=50, architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is a BertModel, which takes no images \(pixel_values\)"):
        load_model(f"hf:{tmp_path}")


def test_networks_of_patches_are_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = tf.Siglip2Config(vision_config=small, text_config={**small, "vocab_size": 50})
    config.architectures = ["Siglip2ForImageClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="takes patches with their positions, not images"):
        load_model(f"hf:{tmp_path}")


def test_configuration_without_labels_has_no_class_names(tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    config = tf.PvtConfig(image_size=64, **sizes, architectures=["PvtForImageClassification"])
    config.save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    assert model.classes is None and model(torch.rand(1, 3, 64, 64)).shape[0] == 1


def test_networks_of_timm_are_referred_to_their_own_scheme(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a network of timm's: load it as timm:local-dir:"):
        load_model(write_config(tmp_path, architecture="resnet18", num_classes=3))


def test_both_towers_of_clip_are_loaded_and_images_are_embedded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = clip().eval()
    network.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
    tf.CLIPImageProcessor(**sizes).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}", pretrained=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.get_image_features(pixel_values=model.normalize(images)).pooler_output
        torch.testing.assert_close(model.outputs(images), expected)
    assert model.task == "embedding"


def test_texts_are_compared_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = clip().eval()
    network.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
    tf.CLIPImageProcessor(**sizes).save_pretrained(tmp_path)
    uri, images = f"hf:{tmp_path}", torch.rand(2, 3, 32, 32)
    with pytest.raises(ModelError, match="has no tokenizer"):
        parse_target("similar:a dog", load_model(uri, pretrained=True))
    words = {word: number for number, word in enumerate(["[UNK]", "<s>", "</s>", "a", "dog", "cat"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=77).save_pretrained(tmp_path)
    model = load_model(uri, pretrained=True)
    with torch.no_grad():
        text = network.get_text_features(input_ids=torch.tensor([[1, 3, 4, 2]])).pooler_output
        expected = torch.cosine_similarity(model.embed(images), text)
    for spelling in ("similar:a dog", "similar:text:a dog"):
        torch.testing.assert_close(scores(model, images, spelling), expected)
    # An attack succeeds at half the image's own cosine.
    own = expected.sign() * expected
    target = Similar(text[0] * float(expected[0].sign()), "text:a dog", threshold=None)
    torch.testing.assert_close(target.resolve(model, images[:1]).margin(model, images[:1]), own[:1] / 2)
    assert run("saliency", model=model, images=images, target="similar:a dog").maps.any()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a dog").mkdir()
    with pytest.raises(InputError, match="write 'similar:text:a dog' or 'similar:image:a dog'"):
        parse_target("similar:a dog", model)
    with pytest.raises(InputError, match="there is no image file at 'dog.png'"):
        parse_target("similar:dog.png", model)


def test_features_that_are_not_pooled_need_a_choice(tmp_path: Path) -> None:
    uri = write_config(tmp_path, model_type="vit_mae", architectures=["ViTMAEModel"], **vit(), mask_ratio=0.0)
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(ModelError, match=r"without pooled features; choose some: load_model\(..., output="):
        load_model(uri).outputs(images)
    model = load_model(uri, output=lambda result: result.last_hidden_state.mean(1))
    assert model.outputs(images).shape == (2, 16)


def test_saved_results_name_no_folder_of_a_cache(folders: dict[str, Path]) -> None:
    source = {"uri": f"hf:{folders['vit']}", "pretrained": True, "head": "classification"}
    assert load_saved_model(source).class_count == 3
    with pytest.raises(InputError, match="does not accept the option 'cache_dir' from a file"):
        load_saved_model(source | {"cache_dir": "/"})


def test_logging_of_transformers_is_unchanged(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    logging = tf.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(f"hf:{folders['vit']}", pretrained=True)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(loaders()["hf"].names()) == []
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("phosphene_plugins.models.hf.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"phosphene\[transformers\]"):
        load_model("hf:someone/tiny-vit")
