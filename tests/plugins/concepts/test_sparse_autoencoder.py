"""Sparse autoencoders: published files, saved fits, and codes as targets of other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phosphene import InputError, TensorDataset, export, load_model, load_result, run
from phosphene.results import Result

CHANNELS, CODES = 3, 5


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=(3, 6, 8))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(6, 3, 6, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    shapes = {"W_enc": (CHANNELS, CODES), "b_enc": (CODES,), "W_dec": (CODES, CHANNELS), "b_dec": (CHANNELS,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor]) -> str:
    file = folder / "codes.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return str(file)


def apply(model: Any, images: Tensor, file: Any, **options: Any) -> Any:
    data = TensorDataset(images)
    options = {"layer": "1", "codes": list(range(CODES)), "top": len(images), "steps": 0} | options
    return run("sparse_autoencoder", model=model, dataset=data, autoencoder=file, **options)


def check_codes(result: Any, expected: Tensor) -> None:
    """The maps of the result are the codes (N, h, w, K) of the images."""
    order = result.image_indices
    for row in range(CODES):
        torch.testing.assert_close(result.maps[row], expected[order[row], ..., row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_a_file_of_saelens_or_prisma_computes_its_codes(
    model: Any, images: Tensor, weights: dict[str, Tensor], tmp_path: Path, centered: bool, normalization: str
) -> None:
    options = {"activation": "relu", "centered": centered, "normalization": normalization}
    result = apply(model, images, write(tmp_path, weights), **options)
    x = model.features(images, "1").movedim(1, -1).detach()
    u, mean, std = x, torch.zeros(()), torch.ones(())
    if normalization == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        u = (x - mean) / (std + 1e-5)
    codes = ((u - weights["b_dec"] * centered) @ weights["W_enc"] + weights["b_enc"]).relu()
    check_codes(result, codes)
    rebuilt = (codes @ weights["W_dec"] + weights["b_dec"]) * std + mean
    flat = x.flatten(0, 2)
    r2 = 1 - (flat - rebuilt.flatten(0, 2)).square().sum() / (flat - flat.mean(0)).square().sum()
    torch.testing.assert_close(result.r2, r2, rtol=1e-4, atol=1e-4)
    assert float(result.l0) == pytest.approx(float((codes > 0).float().sum(-1).mean()), rel=1e-5)
    torch.testing.assert_close(result.density, (codes > 0).float().mean((0, 1, 2)))


def test_other_layouts_hold_the_same_codes(
    model: Any, images: Tensor, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    encoder, bias = weights["W_enc"].T, weights["b_dec"]
    decoder, encoder_bias = weights["W_dec"], weights["b_enc"]
    ours, theirs = {"encoder.weight": encoder}, {"decoder.weight": decoder.T}
    layouts = [
        ours | {"encoder.bias": encoder_bias, "W_dec": decoder, "b_dec": bias},
        ours | theirs | {"encoder.bias": encoder_bias, "b_dec": bias},
        ours | theirs | {"latent_bias": encoder_bias, "pre_bias": bias},
    ]
    x = model.features(images, "1").movedim(1, -1).detach()
    values = (x - bias) @ weights["W_enc"] + encoder_bias
    top = values.relu().topk(2, -1)
    expected = torch.zeros_like(values).scatter(-1, top.indices, top.values)
    for tensors in layouts:
        result = apply(model, images, write(tmp_path, tensors), activation="topk", k=2)
        check_codes(result, expected)
    # With thresholds it is a JumpReLU by default, also of the logarithm of the thresholds.
    threshold = torch.tensor([0.1, 0.5, 1.0, 0.2, 0.3])
    for extra in ({"threshold": threshold}, {"log_threshold": threshold.log()}):
        result = apply(model, images, write(tmp_path, layouts[0] | extra))
        check_codes(result, values * (values > threshold))
        assert result.direction(1).threshold == pytest.approx(
            float(threshold[1] - encoder_bias[1] + encoder[1] @ bias), rel=1e-4
        )


def test_files_that_do_not_say_what_they_are_are_refused(
    model: Any, images: Tensor, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    file = write(tmp_path, weights)
    for options, words in [
        ({"activation": "relu"}, "centered"),
        ({"centered": True}, "no thresholds"),
        ({"centered": True, "activation": "topk"}, "needs k="),
        ({"centered": True, "activation": "relu", "k": 3}, "takes no k"),
        ({"centered": True, "activation": "batch_topk"}, "threshold"),
        ({"centered": True, "activation": "relu", "layer": None}, "does not name the layer"),
        ({"centered": True, "activation": "relu", "codes": [5]}, "no number 5"),
    ]:
        with pytest.raises(InputError, match=words):
            apply(model, images, file, **options)
    wrong = {
        "no layout": {"weight": torch.zeros(3)},
        "W_gate": weights | {"W_gate": torch.zeros(3)},
        "the encoder of 5 codes and 3 channels is": weights | {"W_enc": torch.zeros(CODES, CHANNELS)},
    }
    for words, tensors in wrong.items():
        with pytest.raises(InputError, match=words):
            apply(model, images, write(tmp_path, tensors), activation="relu", centered=True)
    wide = {"W_enc": torch.zeros(4, 2), "b_enc": torch.zeros(2), "W_dec": torch.zeros(2, 4)}
    with pytest.raises(InputError, match="3 channels, the codes are of a layer with 4"):
        apply(
            model, images, write(tmp_path, wide | {"b_dec": torch.zeros(4)}), activation="relu", centered=True
        )


def test_a_saved_fit_is_loaded_and_its_codes_are_targets(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": "builtin:scenes/8", "codes": 12, "k": 3, "steps": 3, "batch": 4}
    fit: Any = run("sparse_autoencoder_fit", **options, seed=0, out=tmp_path / "fit")
    loaded: Any = load_result(tmp_path / "fit")
    assert torch.equal(loaded.network.encoder, fit.network.encoder) and loaded.layer == fit.layer
    result: Any = run("sparse_autoencoder", dataset="builtin:scenes/8", autoencoder=tmp_path / "fit",
                      count=2, steps=2, seed=0, out=tmp_path / "codes")  # fmt: skip
    code = result.codes[0]
    assert result.inputs["autoencoder"] == str(tmp_path / "fit")
    with pytest.raises(InputError, match="not among those of this result"):
        result.direction(next(n for n in range(12) if n not in result.codes))
    maps = []
    for folder in ("fit", "codes"):
        target = f"concept:{tmp_path / folder}#{code}"
        attribution: Any = run("saliency", images="builtin:scenes/2", target=target)
        assert attribution.targets == (target, target)
        maps.append(attribution.maps)
        drawn: Any = run("class_visualization", target=target, steps=2, seed=0)
        assert drawn.images.shape == (1, 3, 64, 64)
    torch.testing.assert_close(maps[0], maps[1])
    attacked: Result = run(
        "pgd", images="builtin:scenes/2", labels=f"concept:{tmp_path / 'fit'}#{code}", steps=2
    )
    assert attacked.inputs["labels"] == f"concept:{tmp_path / 'fit'}#{code}"
    with pytest.raises(InputError, match="takes activations of a layer and not images"):
        export(fit, tmp_path / "codes.pt2")
    with pytest.raises(InputError, match="activation= is for a published file"):
        run("sparse_autoencoder", dataset="builtin:scenes/4", autoencoder=fit, activation="relu")


def test_a_code_is_the_largest_value_over_the_positions(model: Any, images: Tensor) -> None:
    data = TensorDataset(images)
    fit: Any = run("sparse_autoencoder_fit", model=model, dataset=data, layer="1", codes=4, k=1, steps=5,
                   activation="batch_topk", batch=3, seed=0)  # fmt: skip
    x = model.features(images, "1").movedim(1, -1).flatten(1, 2)
    codes = fit.network.encode(x)
    for code in range(4):
        active = fit.direction(code).margin(model, images) > 0
        assert active.tolist() == (codes[..., code] > 0).any(1).tolist()
