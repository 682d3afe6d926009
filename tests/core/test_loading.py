"""Loading: names, weights from caches and files, presets, refusals; no pickles, no long waits."""

import hashlib
import pickle
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models._api import WeightsEnum

from phosphene import InputError, Model, ModelError, UnknownName, load_model, methods
from phosphene.models import load_saved_model
from phosphene.models.loading import loaders


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, in a TORCH_HOME of the test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put_into_cache(folder: Path, entry: WeightsEnum, state: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a state into torch's cache as the file of ``entry``, with its true digest in its name and URL."""
    draft = folder / "draft"
    torch.save(state, draft)
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()[:8]
    path = draft.rename(folder / f"weights-{digest}.pth")
    monkeypatch.setattr(entry.value, "url", f"https://example.org/{path.name}")
    return path


class Payload:
    """An object whose pickle runs code when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- torchvision -------------------------------------------------------------------------------


def test_torchvision_names_are_those_of_networks_that_take_images():
    names = set(loaders()["torchvision"].names())
    assert {"resnet18", "vit_b_16", "fcn_resnet50", "ssd300_vgg16", "quantized_resnet18"} <= names
    assert not names & {"r3d_18", "raft_small"}


def test_without_weights_the_default_preset_sets_the_preprocessing():
    model = load_model("torchvision:efficientnet_b1")
    assert model.input_size == (3, 240, 240)
    assert model.crop_pct == 240 / 255
    assert model.interpolation == "bilinear"
    assert model.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.class_name(0) == "tench"
    assert model.class_index("goldfish") == 1


def test_options_of_model_and_factory():
    model = load_model(
        "torchvision:resnet18", num_classes=2, mean=[0, 0, 0], std=[1, 1, 1],
        input_size=(3, 32, 32), classes=["no", "yes"],
    )  # fmt: skip
    assert model.module.fc.out_features == 2
    assert model.classes == ("no", "yes")
    assert model.input_size == (3, 32, 32)
    assert not model.mean.any()
    assert load_model("torchvision:resnet18", num_classes=2).classes is None


@pytest.mark.parametrize(
    ("uri", "options", "error", "message"),
    [
        ("torchvision:resnet19", {}, UnknownName, "did you mean 'resnet18'"),
        ("torchvision:r3d_18", {}, ModelError, r"takes clips \(N, C, T, H, W\), and Phosphene single images"),
        ("torchvision:raft_small", {}, ModelError, "takes two images at a time"),
        ("torchvision:resnet18", {"weights": "IMAGENET1K_V9"}, UnknownName, "did you mean 'IMAGENET1K_V1'"),
        ("torchvision:resnet18", {"flavour": 3}, InputError, "cannot be built .* 'flavour'"),
        ("torchvision:resnet18", {"weights": "absent.safetensors"}, InputError, "there is no weights file"),
        ("timm:resnet19", {}, UnknownName, "did you mean"),
        ("timm:resnet18.a9_in1k", {}, UnknownName, "did you mean .*a1_in1k"),
        ("timm:resnet18", {"weights": "a9_in1k"}, UnknownName, "did you mean .*a1_in1k"),
        ("timm:resnet18", {"flavour": 3}, InputError, "cannot be built .* 'flavour'"),
        ("timn:resnet18", {}, UnknownName, "did you mean 'timm'"),
        ("resnet18", {}, InputError, "write scheme:name"),
        ("builtin:shapes-vgg", {"weights": "DEFAULT"}, InputError, "has its own weights"),
    ],
)
def test_names_and_options_that_do_not_exist_are_refused(uri, options, error, message):
    with pytest.raises(error, match=message):
        load_model(uri, **options)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "selection", [{"weights": "DEFAULT"}, {"weights": "IMAGENET1K_V1"}, {"pretrained": True}]
)
def test_weights_in_torchs_cache_are_loaded_without_a_network(selection, checkpoints, monkeypatch):
    torch.manual_seed(1)
    state = models.squeezenet1_1().state_dict()
    put_into_cache(checkpoints, models.SqueezeNet1_1_Weights.DEFAULT, state, monkeypatch)
    model = load_model("torchvision:squeezenet1_1", **selection)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.usefixtures("no_network", "checkpoints")
def test_weights_that_cannot_be_downloaded_name_alternatives():
    begin = time.perf_counter()
    with pytest.raises(ModelError, match=r"resnet18-f37072fd\.pth .*a local file.*weights=None.*builtin:"):
        load_model("torchvision:resnet18", weights="DEFAULT")
    assert time.perf_counter() - begin < 10


@pytest.mark.usefixtures("no_network")
def test_cached_file_with_a_wrong_hash_is_refused(checkpoints):
    torch.save(models.squeezenet1_1().state_dict(), checkpoints / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(ModelError, match="is damaged: its SHA-256 does not begin with b8a52dc0"):
        load_model("torchvision:squeezenet1_1", weights="DEFAULT")


@pytest.mark.usefixtures("no_network")
def test_pickle_in_the_cache_is_not_executed(checkpoints, tmp_path, monkeypatch):
    touched = tmp_path / "touched"
    put_into_cache(
        checkpoints, models.SqueezeNet1_1_Weights.DEFAULT, {"weight": Payload(touched)}, monkeypatch
    )
    with pytest.raises(InputError, match="pickled code is never loaded"):
        load_model("torchvision:squeezenet1_1", weights="DEFAULT")
    assert not touched.exists()


def test_pickle_in_a_file_is_not_executed(tmp_path):
    touched = tmp_path / "touched"
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Payload(touched), protocol=2))
    with pytest.raises(InputError, match="pickled code is never loaded"):
        load_model("torchvision:squeezenet1_1", weights=tmp_path / "weights.pth")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("googlenet", models.GoogLeNet_Weights.IMAGENET1K_V1),
        ("inception_v3", models.Inception_V3_Weights.IMAGENET1K_V1),
        ("densenet121", models.DenseNet121_Weights.IMAGENET1K_V1),
        ("squeezenet1_1", models.SqueezeNet1_1_Weights.IMAGENET1K_V1),
    ],
)
def test_pretrained_networks_equal_those_of_torchvisions_builders(name, entry, checkpoints, monkeypatch):
    shape = {"googlenet": {"aux_logits": True, "init_weights": False},
             "inception_v3": {"aux_logits": True, "init_weights": False}}.get(name, {})  # fmt: skip
    torch.manual_seed(0)
    state = models.get_model(name, weights=None, **shape).state_dict()
    if name == "densenet121":  # as its published file names them, which is older than the batch counts
        dotted = {re.sub(r"(denselayer\d+\.(norm|conv))([12])\.", r"\1.\3.", k): v for k, v in state.items()}
        state = {k: v for k, v in dotted.items() if not k.endswith("num_batches_tracked")}
    put_into_cache(checkpoints, entry, state, monkeypatch)
    model = load_model(f"torchvision:{name}", weights=entry.name)
    theirs = models.get_model(name, weights=entry).eval()
    assert list(model.input_size[1:]) == entry.transforms().crop_size * 2
    assert getattr(model.module, "transform_input", None) == getattr(theirs, "transform_input", None)
    ours = model.module.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours[key], value)
    images = torch.rand(1, 3, 128, 128)
    with model.guard(), torch.no_grad():
        torch.testing.assert_close(model(images), theirs(model.normalize(images)))


def test_vision_transformer_is_built_at_the_size_of_its_weights(checkpoints, monkeypatch):
    entry = models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    state = {"class_token": torch.zeros(1, 1, 768), "encoder.pos_embedding": torch.zeros(1, 577, 768)}
    put_into_cache(checkpoints, entry, state, monkeypatch)
    with pytest.raises(
        ModelError, match="do not fit torchvision:vit_b_16 with .*'image_size': 384"
    ) as refusal:
        load_model("torchvision:vit_b_16", weights=entry.name)
    assert "size mismatch" not in str(refusal.value)  # tensors are missing, but all that are present fit


def test_preprocessing_equals_torchvision_and_timm():
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    noise = torch.randint(0, 256, (37, 53, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for uri in (
        "torchvision:mobilenet_v2",
        "torchvision:swin_t",
        "timm:resnet18.a1_in1k",
        "timm:mobilenetv2_050",
    ):
        model = load_model(uri)
        if uri.startswith("timm"):
            prepare = create_transform(**resolve_model_data_config(model.module))
        else:
            prepare = models.get_model_weights(uri.partition(":")[2]).DEFAULT.transforms()
        for size in ((331, 500), (500, 333), (224, 224), (640, 229)):
            image = Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)
            ours = model.normalize(model.transform(image)[None])[0]
            torch.testing.assert_close(ours, prepare(image), rtol=1e-5, atol=1e-5)


# --- timm ----------------------------------------------------------------------------------------


def test_timm_names_are_architectures_and_tags():
    assert {"resnet18", "resnet18.a1_in1k"} <= set(loaders()["timm"].names())


def test_timm_tag_sets_the_preprocessing():
    model = load_model("timm:resnet18.a1_in1k")
    assert model.input_size == (3, 224, 224)
    assert model.crop_pct == 0.95
    assert model.interpolation == "bicubic"
    assert model.class_index("goldfish") == 1
    assert model.class_name(0) == "tench, Tinca tinca"


def test_models_of_larger_imagenets_have_class_names():
    model = load_model("timm:test_resnet", num_classes=21843)
    assert len(model.classes) == 21843
    assert load_model("timm:test_resnet", num_classes=7).classes is None


def test_other_channels_and_sizes():
    model = load_model("timm:vit_tiny_patch16_224", in_chans=1, img_size=32, num_classes=5, depth=2)
    assert model.input_size == (1, 32, 32)
    assert model.mean.tolist() == [0.5]
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def hub_layout(cache: Path, repository: str, file: str, state: dict[str, torch.Tensor]) -> None:
    """Write a repository as the hub client caches it: refs name a commit, snapshots contain its files."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    if file.endswith(".safetensors"):
        save_file(state, snapshot / file)
    else:
        torch.save(state, snapshot / file)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("uri", "selection"),
    [
        ("timm:test_resnet.r160_in1k", {"pretrained": True}),
        ("timm:test_resnet", {"weights": "DEFAULT"}),
        ("timm:test_resnet", {"weights": "r160_in1k"}),
    ],
)
def test_weights_in_the_hubs_cache_are_loaded_without_a_network(uri, selection, file, tmp_path):
    torch.manual_seed(1)
    state = load_model("timm:test_resnet").module.state_dict()
    hub_layout(tmp_path, "timm/test_resnet.r160_in1k", file, state)
    begin = time.perf_counter()
    model = load_model(uri, cache_dir=str(tmp_path), **selection)
    assert time.perf_counter() - begin < 5
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.usefixtures("no_network")
def test_hub_weights_that_cannot_be_downloaded_name_alternatives(tmp_path):
    begin = time.perf_counter()
    with pytest.raises(ModelError, match="timm/test_resnet.*a local file.*weights=None.*builtin:"):
        load_model("timm:test_resnet", pretrained=True, cache_dir=str(tmp_path))
    assert time.perf_counter() - begin < 10  # the client's own retries take most of a minute


