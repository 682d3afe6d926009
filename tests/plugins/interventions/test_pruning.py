"""Accuracy without channels: by criterion, of layers of every layout, and what is refused."""

import pytest
import torch

from phosphene import InputError, TensorDataset, run
from phosphene.testing.networks import make_network


def labeled(count: int) -> TensorDataset:
    images = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, [str(n % 3) for n in range(count)])


@pytest.mark.parametrize(
    ("name", "layer", "channels"),
    [("tokens", "blocks.0", 12), ("nhwc", "norm", 8), ("nhwc", "grow", 16), ("functional", "relu", 12)],
)
def test_channels_of_tokens_and_channels_last_maps(name, layer, channels):
    """The accuracy without a share is that of a network whose layer outputs zeros in these channels."""
    model, data = make_network(name), labeled(9)
    options = {"layer": layer, "steps": 2, "repeats": 1, "seed": 0}
    result = run("prune_and_measure", model=model, dataset=data, **options)
    assert len(result.order) == channels and result.counts == (0, channels // 2, channels)
    cut = list(result.order[: channels // 2])

    def zero(output):
        (output if output.ndim == 3 or name == "nhwc" else output.movedim(1, -1))[..., cut] = 0
        return output

    numbers = torch.tensor([int(label) for label in data.classes])
    with torch.no_grad(), model.guard(), model.tap(layer, replace=zero):
        accuracy = float((model(data.images).argmax(1) == numbers).double().mean())
    assert float(result.accuracy[1]) == pytest.approx(accuracy, abs=1e-6)


def test_redundant_channels_are_needed_less_than_random_ones():
    options = {"dataset": "builtin:scenes/40", "layer": "features.11", "steps": 5, "repeats": 1, "seed": 0}
    result = run("prune_and_measure", **options, criterion="redundant")
    assert float(result.accuracy[0]) > 0.9 and float(result.accuracy[-1]) < 0.3
    assert float(result.accuracy[:3].sum()) >= float(result.random_accuracy.mean(0)[:3].sum())
    assert result.removable(1.0) == result.order and set(result.order) == set(range(96))
    assert result.ranks.tolist() == sorted(result.ranks.tolist(), reverse=True)


def test_a_data_set_without_classes_is_refused():
    with pytest.raises(InputError, match="no classes"):
        run("prune_and_measure", dataset=torch.rand(3, 3, 64, 64))
