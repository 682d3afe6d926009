"""Diffusion style transfer: closed forms, predictions of denoisers, attention and feature injection."""

import copy
import sys

import pytest
import torch
from torch import Tensor

from phosphene import InputError, ModelError, UnknownName, prepare
from phosphene.builtin.denoiser import ShapesDenoiser
from phosphene_plugins.style._adain import adain, channel_statistics
from phosphene_plugins.style._ddim import ddim, timesteps
from phosphene_plugins.style._diffusion_hooks import (
    LayerOutputs,
    finer_up_blocks,
    record_outputs,
    replace_outputs,
    residual_blocks,
    self_attention_layers,
)
from phosphene_plugins.style.diffusion_style import GaussianDenoiser, diffusion_style

ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def draw_images(count: int = 1, side: int = 16, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def untrained() -> ShapesDenoiser:
    """Random weights in every layer, those that are initialized with zeros included."""
    torch.manual_seed(0)
    denoiser = ShapesDenoiser()
    for parameter in denoiser.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return denoiser


def test_inversion_of_a_gaussian_has_a_closed_form_and_twice_the_steps_halve_the_error():
    """sqrt(abar_t) mu + sqrt((abar_t s^2 + 1 - abar_t) / (abar_0 s^2 + 1 - abar_0)) (x - sqrt(abar_0) mu)"""
    mu, s, x = -0.4, 0.6, torch.linspace(-2, 2, 27, dtype=torch.float64).view(1, 3, 3, 3)
    denoiser = GaussianDenoiser(ALPHAS_CUMPROD, mu, s)
    first, last = ALPHAS_CUMPROD[0], ALPHAS_CUMPROD[-1]
    spread = ((last * s**2 + 1 - last) / (first * s**2 + 1 - first)).sqrt()
    expected = last.sqrt() * mu + spread * (x - first.sqrt() * mu)
    inverted = [ddim(denoiser, denoiser.eps, x, timesteps(1000, n), "") for n in (50, 100, 200)]
    errors = [(x_t - expected).abs().max().item() for x_t in inverted]
    assert errors[0] < 0.1
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine / coarse == pytest.approx(0.5, abs=0.05)
    reconstruction = ddim(denoiser, denoiser.eps, inverted[-1], timesteps(1000, 200)[::-1], "")
    assert (reconstruction - x).abs().max() < 0.05


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_noise_is_the_same_for_every_prediction_type(prediction):
    class Predictor(GaussianDenoiser):
        def forward(self, x: Tensor, t: int) -> Tensor:
            eps, (signal, level) = super().forward(x, t), self.levels(t)
            clean = (x - level * eps) / signal
            outputs = {"epsilon": eps, "v_prediction": signal * eps - level * clean, "sample": clean}
            variance = torch.ones_like(eps)  # which is ignored
            return torch.cat([outputs[prediction], variance], 1)

    predictor = Predictor(ALPHAS_CUMPROD, 0.3, 0.5)
    predictor.prediction = prediction
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0, 10, 500, 999):
        plain = GaussianDenoiser(ALPHAS_CUMPROD, 0.3, 0.5).eps(x, t)
        assert torch.allclose(predictor.eps(x, t), plain, atol=1e-9)


def test_adain_matches_the_statistics_and_is_the_identity_for_itself():
    content, styles = draw_images().double(), draw_images(2, 9, seed=1).double()
    result = adain(content, styles)
    for statistic, expected in zip(channel_statistics(result), channel_statistics(styles), strict=True):
        assert torch.allclose(statistic, expected, atol=1e-3)
    assert torch.allclose(adain(content, content), content, atol=1e-12)
    assert adain(content[..., :1, :1], styles).isfinite().all()


def test_injecting_an_image_into_itself_changes_nothing(untrained):
    """With its own keys and values, and a temperature of 1, attention is unchanged."""
    image = draw_images()
    plain = diffusion_style(image, image, untrained, inject="nothing", steps=20)
    own = diffusion_style(image, image, untrained, gamma=1, temperature=1, steps=20)
    other = diffusion_style(image, draw_images(seed=9), untrained, gamma=1, temperature=1, steps=20)
    assert (own.stylized - plain.stylized).abs().max() < 0.1 * (other.stylized - plain.stylized).abs().max()


@pytest.mark.parametrize("inject", ["attention", "features"])
def test_injection_changes_the_image_through_the_selected_layers(untrained, inject):
    image, style = draw_images(), draw_images(seed=1)
    plain = diffusion_style(image, style, untrained, inject="nothing", steps=3)
    result = diffusion_style(image, style, untrained, inject=inject, steps=3)
    assert (result.stylized - plain.stylized).abs().max() > 1e-3
    available = self_attention_layers(untrained) if inject == "attention" else residual_blocks(untrained)
    named = diffusion_style(
        image, style, untrained, inject=inject, layers=finer_up_blocks(available), steps=3
    )
    assert torch.equal(named.stylized, result.stylized)
    with pytest.raises(UnknownName, match=f"did you mean '{available[0]}'"):
        diffusion_style(image, style, untrained, inject=inject, layers=[available[0] + "0"])


