"""Efros-Leung: against a reference implementation, periodic textures, sizes, seeds and types of samples."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phosphene import InputError, methods, replay, report_progress, run
from phosphene.builtin.textures import load_texture
from phosphene.images import write_png
from phosphene.progress import ProgressEvent
from phosphene_plugins.textures import _textbook_textures as textbook_textures
from phosphene_plugins.textures.efros_leung import boundary_pixels, independent_batches

efros_leung = methods["textures.efros_leung"]


@pytest.fixture(scope="module")
def bricks() -> Tensor:
    return load_texture("bricks")[None, :, :18, :20]


def tiled(period: tuple[int, int], height: int, width: int, channels: int = 3) -> Tensor:
    tile = torch.rand(1, channels, *period, generator=torch.Generator().manual_seed(5))
    return tile[..., torch.arange(height)[:, None] % period[0], torch.arange(width) % period[1]]


def colors(images: Tensor) -> set[tuple[float, ...]]:
    return {tuple(color) for color in images.movedim(1, -1).flatten(0, -2).tolist()}


@pytest.mark.parametrize("start", ["patch", "sample"])
@pytest.mark.parametrize("order", ["exact", "ring"])
def test_pixels_equal_the_reference(bricks: Tensor, order: str, start: str) -> None:
    result = efros_leung(bricks, size=(22, 23), window=7, order=order, start=start, seed=3).images[0]
    reference = textbook_textures.efros_leung(
        bricks[0], 22, 23, window=7, seed=3, ring=order == "ring", from_sample=start == "sample"
    )
    assert torch.equal(result.double(), deque(reference, maxlen=1)[0])


def test_matches_above_the_largest_error_are_postponed() -> None:
    """Noise has few matches with so small an error, so that most rings are repeated."""
    noise = torch.rand(1, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    reference = textbook_textures.efros_leung(noise[0], 10, 9, window=5, seed=1, max_error=0.02)
    expected = deque(reference, maxlen=1)[0]
    result = efros_leung(noise, size=(10, 9), window=5, max_error=0.02, seed=1)
    assert torch.equal(result.images[0].double(), expected)
    assert not torch.equal(result.images, efros_leung(noise, size=(10, 9), window=5, seed=1).images)


@pytest.mark.parametrize("order", ["exact", "ring"])
@pytest.mark.parametrize(("period", "window"), [((3, 4), 9), ((1, 5), 11), ((6, 2), 13)])
def test_a_periodic_texture_is_continued_exactly(order: str, period: tuple[int, int], window: int) -> None:
    texture = tiled(period, 40, 44)
    top, left = 6 * (period[0] * 2) % 13, 7
    sample = texture[..., top : top + 20, left : left + 18]
    result = efros_leung(
        sample, size=(30, 34), window=window, start="sample", order=order, error_threshold=0, seed=2
    ).images
    y, x = top - 5 + torch.arange(30), left - 8 + torch.arange(34)
    expected = texture[..., (y % period[0])[:, None], x % period[1]]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("order", ["exact", "ring"])
def test_periodic_outputs_equal_the_reference(bricks: Tensor, order: str) -> None:
    result = efros_leung(bricks, size=(13, 16), window=7, order=order, periodic=True, seed=3).images[0]
    reference = textbook_textures.efros_leung(
        bricks[0], 13, 16, window=7, seed=3, ring=order == "ring", periodic=True
    )
    assert torch.equal(result.double(), deque(reference, maxlen=1)[0])


def test_a_periodic_texture_is_continued_across_the_edges() -> None:
    texture = tiled((4, 5), 24, 30)
    sample = texture[..., 3:19, 4:21]
    result = efros_leung(sample, size=(24, 30), window=9, start="sample", periodic=True, seed=0).images
    assert torch.equal(result, texture.roll((1, 2), (2, 3)))


def test_pixels_in_a_batch_are_not_in_each_others_windows() -> None:
    filled = torch.zeros(30, 24, dtype=torch.bool)
    filled[10:20, 8:15] = True
    pixels = boundary_pixels(filled, torch.Generator().manual_seed(0))
    batches = independent_batches(pixels, filled, 7)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(pixels)))
    batch_of = {index: number for number, batch in enumerate(batches) for index in batch.tolist()}
    for later in range(len(pixels)):
        for earlier in range(later):
            if (pixels[later] - pixels[earlier]).abs().max() <= 3:
                assert batch_of[earlier] < batch_of[later]
    assert len(batches) < len(pixels) / 2


def test_boundary_pixels_are_sorted_by_filled_neighbors() -> None:
    filled = torch.zeros(6, 6, dtype=torch.bool)
    filled[2:4, 2:4] = True
    filled[1, 1] = True
    pixels = [tuple(p) for p in boundary_pixels(filled, torch.Generator().manual_seed(0)).tolist()]
    assert set(pixels[:2]) == {(1, 2), (2, 1)}
    assert set(pixels[-7:]) >= {(0, 0), (0, 1), (1, 0), (4, 4)}
    assert len(pixels) == len(set(pixels)) == 16


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_pixel_is_a_pixel_of_the_sample(channels: int) -> None:
    sample = torch.rand(1, channels, 12, 9, generator=torch.Generator().manual_seed(0))
    result = efros_leung(sample, size=(15, 8), window=5, seed=0)
    assert result.images.shape == (1, channels, 15, 8)
    assert colors(result.images) <= colors(sample)
    assert result.scores.shape == (0, 1)
    assert result.images.dtype == sample.dtype


def test_the_sample_is_unchanged_where_growth_starts_from_it(bricks: Tensor) -> None:
    result = efros_leung(bricks, size=(25, 20), window=5, start="sample", order="ring", seed=0).images
    assert torch.equal(result[:, :, 3:21], bricks)


def test_a_higher_error_threshold_changes_the_texture(bricks: Tensor) -> None:
    strict, loose = (
        efros_leung(bricks, window=5, order="ring", error_threshold=t, seed=0).images for t in (0.0, 5.0)
    )
    assert not torch.equal(strict, loose)


def test_samples_of_a_batch_are_independent(bricks: Tensor) -> None:
    samples = torch.cat([bricks, load_texture("pebbles")[None, :, :18, :20]])
    together = efros_leung(samples, window=5, order="ring", seed=4)
    for n in range(2):
        alone = efros_leung(samples[n : n + 1], window=5, order="ring", seed=4)
        assert torch.equal(together.images[n : n + 1], alone.images)


def test_progress_reports_every_pixel(bricks: Tensor) -> None:
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        efros_leung(bricks, size=9, window=5, seed=0)
    assert [event.done for event in events] == list(range(1, 81 - 9 + 1))
    assert {event.total for event in events} == {72}


def test_it_runs_without_a_model_and_replays(tmp_path: Path) -> None:
    write_png(load_texture("mosaic")[:, :30, :34], tmp_path / "sample.png")
    result = run("efros_leung", sample=tmp_path / "sample.png", size=16, window=5, out=tmp_path / "result")
    assert result.provenance is not None
    assert result.provenance.model is None
    assert replay(tmp_path / "result").same


@pytest.mark.parametrize("window", [4, 21])
def test_windows_that_do_not_fit_are_refused(bricks: Tensor, window: int) -> None:
    with pytest.raises(InputError, match="odd and fit into the sample of 18 x 20"):
        efros_leung(bricks, window=window)


@pytest.mark.parametrize("size", [None, (18, 20), (17, 40)])
def test_starting_from_the_sample_needs_a_larger_size(bricks: Tensor, size: tuple[int, int] | None) -> None:
    with pytest.raises(InputError, match="larger"):
        efros_leung(bricks, size=size, window=5, start="sample")


def test_windows_that_do_not_fit_into_memory_are_refused() -> None:
    with pytest.raises(InputError, match="4 GiB"):
        efros_leung(torch.zeros(1, 3, 1000, 1500), window=21)
