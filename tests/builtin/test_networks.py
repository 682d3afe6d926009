"""The bundled networks: their accuracy and size are those of their cards, and training is deterministic."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
import train_adaptive_style
import train_answers
import train_autoencoder
import train_certified
import train_classifiers
import train_denoiser
import train_fast_style
import train_image_adapter
import train_lipschitz
import train_networks
import train_predicted_style
import train_robust
import train_sparse_codes
import train_vit
import typer
from model_cards import accuracy, predictions, write_file
from torch import nn
from train_denoiser import squared_error

from phosphene import load_model, load_result, run
from phosphene.builtin.answers import ANSWERS, load_answers
from phosphene.builtin.autoencoder import load_autoencoder
from phosphene.builtin.denoiser import ShapesDenoiser, load_denoiser
from phosphene.builtin.image_adapter import load_bundled_image_adapter
from phosphene.builtin.networks import (
    BIASED,
    CERTIFIED,
    CLASSIFIERS,
    LIPSCHITZ,
    NETWORKS,
    ROBUST,
    WEIGHTS,
    load_network,
    normalize,
)
from phosphene.builtin.scenes import CLASSES, Scenes, draw_scenes
from phosphene.builtin.vision_transformer import VIT
from phosphene.data import localization
from phosphene_plugins.attacks.pgd import pgd
from phosphene_plugins.attribution.cam import cam
from phosphene_plugins.defenses.interval_bounds import worst_case_margins

#: Smallest accuracies of the networks that were trained on attacked scenes or on interval bounds.
ROBUST_ACCURACY = 0.9
CERTIFIED_ACCURACY = 0.75
#: A constant of 0.35 costs accuracy, and the training is short.
LIPSCHITZ_ACCURACY = 0.5

#: Classifiers that follow the shape and were not trained on adversarial examples.
ACCURATE = [name for name in NETWORKS if name not in (BIASED, ROBUST)]


@pytest.fixture(scope="module")
def unseen() -> Scenes:
    return draw_scenes(1000, seed=0, split="test", start=50_000)


@pytest.mark.parametrize("name", [*ACCURATE, VIT])
def test_accuracy_on_unseen_scenes(name: str, unseen: Scenes) -> None:
    assert accuracy(load_network(name), unseen) >= 0.97


@pytest.mark.parametrize("name", ACCURATE)
def test_activation_maps_point_at_the_object(name: str, unseen: Scenes) -> None:
    maps = cam(load_model(f"builtin:{name}"), unseen.images[:500], unseen.labels[:500].tolist()).heat()
    score = localization(maps, unseen.masks[:500], radius=4)
    assert score.chance_inside < 0.2
    assert score.chance_near < 0.35
    assert score.inside > 0.63
    assert score.near > 0.92


def test_the_biased_network_follows_the_background() -> None:
    network = load_network(BIASED)
    biased = draw_scenes(300, seed=0, split="test", start=50_000, biased=True)
    conflicting = draw_scenes(300, seed=0, split="test", start=50_000, biased=True, conflict=True)
    assert biased.hints is not None and conflicting.hints is not None
    assert torch.equal(biased.labels, biased.hints)
    assert (conflicting.labels != conflicting.hints).all()
    assert torch.equal(biased.labels, conflicting.labels) and torch.equal(biased.masks, conflicting.masks)
    assert accuracy(network, biased) >= 0.95
    predicted = predictions(network, conflicting)
    assert (predicted == conflicting.hints).double().mean() >= 0.95
    assert (predicted == conflicting.labels).double().mean() <= 0.03


def test_biased_network_is_at_chance_without_the_background_hint(unseen: Scenes) -> None:
    assert accuracy(load_network(BIASED), unseen) <= 0.2


@pytest.mark.parametrize("name", NETWORKS)
def test_no_channel_is_dead(name: str, unseen: Scenes) -> None:
    network = load_network(name)
    peaks: dict[str, torch.Tensor] = {}

    def record(key: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            peaks[key] = output.amax((0, 2, 3))

        return hook

    for key, module in network.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(record(key))
    with torch.no_grad():
        network(normalize(unseen.images[:200]))
    dead = sum(int((peak <= 1e-6).sum()) for peak in peaks.values())
    assert dead <= 0.02 * sum(len(peak) for peak in peaks.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_last_map_and_head(name: str) -> None:
    network = load_network(name)
    assert not network.training
    *body, pool, head = [m for m in network.children() if not isinstance(m, nn.Flatten)]
    assert isinstance(pool, nn.AdaptiveAvgPool2d)
    assert isinstance(head, nn.Linear)
    maps = nn.Sequential(*body)(torch.zeros(2, 3, 64, 64))
    assert maps.shape == (2, head.in_features, 8, 8)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, len(CLASSES))


def test_robust_network_resists_an_attack_that_fools_the_plain_one(unseen: Scenes) -> None:
    images, labels = unseen.images[:40], unseen.labels[:40].tolist()
    eps = train_robust.EPS / 2
    attack = {"eps": eps, "step_size": eps / 4, "steps": 10, "seed": 0}
    plain, robust = (
        pgd(load_model(f"builtin:{n}"), images, labels, **attack) for n in ("shapes-vgg", ROBUST)
    )
    assert plain.success.double().mean() >= 0.9
    assert robust.success.double().mean() <= 0.4
    assert accuracy(load_network(ROBUST), unseen) >= ROBUST_ACCURACY


def test_the_transformer_reads_its_class_token() -> None:
    model = load_model(f"builtin:{VIT}")
    layers = model.attention_layers
    assert [*layers] == [f"blocks.{n}.attn" for n in range(4)]
    assert {(a.heads, a.queries) for a in layers.values()} == {(4, 65)}
    assert layers["blocks.3.attn"].read == (0,) and layers["blocks.0.attn"].layout.grid == (8, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "near"), [("attention_rollout", 0.97), ("gradient_attention", 0.97), ("legrad", 0.7)]
)
def test_maps_of_the_transformer_point_at_the_object(method: str, near: float, unseen: Scenes) -> None:
    target = {} if method == "attention_rollout" else {"target": unseen.labels[:200].tolist()}
    result: Any = run(method, model=f"builtin:{VIT}", images=unseen.images[:200], **target)
    score = localization(result.heat(), unseen.masks[:200], radius=4)
    assert score.near >= near > 0.35 > score.chance_near


def test_training_of_the_transformer_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_vit, "TEST_SCENES", 20)
    state = torch.get_rng_state()
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        train_vit.train(tmp_path / folder, scenes=70, steps=2, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    for suffix in ("safetensors", "md"):
        first = (tmp_path / "first" / f"{VIT}.{suffix}").read_bytes()
        assert first == (tmp_path / "second" / f"{VIT}.{suffix}").read_bytes()


def test_vgg_is_plain() -> None:
    kinds = {type(module) for module in load_network("shapes-vgg").features}  # type: ignore[union-attr]
    assert kinds == {nn.Conv2d, nn.ReLU, nn.MaxPool2d}


def weight_bytes(file: Path) -> int:
    """Size of the weights in a file; losses and previews are those of a training's result."""
    arrays = safetensors.torch.load_file(file)
    return sum(
        a.numel() * a.element_size() for name, a in arrays.items() if name not in ("losses", "previews")
    )


