"""Top patches: the strongest places of a whole data set, ties in order, fields exact, memory bounded."""

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
    return load_model(nn.Sequential(*layers, nn.Flatten(), nn.Linear(7, 2)).double(), input_size=(3, 14, 14))


MODEL = network()


def test_its_oracle_holds():
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
def test_streaming_finds_what_sorting_everything_finds(seed, count, k, per_image, batch, repeats):
    images = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if repeats:  # many ties
        images = images[torch.arange(count) % 2 % count]
    dataset = TensorDataset(images)
    with max_batch(batch):
        found = top_patches(MODEL, dataset, layer="3", channels=[1, 6], k=k, per_image=per_image)
    with torch.no_grad():
        maps = torch.cat([MODEL.features(i[None], "3") for i in images])
    for channel in (1, 6):
        every = []
        for n in range(count):
            places = [(-float(maps[n, channel, y, x]), n, y, x) for y in range(5) for x in range(5)]
            every += sorted(places)[:per_image]
        expected = sorted(every)[:k]
        here = [i for i, c in enumerate(found.channels) if c == channel]
        assert [found.ids[i] for i in here] == [str(n) for _, n, _, _ in expected]
        assert found.places[here].tolist() == [[y, x] for _, _, y, x in expected]
        assert found.scores[here].tolist() == pytest.approx([-s for s, *_ in expected])


def test_a_patch_is_all_its_unit_sees():
    images = torch.rand(6, 3, 14, 14, generator=torch.Generator().manual_seed(3)).double()
    found = top_patches(MODEL, TensorDataset(images), layer="3", channels=[2], k=4)
    assert torch.equal(
        found.boxes, receptive_fields(MODEL, "3", (14, 14), [tuple(p) for p in found.places.tolist()])
    )
    for image, box, place, score in zip(found.images, found.boxes, found.places, found.scores, strict=True):
        top, left, bottom, right = box.tolist()
        alone = torch.zeros_like(image)
        alone[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        y, x = place.tolist()
        with torch.no_grad():
            answer = MODEL.features(alone[None], "3")[0, 2, y, x]
        assert float(answer) == pytest.approx(float(score))


def test_by_default_it_reads_the_last_map_at_six_channels():
    found = top_patches(MODEL, TensorDataset(torch.rand(3, 3, 14, 14)), k=2)
    assert found.layer == "3" and tuple(dict.fromkeys(found.channels)) == (0, 1, 2, 3, 4, 5)
    assert found.grid == (5, 5)


def test_channels_that_are_not_there_are_refused_before_anything_is_read():
    class Unread(Dataset):
        def __len__(self) -> int:
            return 3

        def read(self, indices: Sequence[int]) -> Tensor:
            raise AssertionError("read before the parameters were checked")

    with pytest.raises(InputError, match="has 7 channels, so there is no number 7"):
        top_patches(MODEL, Unread(), layer="3", channels=[7])


def test_never_more_than_a_batch_and_the_best_are_held():
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
        found = top_patches(MODEL, dataset, layer="3", channels=[0], k=3)
    assert dataset.longest == 5 and all(name.startswith("picture ") for name in found.ids)


def test_it_draws_patches_where_they_were_and_round_trips(tmp_path):
    found = run("top_patches", dataset="builtin:scenes/24", layer="features.8", k=3, out=tmp_path / "patches")
    assert len(found.panels()) == 12  # for six channels: the patches, and where they were
    assert torch.equal(load_result(tmp_path / "patches").boxes, found.boxes)
    whole = run("top_patches", dataset="builtin:scenes/8", layer="pool", k=2, channels=[3])
    assert whole.boxes.tolist() == [[0, 0, 64, 64]] * 2 and len(whole.panels()) == 2
