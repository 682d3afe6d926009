"""Image quilting: cuts, blocks, tileable outputs, guides, seeds and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phosphene import InputError, methods, report_progress, run
from phosphene.builtin.textures import load_texture
from phosphene.progress import ProgressEvent
from phosphene_plugins.textures.image_quilting import block_starts, cut_mask, minimum_error_cut

image_quilting = methods["textures.image_quilting"]


@pytest.fixture(scope="module")
def bricks() -> Tensor:
    return load_texture("bricks")[None, :, :40, :48]


def test_a_cut_by_hand() -> None:
    errors = torch.tensor([[9.0, 1, 9, 9], [9, 9, 2, 9], [9, 9, 9, 0], [1, 9, 9, 1]])
    assert minimum_error_cut(errors).tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize(("length", "block", "overlap"), [(64, 24, 4), (25, 24, 4), (24, 24, 1), (49, 9, 8)])
@pytest.mark.parametrize("periodic", [False, True])
def test_blocks_cover_a_side_and_overlap(length: int, block: int, overlap: int, periodic: bool) -> None:
    starts = block_starts(length, block, overlap, periodic)
    following = [*starts[1:], starts[0] + length] if periodic else starts[1:]
    gaps = [after - before for before, after in zip(starts, following, strict=False)]
    assert starts[0] == 0 and all(0 < gap <= block - overlap for gap in gaps)
    assert periodic or starts[-1] == length - block


def test_a_block_replaces_all_empty_pixels() -> None:
    filled = torch.zeros(9, 9, dtype=torch.bool)
    filled[:, :3] = filled[:2] = filled[:, 7:] = True
    mask = cut_mask(torch.rand(9, 9), filled)
    assert mask[~filled].all() and not mask.all()
    assert not mask[:, 0].any() or not mask[0].all()


def colors(images: Tensor) -> set[tuple[float, ...]]:
    return {tuple(color) for color in images.movedim(1, -1).flatten(0, -2).tolist()}


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_pixel_is_a_pixel_of_the_sample(channels: int) -> None:
    sample = torch.rand(1, channels, 14, 12, generator=torch.Generator().manual_seed(0))
    result = image_quilting(sample, size=(23, 17), block=7, seed=0)
    assert result.images.shape == (1, channels, 23, 17)
    assert colors(result.images) <= colors(sample)


def test_a_periodic_output_has_no_seam(bricks: Tensor) -> None:
    """Differences across the edges are at most half of those without the option."""

    def seam(images: Tensor) -> float:
        return float((images[..., 0] - images[..., -1]).square().mean())

    tileable, plain = (
        torch.cat([image_quilting(bricks, block=16, periodic=p, seed=s).images for s in range(4)])
        for p in (True, False)
    )
    assert seam(tileable) < 0.5 * seam(plain)


def test_a_sample_guide_chooses_the_part_of_the_sample() -> None:
    """A sample that is dark on the left and bright on the right, each with its own guide value."""
    sample = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    sample[..., 16:] += 0.7
    sample_guide = torch.zeros(1, 1, 24, 32)
    sample_guide[..., :16] = 1
    guide = torch.zeros(1, 1, 30, 30)
    guide[..., :15, :] = 1
    images = image_quilting(sample, guide, sample_guide, block=6, guide_weight=0.9, seed=0).images
    assert images.shape == (1, 3, 30, 30)
    assert images[..., :10, :].max() < 0.5 < images[..., 20:, :].min()


def test_a_guide_alone_is_matched_by_its_luminance(bricks: Tensor) -> None:
    ramp = torch.linspace(0, 1, 60)[None, None, None].expand(1, 3, 40, 60)
    images = image_quilting(bricks, ramp, block=6, guide_weight=0.95, seed=0).images
    rows = images.mean((0, 1, 2))
    assert torch.corrcoef(torch.stack([rows, ramp[0, 0, 0]]))[0, 1] > 0.8


def test_samples_of_a_batch_are_independent(bricks: Tensor) -> None:
    samples = torch.cat([bricks, load_texture("pebbles")[None, :, :40, :48]])
    together = image_quilting(samples, block=12, seed=4)
    for n in range(2):
        alone = image_quilting(samples[n : n + 1], block=12, seed=4)
        assert torch.equal(together.images[n : n + 1], alone.images)


def test_progress_reports_every_block(bricks: Tensor) -> None:
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        image_quilting(bricks, size=30, block=12, seed=0)
    assert [event.done for event in events] == list(range(1, 10))


def test_it_runs_without_a_model() -> None:
    result = run("image_quilting", sample="builtin:bricks", size=30, block=12, seed=0)
    assert result.provenance is not None and result.provenance.model is None


@pytest.mark.parametrize("options", [{"block": 41}, {"block": 20, "size": 19}, {"block": 8, "overlap": 8}])
def test_blocks_that_do_not_fit_are_refused(bricks: Tensor, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="blocks must fit into the sample and the output"):
        image_quilting(bricks, **options)


def test_guides_that_do_not_fit_are_refused(bricks: Tensor) -> None:
    with pytest.raises(InputError, match="it needs a guide"):
        image_quilting(bricks, None, bricks)
    with pytest.raises(InputError, match="the sample's size and the guide's channels"):
        image_quilting(bricks, bricks, bricks[..., :30])
    with pytest.raises(InputError, match="the sample's size and the guide's channels"):
        image_quilting(bricks, bricks, bricks[:, :1])
    with pytest.raises(InputError, match="one map, or one for each of 1 samples, not 2"):
        image_quilting(bricks, bricks.expand(2, -1, -1, -1))
