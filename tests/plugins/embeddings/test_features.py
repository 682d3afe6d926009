"""Features of whole data sets: ids and labels kept, work that was cut off gone on with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model, load_result, methods, run
from phosphene.builtin.scenes import draw_scenes
from phosphene.data import bundled as datasets
from phosphene.images import write_png

embed, pca, tsne = (methods[f"embeddings.{name}"] for name in ("embed", "pca", "tsne"))


def network() -> Model:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)]
    return load_model(nn.Sequential(*layers), input_size=(3, 10, 10))


MODEL = network()


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def test_features_are_pooled_or_flattened_and_by_default_the_classifiers_input():
    images = pictures(5)
    maps = MODEL.features(images, "1").detach()
    for found, expected in (
        (embed(MODEL, images), MODEL.embed(images).detach()),
        (embed(MODEL, images, layer="1"), maps.mean((2, 3))),
        (embed(MODEL, images, layer="1", pooled=False), maps.flatten(1)),
    ):
        assert torch.allclose(found.features, expected, atol=1e-6)
        assert found.ids == ("0", "1", "2", "3", "4") and found.labels is None


def test_a_model_without_a_classifier_needs_a_layer():
    model = load_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), input_size=(3, 10, 10))
    with pytest.raises(ModelError, match="name a layer"):
        embed(model, pictures(3))


def test_ids_are_paths_and_labels_are_folders(tmp_path):
    for name, picture in zip(("cat/b", "cat/a", "dog/c"), pictures(3), strict=True):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, tmp_path / "set" / f"{name}.png")
    found = run("embed", dataset=tmp_path / "set", out=tmp_path / "out")
    again = load_result(tmp_path / "out")
    assert found.ids == again.ids == ("cat/a.png", "cat/b.png", "dog/c.png")
    assert found.labels == again.labels == ("cat", "cat", "dog")
    assert torch.equal(found.features, again.features) and len(found.features) == 3


def test_resumed_run_reads_only_the_remaining_images(tmp_path, monkeypatch):
    whole = run("embed", dataset="builtin:scenes/40", batch_size=8)
    read = []
    drawn = draw_scenes

    def drawing(count, **how):
        read.append(how["start"])
        if stop and how["start"] >= 24:
            raise KeyboardInterrupt
        return drawn(count, **how)

    monkeypatch.setattr("phosphene.data.bundled.draw_scenes", drawing)
    datasets._cached_test_scenes.cache_clear()
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run("embed", dataset="builtin:scenes/40", batch_size=8, out=tmp_path / "out")
    stop = False
    read.clear()
    found = run("embed", dataset="builtin:scenes/40", batch_size=8, out=tmp_path / "out")
    assert min(read) == 24
    assert torch.equal(found.features, whole.features) and torch.equal(found.thumbnails, whole.thumbnails)
    assert found.labels == whole.labels and found.ids == whole.ids


def test_set_distance_resumes_within_either_set(tmp_path, monkeypatch):
    both = {"dataset": "builtin:scenes/16", "other": "builtin:biased-scenes/24", "batch_size": 8}
    whole = run("set_distance", **both)
    drawn = draw_scenes

    def drawing(count, **how):
        read.append((how["biased"], how["start"]))
        if stop and how["biased"] and how["start"] >= 8:
            raise KeyboardInterrupt
        return drawn(count, **how)

    monkeypatch.setattr("phosphene.data.bundled.draw_scenes", drawing)
    datasets._cached_test_scenes.cache_clear()
    read, stop = [], True
    with pytest.raises(KeyboardInterrupt):
        run("set_distance", **both, out=tmp_path / "out")
    read, stop = [], False
    found = run("set_distance", **both, out=tmp_path / "out")
    assert {start for biased, start in read if not biased} == set()
    assert {start for biased, start in read if biased} == {8, 16}
    assert torch.equal(found.frechet, whole.frechet) and torch.equal(found.kernel, whole.kernel)


def test_more_components_than_images_or_features_are_refused():
    with pytest.raises(InputError, match="needs at least 5 images, the data set has 4"):
        pca(MODEL, pictures(4), components=5)
    with pytest.raises(InputError, match="there are 32 features"):
        pca(MODEL, pictures(40), components=33)


def test_components_from_the_gram_matrix_equal_those_of_the_covariance():
    images = pictures(12)
    found = pca(MODEL, images, layer="1", components=3)
    few = pca(MODEL, images, components=3)
    for result in (found, few):
        rest = (result.features - result.features.mean(0)).double()
        values = torch.linalg.eigvalsh(rest.T @ rest).flip(0)
        assert torch.allclose(result.points.double().square().sum(0), values[:3], rtol=1e-4)
        shares = torch.stack([result.metrics[f"component {n}"] for n in (1, 2, 3)])
        assert torch.allclose(shares.double(), values[:3] / values.sum(), rtol=1e-4)


def test_equal_images_are_one_point():
    images = pictures(1).expand(7, -1, -1, -1)
    for method in (pca, tsne):
        found = method(MODEL, images)
        assert found.points.isfinite().all() and (found.points - found.points[0]).abs().max() < 1e-6


def test_too_large_perplexity_is_refused():
    with pytest.raises(InputError, match="10 images allow a perplexity of at most 9, not 30"):
        tsne(MODEL, pictures(10), perplexity=30)
    assert tsne(MODEL, pictures(10)).points.shape == (10, 2)


def test_neighbors_on_the_map_of_scenes_share_a_class():
    found = run("tsne", dataset="builtin:scenes/120")
    apart = torch.cdist(found.points, found.points).fill_diagonal_(torch.inf)
    same = [found.labels[i] == found.labels[j] for i, j in enumerate(apart.argmin(1).tolist())]
    assert sum(same) / len(same) > 0.85
    assert found.metrics["trustworthiness"] > 0.95
