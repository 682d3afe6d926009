"""Universal perturbation: ball, fooling rates on held-out images, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, Model, TensorDataset, UnknownName, load_model, max_batch, methods, run
from phosphene.progress import ProgressEvent, report_progress

universal = methods["attacks.universal"]


def network() -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    return load_model(module, input_size=(3, 8, 8))


def random_images(count: int = 12) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["deepfool", "pgd"])
def test_perturbation_is_in_its_ball_and_rates_equal_the_predictions(norm: str, attack: str) -> None:
    model, data = network(), random_images()
    eps = {"linf": 0.1, "l2": 1.0}[norm]
    result = universal(model, TensorDataset(data), attack=attack, eps=eps, norm=norm)
    v = result.perturbation
    assert float(v.abs().max() if norm == "linf" else v.norm()) <= eps * (1 + 1e-12)
    fooled = model((data + v).clamp(0, 1)).argmax(1) != model(data).argmax(1)
    assert result.fooling_rate == pytest.approx(float(fooled[:9].double().mean()))
    assert result.held_out_rate == pytest.approx(float(fooled[9:].double().mean()))
    assert result.fooling_rate > 0.3 or attack == "pgd"
    torch.testing.assert_close(result.images, data[9:])
    torch.testing.assert_close(result.adversarial, (data[9:] + v).clamp(0, 1))


def test_fools_more_held_out_images_than_noise_of_the_same_size() -> None:
    model, data = network(), random_images(60)
    result = universal(model, TensorDataset(data), eps=0.1)
    noise = 0.1 * torch.randn(result.perturbation.shape, generator=torch.Generator().manual_seed(0)).sign()
    fooled = model((data + noise).clamp(0, 1)).argmax(1) != model(data).argmax(1)
    assert result.held_out_rate > 2 * float(fooled.double().mean())


@pytest.mark.parametrize("attack", ["deepfool", "pgd", "carlini_wagner"])
def test_constant_prediction_ends_without_success(attack: str) -> None:
    model = network()
    model.module[3].weight.data.zero_()
    result = universal(model, TensorDataset(random_images(4)), attack=attack, epochs=2, steps=3)
    assert result.fooling_rate == result.held_out_rate == 0
    assert result.perturbation.isfinite().all()


def test_constant_added_to_the_logits_does_not_matter() -> None:
    model, data = network(), TensorDataset(random_images())
    plain = universal(model, data, eps=0.1).perturbation
    model.module[3].bias.data += 100
    torch.testing.assert_close(universal(model, data, eps=0.1).perturbation, plain, rtol=0, atol=1e-8)


def test_batch_size_does_not_matter() -> None:
    model, data = network(), TensorDataset(random_images())
    complete = universal(model, data, eps=0.1)
    with max_batch(2):
        parts = universal(model, data, eps=0.1)
    torch.testing.assert_close(complete.perturbation, parts.perturbation)
    assert complete.held_out_rate == parts.held_out_rate


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    # Three batches of the six training images.
    rounds = {"target_rate": 1.0, "epochs": 2, "steps": 2, "batch": 2}
    params = {"model": "builtin:shapes-vgg", "dataset": "builtin:scenes/8", **rounds}
    complete = run("universal", **params)

    def count_events(events: list[int], limit: int) -> Callable[[ProgressEvent], None]:
        def on_event(event: ProgressEvent) -> None:
            if event.description == "universal perturbation":
                events.append(event.done)
                if len(events) == limit:
                    raise KeyboardInterrupt

        return on_event

    first: list[int] = []
    again: list[int] = []
    with pytest.raises(KeyboardInterrupt), report_progress(count_events(first, 4)):
        run("universal", **params, out=tmp_path / "v")
    with report_progress(count_events(again, 100)):
        resumed = run("universal", **params, out=tmp_path / "v")
    assert torch.equal(resumed.perturbation, complete.perturbation)
    assert len(first) + len(again) <= 2 * 3 + 1


def test_stops_at_the_target_rate() -> None:
    model, data = network(), TensorDataset(random_images())
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        result = universal(model, data, eps=0.5, target_rate=0.3, epochs=100, batch=2)
    assert result.fooling_rate >= 0.3
    assert 0 < len(events) < 100 * 5 / 2


def test_progress_of_the_loop_and_of_predictions_but_not_of_the_inner_attack() -> None:
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        universal(network(), TensorDataset(random_images()), epochs=2, batch=4, target_rate=1.0)
    predictions = ("predictions", 1, 1)
    assert [(e.description, e.done, e.total) for e in events] == [
        predictions, *(("universal perturbation", done, 6) for done in range(1, 7)), predictions
    ]  # fmt: skip


def test_batch_of_one_equals_the_algorithm_of_the_paper() -> None:
    model, data, deepfool = network(), random_images(), methods["attacks.deepfool"]
    predictions, v = model(data).argmax(1), torch.zeros_like(data[0])
    for image, label in zip(data, predictions, strict=True):
        point = (image + v).clamp(0, 1)[None]
        v = (v + (deepfool(model, point, label[None], norm="linf", steps=10).adversarial - point)[0]).clamp(
            -0.1, 0.1
        )
    result = universal(model, TensorDataset(data), eps=0.1, epochs=1, held_out=0, batch=1)
    torch.testing.assert_close(result.perturbation, v.detach())


def test_unsuitable_inner_attack_raises() -> None:
    model, data = network(), TensorDataset(random_images())
    with pytest.raises(InputError, match="the inner attack takes a model, images and labels"):
        universal(model, data, attack="saliency")
    with pytest.raises(UnknownName):
        universal(model, data, attack="deepfol")
