"""Efros-Leung: the textbook's pixels, periodic textures that go on, sizes, seeds, samples of any kind."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch
from tests import textbook_textures
from torch import Tensor

from phosphene import InputError, methods, replay, report_progress, run
from phosphene.builtin.textures import load_texture
from phosphene.images import write_png
from phosphene.progress import ProgressEvent
from phosphene_plugins.textures.efros_leung import frontier, waves

efros_leung = methods["textures.efros_leung"]


@pytest.fixture(scope="module")
def bricks() -> Tensor:
    return load_texture("bricks")[None, :, :18, :20]


def tiled(period: tuple[int, int], height: int, width: int, channels: int = 3) -> Tensor:
    tile = torch.rand(1, channels, *period, generator=torch.Generator().manual_seed(5))
    return tile[..., torch.arange(height)[:, None] % period[0], torch.arange(width) % period[1]]


def colours(images: Tensor) -> set[tuple[float, ...]]:
    return {tuple(colour) for colour in images.movedim(1, -1).flatten(0, -2).tolist()}


@pytest.mark.parametrize("start", ["patch", "sample"])
@pytest.mark.parametrize("order", ["exact", "ring"])
def test_the_pixels_are_those_of_the_textbook(bricks: Tensor, order: str, start: str) -> None:
    made = efros_leung(bricks, size=(22, 23), window=7, order=order, start=start, seed=3).images[0]
    textbook = textbook_textures.efros_leung(
        bricks[0], 22, 23, window=7, seed=3, ring=order == "ring", whole=start == "sample"
    )
    assert torch.equal(made.double(), deque(textbook, maxlen=1)[0])


def test_matches_worse_than_the_most_allowed_wait_until_more_is_allowed() -> None:
    """Noise has hardly a match as good as this, so most rings are gone over again."""
    noise = torch.rand(1, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    textbook = textbook_textures.efros_leung(noise[0], 10, 9, window=5, seed=1, max_error=0.02)
    wanted = deque(textbook, maxlen=1)[0]
    made = efros_leung(noise, size=(10, 9), window=5, max_error=0.02, seed=1)
    assert torch.equal(made.images[0].double(), wanted)
    assert not torch.equal(made.images, efros_leung(noise, size=(10, 9), window=5, seed=1).images)


@pytest.mark.parametrize("order", ["exact", "ring"])
@pytest.mark.parametrize(("period", "window"), [((3, 4), 9), ((1, 5), 11), ((6, 2), 13)])
def test_a_periodic_texture_goes_on_exactly(order: str, period: tuple[int, int], window: int) -> None:
    whole = tiled(period, 40, 44)
    top, left = 6 * (period[0] * 2) % 13, 7
    sample = whole[..., top : top + 20, left : left + 18]
    made = efros_leung(
        sample, size=(30, 34), window=window, start="sample", order=order, error_threshold=0, seed=2
    ).images
    y, x = top - 5 + torch.arange(30), left - 8 + torch.arange(34)
    wanted = whole[..., (y % period[0])[:, None], x % period[1]]
    assert torch.equal(made, wanted)


def test_waves_are_the_list_cut_where_pixels_see_each_other() -> None:
    known = torch.zeros(30, 24, dtype=torch.bool)
    known[10:20, 8:15] = True
    pixels = frontier(known, torch.Generator().manual_seed(0))
    batches = waves(pixels, known, 7)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(pixels)))
    turn = {place: number for number, batch in enumerate(batches) for place in batch.tolist()}
    for later in range(len(pixels)):
        for earlier in range(later):
            if (pixels[later] - pixels[earlier]).abs().max() <= 3:
                assert turn[earlier] < turn[later]
    assert len(batches) < len(pixels) / 2


def test_the_frontier_has_those_with_most_known_neighbours_first() -> None:
    known = torch.zeros(6, 6, dtype=torch.bool)
    known[2:4, 2:4] = True
    known[1, 1] = True
    pixels = [tuple(p) for p in frontier(known, torch.Generator().manual_seed(0)).tolist()]
    assert set(pixels[:2]) == {(1, 2), (2, 1)}
    assert set(pixels[-7:]) >= {(0, 0), (0, 1), (1, 0), (4, 4)}
    assert len(pixels) == len(set(pixels)) == 16


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_pixel_is_one_of_the_sample(channels: int) -> None:
    sample = torch.rand(1, channels, 12, 9, generator=torch.Generator().manual_seed(0))
    made = efros_leung(sample, size=(15, 8), window=5, seed=0)
    assert made.images.shape == (1, channels, 15, 8)
    assert colours(made.images) <= colours(sample)
    assert made.scores.shape == (0, 1)
    assert made.images.dtype == sample.dtype


def test_the_sample_stays_where_it_is_gone_on_with(bricks: Tensor) -> None:
    made = efros_leung(bricks, size=(25, 20), window=5, start="sample", order="ring", seed=0).images
    assert torch.equal(made[:, :, 3:21], bricks)


def test_an_error_threshold_lets_more_in(bricks: Tensor) -> None:
    strict, loose = (
        efros_leung(bricks, window=5, order="ring", error_threshold=t, seed=0).images for t in (0.0, 5.0)
    )
    assert not torch.equal(strict, loose)


def test_a_batch_gives_what_its_samples_give_alone(bricks: Tensor) -> None:
    samples = torch.cat([bricks, load_texture("pebbles")[None, :, :18, :20]])
    together = efros_leung(samples, window=5, order="ring", seed=4)
    for n in range(2):
        alone = efros_leung(samples[n : n + 1], window=5, order="ring", seed=4)
        assert torch.equal(together.images[n : n + 1], alone.images)


def test_it_tells_every_pixel(bricks: Tensor) -> None:
    told: list[ProgressEvent] = []
    with report_progress(told.append):
        efros_leung(bricks, size=9, window=5, seed=0)
    assert [event.done for event in told] == list(range(1, 81 - 9 + 1))
    assert {event.total for event in told} == {72}


def test_it_runs_without_a_model_and_replays(tmp_path: Path) -> None:
    write_png(load_texture("mosaic")[:, :30, :34], tmp_path / "sample.png")
    made = run("efros_leung", sample=tmp_path / "sample.png", size=16, window=5, out=tmp_path / "made")
    assert made.provenance is not None
    assert made.provenance.model is None
    assert replay(tmp_path / "made").same


@pytest.mark.parametrize("window", [4, 21])
def test_windows_that_do_not_fit_are_refused(bricks: Tensor, window: int) -> None:
    with pytest.raises(InputError, match="odd and fit into the sample of 18 x 20"):
        efros_leung(bricks, window=window)


@pytest.mark.parametrize("size", [None, (18, 20), (17, 40)])
def test_going_on_needs_room(bricks: Tensor, size: tuple[int, int] | None) -> None:
    with pytest.raises(InputError, match="larger"):
        efros_leung(bricks, size=size, window=5, start="sample")


def test_what_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(InputError, match="4 GiB"):
        efros_leung(torch.zeros(1, 3, 1000, 1500), window=21)