def test_file_named_in_the_configuration_is_loaded(tmp_path):
    torch.manual_seed(1)
    state = load_model("timm:test_resnet").module.state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    overlay = {"file": str(tmp_path / "mine.safetensors")}
    model = load_model("timm:test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.module.state_dict()["fc.weight"], state["fc.weight"])


def test_network_without_published_weights_is_refused():
    with pytest.raises(ModelError, match="no pretrained weights for timm:vit_base_patch32_plus_256"):
        load_model("timm:vit_base_patch32_plus_256", pretrained=True)


# --- files, state dicts, modules -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_are_loaded_and_recorded_in_the_source(suffix, tmp_path):
    state = load_model("timm:test_resnet").module.state_dict()
    path = tmp_path / f"mine{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    model = load_model("timm:test_resnet", weights=path)
    again = load_model(model.source["uri"], weights=model.source["weights"])
    assert again.digest == model.digest


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="do not fit timm:test_resnet"):
        load_model("timm:test_resnet", weights={"fc.bias": torch.zeros(3)})
    with pytest.raises(ModelError) as raised:  # all names of all tensors would be pages
        load_model("timm:test_resnet", weights={"stem.weight": torch.zeros(3)})
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_module_is_used_as_it_is():
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    module(torch.rand(1, 2, 8, 8))
    model = load_model(module, input_size=(2, 8, 8))
    assert model.module is module
    assert model.source is None
    assert model.mean.tolist() == [0, 0]
    with pytest.raises(InputError, match="factory options need a URI"):
        load_model(module, pretrained=True)


