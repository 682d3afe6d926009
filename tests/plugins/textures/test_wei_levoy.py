"""Wei-Levoy: against a reference implementation, the search tree, tileable edges, sizes and samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from phosphene import InputError, methods, report_progress, run
from phosphene.builtin.textures import load_texture
from phosphene.progress import ProgressEvent
from phosphene_plugins.textures import _textbook_textures as textbook_textures
from phosphene_plugins.textures._vector_quantization import Fork, Leaf, build_codebook, nearest_index

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
def test_a_single_leaf_equals_the_reference(
    pebbles: Tensor, window: int, levels: int, leaf_size: int | None, size: tuple[int, int]
) -> None:
    how = {"window": window, "levels": levels, "seed": 3}
    result = wei_levoy(pebbles, size=size, leaf_size=leaf_size, **how).images[0]
    assert torch.equal(result.double(), textbook_textures.wei_levoy(pebbles[0], *size, **how))


def test_the_tree_holds_every_vector_once_in_small_leaves(vectors: np.ndarray) -> None:
    tree_leaves = leaves(build_codebook(vectors, np.arange(500), 7))
    assert sorted(np.concatenate([leaf.indices for leaf in tree_leaves])) == list(range(500))
    assert max(len(leaf.indices) for leaf in tree_leaves) <= 7
    for leaf in tree_leaves:
        np.testing.assert_array_equal(leaf.vectors, vectors[leaf.indices])


def test_every_vector_is_its_own_nearest(vectors: np.ndarray) -> None:
    book = build_codebook(vectors, np.arange(500), 5)
    assert [nearest_index(book, vector) for vector in vectors] == list(range(500))


def test_a_fork_splits_halfway_between_its_centroids(vectors: np.ndarray) -> None:
    """Converged 2-means: every vector is on the side of the nearer mean."""
    book = build_codebook(vectors, np.arange(500), 499)
    assert isinstance(book, Fork)
    near, far = (leaf.vectors.mean(0) for leaf in (book.near, book.far))
    for leaf, own, other in ((book.near, near, far), (book.far, far, near)):
        assert (
            np.linalg.norm(leaf.vectors - own, axis=1) <= np.linalg.norm(leaf.vectors - other, axis=1)
        ).all()


def test_tree_search_is_close_to_exhaustive_search(vectors: np.ndarray) -> None:
    queries = vectors + np.random.default_rng(1).normal(scale=0.2, size=vectors.shape)
    tree, leaf = build_codebook(vectors, np.arange(500), 25), build_codebook(vectors, np.arange(500), None)
    approximate, exact = ([nearest_index(b, v) for v in queries] for b in (tree, leaf))
    distances = [
        np.linalg.norm(queries - vectors[indices], axis=1).mean() for indices in (approximate, exact)
    ]
    assert distances[1] <= distances[0] < 1.5 * distances[1]
    assert np.mean(np.equal(approximate, exact)) > 0.75


def test_equal_vectors_stay_in_one_leaf() -> None:
    book = build_codebook(np.ones((40, 3)), np.arange(40), 4)
    assert isinstance(book, Leaf)
    assert nearest_index(book, np.zeros(3)) == 0


def test_the_texture_is_tileable() -> None:
    """Pixels across opposite edges differ less than random pixels of the sample."""
    sample = load_texture("swirls")[None]
    seams = []
    for seed in range(3):
        result = wei_levoy(sample, size=32, window=5, leaf_size=64, seed=seed).images
        seams += [(result.select(dim, 0) - result.select(dim, -1)).square().mean() for dim in (2, 3)]
    assert torch.stack(seams).mean() < 0.5 * 2 * sample.var((2, 3)).mean()


def test_every_texture_method_has_the_option_to_be_tileable() -> None:
    for name, plugin in methods.by_family()["textures"].items():
        assert "periodic" in methods[plugin.id].spec.params.model_fields, name


def test_only_a_periodic_texture_continues_at_its_opposite_edges() -> None:
    sample, seams = load_texture("swirls")[None], list[float]()
    for periodic in (True, False):
        textures = torch.cat(
            [
                wei_levoy(sample, size=32, window=5, leaf_size=64, periodic=periodic, seed=seed).images
                for seed in range(6)
            ]
        )
        errors = [(textures.select(dim, 0) - textures.select(dim, -1)).square().mean() for dim in (2, 3)]
        seams.append(float(sum(errors)))
    assert seams[0] < seams[1] / 2


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_pixel_is_a_pixel_of_the_sample(channels: int) -> None:
    sample = torch.rand(1, channels, 14, 13, generator=torch.Generator().manual_seed(0))
    result = wei_levoy(sample, size=(9, 30), window=3, seed=0)
    assert result.images.shape == (1, channels, 9, 30)
    colors, sample_colors = (
        set(map(tuple, t.movedim(1, -1).flatten(0, -2).tolist())) for t in (result.images, sample)
    )
    assert colors <= sample_colors
    assert result.scores.shape == (0, 1)
    assert result.images.dtype == sample.dtype


def test_samples_of_a_batch_are_independent(pebbles: Tensor) -> None:
    samples = torch.cat([pebbles, load_texture("waves")[None, :, :26, :24]])
    together = wei_levoy(samples, size=12, window=3, seed=4)
    for n in range(2):
        alone = wei_levoy(samples[n : n + 1], size=12, window=3, seed=4)
        assert torch.equal(together.images[n : n + 1], alone.images)


def test_levels_that_would_be_too_small_are_omitted(pebbles: Tensor) -> None:
    """26 x 24 pixels leave 13 x 12 for a second level of window 5, and nothing for a third."""
    two, many, one = (wei_levoy(pebbles, window=5, levels=n, seed=0).images for n in (2, 10, 1))
    assert torch.equal(two, many)
    assert not torch.equal(two, one)


def test_progress_reports_every_pixel_of_every_level(pebbles: Tensor) -> None:
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        wei_levoy(pebbles, size=(13, 20), window=3, levels=2, seed=0)
    assert [event.done for event in events] == list(range(1, 13 * 20 + 7 * 10 + 1))
    assert {event.total for event in events} == {330}


def test_it_runs_without_a_model() -> None:
    result = run("wei_levoy", sample="builtin:mosaic", size=16, window=3, seed=0)
    assert result.provenance is not None
    assert result.provenance.model is None
    assert result.sources.shape == (1, 3, 128, 128)


@pytest.mark.parametrize("window", [4, 25])
def test_windows_that_do_not_fit_are_refused(pebbles: Tensor, window: int) -> None:
    with pytest.raises(InputError, match="odd and fit into the sample of 26 x 24"):
        wei_levoy(pebbles, window=window)
