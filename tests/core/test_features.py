"""Features as inputs: saved embeddings and files instead of a model and a data set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from phosphene import (
    InputError,
    TensorDataset,
    UnknownName,
    load_model,
    load_result,
    methods,
    prepare,
    replay,
    run,
)
from phosphene.cli import main
from phosphene.results import Embedding
from phosphene.testing.networks import make_network

pca, clusters, set_distance = methods["pca"], methods["clusters"], methods["set_distance"]
nearest_neighbors = methods["nearest_neighbors"]


@pytest.fixture
def model():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    return load_model(network, input_size=(3, 8, 8))


@pytest.fixture
def dataset():
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, [f"class {n % 3}" for n in range(12)])


@pytest.fixture
def embedding(model, dataset):
    return methods["embed"](model, dataset)


def test_a_run_from_a_saved_embedding_loads_no_model(tmp_path, monkeypatch, capsys):
    saved, out = tmp_path / "embed", tmp_path / "pca"
    run("embed", dataset="builtin:scenes/12", out=saved, progress=False)
    expected = run("pca", dataset="builtin:scenes/12", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("phosphene.roles.model.load_model", None)
        result = run("pca", features=saved, out=out, progress=False)
        assert torch.equal(result.points, expected.points) and result.labels == expected.labels
        assert torch.equal(result.thumbnails, expected.thumbnails)
        provenance = result.provenance
        assert provenance.model is None and provenance.inputs.keys() == {"features"}
        assert provenance.inputs["features"]["uri"] == str(saved) and result.uri is None
        assert replay(out).same
        prepared = prepare("pca", features=saved)
        assert (
            prepared.model_digest is None
            and prepared.produced(load_result(out))
            and prepared.passes() == (0, 0)
        )
        with pytest.raises(SystemExit, match="0"):
            main(["run", "pca", "--features", str(saved), "--out", str(tmp_path / "again")])
    assert torch.equal(load_result(tmp_path / "again").points, expected.points)
    assert expected.provenance.inputs == {"dataset": "builtin:scenes/12"}


def test_a_replay_from_features_that_changed_is_refused(tmp_path):
    saved, out = tmp_path / "embed", tmp_path / "pca"
    run("embed", dataset="builtin:scenes/12", out=saved, progress=False)
    run("pca", features=saved, out=out, progress=False)
    before = prepare("pca", features=saved).identity()
    run("embed", dataset="builtin:scenes/13", out=saved, progress=False)
    assert prepare("pca", features=saved).identity() != before
    with pytest.raises(InputError, match="have changed since"):
        replay(out)


def test_features_in_files(tmp_path, embedding):
    expected = clusters(features=embedding, k=3, seed=0)
    numbers = embedding.features.numpy()
    np.save(tmp_path / "a.npy", numbers)
    np.savez(tmp_path / "one.npz", numbers)
    arrays = {"features": numbers, "labels": np.array(embedding.labels), "other": np.zeros(3)}
    np.savez(tmp_path / "b.npz", **arrays, thumbnails=embedding.thumbnails.numpy())
    embedding.to_parquet(tmp_path / "c.parquet")
    for name in ("a.npy", "one.npz", "b.npz", "c.parquet"):
        result = run(
            "clusters", features=tmp_path / name, k=3, seed=0, out=tmp_path / f"of {name}", progress=False
        )
        assert result.ids == embedding.ids
        # A table holds numbers in double precision.
        assert result.features.dtype == (torch.float64 if name == "c.parquet" else torch.float32)
        assert torch.equal(result.features.float(), embedding.features)
        assert torch.equal(result.clusters, expected.clusters)
        torch.testing.assert_close(result.points.float(), expected.points, rtol=0, atol=1e-6)
        assert (result.labels is None) == (name in ("a.npy", "one.npz")) and replay(
            tmp_path / f"of {name}"
        ).same
        assert result.labels in (None, embedding.labels)
    assert torch.equal(run("pca", features=tmp_path / "b.npz").thumbnails, embedding.thumbnails)
    for features in (embedding.features, numbers):
        assert torch.equal(clusters(features=features, k=3, seed=0).clusters, expected.clusters)
    whole = run("pca", features=np.arange(12).reshape(4, 3) ** 2)  # integers become float32
    assert whole.features.dtype == torch.float32


def test_parquet_with_a_column_of_lists(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [[0.0, 1.0], [2.0, 3.5], [4.0, 4.0]]
    parquet.write_table(pyarrow.table({"features": rows, "ids": ["a", "b", "c"]}), tmp_path / "x.parquet")
    result = run("pca", features=tmp_path / "x.parquet", progress=False)
    assert result.features.tolist() == rows and result.ids == ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("x.npy", lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True), "NumPy file"),
        ("x.npy", lambda path: path.write_bytes(b"nothing"), "NumPy file"),
        ("x.npy", lambda path: np.save(path, np.zeros(4)), r"numbers \(N, D\)"),
        ("x.npy", lambda path: np.save(path, np.array([["a"]])), r"numbers \(N, D\)"),
        ("x.npz", lambda path: np.savez(path, a=np.zeros(4), b=np.zeros(4)), "features"),
        ("x.parquet", lambda path: path.write_bytes(b"nothing"), "Parquet"),
        ("x.npy", lambda path: None, "cannot be read"),
        ("x", lambda path: None, "no saved result"),
    ],
)
def test_files_without_features_are_refused(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises((InputError, UnknownName), match=words):
        run("pca", features=tmp_path / name, progress=False)


def test_another_result_is_refused(tmp_path):
    run("grad_cam", images="builtin:scenes/1", out=tmp_path / "map", progress=False)
    with pytest.raises(InputError, match="holds an Attribution"):
        run("pca", features=tmp_path / "map", progress=False)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.rand(4), r"not \(4,\)"),
        (torch.rand(0, 3), "at least one row"),
        (torch.rand(3, 3) * torch.inf, "image 0 contain NaN or infinity"),
        (torch.rand(3, 3) + 1j, "complex64"),
        ("results", "not str"),
    ],
)
def test_values_that_are_no_features_are_refused(features, words):
    with pytest.raises(InputError, match=words):
        pca(features=features)


def test_rows_that_do_not_belong_together_are_refused(embedding):
    with pytest.raises(InputError, match="12 ids needs as many rows of labels, not 11"):
        pca(features=dataclasses.replace(embedding, labels=embedding.labels[1:]))


def test_both_readings_are_named(model, dataset, embedding):
    with pytest.raises(InputError, match="features, computed before, or model and dataset, from which"):
        pca(model, dataset, embedding)
    with pytest.raises(InputError, match="leave out features, or model and dataset"):
        pca(model, features=embedding)
    with pytest.raises(InputError, match="leave out features, or dataset"):
        nearest_neighbors(model, dataset.images, dataset, embedding)
    with pytest.raises(InputError, match="needs dataset .*, or features instead"):
        nearest_neighbors(model, dataset.images)
    with pytest.raises(InputError, match=r"needs model \(model\), or features instead"):
        pca()


def test_a_layer_has_no_meaning_without_a_model(embedding):
    with pytest.raises(InputError, match="layer='1' is a layer of a model, and the features are computed"):
        pca(features=embedding, layer="1")


def test_features_of_another_model_or_layer_are_refused(model, dataset, embedding):
    other = make_network("gap")
    with pytest.raises(InputError, match="pass the model that computed them"):
        nearest_neighbors(other, torch.rand(1, 3, 24, 24), features=embedding)
    with pytest.raises(InputError, match="computed without a layer, so layer='0'"):
        nearest_neighbors(model, dataset.images[:1], features=embedding, layer="0")
    of_layer = methods["embed"](model, dataset, layer="0")
    nearest = nearest_neighbors(model, dataset.images[:1], features=of_layer, layer="0")
    assert nearest.indices[0, 0] == 0 and nearest.distances[0, 0] < 1e-6  # a batch of another size
    with pytest.raises(InputError, match="6 features, those to search have 5"):
        nearest_neighbors(model, dataset.images[:1], features=torch.rand(9, 5))
    flat = methods["embed"](model, dataset, layer="0", pooled=False)
    with pytest.raises(InputError, match="pooled=False"):
        nearest_neighbors(model, dataset.images[:1], features=flat, layer="0")
    with pytest.raises(InputError, match="exclude_self compares pixels"):
        nearest_neighbors(model, dataset.images[:1], features=embedding, exclude_self=True)


def test_either_side_of_a_set_distance(model, dataset, embedding):
    other = TensorDataset(dataset.images**2)
    expected = set_distance(model, dataset, other)
    squares = methods["embed"](model, other)
    for sides in (
        {"model": model, "features": embedding, "other": other},
        {"model": model, "dataset": dataset, "other_features": squares},
        {"features": embedding, "other_features": squares},
    ):
        result = set_distance(**sides)
        assert torch.equal(result.frechet, expected.frechet) and torch.equal(result.kernel, expected.kernel)
    with pytest.raises(InputError, match="both sets need the same features: the first has 6, the second 3"):
        set_distance(features=embedding, other_features=torch.rand(9, 3))


def test_results_from_features_hold_nothing_of_an_earlier_method(embedding):
    clustered = clusters(features=embedding, k=3, seed=0)
    result = pca(features=clustered)
    assert isinstance(result, Embedding) and result.clusters is None and result.layout == "map"
    assert list(result.metrics) == ["component 1", "component 2"]
