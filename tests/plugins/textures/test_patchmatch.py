"""PatchMatch: voting, sizes, guides, tileable outputs, samples and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phosphene import InputError, methods, report_progress, run
from phosphene.builtin.textures import load_texture
from phosphene.progress import ProgressEvent
from phosphene_plugins.textures.patchmatch import extract_patches, positions, vote

patchmatch = methods["textures.patchmatch"]


@pytest.fixture(scope="module")
def bricks() -> Tensor:
    return load_texture("bricks")[None, :, :40, :48]


def test_votes_by_hand() -> None:
    """Two patches of two pixels in a row of three: the middle pixel is the mean of both."""
    sample = torch.tensor([[[1.0, 3.0, 5.0], [1.0, 3.0, 5.0]]])
    matches = torch.tensor([[[0, 1], [0, 0]]])  # the right patch of the sample, then the left one
    image = vote(matches, matches, sample, (2, 3), 2, 0.0)
    assert image.tolist() == [[[3, (5 + 1) / 2, 3]] * 2]
    both = vote(matches, positions((1, 2), sample), sample, (2, 3), 2, 3.0)
    assert both.tolist() == [[[(3 + 3 * 1) / 4, (3 + 3 * 3) / 4, (3 + 3 * 5) / 4]] * 2]


def test_completeness_brings_patches_of_the_sample_nearer(bricks: Tensor) -> None:
    """The mean distance of the sample's patches from those of the output falls with the term's weight."""
    source = extract_patches(bricks[0], 7).rows
    means = []
    for completeness in (0.0, 1.0):
        image = patchmatch(bricks, steps=4, completeness=completeness, seed=1).images[0]
        means.append(float(torch.cdist(source, extract_patches(image, 7).rows).amin(1).mean()))
    assert means[1] < 0.9 * means[0]


def test_a_periodic_output_has_no_seam(bricks: Tensor) -> None:
    """Differences across the edges are at most half of those without the option."""

    def seam(images: Tensor) -> float:
        return float((images[..., 0] - images[..., -1]).square().mean())

    tileable, plain = (patchmatch(bricks, steps=3, periodic=p, seed=0).images for p in (True, False))
    assert seam(tileable) < 0.5 * seam(plain)


def test_a_sample_guide_chooses_the_part_of_the_sample() -> None:
    """A sample that is dark on the left and bright on the right, each with its own guide value."""
    sample = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    sample[..., 16:] += 0.7
    sample_guide = torch.zeros(1, 1, 24, 32)
    sample_guide[..., :16] = 1
    guide = torch.zeros(1, 1, 30, 30)
    guide[..., :15, :] = 1
    images = patchmatch(
        sample, guide, sample_guide, window=5, guide_weight=0.9, completeness=0.3, seed=0
    ).images
    assert images.shape == (1, 3, 30, 30)
    assert images[..., :10, :].mean() < 0.3 < 0.7 < images[..., 20:, :].mean()


def test_samples_of_a_batch_are_independent(bricks: Tensor) -> None:
    samples = torch.cat([bricks, load_texture("pebbles")[None, :, :40, :48]])
    together = patchmatch(samples, steps=2, seed=4)
    for n in range(2):
        alone = patchmatch(samples[n : n + 1], steps=2, seed=4)
        assert torch.equal(together.images[n : n + 1], alone.images)


def test_progress_reports_every_step(bricks: Tensor) -> None:
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        patchmatch(bricks, size=30, steps=2, seed=0)
    assert [event.done for event in events] == [1, 2, 3, 4]


def test_it_runs_without_a_model() -> None:
    result = run("patchmatch", sample="builtin:bricks", size=30, steps=1, seed=0)
    assert result.provenance is not None and result.provenance.model is None


@pytest.mark.parametrize("options", [{"window": 8}, {"window": 41}, {"window": 21, "size": 19}])
def test_windows_that_do_not_fit_are_refused(bricks: Tensor, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="window must be odd and fit into the"):
        patchmatch(bricks, **options)