@pytest.mark.parametrize("weights", ["DEFAULT", "absent.tag", Path("absent")])
def test_named_weights_need_a_scheme(weights):
    with pytest.raises(InputError, match="named or pretrained weights .* need a URI"):
        load_model(nn.Linear(2, 2), weights=weights)
    if weights != "DEFAULT":
        with pytest.raises(UnknownName, match="no weights 'absent"):
            load_model("torchvision:squeezenet1_1", weights=weights)


def test_models_of_other_types_are_refused():
    with pytest.raises(InputError, match="not a Model"):
        load_model(load_model(nn.Linear(2, 2)))


def test_model_that_json_cannot_describe_has_no_source():
    selection = {"num_classes": 2, "input_size": (3, 64, 64)}
    assert load_model("torchvision:resnet18", **selection).source == {
        "uri": "torchvision:resnet18", "weights": None, "pretrained": False, **selection
    }  # fmt: skip
    assert load_model("torchvision:resnet18", norm_layer=nn.InstanceNorm2d).source is None
    assert load_model("torchvision:squeezenet1_1", output=lambda z: z).source is None
    state = load_model("timm:test_resnet").module.state_dict()
    assert load_model("timm:test_resnet", weights=state).source is None


def test_model_loaded_in_inference_mode_can_be_differentiated():
    with torch.inference_mode():
        model = load_model("builtin:shapes-vgg")
    assert methods["saliency"](model, torch.rand(1, 3, 64, 64), 0).maps.any()


