"""Latent visualisation: closed form, seeds, bounds, other sizes and channels, realism against fidelity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Class, InputError, load_model, methods, run
from phosphene.builtin.networks import load_network, normalise
from phosphene.builtin.scenes import CLASSES
from phosphene.generative import Generator
from phosphene.testing.networks import make_network

search = methods["synthesis.latent_visualization"]


def colours(z: Tensor) -> Tensor:
    return z.sigmoid()[:, :, None, None].expand(-1, -1, 12, 12)


def test_oracle() -> None:
    assert search.spec.oracle is not None
    search.spec.oracle()


def test_scores_rise_codes_stay_in_their_bound_and_a_seed_says_all() -> None:
    model, generator = (
        make_network("gap"),
        Generator([3], colours, lambda images: images.mean((2, 3)).logit()),
    )
    made, again, other = (
        search(model, Class((0, 1, 2)), generator, l2=0.0, bound=1.5, steps=20, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(made.images, again.images) and torch.equal(made.free, again.free)
    assert not torch.equal(made.images, other.images)
    assert (made.scores[-1] > made.scores[0]).all() and (made.free_scores[-1] > made.free_scores[0]).all()
    assert made.codes.abs().max() <= 1.5
    assert made.images.min() >= 0 and made.images.max() <= 1
    # What the decoder can draw, the encoder finds again; noise in the pixels it cannot draw.
    assert made.strange is not None and made.free_strange is not None
    assert made.strange.max() < 1e-5 < 0.01 < made.free_strange.min()


def test_the_penalty_draws_codes_to_nothing() -> None:
    model, generator = make_network("gap"), Generator([3], colours)
    sizes = [
        search(model, Class(1), generator, l2=l2, steps=60, seed=0).codes.norm().item()
        for l2 in (0.0, 0.1, 10.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 0.2


@pytest.mark.parametrize("name", ["gray", "double"])
def test_pictures_are_brought_to_what_the_model_sees(name: str) -> None:
    model = make_network(name)
    made = search(model, Class(1), Generator([3], colours), steps=2, frames=2, seed=0)
    assert made.images.shape == (1, *model.input_size) and made.images.dtype == model.dtype
    assert len(made.animation_frames()) == 2


def test_a_decoder_that_draws_no_pictures_is_refused_before_any_work() -> None:
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), input_size=(4, 4, 4))
    for decoder, told in ((colours, "the model takes 4 channels, the generator draws 3"),
                          (torch.sigmoid, r"draws pictures \(N, C, H, W\)")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            search(model, Class(1), Generator([3], decoder))


def test_the_generator_is_left_as_it_was() -> None:
    decoder = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Sigmoid(), nn.Unflatten(1, (3, 1, 1)))
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    made = [search(make_network("gap"), Class(1), Generator([3], decoder), steps=3, seed=0) for _ in range(2)]
    assert torch.equal(made[0].images, made[1].images)  # without dropout
    assert decoder.training and all(p.requires_grad and p.grad is None for p in decoder.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())


def test_bundled_codes_show_the_class_to_a_network_that_had_no_say_and_free_pixels_are_strange() -> None:
    """The trade-off of lecture 21.6.2 on the bundled world."""
    made = run("latent_visualization", target=list(range(10)), steps=60, seed=0, progress=False)
    assert made.targets == CLASSES
    second = load_network("shapes-resnet")
    with torch.no_grad():
        said = second(normalise(made.images)).argmax(1)
    assert (said == torch.arange(10)).sum() >= 8
    assert made.strange is not None and made.free_strange is not None
    assert (made.strange < made.free_strange).all()
