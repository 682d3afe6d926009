"""Nearest neighbors: exact, streamed, with ids, and compared with pixel distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import (
    InputError,
    Model,
    ModelError,
    TensorDataset,
    checkpoints,
    load_model,
    load_result,
    max_batch,
    methods,
    run,
)
from phosphene.builtin.scenes import draw_scenes
from phosphene_plugins.embeddings._nearest_neighbor_search import NearestNeighborSearch

nearest_neighbors = methods["embeddings.nearest_neighbors"]


def network() -> Model:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)]
    return load_model(nn.Sequential(*layers), input_size=(3, 10, 10))


MODEL = network()
METRICS = st.sampled_from(["l2", "cosine"])


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def test_oracle():
    nearest_neighbors.spec.oracle()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 8), st.integers(1, 7), METRICS)
def test_streaming_equals_all_distances_at_once(queries, count, k, batch, metric):
    images, dataset = random_images(queries, 1), random_images(count, 2)
    with max_batch(batch):
        result = nearest_neighbors(MODEL, images, TensorDataset(dataset), k=k, metric=metric)
    for indices, distances, vectors, kind in (
        (result.indices, result.distances, (MODEL.embed(images), MODEL.embed(dataset)), metric),
        (result.pixel_indices, result.pixel_distances, (images.flatten(1), dataset.flatten(1)), "l2"),
    ):
        a, b = (v.detach().double() for v in vectors)
        every = torch.cdist(a, b) if kind == "l2" else 1 - F.cosine_similarity(a[:, None], b[None], dim=2)
        expected = every.sort(dim=1)
        assert indices.tolist() == expected.indices[:, :k].tolist()
        assert torch.allclose(distances.double(), expected.values[:, :k], atol=1e-5)
    assert torch.equal(result.neighbors, dataset[result.indices])
    assert torch.equal(result.pixel_neighbors, dataset[result.pixel_indices])
    assert result.ids == tuple(tuple(str(i) for i in row) for row in result.indices.tolist())


def test_image_of_the_data_set_is_its_own_neighbor_at_distance_zero():
    dataset = random_images(9)
    result = nearest_neighbors(MODEL, dataset[4:6], TensorDataset(dataset), k=2)
    assert result.indices[:, 0].tolist() == [4, 5] and result.distances[:, 0].tolist() == [0, 0]
    without = nearest_neighbors(MODEL, dataset[4:6], TensorDataset(dataset), k=1, exclude_self=True)
    assert without.indices[:, 0].tolist() == result.indices[:, 1].tolist()


@pytest.mark.parametrize("index", range(6))
def test_near_duplicates_are_farther_than_the_image_itself(index):
    query = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dataset = query[:1].repeat(6, 1, 1, 1)
    for n in set(range(6)) - {index}:
        dataset[n, 0, 10, n] = (dataset[n, 0, 10, n] - 0.5) * 0.998 + 0.5
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), input_size=(3, 64, 64))
    result = nearest_neighbors(model, query, TensorDataset(dataset), k=1)
    assert result.indices[0].tolist() == result.pixel_indices[0].tolist() == [index]
    assert result.distances[0].tolist() == result.pixel_distances[0].tolist() == [0]


def test_equal_images_have_equal_distances_and_are_ordered_by_index():
    dataset = random_images(2)[[0, 1, 0, 1, 0]]
    for size in (1, 2, 5):
        with max_batch(size):
            result = nearest_neighbors(MODEL, dataset[:1], TensorDataset(dataset), k=3)
        assert result.pixel_indices.tolist() == [[0, 2, 4]] and result.pixel_distances.eq(0).all()
        # The features of equal images can differ by a rounding between batches.
        assert sorted(result.indices[0].tolist()) == [0, 2, 4] and result.distances.max() < 1e-6


def test_fewer_images_than_k_are_all_returned_and_none_is_refused():
    dataset = random_images(2)
    assert nearest_neighbors(MODEL, dataset[:1], TensorDataset(dataset), k=9).indices.shape == (1, 2)
    with pytest.raises(InputError, match="no image but the query image itself"):
        nearest_neighbors(MODEL, dataset[:1], TensorDataset(dataset[:1]), exclude_self=True)


def test_output_of_a_named_layer_is_averaged_over_positions():
    images, dataset = random_images(2, 1), random_images(6, 2)
    result = nearest_neighbors(MODEL, images, TensorDataset(dataset), layer="1", k=6)
    a, b = (MODEL.features(x, "1").detach().mean((2, 3)) for x in (images, dataset))
    assert torch.allclose(result.distances, torch.cdist(a, b).sort(dim=1).values, atol=1e-5)


def test_a_model_without_a_classifier_needs_a_layer():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = load_model(layers, input_size=(3, 10, 10))
    with pytest.raises(ModelError, match="name a layer"):
        nearest_neighbors(model, random_images(1), TensorDataset(random_images(3)))
    result = nearest_neighbors(model, random_images(1), TensorDataset(random_images(3)), layer="1", k=1)
    assert result.indices.shape == (1, 1)


def test_neighbors_by_features_share_the_class_more_often_than_by_pixels():
    result = run("nearest_neighbors", dataset="builtin:scenes/96", k=3, exclude_self=True)
    labels = draw_scenes(96, split="test").labels
    query_labels = labels[:4, None]
    by_features = (labels[result.indices] == query_labels).float().mean()
    by_pixels = (labels[result.pixel_indices] == query_labels).float().mean()
    assert by_features >= 0.7 and by_features > by_pixels + 0.3


def test_saving(tmp_path):
    result = run("nearest_neighbors", dataset="builtin:scenes/12", k=2, out=tmp_path / "near")
    again = load_result(tmp_path / "near")
    assert again.ids == result.ids and torch.equal(again.distances, result.distances)


@pytest.mark.parametrize("excluded", [False, True])
def test_faiss_returns_the_same_neighbors(monkeypatch, excluded):
    generator = torch.Generator().manual_seed(0)
    queries, vectors = (torch.randn(n, 16, generator=generator) for n in (7, 300))
    results = []
    for max_pairs in (10**9, 0):
        monkeypatch.setattr(NearestNeighborSearch, "MAX_PAIRS", max_pairs)
        search = NearestNeighborSearch(queries, 5)
        for start in range(0, 300, 100):
            exclude = torch.zeros(7, 100, dtype=torch.bool)
            exclude[:, 3] = excluded
            search.add(vectors[start : start + 100], tuple(range(start, start + 100)), exclude)
            search._rank_pending()
        results.append(search.result())
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    exact = torch.cdist(queries.double(), vectors.double())
    if not excluded:
        assert torch.equal(results[1][0], exact.topk(5, largest=False).indices)


def test_an_interrupted_search_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    arguments = {"images": "builtin:scenes/3", "dataset": "builtin:scenes/20", "k": 4, "batch_size": 2}
    expected = run("nearest_neighbors", progress=False, **arguments)
    events = []

    def cut(event):
        events.append(event.done)
        if event.done == 6 and len(events) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("nearest_neighbors", out=tmp_path / "near", progress=cut, **arguments)
    resumed = run("nearest_neighbors", out=tmp_path / "near", progress=cut, **arguments)
    assert events == [*range(1, 7), *range(1, 5)]
    for name in ("indices", "distances", "neighbors", "pixel_indices", "pixel_distances"):
        assert torch.equal(getattr(resumed, name), getattr(expected, name)), name