def test_device_and_precision():
    model = load_model("timm:test_resnet", dtype=torch.float64)
    assert model.dtype is torch.float64
    assert model(torch.rand(1, 3, 64, 64)).dtype is torch.float64


# --- checkpoints of trainings ----------------------------------------------------------------------


def plain_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def assert_loaded(path: Path, state: dict[str, torch.Tensor]) -> None:
    loaded = load_model(plain_network(), weights=path, input_size=(3, 8, 8)).module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"])
def test_state_dict_is_read_from_a_checkpoint(entry, tmp_path):
    state = plain_network().state_dict()
    optimizer = torch.optim.Adam(plain_network().parameters()).state_dict()
    torch.save({entry: state, "optimizer": optimizer, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert_loaded(tmp_path / "checkpoint.pth", state)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    state = plain_network().state_dict()
    torch.save({"model": prefixed(state, prefix)}, tmp_path / "checkpoint.pt")
    assert_loaded(tmp_path / "checkpoint.pt", state)


def test_averaged_and_wrapped_networks_are_read_as_torch_saves_them(tmp_path):
    network = plain_network()
    wrappers = (
        torch.optim.swa_utils.AveragedModel(network),
        nn.DataParallel(network),
        torch.compile(network),
    )
    for wrapper in wrappers:
        torch.save(wrapper.state_dict(), tmp_path / "wrapped.pth")
        assert_loaded(tmp_path / "wrapped.pth", network.state_dict())


def test_prefixes_that_the_network_has_itself_stay():
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain_network()

        def forward(self, images):
            return self.model(images)

    torch.manual_seed(0)
    state = Wrapping().state_dict()
    for weights in (state, prefixed(state, "model."), prefixed(state, "module.")):
        loaded = load_model(Wrapping(), weights=weights, input_size=(3, 8, 8)).module.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


def lightning_checkpoint(state: dict[str, torch.Tensor], hyper_parameters: object) -> dict[str, object]:
    """What ``Trainer.save_checkpoint`` writes."""
    return {
        "epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {},
        "state_dict": prefixed(state, "model."), "hyper_parameters": hyper_parameters,
    }  # fmt: skip


def test_lightning_checkpoint_is_read_without_its_hyper_parameters(tmp_path):
    state = plain_network().state_dict()
    torch.save(lightning_checkpoint(state, {"lr": 0.1}), tmp_path / "last.ckpt")
    assert_loaded(tmp_path / "last.ckpt", state)


def test_pickled_hyper_parameters_are_named_and_not_loaded(tmp_path):
    torch.save(
        lightning_checkpoint(plain_network().state_dict(), {"config": Payload(tmp_path / "touched")}),
        tmp_path / "last.ckpt",
    )
    message = r"never loaded\): beside tensors it contains objects of .*pathlib.*save its weights alone"
    with pytest.raises(InputError, match=message):
        load_model(plain_network(), weights=tmp_path / "last.ckpt")
    assert not (tmp_path / "touched").exists()


def test_checkpoint_with_two_state_dicts_is_refused_with_both_names(tmp_path):
    first, second = plain_network().state_dict(), plain_network().state_dict()
    path = tmp_path / "timm.pth"
    torch.save({"state_dict": first, "state_dict_ema": second}, path)
    with pytest.raises(InputError, match="contains 2 state dicts, state_dict and state_dict_ema; choose one"):
        load_model(plain_network(), weights=path)
    weights = torch.load(path, weights_only=True)["state_dict_ema"]  # as the sentence says
    loaded = load_model(plain_network(), weights=weights).module.state_dict()
    assert torch.equal(loaded["0.weight"], second["0.weight"])


def test_checkpoint_without_a_state_dict_is_refused_with_its_entries(tmp_path):
    torch.save({"weights": plain_network().state_dict(), "epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(
        InputError, match="contains no state dict: none of its entries weights, epoch is one of"
    ):
        load_model(plain_network(), weights=tmp_path / "odd.pth")


def test_ckpt_is_the_suffix_of_a_file(tmp_path):
    with pytest.raises(InputError, match="there is no weights file .*absent.ckpt"):
        load_model("torchvision:squeezenet1_1", weights="absent.ckpt")
    path = tmp_path / "mine.ckpt"
    torch.save({"state_dict": plain_network().state_dict()}, path)
    with pytest.raises(InputError, match="no safetensors file"):  # a saved result may come from a stranger
        load_saved_model({"uri": "torchvision:squeezenet1_1", "weights": str(path)})


# --- class names of ImageNet -------------------------------------------------------------------------


def thousand(**options):
    return load_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 1000)), input_size=(3, 2, 2), **options)


