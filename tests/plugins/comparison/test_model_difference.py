"""Two networks on one data set: what they disagree on, and which networks cannot be compared."""

import pytest
import torch
from torch import nn

from phosphene import InputError, TensorDataset, UnknownName, load_model, run


def linear(classes, side=4, seed=0):
    torch.manual_seed(seed)
    count = classes if isinstance(classes, int) else len(classes)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, count))
    names = None if isinstance(classes, int) else classes
    return load_model(network, input_size=(3, side, side), classes=names)


def test_a_biased_network_depends_on_the_background():
    """On the images of largest divergence, Grad-CAM of the biased network covers the background."""
    result = run("model_difference", dataset="builtin:scenes/60", other="builtin:shapes-biased", k=6)
    assert result.agreement < 0.3 and bool((result.divergences[result.indices] > 0.68).all())
    same = run("model_difference", dataset="builtin:scenes/12", other="builtin:shapes-vgg", k=2)
    assert same.agreement == 1 and float(same.divergences.max()) < 1e-9
    from phosphene.data import open_dataset

    scenes = open_dataset("builtin:scenes/60", load_model("builtin:shapes-vgg").transform, (64, 64))
    masks = scenes.masks(result.indices.tolist())
    shares = (result.maps * masks[:, None]).sum((2, 3)) / result.maps.sum((2, 3)).clamp(min=1e-9)
    assert bool((shares[:, 0] > 1.5 * shares[:, 1]).all())


def test_maps_of_another_method_and_size():
    images = TensorDataset(torch.rand(5, 3, 4, 4))
    result = run(
        "model_difference",
        model=linear(3),
        other=linear(3, side=8, seed=1),
        dataset=images,
        attribution="smooth_grad",
        attribution_params={"samples": 2},
        k=9,
    )
    assert result.maps.shape == (5, 2, 4, 4) and result.attribution == "smooth_grad"
    assert result.classes == ("class 0", "class 1", "class 2")


def test_networks_of_other_classes_are_refused():
    inputs = {"model": linear(["a", "b"]), "dataset": torch.rand(3, 3, 4, 4)}
    with pytest.raises(InputError, match="other classes, which cannot be compared: b, c"):
        run("model_difference", **inputs, other=linear(["a", "c"]))
    with pytest.raises(InputError, match="2 classes and .* 3"):
        run("model_difference", **inputs, other=linear(3))
    with pytest.raises(InputError, match="needs other|pass the other one"):
        run("model_difference", **inputs)
    with pytest.raises(InputError, match="returns no maps"):
        run("model_difference", **inputs, other=linear(2), attribution="activation_maps")
    with pytest.raises(UnknownName, match="grad_cam"):
        run("model_difference", **inputs, other=linear(2), attribution="grad_cams")
