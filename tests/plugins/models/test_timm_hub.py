"""``timm:hf-hub:`` and ``timm:local-dir:`` - networks with the configuration that timm saved with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.hub_cache import disconnect, put_into_cache
from timm.models import save_for_hf

from phosphene import InputError, ModelError, load_model, replay, run

LABELS = ["n1", "n2", "n3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network that somebody trained on three classes, as timm saves it for the hub."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)
    network.pretrained_cfg |= {"crop_mode": "squash", "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3)}
    config = {"label_names": LABELS, "label_descriptions": {"n1": "cat", "n2": "dog"}}
    save_for_hf(network, tmp_path / "own", model_config=config, safe_serialization=True)
    return tmp_path / "own"


def assert_is_saved(model: Any) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3).eval()
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network(model.normalize(images)))
    assert model.classes == ("cat", "dog", "n3")
    assert (model.crop_mode, model.crop_pct, model.input_size) == ("squash", 1.0, (3, 160, 160))
    assert model.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_folder_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder.parent)
    model = load_model("timm:local-dir:own", pretrained=True)
    assert_is_saved(model)
    assert model.name == f"timm:local-dir:{folder.resolve()}"
    images = torch.rand(1, 3, 160, 160)
    run("saliency", model=model, images=images, target="dog", progress=False, out=tmp_path / "map")
    monkeypatch.chdir("/")
    assert replay(tmp_path / "map").same
    assert load_model(f"timm:local-dir:{folder}").digest != model.digest  # random weights


def test_repository_in_the_cache_is_loaded_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disconnect(monkeypatch)
    put_into_cache(tmp_path / "cache", "someone/tiny", folder)
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    for selection in ({"pretrained": True}, {"weights": "DEFAULT"}):
        model = load_model("timm:hf-hub:someone/tiny", **selection, **options)
        assert_is_saved(model)
        assert model.name == "timm:hf-hub:someone/tiny"
    assert load_model("timm:hf-hub:someone/tiny", num_classes=7, **options).classes is None
    message = "someone/absent/config.json is not in the cache .*hf download someone/absent"
    with pytest.raises(ModelError, match=message):
        load_model("timm:hf-hub:someone/absent", **options)


def test_names_that_are_ambiguous_or_wrong_are_refused(folder: Path, tmp_path: Path) -> None:
    message = "write timm:hf-hub:someone/tiny for a repository on the hub, timm:local-dir:someone/tiny"
    with pytest.raises(InputError, match=message):
        load_model("timm:someone/tiny")
    with pytest.raises(InputError, match="contains no config.json"):
        load_model(f"timm:local-dir:{tmp_path}")
    with pytest.raises(InputError, match="no weights called 'a1', only 'DEFAULT'"):
        load_model(f"timm:local-dir:{folder}", weights="a1")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match="is no timm network: .*; try hf:"):
        load_model(f"timm:local-dir:{folder}")


def test_network_without_a_head_embeds_images() -> None:
    model = load_model("timm:test_vit", num_classes=0)
    assert model.task == "embedding" and model.classes is None
    assert model.outputs(torch.rand(1, *model.input_size)).shape == (1, model.module.num_features)
    assert load_model("timm:test_vit").task is None
