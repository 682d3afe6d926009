"""Channel redundancy: numpy's correlation and scipy's clusters from streamed sums, in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phosphene import TensorDataset, load_model, load_result, max_batch, methods, run
from phosphene.testing.observation import assert_same_result

channel_redundancy = methods["activations.channel_redundancy"]

torch.manual_seed(0)
LAYERS = nn.Sequential(
    nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
).double()
with torch.no_grad():  # four kinds of channels, each three times with some noise
    LAYERS[0].weight.copy_(LAYERS[0].weight[torch.arange(12) % 4] + 0.03 * torch.randn(12, 3, 3, 3))
MODEL = load_model(LAYERS, input_size=(3, 11, 11))
IMAGES = torch.rand(9, 3, 11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_oracle():
    channel_redundancy.spec.oracle()


@pytest.mark.parametrize("layer", ["1", "4"])
def test_streamed_similarities_equal_numpys(layer):
    with torch.no_grad():
        answers = MODEL.features(IMAGES, layer).transpose(0, 1).flatten(1)
    with max_batch(4):
        result = channel_redundancy(MODEL, TensorDataset(IMAGES), layer=layer)
        cosine = channel_redundancy(MODEL, TensorDataset(IMAGES), layer=layer, measure="cosine")
    alive = (answers.std(1) > 0).nonzero()[:, 0]
    expected = torch.eye(len(answers)).double()
    expected[alive[:, None], alive] = torch.corrcoef(answers[alive])
    torch.testing.assert_close(result.similarity, expected, rtol=0, atol=1e-9)
    unit = nn.functional.normalize(answers)
    expected = (unit @ unit.T).fill_diagonal_(1)
    torch.testing.assert_close(cosine.similarity, expected, rtol=0, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(9)), batch=st.integers(1, 9), threshold=st.floats(0.05, 1))
def test_groups_reach_the_threshold_and_do_not_depend_on_the_order(order, batch, threshold):
    complete = channel_redundancy(MODEL, TensorDataset(IMAGES), layer="0", threshold=threshold)
    with max_batch(batch):
        parts = channel_redundancy(MODEL, TensorDataset(IMAGES[order]), layer="0", threshold=threshold)
    torch.testing.assert_close(parts.similarity, complete.similarity)
    assert parts.groups == complete.groups and parts.order == complete.order
    assert torch.equal(parts.pairs, complete.pairs)
    for group in complete.groups:
        assert float(complete.similarity[list(group)][:, list(group)].min()) >= threshold - 1e-9
        positions = sorted(complete.order.index(channel) for channel in group)
        assert positions == list(range(positions[0], positions[0] + len(group)))
    assert len({c for group in complete.groups for c in group}) == sum(map(len, complete.groups))
    values = complete.similarity[complete.pairs[:, 0], complete.pairs[:, 1]]
    assert bool((values >= threshold).all()) and values.tolist() == sorted(values.tolist(), reverse=True)
    assert len(complete.pairs) == int((complete.similarity.triu(1) >= threshold).sum())


def test_dead_channel_is_similar_to_no_other():
    conv = nn.Conv2d(3, 4, 1).double()
    nn.init.zeros_(conv.weight[:2])
    layers = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    result = channel_redundancy(load_model(layers), TensorDataset(IMAGES), layer="0")
    assert torch.equal(result.similarity[:2], torch.eye(4).double()[:2])


def test_groups_are_displayed_on_the_image_of_largest_activation():
    result = channel_redundancy(MODEL, TensorDataset(IMAGES), layer="1", threshold=0.5)
    assert len(result.groups) > 2
    with torch.no_grad():
        maps = MODEL.features(IMAGES, "1")
    for image, group_maps, group in zip(result.images, result.maps, result.groups, strict=False):
        best = int(maps[:, group[0]].amax((1, 2)).argmax())
        assert torch.equal(image, IMAGES[best])
        members = list(group[: len(group_maps)])
        torch.testing.assert_close(group_maps[: len(members)], maps[best, members])
        assert not group_maps[len(members) :].any()


def test_figure_and_saving(tmp_path):
    arguments = {"dataset": "builtin:scenes/8", "layer": "features.11"}
    result = run("channel_redundancy", **arguments, threshold=0.7, out=tmp_path / "out")
    assert len(result.groups) > 1 and len(result.panels()) > 1 and result.figure() is not None
    assert_same_result(load_result(tmp_path / "out"), result)
    ungrouped = run("channel_redundancy", **arguments, threshold=1)
    assert ungrouped.groups == () and ungrouped.images is None and ungrouped.figure() is not None
