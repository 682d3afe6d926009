"""Diffusion style: against the closed form, through every door of the denoiser, and what injection does."""

import pytest
import torch
from torch import Tensor

from phosphene import InputError, ModelError, UnknownName, prepare
from phosphene.builtin.denoiser import ShapesDenoiser
from phosphene_plugins.style._adain import adain, statistics
from phosphene_plugins.style._diffusion_hooks import (
    Memory,
    attention_layers,
    finer,
    injected,
    residual_blocks,
    watched,
)
from phosphene_plugins.style.diffusion_style import GaussianDenoiser, ddim, diffusion_style, grid

ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def pictures(count: int = 1, side: int = 16, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def untrained() -> ShapesDenoiser:
    """Every layer does something: those that begin at zero are drawn, too."""
    torch.manual_seed(0)
    denoiser = ShapesDenoiser()
    for parameter in denoiser.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return denoiser


def test_inversion_of_a_gaussian_goes_where_the_equation_says_and_twice_the_steps_halve_its_error():
    """sqrt(abar_t) mu + sqrt((abar_t s^2 + 1 - abar_t) / (abar_0 s^2 + 1 - abar_0)) (x - sqrt(abar_0) mu)"""
    mu, s, x = -0.4, 0.6, torch.linspace(-2, 2, 27, dtype=torch.float64).view(1, 3, 3, 3)
    denoiser = GaussianDenoiser(ALPHAS, mu, s)
    first, last = ALPHAS[0], ALPHAS[-1]
    spread = ((last * s**2 + 1 - last) / (first * s**2 + 1 - first)).sqrt()
    wanted = last.sqrt() * mu + spread * (x - first.sqrt() * mu)
    inverted = [ddim(denoiser, denoiser.eps, x, grid(1000, n), "") for n in (50, 100, 200)]
    errors = [(found - wanted).abs().max().item() for found in inverted]
    assert errors[0] < 0.1
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine / coarse == pytest.approx(0.5, abs=0.05)
    back = ddim(denoiser, denoiser.eps, inverted[-1], grid(1000, 200)[::-1], "")
    assert (back - x).abs().max() < 0.05


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_whatever_a_network_predicts_its_noise_is_the_same(prediction):
    class Says(GaussianDenoiser):
        def forward(self, x: Tensor, t: int) -> Tensor:
            eps, (signal, level) = super().forward(x, t), self.levels(t)
            clean = (x - level * eps) / signal
            said = {"epsilon": eps, "v_prediction": signal * eps - level * clean, "sample": clean}[prediction]
            return torch.cat([said, torch.ones_like(said)], 1)  # and its variance, nobody asked for

    says = Says(ALPHAS, 0.3, 0.5)
    says.prediction = prediction
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0, 10, 500, 999):
        plain = GaussianDenoiser(ALPHAS, 0.3, 0.5).eps(x, t)
        assert torch.allclose(says.eps(x, t), plain, atol=1e-9)


def test_adain_has_the_styles_statistics_and_leaves_what_has_them():
    content, styles = pictures().double(), pictures(2, 9, seed=1).double()
    made = adain(content, styles)
    for found, wanted in zip(statistics(made), statistics(styles), strict=True):
        assert torch.allclose(found, wanted, atol=1e-3)
    assert torch.allclose(adain(content, content), content, atol=1e-12)
    assert adain(content[..., :1, :1], styles).isfinite().all()


def test_a_picture_injected_into_itself_is_drawn_as_it_was(untrained):
    """With its own keys and values, and a temperature of 1, attention is what it would have been."""
    image = pictures()
    plain = diffusion_style(image, image, untrained, inject="nothing", steps=20)
    own = diffusion_style(image, image, untrained, gamma=1, temperature=1, steps=20)
    other = diffusion_style(image, pictures(seed=9), untrained, gamma=1, temperature=1, steps=20)
    assert (own.stylized - plain.stylized).abs().max() < 0.1 * (other.stylized - plain.stylized).abs().max()