def test_queries_keys_and_values_equal_the_equations(untrained):
    """Attention computed by hand: Q = gamma Q_c + (1 - gamma) Q_z, K and V of the style."""
    (layer,) = [name for name in self_attention_layers(untrained) if "up_blocks.1" in name]
    x, y = 2 * draw_images(2, seed=2)[:1] - 1, 2 * draw_images(2, 24, seed=3) - 1
    projections = [f"{layer}.to_{part}" for part in "qkv"]
    attention_outputs: list[Tensor] = []
    with torch.no_grad():
        recorded: list[LayerOutputs] = [{}, {}]
        for outputs, image in zip(recorded, (x, y), strict=True):
            record_outputs(untrained, projections, outputs)(image, 7)
        content, style = recorded
        keys_and_values = [style[7][name].flatten(0, 1)[None] for name in projections[1:]]
        replacements = {projections[0]: lambda t, own: 1.5 * (0.25 * content[t][projections[0]] + 0.75 * own)}
        replacements |= {
            n: lambda t, own, k=k: k for n, k in zip(projections[1:], keys_and_values, strict=True)
        }
        module = untrained.get_submodule(layer)
        handle = module.to_out.register_forward_pre_hook(
            lambda _, inputs: attention_outputs.append(inputs[0])
        )
        replace_outputs(untrained, replacements)(x, 7)
        handle.remove()
        query = content[7][projections[0]] * 1.5  # the layers below are unchanged, so Q_z = Q_c
        heads = [part.unflatten(2, (-1, 16)).transpose(1, 2) for part in (query, *keys_and_values)]
        weights = (heads[0] @ heads[1].transpose(-1, -2) / 4).softmax(-1)
        expected = (weights @ heads[2]).transpose(1, 2).flatten(2)
    assert torch.allclose(attention_outputs[0], expected, atol=1e-5)


def test_a_repeated_style_equals_one_style(
    untrained: ShapesDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over the positions of two equal styles is that over one's.

    The unbiased deviation of twice the 256 positions is smaller by a thousandth, which random weights
    amplify: AdaIN reads one of the styles here.
    """
    module = sys.modules["phosphene_plugins.style.diffusion_style"]
    monkeypatch.setattr(module, "adain", lambda content, style: adain(content, style[:1]))
    image, style = draw_images().double(), draw_images(seed=1).double()
    denoiser = copy.deepcopy(untrained).double()
    once = diffusion_style(image, style, denoiser, steps=2)
    twice = diffusion_style(image, style.repeat(2, 1, 1, 1), denoiser, steps=2)
    assert torch.allclose(once.stylized, twice.stylized, atol=1e-9)


def test_default_layers_of_stable_diffusion_are_those_of_the_paper():
    names = [f"unet.up_blocks.{b}.attentions.{n}.attn1" for b in (1, 2, 3) for n in range(3)]
    down = ["unet.down_blocks.0.attentions.0.attn1", "unet.mid_block.attentions.0.attn1"]
    assert finer_up_blocks(down + names) == names[3:]
    assert finer_up_blocks(down) == down


def test_sides_of_any_length_and_any_number_of_channels(untrained):
    image = draw_images(2, 16)[..., :13, :11]
    assert diffusion_style(image, draw_images(seed=1), untrained, steps=1).stylized.shape == image.shape
    gray = GaussianDenoiser(ALPHAS_CUMPROD, 0, 0.5)
    gray.channels = 1
    one = draw_images(channels=1)
    assert diffusion_style(one, one, gray, inject="nothing", steps=1).stylized.shape == one.shape
    with pytest.raises(InputError, match="takes 3 channels, the styles have 1"):
        diffusion_style(image, one, untrained)


def test_a_model_without_layers_to_inject_into_is_refused():
    bare = GaussianDenoiser(ALPHAS_CUMPROD, 0, 0.5)
    with pytest.raises(ModelError, match="no self-attention layer"):
        diffusion_style(draw_images(), draw_images(), bare)
    with pytest.raises(ModelError, match="no residual block"):
        diffusion_style(draw_images(), draw_images(), bare, inject="features")


def test_styles_are_read_at_the_height_of_the_images():
    result = prepare("diffusion_style", images=draw_images(1, 24), styles="builtin:bricks", steps=1)
    assert result.inputs["styles"].shape == (1, 3, 24, 24)
    assert result.passes() == (3, 0)