def test_module_with_a_thousand_outputs_has_names_only_where_they_are_asked_for():
    assert thousand().classes is None
    model = thousand(classes="imagenet")
    assert model.class_name(1) == "goldfish, Carassius auratus"
    assert model.class_index("goldfish") == 1
    assert model(torch.rand(1, 3, 2, 2)).shape == (1, 1000)
    with pytest.raises(InputError, match="has no class names; pass the index"):
        thousand().class_index("goldfish")


def test_names_of_imagenet_belong_to_uris_and_saved_sources_as_well():
    model = load_model("torchvision:squeezenet1_1", classes="imagenet")
    assert model.source["classes"] == "imagenet"
    again = load_saved_model(model.source)
    assert again.classes == model.classes and len(again.classes) == 1000
    assert load_model("timm:test_resnet", classes="imagenet").classes == model.classes
    assert Model(nn.Flatten(), classes="imagenet-22k").class_count == 21841


def test_imagenet_names_for_another_number_of_logits_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(ModelError, match="returns 10 logits, but has 1000 class names"):
        load_model(network, input_size=(3, 2, 2), classes="imagenet")(torch.rand(1, 3, 2, 2))


@pytest.mark.parametrize("name", ["imagenet-21k", "ImageNet-1k", "cifar10"])
def test_other_lists_of_class_names_are_refused_with_the_nearest(name):
    with pytest.raises(UnknownName, match="there is imagenet, imagenet-12k"):
        thousand(classes=name)


# --- real weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "file", "side", "least"),
    [
        ("torchvision:mobilenet_v2", "mobilenet_v2.coral-ptq.torchvision.safetensors", 225, 8),
        ("torchvision:squeezenet1_0", "squeezenet1_0.deepcompression.torchvision.safetensors", 227, 6),
    ],
)
def test_real_networks_classify_real_photographs(assets, uri, file, side, least):
    model = load_model(uri, weights=assets / "weights" / file, input_size=(3, side, side))
    photographs = sorted((assets / "images" / "imagenet").glob("*.JPEG"))[::17][:12]
    right = 0
    with model.guard(), torch.inference_mode():
        for path in photographs:
            label = model.class_name(int(model(model.transform(path)[None]).argmax()))
            right += label.replace(" ", "_") in path.stem
    assert right >= least


def test_function_returns_logits_or_labels_and_needs_size_and_classes():
    def logits(images):
        return torch.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], 1)

    signature = {"input_size": (3, 4, 4), "classes": ["light", "dark"]}
    images = torch.rand(5, 3, 4, 4)
    assert torch.equal(load_model(logits, **signature)(images), logits(images))
    labels = load_model(lambda images: logits(images).argmax(1).numpy(), **signature)(images)
    assert torch.equal(labels, 100 * torch.nn.functional.one_hot(logits(images).argmax(1), 2).float())
    with pytest.raises(InputError, match="a function needs input_size"):
        load_model(logits, input_size=(3, 4, 4))
    with pytest.raises(InputError, match="a URI, a torch module or a function, not a type"):
        load_model(nn.Linear, **signature)
    with pytest.raises(ModelError, match="returned labels from 7 to 7, but the classes are 0 to 1"):
        load_model(lambda images: torch.full((len(images),), 7), **signature)(images)


def test_module_that_returns_labels_alone_needs_classes():
    class Labels(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)).argmax(1)

    with pytest.raises(ModelError, match="labels alone; pass the class names"):
        load_model(Labels(), input_size=(3, 4, 4))(torch.rand(1, 3, 4, 4))
