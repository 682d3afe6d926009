"""One perturbation for all: in its ball, fooling pictures it never saw, resumed where it was cut off."""

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


def pictures(count: int = 12) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["deepfool", "pgd"])
def test_perturbation_is_in_its_ball_and_the_rates_are_true(norm: str, attack: str) -> None:
    model, data = network(), pictures()
    eps = {"linf": 0.1, "l2": 1.0}[norm]
    found = universal(model, TensorDataset(data), attack=attack, eps=eps, norm=norm)
    v = found.perturbation
    assert float(v.abs().max() if norm == "linf" else v.norm()) <= eps * (1 + 1e-12)
    fooled = model((data + v).clamp(0, 1)).argmax(1) != model(data).argmax(1)
    assert found.fooling_rate == pytest.approx(float(fooled[:9].double().mean()))
    assert found.held_out_rate == pytest.approx(float(fooled[9:].double().mean()))
    assert found.fooling_rate > 0.3 or attack == "pgd"
    torch.testing.assert_close(found.images, data[9:])
    torch.testing.assert_close(found.adversarial, (data[9:] + v).clamp(0, 1))


def test_it_carries_over_better_than_noise_of_the_same_size() -> None:
    model, data = network(), pictures(60)
    found = universal(model, TensorDataset(data), eps=0.1)
    noise = 0.1 * torch.randn(found.perturbation.shape, generator=torch.Generator().manual_seed(0)).sign()
    fooled = model((data + noise).clamp(0, 1)).argmax(1) != model(data).argmax(1)
    assert found.held_out_rate > 2 * float(fooled.double().mean())


@pytest.mark.parametrize("attack", ["deepfool", "pgd", "carlini_wagner"])
def test_model_that_always_says_the_same_ends_the_search_with_nothing_fooled(attack: str) -> None:
    model = network()
    model.module[3].weight.data.zero_()
    found = universal(model, TensorDataset(pictures(4)), attack=attack, epochs=2, steps=3)
    assert found.fooling_rate == found.held_out_rate == 0
    assert found.perturbation.isfinite().all()


def test_constant_on_all_logits_changes_nothing() -> None:
    model, data = network(), TensorDataset(pictures())
    plain = universal(model, data, eps=0.1).perturbation
    model.module[3].bias.data += 100
    torch.testing.assert_close(universal(model, data, eps=0.1).perturbation, plain, rtol=0, atol=1e-8)


def test_how_many_go_through_at_once_does_not_matter() -> None:
    model, data = network(), TensorDataset(pictures())
    whole = universal(model, data, eps=0.1)
    with max_batch(2):
        parts = universal(model, data, eps=0.1)
    torch.testing.assert_close(whole.perturbation, parts.perturbation)
    assert whole.held_out_rate == parts.held_out_rate


def test_cut_off_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    # Three rounds for the six pictures that are not held out.
    rounds = {"target_rate": 1.0, "epochs": 2, "steps": 2, "batch": 2}
    told = {"model": "builtin:shapes-vgg", "dataset": "builtin:scenes/8", **rounds}
    whole = run("universal", **told)

    def of_pictures(events: list[int], most: int) -> Callable[[ProgressEvent], None]:
        def see(event: ProgressEvent) -> None:
            if event.description == "universal perturbation":
                events.append(event.done)
                if len(events) == most:
                    raise KeyboardInterrupt

        return see

    first: list[int] = []
    again: list[int] = []
    with pytest.raises(KeyboardInterrupt), report_progress(of_pictures(first, 4)):
        run("universal", **told, out=tmp_path / "v")
    with report_progress(of_pictures(again, 100)):
        resumed = run("universal", **told, out=tmp_path / "v")
    assert torch.equal(resumed.perturbation, whole.perturbation)
    assert len(first) + len(again) <= 2 * 3 + 1


def test_enough_is_enough() -> None:
    model, data = network(), TensorDataset(pictures())
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        found = universal(model, data, eps=0.5, target_rate=0.3, epochs=100, batch=2)
    assert found.fooling_rate >= 0.3
    assert 0 < len(events) < 100 * 5 / 2


def test_one_count_is_told_and_none_of_the_inner_attack() -> None:
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        universal(network(), TensorDataset(pictures()), epochs=1, batch=4)
    assert [(e.description, e.done, e.total) for e in events] == [
        ("universal perturbation", done, 3) for done in (1, 2, 3)
    ]


def test_one_picture_at_a_time_is_the_algorithm_of_the_paper() -> None:
    model, data, deepfool = network(), pictures(), methods["attacks.deepfool"]
    said, v = model(data).argmax(1), torch.zeros_like(data[0])
    for image, label in zip(data, said, strict=True):
        point = (image + v).clamp(0, 1)[None]
        v = (v + (deepfool(model, point, label[None], norm="linf", steps=10).adversarial - point)[0]).clamp(
            -0.1, 0.1
        )
    found = universal(model, TensorDataset(data), eps=0.1, epochs=1, held_out=0, batch=1)
    torch.testing.assert_close(found.perturbation, v.detach())


def test_attack_that_cannot_be_an_inner_one_is_refused() -> None:
    model, data = network(), TensorDataset(pictures())
    with pytest.raises(InputError, match="the inner attack takes a model, images and labels"):
        universal(model, data, attack="saliency")
    with pytest.raises(UnknownName):
        universal(model, data, attack="deepfol")
