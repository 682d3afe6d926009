"""Generators: by name, from a folder and as an object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, load_result, methods, run
from phosphene.generative import Generator
from phosphene.results import TrainedNetwork
from phosphene.roles import ROLES, InputContext

FEW: dict[str, Any] = {"steps": 2, "target": [1, 4], "seed": 0, "progress": False}


def constant_images(z: Tensor) -> Tensor:
    """Images (N, 3, 16, 16) of constant color from codes (N, 3)."""
    return z.sigmoid()[:, :, None, None].expand(-1, -1, 16, 16)


def test_the_bundled_generator_is_recorded_by_name() -> None:
    default, named = (
        run("latent_visualization", **FEW | options)
        for options in ({}, {"generator": "builtin:shapes-autoencoder"})
    )
    assert default.inputs["generator"] == "builtin:shapes-autoencoder"
    assert torch.equal(default.images, named.images)


def test_generator_can_be_a_function() -> None:
    generator = Generator([3], constant_images)
    assert generator.latent_size == (3,) and torch.equal(
        generator(torch.zeros(1, 3)), constant_images(torch.zeros(1, 3))
    )
    result = run("latent_visualization", **FEW, generator=generator)
    assert result.codes.shape == (2, 3) and result.reconstruction_error is None
    assert (result.images.amax((2, 3)) - result.images.amin((2, 3))).max() < 1e-6
    with pytest.raises(InputError, match="no encoder"):
        generator.encode(torch.zeros(1, 3, 16, 16))


def test_decoded_images_are_clipped() -> None:
    decoded = Generator([3], lambda z: 5 * z.view(-1, 3, 1, 1)).decode(torch.tensor([[-1.0, 0.1, 1.0]]))
    assert decoded.flatten().tolist() == [0.0, 0.5, 1.0]


def test_a_trained_generator_is_accepted_as_object_and_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def color_generator(size: int) -> Generator:
        return Generator([size], nn.Sequential(nn.Linear(size, 3), nn.Sigmoid(), nn.Unflatten(1, (3, 1, 1))))

    monkeypatch.setattr(methods["style.fast_style_fit"], "network", color_generator)
    torch.manual_seed(0)
    trained = TrainedNetwork(
        network=color_generator(4),
        method="style.fast_style_fit",
        config={"size": 4},
        losses=torch.zeros(1),
        labels=("colors",),
        previews=torch.zeros(1, 3, 4, 4),
    )
    folder = trained.save(tmp_path / "colors")
    by_object, by_folder = (run("latent_visualization", **FEW, generator=g) for g in (trained, folder))
    assert torch.equal(by_object.images, by_folder.images)
    assert by_folder.inputs["generator"] == str(folder)


@pytest.mark.parametrize("value", [5, nn.Linear(3, 3), constant_images])
def test_other_objects_are_refused_with_the_constructor(value: Any) -> None:
    with pytest.raises(InputError, match=r"Generator\(latent_size, decoder\)"):
        ROLES["generator"].check(ROLES["generator"].make(value, InputContext()), InputContext())


def test_network_of_another_method_is_refused() -> None:
    stylizer = load_result("builtin:shapes-styles")
    with pytest.raises(InputError, match="not a StyleNetwork"):
        ROLES["generator"].check(ROLES["generator"].make(stylizer, InputContext()), InputContext())
