"""Nearest neighbours: exact, streamed, ids kept, beside those by pixels."""

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


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def test_oracle():
    nearest_neighbors.spec.oracle()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 8), st.integers(1, 7), METRICS)
def test_streaming_equals_all_distances_at_once(queries, count, k, batch, metric):
    images, dataset = pictures(queries, 1), pictures(count, 2)
    with max_batch(batch):
        found = nearest_neighbors(MODEL, images, TensorDataset(dataset), k=k, metric=metric)
    for indices, distances, vectors, how in (
        (found.indices, found.distances, (MODEL.embed(images), MODEL.embed(dataset)), metric),
        (found.pixel_indices, found.pixel_distances, (images.flatten(1), dataset.flatten(1)), "l2"),
    ):
        a, b = (v.detach().double() for v in vectors)
        every = torch.cdist(a, b) if how == "l2" else 1 - F.cosine_similarity(a[:, None], b[None], dim=2)
        expected = every.sort(dim=1)
        assert indices.tolist() == expected.indices[:, :k].tolist()
        assert torch.allclose(distances.double(), expected.values[:, :k], atol=1e-5)
    assert torch.equal(found.neighbors, dataset[found.indices])
    assert torch.equal(found.pixel_neighbors, dataset[found.pixel_indices])
    assert found.ids == tuple(tuple(str(i) for i in row) for row in found.indices.tolist())


def test_image_of_the_data_set_is_its_own_neighbor_at_distance_zero():
    dataset = pictures(9)
    found = nearest_neighbors(MODEL, dataset[4:6], TensorDataset(dataset), k=2)
    assert found.indices[:, 0].tolist() == [4, 5] and found.distances[:, 0].tolist() == [0, 0]
    without = nearest_neighbors(MODEL, dataset[4:6], TensorDataset(dataset), k=1, exclude_self=True)
    assert without.indices[:, 0].tolist() == found.indices[:, 1].tolist()


@pytest.mark.parametrize("place", range(6))
def test_near_duplicates_are_farther_than_the_image_itself(place):
    query = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dataset = query[:1].repeat(6, 1, 1, 1)
    for n in set(range(6)) - {place}:
        dataset[n, 0, 10, n] = (dataset[n, 0, 10, n] - 0.5) * 0.998 + 0.5
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), input_size=(3, 64, 64))
    found = nearest_neighbors(model, query, TensorDataset(dataset), k=1)
    assert found.indices[0].tolist() == found.pixel_indices[0].tolist() == [place]
    assert found.distances[0].tolist() == found.pixel_distances[0].tolist() == [0]


def test_equal_images_have_equal_distances_and_are_ordered_by_index():
    dataset = pictures(2)[[0, 1, 0, 1, 0]]
    for size in (1, 2, 5):
        with max_batch(size):
            found = nearest_neighbors(MODEL, dataset[:1], TensorDataset(dataset), k=3)
        assert found.pixel_indices.tolist() == [[0, 2, 4]] and found.pixel_distances.eq(0).all()
        # What a network says of equal pictures can differ by a rounding between batches.
        assert sorted(found.indices[0].tolist()) == [0, 2, 4] and found.distances.max() < 1e-6


def test_fewer_images_than_k_are_all_returned_and_none_is_refused():
    dataset = pictures(2)
    assert nearest_neighbors(MODEL, dataset[:1], TensorDataset(dataset), k=9).indices.shape == (1, 2)
    with pytest.raises(InputError, match="no image but the query image itself"):
        nearest_neighbors(MODEL, dataset[:1], TensorDataset(dataset[:1]), exclude_self=True)


def test_output_of_a_named_layer_is_averaged_over_positions():
    images, dataset = pictures(2, 1), pictures(6, 2)
    found = nearest_neighbors(MODEL, images, TensorDataset(dataset), layer="1", k=6)
    a, b = (MODEL.features(x, "1").detach().mean((2, 3)) for x in (images, dataset))
    assert torch.allclose(found.distances, torch.cdist(a, b).sort(dim=1).values, atol=1e-5)


def test_a_model_without_a_classifier_needs_a_layer():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = load_model(layers, input_size=(3, 10, 10))
    with pytest.raises(ModelError, match="name a layer"):
        nearest_neighbors(model, pictures(1), TensorDataset(pictures(3)))
    found = nearest_neighbors(model, pictures(1), TensorDataset(pictures(3)), layer="1", k=1)
    assert found.indices.shape == (1, 1)


def test_neighbors_by_features_share_the_class_more_often_than_by_pixels():
    found = run("nearest_neighbors", dataset="builtin:scenes/96", k=3, exclude_self=True)
    labels = draw_scenes(96, split="test").labels
    wanted = labels[:4, None]
    by_features = (labels[found.indices] == wanted).float().mean()
    by_pixels = (labels[found.pixel_indices] == wanted).float().mean()
    assert by_features >= 0.7 and by_features > by_pixels + 0.3


def test_saving(tmp_path):
    found = run("nearest_neighbors", dataset="builtin:scenes/12", k=2, out=tmp_path / "near")
    again = load_result(tmp_path / "near")
    assert again.ids == found.ids and torch.equal(again.distances, found.distances)


@pytest.mark.parametrize("excluded", [False, True])
def test_faiss_returns_the_same_neighbors(monkeypatch, excluded):
    generator = torch.Generator().manual_seed(0)
    queries, vectors = (torch.randn(n, 16, generator=generator) for n in (7, 300))
    found = []
    for max_pairs in (10**9, 0):
        monkeypatch.setattr(NearestNeighborSearch, "MAX_PAIRS", max_pairs)
        search = NearestNeighborSearch(queries, 5)
        for start in range(0, 300, 100):
            exclude = torch.zeros(7, 100, dtype=torch.bool)
            exclude[:, 3] = excluded
            search.add(vectors[start : start + 100], tuple(range(start, start + 100)), exclude)
            search._rank_pending()
        found.append(search.result())
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    exact = torch.cdist(queries.double(), vectors.double())
    if not excluded:
        assert torch.equal(found[1][0], exact.topk(5, largest=False).indices)