@pytest.mark.parametrize("inject", ["attention", "features"])
def test_injection_changes_the_picture_and_only_through_the_layers_named(untrained, inject):
    image, style = pictures(), pictures(seed=1)
    plain = diffusion_style(image, style, untrained, inject="nothing", steps=3)
    made = diffusion_style(image, style, untrained, inject=inject, steps=3)
    assert (made.stylized - plain.stylized).abs().max() > 1e-3
    known = attention_layers(untrained) if inject == "attention" else residual_blocks(untrained)
    named = diffusion_style(image, style, untrained, inject=inject, layers=finer(known), steps=3)
    assert torch.equal(named.stylized, made.stylized)
    with pytest.raises(UnknownName, match=f"did you mean '{known[0]}'"):
        diffusion_style(image, style, untrained, inject=inject, layers=[known[0] + "0"])


def test_queries_keys_and_values_are_those_of_the_paper(untrained):
    """What a layer is given, spelled out: Q = gamma Q_c + (1 - gamma) Q_z, K and V of the style."""
    (layer,) = [name for name in attention_layers(untrained) if "up_blocks.1" in name]
    x, y = 2 * pictures(2, seed=2)[:1] - 1, 2 * pictures(2, 24, seed=3) - 1
    projections = [f"{layer}.to_{part}" for part in "qkv"]
    seen: list[Tensor] = []
    with torch.no_grad():
        memories: list[Memory] = [{}, {}]
        for memory, picture in zip(memories, (x, y), strict=True):
            watched(untrained, projections, memory)(picture, 7)
        content, style = memories
        kept = [style[7][name].flatten(0, 1)[None] for name in projections[1:]]
        changes = {projections[0]: lambda t, own: 1.5 * (0.25 * content[t][projections[0]] + 0.75 * own)}
        changes |= {n: lambda t, own, k=k: k for n, k in zip(projections[1:], kept, strict=True)}
        module = untrained.get_submodule(layer)
        handle = module.to_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        injected(untrained, changes)(x, 7)
        handle.remove()
        query = content[7][projections[0]] * 1.5  # layers below are as they were, so Q_z = Q_c
        heads = [part.unflatten(2, (-1, 16)).transpose(1, 2) for part in (query, *kept)]
        weights = (heads[0] @ heads[1].transpose(-1, -2) / 4).softmax(-1)
        wanted = (weights @ heads[2]).transpose(1, 2).flatten(2)
    assert torch.allclose(seen[0], wanted, atol=1e-5)


def test_several_styles_are_one_together(untrained):
    image, style = pictures(), pictures(seed=1)
    once = diffusion_style(image, style, untrained, steps=2)
    twice = diffusion_style(image, style.repeat(2, 1, 1, 1), untrained, steps=2)
    assert torch.allclose(once.stylized, twice.stylized, atol=1e-3)


def test_layers_of_stable_diffusion_are_the_papers():
    names = [f"unet.up_blocks.{b}.attentions.{n}.attn1" for b in (1, 2, 3) for n in range(3)]
    down = ["unet.down_blocks.0.attentions.0.attn1", "unet.mid_block.attentions.0.attn1"]
    assert finer(down + names) == names[3:]
    assert finer(down) == down


def test_sides_of_any_length_and_any_number_of_channels(untrained):
    image = pictures(2, 16)[..., :13, :11]
    assert diffusion_style(image, pictures(seed=1), untrained, steps=1).stylized.shape == image.shape
    grey = GaussianDenoiser(ALPHAS, 0, 0.5)
    grey.channels = 1
    one = pictures(channels=1)
    assert diffusion_style(one, one, grey, inject="nothing", steps=1).stylized.shape == one.shape
    with pytest.raises(InputError, match="takes 3 channels, the styles have 1"):
        diffusion_style(image, one, untrained)


def test_a_model_without_layers_to_inject_into_says_so():
    bare = GaussianDenoiser(ALPHAS, 0, 0.5)
    with pytest.raises(ModelError, match="no self-attention layer"):
        diffusion_style(pictures(), pictures(), bare)
    with pytest.raises(ModelError, match="no residual block"):
        diffusion_style(pictures(), pictures(), bare, inject="features")


def test_styles_are_read_as_high_as_the_pictures():
    made = prepare("diffusion_style", images=pictures(1, 24), styles="builtin:bricks", steps=1)
    assert made.inputs["styles"].shape == (1, 3, 24, 24)
    assert made.passes() == (3, 0)
