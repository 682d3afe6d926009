"""Codes of published sparse autoencoders in small numbers, for the oracle of ``sparse_autoencoder``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phosphene import InputError, load_model

from ._code_statistics import map_features, on_model
from ._sparse_autoencoder import (
    AutoencoderNetwork,
    PublishedOptions,
    SparseAutoencoder,
    build_network,
    code_direction,
    read_published,
)

_ENCODER = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]])  # (K, C)
_DECODER = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
_ENCODER_BIAS, _BIAS = torch.tensor([-0.5, 0.25, 0.5]), torch.tensor([1.0, -1.0])
#: Activations, W_e x + b_e and W_e (x - b) + b_e.
_X, _PLAIN, _CENTERED = torch.tensor([3.0, 1.0]), [2.5, 2.25, 2.5], [1.5, 4.25, 0.5]


def published_files_have_known_codes() -> None:
    """Every layout, activation and normalization; what a file does not say; files that are refused."""
    with TemporaryDirectory() as folder:
        _layouts_hold_the_same_weights(Path(folder) / "codes.safetensors")
        _activations_and_thresholds(Path(folder) / "codes.safetensors")
        _refusals(Path(folder) / "codes.safetensors")
    _networks_of_fits()
    _activations_of_vectors()


def _read(path: Path, tensors: Mapping[str, Tensor]) -> SparseAutoencoder:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return read_published(path)


def _layouts_hold_the_same_weights(path: Path) -> None:
    for encoder, encoder_bias, decoder, bias in (
        ("W_enc", "b_enc", "W_dec", "b_dec"),
        ("encoder.weight", "encoder.bias", "W_dec", "b_dec"),
        ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
        ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias"),
    ):
        tensors = {
            encoder: _ENCODER.T if encoder == "W_enc" else _ENCODER,
            decoder: _DECODER.T if decoder == "decoder.weight" else _DECODER,
            encoder_bias: _ENCODER_BIAS,
            bias: _BIAS,
            "step": torch.zeros(1),
        }
        file = _read(path, tensors)
        # SAELens and Prisma share their names, but only Prisma subtracts the bias: the file does not say it.
        for centered in (True, False) if encoder == "W_enc" else (None, False):
            options = PublishedOptions(activation="relu", centered=centered)
            used = file.complete(options, "features.3")
            expected = torch.tensor(_PLAIN if centered is False else _CENTERED)
            torch.testing.assert_close(used.codes.encode(_X), expected)
            torch.testing.assert_close(used.codes(_X), expected @ _DECODER + _BIAS)
            assert used.layer == "features.3" and used.config == {
                "channels": 2, "codes": 3, "activation": "relu", "k": 1, "normalization": "none",
            }  # fmt: skip
        for result in (file, used):
            assert not result.codes.training and not any(p.requires_grad for p in result.codes.parameters())
        assert file.layer == "" and file.method == "concepts.sparse_autoencoder_fit"
        assert file.uri == str(path) and file.labels == () and file.config["activation"] is None
        assert file.losses.shape == (0,) and file.previews.shape == (0, 3, 1, 1)
        assert build_network(**file.config).activation == "relu"


def _published(**more: Tensor) -> dict[str, Tensor]:
    weights = {"encoder.weight": _ENCODER, "encoder.bias": _ENCODER_BIAS, "W_dec": _DECODER, "b_dec": _BIAS}
    return weights | more


def _activations_and_thresholds(path: Path) -> None:
    """Pre-activations 1.5, 4.25 and 0.5."""
    thresholds = torch.tensor([2.0, 4.0, 0.25])
    for tensors, options, expected in (
        ({}, {"activation": "topk", "k": 1}, [0, 4.25, 0]),
        ({}, {"activation": "topk", "k": 2}, [1.5, 4.25, 0]),
        ({"threshold": thresholds}, {}, [0, 4.25, 0.5]),
        ({"log_threshold": thresholds.log()}, {"activation": "jump_relu"}, [0, 4.25, 0.5]),
        ({"threshold": torch.tensor(1.0)}, {"activation": "batch_topk"}, [1.5, 4.25, 0]),
        ({"threshold": torch.tensor([1.0])}, {"activation": "relu"}, [1.5, 4.25, 0.5]),
    ):
        used = _read(path, _published(**tensors)).complete(PublishedOptions(**options), "0")
        torch.testing.assert_close(used.codes.encode(_X), torch.tensor(expected))
        assert build_network(**used.config).k == options.get("k", 1)


def _refusals(path: Path) -> None:
    plain = _read(path, _published())
    saelens = _read(path, {"W_enc": _ENCODER.T, "b_enc": _ENCODER_BIAS, "W_dec": _DECODER, "b_dec": _BIAS})
    fit = plain.complete(PublishedOptions(activation="relu"), "0")
    two, relu = torch.ones(2), PublishedOptions(activation="relu")
    for call, message in (
        (lambda: _read(path, _published(other=torch.ones(1))), "encoder.weight, other, which is no"),
        (lambda: _read(path, {"W_enc": _ENCODER}), "W_enc, b_enc, W_dec, b_dec (SAELens, Prisma); encoder"),
        (lambda: _read(path, _published(W_dec=_DECODER.T)), "decoder of 3 codes and 2 channels is (2, 3)"),
        (lambda: _read(path, _published(threshold=two)), "threshold of 3 codes and 2 channels is (2,)"),
        (lambda: fit.complete(relu, None), "is for a published file; this autoencoder has its own"),
        (lambda: plain.complete(relu, None), "pass layer="),
        (lambda: plain.complete(PublishedOptions(), "0"), "the file has no thresholds"),
        (lambda: plain.complete(PublishedOptions(activation="batch_topk"), "0"), "needs the threshold"),
        (lambda: plain.complete(PublishedOptions(activation="topk"), "0"), "activation='topk' needs k="),
        (lambda: plain.complete(PublishedOptions(activation="relu", k=1), "0"), "'relu' takes no k"),
        (lambda: saelens.complete(relu, "0"), "pass centered=True"),
        (lambda: fit.direction(3), "there are 3 codes, so there is no number 3"),
        (lambda: fit.direction(-1), "there are 3 codes, so there is no number -1"),
        (lambda: AutoencoderNetwork(2, 3, "relu", 4), "4 of 3 codes of 2 channels"),
        (lambda: AutoencoderNetwork(2, 0), "1 of 0 codes"),
        (lambda: AutoencoderNetwork(2, 3, "gelu"), "there is no activation 'gelu'"),
    ):  # fmt: skip
        refusal = ""
        try:
            call()
        except InputError as error:
            refusal = str(error)
        assert message in refusal, f"{message}: {refusal}"
    assert fit.complete(PublishedOptions(), None) is fit
    assert fit.complete(PublishedOptions(), "features").layer == "features"
    assert fit.direction(2).name == "0"


def _networks_of_fits() -> None:
    """A scale of 2, and activations standardized over their channels; directions of both."""
    network = AutoencoderNetwork(2, 3, "jump_relu")
    state = {"encoder": _ENCODER, "decoder": _DECODER, "encoder_bias": _ENCODER_BIAS, "bias": _BIAS}
    state |= {"threshold": torch.tensor([1.0, 1.0, 1.0]), "scale": torch.tensor(2.0)}
    network.load_state_dict(state)
    # W_e (x - b) / 2 + b_e = (0.5, 2.25, 0.5), above the threshold only the second: 2 * 2.25 W_d + b.
    assert network(_X).tolist() == [14.5, 17.0]
    target = code_direction(network, "0", 1)
    assert target.vector.tolist() == [0, 1]
    assert target.threshold == 1 - 0.25 - 1  # <row, x> / 2 above threshold - b_e + <row, b> / 2
    normalized = AutoencoderNetwork(2, 3, "relu", normalization="layer_norm")
    normalized.load_state_dict(state | {"bias": torch.zeros(2), "scale": torch.ones(())})
    # Two activations have the standardized values 1 / sqrt(2) and -1 / sqrt(2).
    unit, rows = 0.5**0.5, torch.tensor([[3.0, 1.0], [10.0, 30.0]])
    for row, sign, middle, deviation in zip(rows, (1, -1), (2, 20), (2**0.5, 200**0.5), strict=True):
        codes = torch.tensor([unit * sign - 0.5, -2 * unit * sign + 0.25, 2 * unit * sign + 0.5]).relu()
        torch.testing.assert_close(normalized.encode(row), codes, rtol=1e-4, atol=1e-4)
        expected = codes @ _DECODER * deviation + middle
        torch.testing.assert_close(normalized(rows)[int(sign < 0)], expected, rtol=1e-4, atol=1e-3)
    centered = code_direction(normalized, "0", 1)
    assert centered.vector.tolist() == [-1, 1] and centered.threshold is None


def _activations_of_vectors() -> None:
    """A vector is a map of one position, and has channels; a copy of the network in the model's precision."""
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    model = load_model(network, input_size=(3, 4, 5))
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    maps = map_features(model, images, "2")
    assert torch.equal(maps[..., 0, 0], model.features(images, "2")) and maps.shape == (2, 2, 1, 1)
    for layer in ("0", "2"):
        copied = on_model(AutoencoderNetwork(2, 3), model, layer)
        assert copied.bias.dtype == torch.float64
        refusal = ""
        try:
            on_model(AutoencoderNetwork(4, 3), model, layer)
        except InputError as error:
            refusal = str(error)
        assert refusal == f"layer '{layer}' has 2 channels, the codes are of a layer with 4"
