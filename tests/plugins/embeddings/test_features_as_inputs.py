"""Features of data sets: ids, labels, and interrupted runs that resume."""

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


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def test_features_are_pooled_or_flattened_and_by_default_the_classifiers_input():
    images = random_images(5)
    maps = MODEL.features(images, "1").detach()
    for result, expected in (
        (embed(MODEL, images), MODEL.embed(images).detach()),
        (embed(MODEL, images, layer="1"), maps.mean((2, 3))),
        (embed(MODEL, images, layer="1", pooled=False), maps.flatten(1)),
    ):
        assert torch.allclose(result.features, expected, atol=1e-6)
        assert result.ids == ("0", "1", "2", "3", "4") and result.labels is None


def test_a_model_without_a_classifier_needs_a_layer():
    model = load_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), input_size=(3, 10, 10))
    with pytest.raises(ModelError, match="name a layer"):
        embed(model, random_images(3))


def test_ids_are_paths_and_labels_are_folders(tmp_path):
    for name, image in zip(("cat/b", "cat/a", "dog/c"), random_images(3), strict=True):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(image, tmp_path / "set" / f"{name}.png")
    result = run("embed", dataset=tmp_path / "set", out=tmp_path / "out")
    again = load_result(tmp_path / "out")
    assert result.ids == again.ids == ("cat/a.png", "cat/b.png", "dog/c.png")
    assert result.labels == again.labels == ("cat", "cat", "dog")
    assert torch.equal(result.features, again.features) and len(result.features) == 3


def test_resumed_run_reads_only_the_remaining_images(tmp_path, monkeypatch):
    full = run("embed", dataset="builtin:scenes/40", batch_size=8)
    read = []
    original = draw_scenes

    def draw(count, **options):
        read.append(options["start"])
        if stop and options["start"] >= 24:
            raise KeyboardInterrupt
        return original(count, **options)

    monkeypatch.setattr("phosphene.data.bundled.draw_scenes", draw)
    datasets._cached_test_scenes.cache_clear()
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run("embed", dataset="builtin:scenes/40", batch_size=8, out=tmp_path / "out")
    stop = False
    read.clear()
    result = run("embed", dataset="builtin:scenes/40", batch_size=8, out=tmp_path / "out")
    assert min(read) == 24
    assert torch.equal(result.features, full.features) and torch.equal(result.thumbnails, full.thumbnails)
    assert result.labels == full.labels and result.ids == full.ids


def test_set_distance_resumes_within_either_set(tmp_path, monkeypatch):
    both = {"dataset": "builtin:scenes/16", "other": "builtin:biased-scenes/24", "batch_size": 8}
    full = run("set_distance", **both)
    original = draw_scenes

    def draw(count, **options):
        read.append((options["biased"], options["start"]))
        if stop and options["biased"] and options["start"] >= 8:
            raise KeyboardInterrupt
        return original(count, **options)

    monkeypatch.setattr("phosphene.data.bundled.draw_scenes", draw)
    datasets._cached_test_scenes.cache_clear()
    read, stop = [], True
    with pytest.raises(KeyboardInterrupt):
        run("set_distance", **both, out=tmp_path / "out")
    read, stop = [], False
    result = run("set_distance", **both, out=tmp_path / "out")
    assert {start for biased, start in read if not biased} == set()
    assert {start for biased, start in read if biased} == {8, 16}
    assert torch.equal(result.frechet, full.frechet) and torch.equal(result.kernel, full.kernel)


def test_more_components_than_images_or_features_are_refused():
    with pytest.raises(InputError, match="needs at least 5 images, the data set has 4"):
        pca(MODEL, random_images(4), components=5)
    with pytest.raises(InputError, match="there are 32 features"):
        pca(MODEL, random_images(40), components=33)


def test_components_from_the_gram_matrix_equal_those_of_the_covariance():
    images = random_images(12)
    many = pca(MODEL, images, layer="1", components=3)
    few = pca(MODEL, images, components=3)
    for result in (many, few):
        rest = (result.features - result.features.mean(0)).double()
        values = torch.linalg.eigvalsh(rest.T @ rest).flip(0)
        assert torch.allclose(result.points.double().square().sum(0), values[:3], rtol=1e-4)
        shares = torch.stack([result.metrics[f"component {n}"] for n in (1, 2, 3)])
        assert torch.allclose(shares.double(), values[:3] / values.sum(), rtol=1e-4)


def test_equal_images_are_one_point():
    images = random_images(1).expand(7, -1, -1, -1)
    for method in (pca, tsne):
        result = method(MODEL, images)
        assert result.points.isfinite().all() and (result.points - result.points[0]).abs().max() < 1e-6


def test_too_large_perplexity_is_refused():
    with pytest.raises(InputError, match="10 images allow a perplexity of at most 9, not 30"):
        tsne(MODEL, random_images(10), perplexity=30)
    assert tsne(MODEL, random_images(10)).points.shape == (10, 2)


def test_neighbors_on_the_map_of_scenes_share_a_class():
    result = run("tsne", dataset="builtin:scenes/120")
    distances = torch.cdist(result.points, result.points).fill_diagonal_(torch.inf)
    same = [result.labels[i] == result.labels[j] for i, j in enumerate(distances.argmin(1).tolist())]
    assert sum(same) / len(same) > 0.85
    assert result.metrics["trustworthiness"] > 0.95
