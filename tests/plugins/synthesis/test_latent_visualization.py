"""Latent visualization: oracle, seeds, bounds, image shapes, reconstruction error against score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Class, InputError, load_model, methods, run
from phosphene.builtin.networks import load_network, normalize
from phosphene.builtin.scenes import CLASSES
from phosphene.generative import Generator
from phosphene.testing.networks import make_network

search = methods["synthesis.latent_visualization"]


def uniform_images(z: Tensor) -> Tensor:
    return z.sigmoid()[:, :, None, None].expand(-1, -1, 12, 12)


def test_oracle() -> None:
    assert search.spec.oracle is not None
    search.spec.oracle()


def test_scores_rise_codes_stay_in_their_bound_and_seeds_repeat() -> None:
    model, generator = (
        make_network("gap"),
        Generator([3], uniform_images, lambda images: images.mean((2, 3)).logit()),
    )
    result, again, other = (
        search(model, Class((0, 1, 2)), generator, l2=0.0, bound=1.5, steps=20, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(result.images, again.images) and torch.equal(result.pixel_images, again.pixel_images)
    assert not torch.equal(result.images, other.images)
    for scores in (result.scores, result.pixel_scores):
        assert (scores[-1] > scores[0]).all()
    assert result.codes.abs().max() <= 1.5
    assert result.images.min() >= 0 and result.images.max() <= 1
    # The autoencoder is exact on the decoder's images, and not on noise in the pixels.
    assert result.reconstruction_error is not None and result.pixel_reconstruction_error is not None
    assert result.reconstruction_error.max() < 1e-5 < 0.01 < result.pixel_reconstruction_error.min()


def test_penalty_shrinks_the_codes() -> None:
    model, generator = make_network("gap"), Generator([3], uniform_images)
    sizes = [
        search(model, Class(1), generator, l2=l2, steps=60, seed=0).codes.norm().item()
        for l2 in (0.0, 0.1, 10.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 0.2


@pytest.mark.parametrize("name", ["gray", "double"])
def test_images_match_the_input_of_the_model(name: str) -> None:
    model = make_network(name)
    result = search(model, Class(1), Generator([3], uniform_images), steps=2, frames=2, seed=0)
    assert result.images.shape == (1, *model.input_size) and result.images.dtype == model.dtype
    assert len(result.animation_frames()) == 2


def test_generator_of_other_shapes_is_refused() -> None:
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), input_size=(4, 4, 4))
    for decoder, message in ((uniform_images, "the model takes 4 channels, the generator returns 3"),
                          (torch.sigmoid, r"returns images \(N, C, H, W\)")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            search(model, Class(1), Generator([3], decoder))


def test_generator_is_not_modified() -> None:
    decoder = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Sigmoid(), nn.Unflatten(1, (3, 1, 1)))
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    first, second = (
        search(make_network("gap"), Class(1), Generator([3], decoder), steps=3, seed=0) for _ in range(2)
    )
    assert torch.equal(first.images, second.images)  # without dropout
    assert decoder.training and all(p.requires_grad and p.grad is None for p in decoder.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())


def test_second_network_recognises_the_codes_and_pixels_reconstruct_worse() -> None:
    """The trade-off of lecture 21.6.2 on the bundled world."""
    result = run("latent_visualization", target=list(range(10)), steps=60, seed=0, progress=False)
    assert result.targets == CLASSES
    second = load_network("shapes-resnet")
    with torch.no_grad():
        predictions = second(normalize(result.images)).argmax(1)
    assert (predictions == torch.arange(10)).sum() >= 8
    assert result.reconstruction_error is not None and result.pixel_reconstruction_error is not None
    assert (result.reconstruction_error < result.pixel_reconstruction_error).all()
