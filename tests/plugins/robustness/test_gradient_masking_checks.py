"""Each kind of gradient masking is detected by its checks, and plain models pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model, load_result, max_batch, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.optimize import straight_through

checks = methods["robustness.gradient_masking_checks"]
SCENES = draw_scenes(4, seed=3, split="test")
FAST = {"eps": 4 / 255, "steps": 4, "max_queries": 20, "seed": 0}


def small() -> Model:
    """A network of a few thousand parameters."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    return load_model(module, input_size=(3, 8, 8), dtype=torch.float64)


def resnet() -> Model:
    return load_model("builtin:shapes-resnet")


def rounded() -> Model:
    return resnet().defended(lambda x: (7 * x).round() / 7, "rounded")


def large_logits() -> Model:
    model = resnet().copy()
    with torch.no_grad():
        model.module.fc.weight.mul_(1000), model.module.fc.bias.mul_(1000)
    return model


def noisy() -> Model:
    return resnet().defended(lambda x: x + 0.05 * torch.randn_like(x), "noise")


def wrong_gradient() -> Model:
    def mirrored(images: Tensor) -> Tensor:
        return straight_through(images, lambda x: x, lambda x: x.flip(3))

    return resnet().defended(mirrored, "wrong_gradient")


def verdicts_of(model: Model, **params: Any) -> dict[str, str]:
    result = checks(model, SCENES.images, SCENES.labels, **{**FAST, **params})
    assert result.masked == ("suspicious" in result.verdicts)
    return {check.name: check.verdict for check in result.checks}


@pytest.mark.parametrize("uri", ["builtin:shapes-resnet", "defended:bit_depth(bits=3)|builtin:shapes-resnet"])
def test_plain_model_and_defense_with_its_own_gradient_pass(uri: str) -> None:
    verdicts = verdicts_of(load_model(uri))
    assert verdicts.pop("white box beats transfer") == "inconclusive"  # no other model to compare with
    assert set(verdicts.values()) == {"pass"}, verdicts


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (rounded, {"gradient exists", "more steps help", "unbounded attack succeeds"}),
        (
            large_logits,
            {"gradient exists", "loss not saturated", "more steps help", "unbounded attack succeeds"},
        ),
        (noisy, {"deterministic"}),
        (wrong_gradient, {"gradient ascends"}),
    ],
)
def test_each_kind_of_masking_is_detected_by_its_checks(build: Any, expected: set[str]) -> None:
    verdicts = verdicts_of(build())
    assert {name for name, verdict in verdicts.items() if verdict == "suspicious"} == expected, verdicts


def test_black_box_beats_a_masked_gradient() -> None:
    # Two pixels: with one of them turned the classes change, and rounding hides which way.
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    plain = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 1, 2))
    images = torch.rand(12, 1, 1, 2, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    labels = torch.zeros(12, dtype=torch.int64)
    params = {**FAST, "eps": 0.5, "max_queries": 60}
    masked = checks(plain.defended(lambda x: (20 * x).round() / 20, "rounded"), images, labels, **params)
    by_name = {check.name: check for check in masked.checks}
    assert by_name["white box beats black box"].verdict == "suspicious"
    assert by_name["white box beats black box"].numbers["white box"] == 0
    honest = checks(plain, images, labels, **params)
    assert not honest.masked


def test_transfer_beats_a_masked_gradient() -> None:
    verdicts = verdicts_of(rounded(), models=["builtin:shapes-resnet"], eps=12 / 255, max_queries=2)
    assert verdicts["white box beats transfer"] == "suspicious"


def test_success_by_steps_equals_bim_with_early_stopping() -> None:
    model, steps = resnet(), FAST["steps"]
    result = checks(model, SCENES.images, SCENES.labels, **FAST)
    right = model(SCENES.images).argmax(1) == SCENES.labels
    x, y = SCENES.images[right], SCENES.labels[right]
    fooled = torch.zeros_like(y, dtype=torch.bool)
    for count in range(1, steps + 1):
        attack = {"eps": result.eps, "step_size": 2.5 * result.eps / steps}
        fooled |= methods["bim"](model, x, y, steps=count, **attack).success
        assert result.success_by_steps[count] == pytest.approx(float(fooled.double().mean()))
    assert result.success_by_steps[0] == 0
    assert result.success_by_eps[result.radii.index(result.eps)] == result.success_by_steps[-1]
    assert result.radii == (*(part * result.eps for part in (0.25, 0.5, 1, 2, 4)), 1)


def test_rates_are_over_correctly_classified_images_in_any_batches() -> None:
    model = small()
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    predicted = model(images).argmax(1)
    labels = torch.cat([predicted[:4], (predicted[4:] + 1) % 4])
    mixed = checks(model, images, labels, **FAST)
    part = checks(model, images[:4], predicted[:4], **FAST)
    assert mixed.reasons == part.reasons and torch.equal(mixed.success_by_eps, part.success_by_eps)
    with max_batch(2):
        assert checks(model, images, labels, **FAST).verdicts == mixed.verdicts
    with pytest.raises(InputError, match="classifies none of the images as its label"):
        checks(model, images, (predicted + 1) % 4, **FAST)


def test_nan_gradients_are_detected() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.mean((1, 2, 3)), 1 - x.amin((1, 2, 3)).sqrt()], 1)

    model = load_model(Root(), input_size=(1, 2, 2))
    result = checks(model, torch.zeros(3, 1, 2, 2), [1, 1, 1], **FAST)
    (check_result,) = (check for check in result.checks if check.name == "gradient exists")
    assert check_result.verdict == "suspicious" and "NaN or infinite on 100%" in check_result.reason


def test_models_without_gradients_are_refused() -> None:
    def labels(images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) > 0.5).long()

    with pytest.raises(ModelError, match="returns labels alone|lets no gradient"):
        checks(load_model(labels, input_size=(3, 4, 4), classes=["a", "b"]), torch.rand(2, 3, 4, 4), [0, 0])
    cut = resnet().defended(lambda x: x.detach(), "detached")
    with pytest.raises(ModelError, match="no gradient flows .* square and hop_skip_jump need none"):
        verdicts_of(cut)


def test_result_loads_unchanged_and_draws(tmp_path: Path) -> None:
    model = small()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = checks(model, images, model(images).argmax(1), **FAST)
    loaded = load_result(result.save(tmp_path / "checks"))
    assert loaded.checks == result.checks and loaded.masked == result.masked  # type: ignore[attr-defined]
    assert loaded.lines() == result.lines() and len(result.lines()) == 9
    assert torch.equal(loaded.success_by_eps, result.success_by_eps) and loaded.png()  # type: ignore[attr-defined]
