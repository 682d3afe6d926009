"""CKA of two models, probes by layer, and what they refuse."""

import pytest
import torch

from phosphene import InputError, ModelError, TensorDataset, load_model, load_result, replay, run


def test_cka_of_two_networks_follows_the_depth(tmp_path):
    """Layers of two trained networks are most similar to those of like depth; the result can be run again."""
    options = {"dataset": "builtin:scenes/64", "other": "builtin:shapes-resnet"}
    result = run("cka", **options, out=tmp_path / "out")
    first, last = result.similarity[0], result.similarity[-1]
    assert first[0] > 0.9 and first[0] > 5 * first[-1] and last[-1] > 5 * last[0]
    assert replay(tmp_path / "out").same
    assert load_result(tmp_path / "out").inputs["other"]["uri"] == "builtin:shapes-resnet"


def test_minibatches_estimate_the_cka_of_all_images():
    """The unbiased estimate of small groups has no offset, not even for random vectors of few images."""
    layers = ["features.6", "features.16"]
    once, parts = (run("cka", dataset="builtin:scenes/192", layers=layers, group=n) for n in (192, 24))
    assert abs(float((once.similarity - parts.similarity)[0, 1])) < 0.1
    noise = TensorDataset(torch.rand(60, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    model = load_model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 8)))
    same = run("cka", model=model, dataset=noise, layers=["0"], other_layers=["1"], group=20).similarity
    assert abs(float(same)) < 0.35


def test_what_cannot_be_compared_is_refused():
    images = torch.rand(8, 3, 64, 64)
    with pytest.raises(InputError, match="no classes"):
        run("linear_probe", dataset=images)
    with pytest.raises(InputError, match="single class"):
        run("knn_probe", dataset=TensorDataset(images, ["a"] * 8), k=2)
    with pytest.raises(InputError, match="single image"):
        run("linear_probe", dataset=TensorDataset(images, ["a"] * 7 + ["b"]))
    with pytest.raises(InputError, match="at least 4 images"):
        run("cka", dataset=images[:3])
    with pytest.raises(ModelError, match="the same for all images"):
        run("cka", dataset=images[:1].expand(6, -1, -1, -1))
    with pytest.raises(InputError, match="span no plane"):
        run("decision_boundary_map", dataset=images[:1].expand(6, -1, -1, -1))


def test_axes_of_the_decision_map_are_the_first_and_the_second_component():
    figure = run("decision_boundary_map", dataset="builtin:scenes/20").draw()
    axes = figure.axes[0]
    assert axes.get_xlabel().startswith("component 1,") and axes.get_ylabel().startswith("component 2,")


def test_deeper_layers_of_a_classifier_separate_the_classes():
    options = {"dataset": "builtin:scenes/120"}
    for name, extra in (("linear_probe", {"seed": 0}), ("knn_probe", {"k": 5})):
        result = run(name, **options, **extra)
        assert result.best == result.layers[-1] and float(result.accuracy[-1]) > 0.85
        assert float(result.accuracy[0]) < 0.4