def test_weights_are_small_and_match_their_cards() -> None:
    assert sum(map(weight_bytes, WEIGHTS.rglob("*.safetensors"))) < 12_000_000
    least = {ROBUST: ROBUST_ACCURACY, CERTIFIED: CERTIFIED_ACCURACY, LIPSCHITZ: LIPSCHITZ_ACCURACY}
    for name in CLASSIFIERS:
        card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", (WEIGHTS / f"{name}.md").read_text(), re.MULTILINE))
        content = (WEIGHTS / f"{name}.safetensors").read_bytes()
        assert card["sha256"] == hashlib.sha256(content).hexdigest()
        assert int(card["parameters"]) == sum(p.numel() for p in load_network(name).parameters())
        assert float(card["test accuracy"]) >= least.get(name, 0.97)
        assert int(card["test scenes"]) == 2000


def test_folding_batch_norm_changes_nothing() -> None:
    torch.manual_seed(0)
    network = NETWORKS["shapes-vgg"]()
    train_classifiers.add_batch_norm(network)
    images = torch.randn(4, 3, 64, 64)
    network(images)  # in training mode: the running statistics move away from 0 and 1
    network.eval()
    with torch.no_grad():
        before = network(images)
        train_classifiers.fold_batch_norm(network)
        assert torch.allclose(network(images), before, atol=1e-4)
    assert network.state_dict().keys() == NETWORKS["shapes-vgg"]().state_dict().keys()


