"""Top patches: the strongest positions of a data set, ties in order, fields exact, memory bounded."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import (
    Dataset,
    InputError,
    Model,
    TensorDataset,
    load_model,
    load_result,
    max_batch,
    methods,
    receptive_fields,
    run,
)

top_patches = methods["activations.top_patches"]


def network() -> Model:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(7, 2)).double()
    for parameter in module.parameters():
        parameter.data = (parameter.data * 64).round() / 64
    return load_model(module, input_size=(3, 14, 14))


MODEL = network()


def test_oracle():
    top_patches.spec.oracle()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 100),
    count=st.integers(1, 12),
    k=st.integers(1, 6),
    per_image=st.integers(1, 4),
    batch=st.integers(1, 5),
    repeats=st.booleans(),
)
def test_streaming_equals_sorting(seed, count, k, per_image, batch, repeats):
    images = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    images = (images * 64).round() / 64  # sums are exact, so the batch size cannot break a tie by rounding
    if repeats:  # many ties
        images = images[torch.arange(count) % 2 % count]
    dataset = TensorDataset(images)
    with max_batch(batch):
        result = top_patches(MODEL, dataset, layer="3", channels=[1, 6], k=k, per_image=per_image)
    with torch.no_grad():
        maps = torch.cat([MODEL.features(i[None], "3") for i in images])
    for channel in (1, 6):
        every = []
        for n in range(count):
            candidates = [(-float(maps[n, channel, y, x]), n, y, x) for y in range(5) for x in range(5)]
            every += sorted(candidates)[:per_image]
        expected = sorted(every)[:k]
        here = [i for i, c in enumerate(result.channels) if c == channel]
        assert [result.ids[i] for i in here] == [str(n) for _, n, _, _ in expected]
        assert result.positions[here].tolist() == [[y, x] for _, _, y, x in expected]
        assert result.scores[here].tolist() == pytest.approx([-s for s, *_ in expected])


def test_patch_determines_its_units_activation():
    images = torch.rand(6, 3, 14, 14, generator=torch.Generator().manual_seed(3)).double()
    result = top_patches(MODEL, TensorDataset(images), layer="3", channels=[2], k=4)
    assert torch.equal(
        result.boxes, receptive_fields(MODEL, "3", (14, 14), [tuple(p) for p in result.positions.tolist()])
    )
    images = result.images[result.image_indices]
    rows = zip(images, result.boxes, result.positions, result.scores, strict=True)
    for image, box, position, score in rows:
        top, left, bottom, right = box.tolist()
        patch_only = torch.zeros_like(image)
        patch_only[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        y, x = position.tolist()
        with torch.no_grad():
            answer = MODEL.features(patch_only[None], "3")[0, 2, y, x]
        assert float(answer) == pytest.approx(float(score))


def test_default_is_six_channels_of_the_last_map():
    result = top_patches(MODEL, TensorDataset(torch.rand(3, 3, 14, 14)), k=2)
    assert result.layer == "3" and tuple(dict.fromkeys(result.channels)) == (0, 1, 2, 3, 4, 5)
    assert result.map_size == (5, 5)


def test_all_channels_equal_single_channels_and_images_are_stored_once():
    images = torch.rand(5, 3, 14, 14, generator=torch.Generator().manual_seed(3)).double()
    data = TensorDataset(images)
    result = top_patches(MODEL, data, layer="3", channels="all", k=4, per_image=2)
    assert result.channels == tuple(c for c in range(7) for _ in range(4))
    for channel in range(7):
        single = top_patches(MODEL, data, layer="3", channels=[channel], k=4, per_image=2)
        rows = slice(4 * channel, 4 * channel + 4)
        assert result.ids[rows] == single.ids
        for name in ("scores", "positions", "boxes"):
            torch.testing.assert_close(getattr(result, name)[rows], getattr(single, name))
    assert len(result.images) == len(set(result.ids)) <= 5
    for source, name in zip(result.image_indices.tolist(), result.ids, strict=True):
        assert torch.equal(result.images[source], images[int(name)])


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(7)))
def test_order_of_the_images_changes_only_their_ids(order):
    images = torch.rand(7, 3, 14, 14, generator=torch.Generator().manual_seed(5)).double()
    in_order = top_patches(MODEL, TensorDataset(images), layer="2", k=3)
    other = top_patches(MODEL, TensorDataset(images[order]), layer="2", k=3)
    assert tuple(str(order[int(i)]) for i in other.ids) == in_order.ids
    torch.testing.assert_close(other.scores, in_order.scores)
    assert torch.equal(other.boxes, in_order.boxes)


def test_figure_of_many_channels_has_a_strip_per_channel(tmp_path):
    many = list(range(13))
    result = run("top_patches", dataset="builtin:scenes/4", channels=many, k=2, out=tmp_path / "out")
    rows, count = result.rows(), len(set(result.channels))
    assert count > 12 and sum(map(len, rows)) == count and len(rows[0]) > 1
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == count == len(result.lines())


def test_channels_out_of_range_are_refused_before_reading():
    class Unread(Dataset):
        def __len__(self) -> int:
            return 3

        def read(self, indices: Sequence[int]) -> Tensor:
            raise AssertionError("read before the parameters were checked")

    with pytest.raises(InputError, match="has 7 channels, so there is no number 7"):
        top_patches(MODEL, Unread(), layer="3", channels=[7])


def test_data_set_is_read_in_batches():
    class Endless(Dataset):
        longest = 0

        def __len__(self) -> int:
            return 40

        def read(self, indices: Sequence[int]) -> Tensor:
            self.longest = max(self.longest, len(indices))
            return torch.stack([torch.full((3, 14, 14), i / 40) for i in indices])

        def id(self, index: int) -> str:
            return f"picture {index}"

    dataset = Endless()
    with max_batch(5):
        result = top_patches(MODEL, dataset, layer="3", channels=[0], k=3)
    assert dataset.longest == 5 and all(name.startswith("picture ") for name in result.ids)


def test_figure_shows_patches_in_their_images_and_saving(tmp_path):
    result = run(
        "top_patches", dataset="builtin:scenes/24", layer="features.8", k=3, out=tmp_path / "patches"
    )
    assert len(result.panels()) == 12  # for six channels: the patches, and the images they are in
    assert torch.equal(load_result(tmp_path / "patches").boxes, result.boxes)
    pooled = run("top_patches", dataset="builtin:scenes/8", layer="pool", k=2, channels=[3])
    assert pooled.boxes.tolist() == [[0, 0, 64, 64]] * 2 and len(pooled.panels()) == 2
