"""StyleDiffusion: style removal, directions in an embedding, tiny pipelines, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_pipelines import write_pipeline

from phosphene import InputError, load_model, run
from phosphene.builtin.denoiser import load_denoiser


def test_fine_tuning_lowers_the_loss_and_leaves_the_model_unchanged() -> None:
    denoiser = load_denoiser()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    result: Any = run("style_diffusion", images="builtin:scenes/1", styles="builtin:swirls",
                      denoiser=denoiser, steps=1, fit_steps=12)  # fmt: skip
    assert result.losses.shape == (12, 1) and result.losses[-1] < 0.8 * result.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not any(parameter.grad is not None for parameter in denoiser.parameters())


def test_the_style_is_its_own_content_where_it_is_gray() -> None:
    """A gray image without removal in time is its own content: D_s = 0, and only colors are removed."""
    gray = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    options: dict[str, Any] = {"styles": gray, "removal": 0.0, "steps": 1, "fit_steps": 1, "lr": 1e-9}
    colored = (0.6 * gray + torch.tensor([0.299 - 1, 0.299, 0.299])[:, None, None] * -0.1).clamp(0, 1)
    first, second = (run("style_diffusion", images=images, **options).stylized for images in (
        colored, (colored * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, True).expand_as(gray),
    ))  # fmt: skip
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["sd2", "flux"])
def test_local_pipelines_and_embedding_networks(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
    pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")
    images, styles = (torch.rand(1, 3, 16, 14, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    model = load_model(network, task="embedding", input_size=(3, 16, 14))
    result: Any = run("style_diffusion", model=model, features="embedding", images=images, styles=styles,
                      denoiser=write_pipeline(kind, tmp_path), steps=2, fit_steps=2)  # fmt: skip
    assert result.stylized.shape == images.shape and result.losses.isfinite().all()


def test_other_channels_are_refused() -> None:
    gray = load_denoiser()
    gray.channels = 1
    with pytest.raises(InputError, match="luminance needs red, green and blue.*the diffusion model takes 1"):
        run("style_diffusion", images=torch.rand(1, 3, 16, 16), denoiser=gray)