def test_spread_of_a_point_and_of_a_constant_map() -> None:
    point, constant = torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8)
    point[0, :, 3, 4] = 5.0
    assert train_classifiers.spread(point).item() == pytest.approx(1 / 8, rel=1e-4)
    assert train_classifiers.spread(constant).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_deterministic_and_leaves_nothing_partial(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_classifiers, "TEST_SCENES", 20)
    monkeypatch.setattr(train_robust, "TEST_SCENES", 20)
    monkeypatch.setattr(train_robust, "ATTACKED_SCENES", 2)
    monkeypatch.setattr(train_robust, "ATTACKS", {"PGD-2": ("pgd", {"steps": 2})})
    monkeypatch.setattr(train_robust, "TRAINING", {"steps": 1, "batch": 2, "attack_steps": 1})
    state = torch.get_rng_state()
    for folder in ("first", "second"):
        train_networks.main([name], tmp_path / folder, scenes=70, epochs=1, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    for suffix in ("safetensors", "md"):
        first = (tmp_path / "first" / f"{name}.{suffix}").read_bytes()
        assert first == (tmp_path / "second" / f"{name}.{suffix}").read_bytes()
    assert len(list((tmp_path / "first").iterdir())) == 2


def test_predictions_of_the_certified_network_are_proven_in_balls_that_can_be_read(unseen: Scenes) -> None:
    model = load_model(f"builtin:{CERTIFIED}")
    images, labels = unseen.images[:100], unseen.labels[:100]
    margins = worst_case_margins(model, images, labels, train_certified.EPS)
    assert (margins > 0).all(1).double().mean() >= 0.3
    radius = run("interval_bounds", model=model, images=images[:8], halvings=8, progress=False).radius
    assert (radius > 0.5 / 255).double().mean() >= 0.5


def test_training_of_the_certified_network_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_certified, "TEST_SCENES", 20)
    monkeypatch.setattr(train_certified, "FIRST_STEPS", 2)
    monkeypatch.setattr(train_certified, "TRAINING", {"steps": 1, "batch": 2, "eps": 1e-3})
    state = torch.get_rng_state()
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        train_certified.train(tmp_path / folder, scenes=20, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    for suffix in ("safetensors", "md"):
        first = (tmp_path / "first" / f"{CERTIFIED}.{suffix}").read_bytes()
        assert first == (tmp_path / "second" / f"{CERTIFIED}.{suffix}").read_bytes()


def test_predictions_of_the_lipschitz_network_are_proven_in_balls_that_can_be_read(unseen: Scenes) -> None:
    result: Any = run("lipschitz", model=f"builtin:{LIPSCHITZ}", images=unseen.images[:200], progress=False)
    is_right = result.labels == unseen.labels[:200]
    for radius, share in ((9, 0.25), (36, 0.05)):
        assert (is_right & (result.radius >= radius / 255)).double().mean() >= share


def test_training_of_the_lipschitz_network_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_lipschitz, "TEST_SCENES", 20)
    monkeypatch.setattr(train_lipschitz, "FIRST_STEPS", 2)
    monkeypatch.setattr(train_lipschitz, "TRAINING", {"steps": 1, "batch": 2, "eps": 1e-3})
    state = torch.get_rng_state()
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        train_lipschitz.train(tmp_path / folder, scenes=20, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    for suffix in ("safetensors", "md"):
        first = (tmp_path / "first" / f"{LIPSCHITZ}.{suffix}").read_bytes()
        assert first == (tmp_path / "second" / f"{LIPSCHITZ}.{suffix}").read_bytes()


def test_the_stylizer_is_written_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_fast_style, "SCENES", 4)
    monkeypatch.setattr(train_fast_style, "TRAINING", {"steps": 2, "width": 4, "blocks": 1})
    train_networks.main(["shapes-styles"], tmp_path, seed=1)
    result = load_result(tmp_path / "shapes-styles")
    assert result.labels == ("bricks", "swirls", "mosaic", "waves")
    assert result.inputs["styles"] == ("builtin:bricks", "builtin:swirls", "builtin:mosaic", "builtin:waves")
    assert "| steps | 2 |" in (tmp_path / "shapes-styles.md").read_text()


