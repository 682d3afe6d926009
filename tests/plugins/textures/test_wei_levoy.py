"""Wei-Levoy: the textbook's pixels by one leaf, the tree, edges that meet, sizes, any sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import textbook_textures
from torch import Tensor

from phosphene import InputError, methods, report_progress, run
from phosphene.builtin.textures import load_texture
from phosphene.progress import ProgressEvent
from phosphene_plugins.textures._vector_quantization import Fork, Leaf, codebook, nearest

wei_levoy = methods["textures.wei_levoy"]


@pytest.fixture(scope="module")
def pebbles() -> Tensor:
    return load_texture("pebbles")[None, :, :26, :24]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(500, 12))


def leaves(book: Fork | Leaf) -> list[Leaf]:
    return [book] if isinstance(book, Leaf) else [*leaves(book.near), *leaves(book.far)]


@pytest.mark.parametrize(
    ("window", "levels", "leaf_size", "size"),
    [(3, 1, 10_000, (9, 12)), (3, 2, None, (13, 12)), (3, 3, None, (24, 25)), (5, 2, 10_000, (21, 20))],
)
def test_one_leaf_gives_the_textbooks_pixels(
    pebbles: Tensor, window: int, levels: int, leaf_size: int | None, size: tuple[int, int]
) -> None:
    how = {"window": window, "levels": levels, "seed": 3}
    made = wei_levoy(pebbles, size=size, leaf_size=leaf_size, **how).images[0]
    assert torch.equal(made.double(), textbook_textures.wei_levoy(pebbles[0], *size, **how))


def test_the_tree_holds_every_vector_once_in_small_leaves(vectors: np.ndarray) -> None:
    found = leaves(codebook(vectors, np.arange(500), 7))
    assert sorted(np.concatenate([leaf.places for leaf in found])) == list(range(500))
    assert max(len(leaf.places) for leaf in found) <= 7
    for leaf in found:
        np.testing.assert_array_equal(leaf.vectors, vectors[leaf.places])


def test_every_vector_of_the_tree_finds_itself(vectors: np.ndarray) -> None:
    book = codebook(vectors, np.arange(500), 5)
    assert [nearest(book, vector) for vector in vectors] == list(range(500))


def test_a_fork_parts_at_the_middle_between_its_centroids(vectors: np.ndarray) -> None:
    """Converged 2-means: every vector is on the side of the nearer mean."""
    book = codebook(vectors, np.arange(500), 499)
    assert isinstance(book, Fork)
    near, far = (leaf.vectors.mean(0) for leaf in (book.near, book.far))
    for leaf, own, other in ((book.near, near, far), (book.far, far, near)):
        assert (
            np.linalg.norm(leaf.vectors - own, axis=1) <= np.linalg.norm(leaf.vectors - other, axis=1)
        ).all()


def test_a_search_in_the_tree_is_nearly_as_good_and_looks_at_little(vectors: np.ndarray) -> None:
    asked = vectors + np.random.default_rng(1).normal(scale=0.2, size=vectors.shape)
    book, leaf = codebook(vectors, np.arange(500), 25), codebook(vectors, np.arange(500), None)
    quick, whole = ([nearest(b, v) for v in asked] for b in (book, leaf))
    away = [np.linalg.norm(asked - vectors[found], axis=1).mean() for found in (quick, whole)]
    assert away[1] <= away[0] < 1.5 * away[1]
    assert np.mean(np.equal(quick, whole)) > 0.75


def test_vectors_that_are_all_alike_stay_in_one_leaf() -> None:
    book = codebook(np.ones((40, 3)), np.arange(40), 4)
    assert isinstance(book, Leaf)
    assert nearest(book, np.zeros(3)) == 0


def test_opposite_edges_meet() -> None:
    """Across the edges neighbours are more alike than any two pixels of the sample are."""
    sample = load_texture("swirls")[None]
    seams = []
    for seed in range(3):
        made = wei_levoy(sample, size=32, window=5, leaf_size=64, seed=seed).images
        seams += [(made.select(dim, 0) - made.select(dim, -1)).square().mean() for dim in (2, 3)]
    assert torch.stack(seams).mean() < 0.5 * 2 * sample.var((2, 3)).mean()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_pixel_is_one_of_the_sample(channels: int) -> None:
    sample = torch.rand(1, channels, 14, 13, generator=torch.Generator().manual_seed(0))
    made = wei_levoy(sample, size=(9, 30), window=3, seed=0)
    assert made.images.shape == (1, channels, 9, 30)
    found, given = (set(map(tuple, t.movedim(1, -1).flatten(0, -2).tolist())) for t in (made.images, sample))
    assert found <= given
    assert made.scores.shape == (0, 1)
    assert made.images.dtype == sample.dtype


def test_a_batch_gives_what_its_samples_give_alone(pebbles: Tensor) -> None:
    samples = torch.cat([pebbles, load_texture("waves")[None, :, :26, :24]])
    together = wei_levoy(samples, size=12, window=3, seed=4)
    for n in range(2):
        alone = wei_levoy(samples[n : n + 1], size=12, window=3, seed=4)
        assert torch.equal(together.images[n : n + 1], alone.images)


def test_levels_that_would_be_too_small_are_left_out(pebbles: Tensor) -> None:
    """26 x 24 pixels leave 13 x 12 for a second level of window 5, and nothing for a third."""
    two, many, one = (wei_levoy(pebbles, window=5, levels=n, seed=0).images for n in (2, 10, 1))
    assert torch.equal(two, many)
    assert not torch.equal(two, one)


def test_it_tells_every_pixel_of_every_level(pebbles: Tensor) -> None:
    told: list[ProgressEvent] = []
    with report_progress(told.append):
        wei_levoy(pebbles, size=(13, 20), window=3, levels=2, seed=0)
    assert [event.done for event in told] == list(range(1, 13 * 20 + 7 * 10 + 1))
    assert {event.total for event in told} == {330}


def test_it_runs_without_a_model() -> None:
    made = run("wei_levoy", sample="builtin:mosaic", size=16, window=3, seed=0)
    assert made.provenance is not None
    assert made.provenance.model is None
    assert made.sources.shape == (1, 3, 128, 128)


@pytest.mark.parametrize("window", [4, 25])
def test_windows_that_do_not_fit_are_refused(pebbles: Tensor, window: int) -> None:
    with pytest.raises(InputError, match="odd and fit into the sample of 26 x 24"):
        wei_levoy(pebbles, window=window)