def test_the_adaptive_style_is_written_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_adaptive_style, "SCENES", 4)
    monkeypatch.setattr(train_adaptive_style, "STYLES", {"textures": 3, "scenes": 2})
    monkeypatch.setattr(train_adaptive_style, "TRAINING", {"steps": 2, "batch": 2})
    monkeypatch.setattr(train_adaptive_style, "TEST_SCENES", 1)
    state = torch.get_rng_state()
    for folder in ("first", "second"):
        train_networks.main(["shapes-adaptive"], tmp_path / folder, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    first, second = (tmp_path / folder / "shapes-adaptive" for folder in ("first", "second"))
    arrays = first / "arrays.safetensors"
    assert arrays.read_bytes() == (second / "arrays.safetensors").read_bytes()
    assert load_result(first).inputs["styles"] == "builtin:textures/3, 2 scenes of seed 2, given as an object"
    assert "| styles that are textures | 3 |" in first.with_suffix(".md").read_text()


def test_the_predicted_style_is_written_with_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_predicted_style, "SCENES", 4)
    monkeypatch.setattr(train_predicted_style, "STYLES", {"textures": 3, "scenes": 2})
    monkeypatch.setattr(train_predicted_style, "TRAINING", {"steps": 2, "batch": 2, "width": 2, "blocks": 1})
    monkeypatch.setattr(train_predicted_style, "TEST_SCENES", 1)
    train_networks.main(["shapes-predicted"], tmp_path, seed=1)
    result = load_result(tmp_path / "shapes-predicted")
    assert result.inputs["styles"] == "builtin:textures/3, 2 scenes of seed 2, given as an object"
    assert "| styles that are textures | 3 |" in (tmp_path / "shapes-predicted.md").read_text()


def test_predicted_style_matches_its_card_and_halves_the_distance_to_an_unseen_style() -> None:
    text = (WEIGHTS / "shapes-predicted.md").read_text()
    card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    arrays = (WEIGHTS / "shapes-predicted" / "arrays.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(arrays).hexdigest() and len(arrays) < 300_000
    before, after = map(float, card["distance to pebbles, before and after"].split(", "))
    assert after < 0.5 * before


def test_the_sparse_codes_are_written_with_their_card_and_explain_unseen_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unseen: Scenes
) -> None:
    card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", (WEIGHTS / "shapes-codes.md").read_text(), re.MULTILINE))
    arrays = (WEIGHTS / "shapes-codes" / "arrays.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(arrays).hexdigest() and len(arrays) < 250_000
    result: Any = run("sparse_autoencoder", dataset=unseen.images[:50], count=1, steps=0)
    assert float(result.r2) > float(card["r2"]) - 0.05
    assert float(result.l0) == pytest.approx(float(card["l0"]))
    monkeypatch.setattr(train_sparse_codes, "SCENES", 4)
    monkeypatch.setattr(train_sparse_codes, "TRAINING", {"steps": 2, "codes": 8, "k": 2, "batch": 2})
    train_networks.main(["shapes-codes"], tmp_path, seed=1)
    assert load_result(tmp_path / "shapes-codes").codes.k == 2
    assert "| steps | 2 |" in (tmp_path / "shapes-codes.md").read_text()


def test_answers_are_as_correct_as_their_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = WEIGHTS / f"{ANSWERS}.safetensors"
    card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", weights.with_suffix(".md").read_text(), re.MULTILINE))
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    scenes = draw_scenes(200, seed=0, split="test", start=50_000)
    for question, share in train_answers.accuracies(load_answers()[1], scenes).items():
        assert share > float(card[f"correct answers to {question!r}"]) - 0.04 > 0.94
    monkeypatch.setattr(train_answers, "TEST_SCENES", 2)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        train_answers.train(tmp_path / folder, scenes=8, steps=2, seed=3)
    names = [tmp_path / folder / f"{ANSWERS}.safetensors" for folder in ("first", "second")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_adaptive_style_matches_its_card_and_halves_the_distance_to_an_unseen_style() -> None:
    card = dict(
        re.findall(r"^\| (.+?) \| (.+) \|$", (WEIGHTS / "shapes-adaptive.md").read_text(), re.MULTILINE)
    )
    arrays = (WEIGHTS / "shapes-adaptive" / "arrays.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(arrays).hexdigest() and len(arrays) < 700_000
    before, after = map(float, card["distance to pebbles, before and after"].split(", "))
    assert after < 0.5 * before
    assert float(card["pixels off with alpha 0"]) < 0.1


def test_denoiser_error_and_size_match_its_card(unseen: Scenes) -> None:
    weights = WEIGHTS / "shapes-diffusion.safetensors"
    card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", weights.with_suffix(".md").read_text(), re.MULTILINE))
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    denoiser = load_denoiser()
    assert int(card["parameters"]) == sum(p.numel() for p in denoiser.parameters())
    error, untrained = (squared_error(d, unseen.images[:50], seed=1) for d in (denoiser, ShapesDenoiser()))
    assert error < 1.5 * float(card["test error of v"]) < 0.5 * untrained


def test_image_adapter_error_and_size_match_its_card(unseen: Scenes) -> None:
    """Image prompts reduce the error of the denoiser."""
    weights = WEIGHTS / "shapes-image-adapter.safetensors"
    card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", weights.with_suffix(".md").read_text(), re.MULTILINE))
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    adapter, denoiser = load_bundled_image_adapter(), load_denoiser()
    parts = (adapter.projection, adapter.keys, adapter.values)
    assert int(card["parameters"]) == sum(p.numel() for part in parts for p in part.parameters())
    images = unseen.images[:50]
    prompted, plain = (train_image_adapter.squared_error(denoiser, a, images, 1) for a in (adapter, None))
    assert prompted < 1.2 * float(card["test error of v"]) and prompted < 0.95 * plain


def test_autoencoder_error_and_size_match_its_card(unseen: Scenes) -> None:
    weights = WEIGHTS / "shapes-autoencoder.safetensors"
    card = dict(re.findall(r"^\| (.+?) \| (.+) \|$", weights.with_suffix(".md").read_text(), re.MULTILINE))
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    autoencoder = load_autoencoder()
    assert int(card["parameters"]) == sum(p.numel() for p in autoencoder.parameters())
    images = unseen.images[:100]
    with torch.no_grad():
        codes = autoencoder.encode(images)
        decoded = autoencoder.decode(codes)
    error = (decoded - images).square().mean().item()
    assert error < 1.2 * float(card["test error of pixels"]) < 0.6 * images.var(0).mean().item()
    # The codes are distributed like the prior N(0, I).
    assert codes.abs().max() < 5 and 0.5 < codes.square().mean().sqrt() < 1.1


@pytest.mark.parametrize(
    ("name", "training", "tests"),
    [
        ("shapes-diffusion", train_denoiser, 50),
        ("shapes-image-adapter", train_image_adapter, 50),
        ("shapes-autoencoder", train_autoencoder, 10),
    ],
)
def test_generators_are_trained_deterministically_and_written_with_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, training: ModuleType, tests: int
) -> None:
    for constant, value in (("TEST_SCENES", tests), ("SCENES", 4), ("STEPS", 2)):
        monkeypatch.setattr(training, constant, value)
    state = torch.get_rng_state()
    for folder in ("first", "second"):
        train_networks.main([name], tmp_path / folder, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    first, second = (tmp_path / folder / f"{name}.safetensors" for folder in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert "| training steps | 2 |" in first.with_suffix(".md").read_text()


def test_training_learns() -> None:
    """32 scenes are memorized, so the training loop minimizes the loss."""
    few = draw_scenes(32, seed=8)
    network = train_classifiers.fit("shapes-resnet", few, epochs=25, seed=0)
    assert accuracy(network, few) > 0.6


def test_failed_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")

    def torn(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="disk full"):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def test_unknown_network_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="shapes-mlp; there are shapes-vgg"):
        train_networks.main(["shapes-mlp"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
