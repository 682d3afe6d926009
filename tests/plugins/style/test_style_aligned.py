"""StyleAligned: shared attention in tiny pipelines, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_pipelines import write_pipeline

from phosphene import InputError, ModelError, UnknownName, run
from phosphene_plugins.style.diffusion_style import GaussianDenoiser


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_pipelines_share_attention_with_a_reference(kind: str, tmp_path: Path) -> None:
    """Each reference changes what is drawn, a prompt changes it too, and the plain images stay."""
    pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
    pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")
    images = torch.rand(2, 3, 16, 14, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"images": images, "denoiser": write_pipeline(kind, tmp_path), "steps": 2}
    result: Any = run("style_aligned", prompts=["a", "dogs"], guidance=2, style_prompt="dog", **options)
    assert result.aligned.shape == (2, 2, 3, 16, 14) == result.plain.shape
    assert torch.equal(result.plain[0], result.plain[1])
    assert not torch.equal(result.aligned[0], result.aligned[1])
    assert not torch.allclose(result.aligned, result.plain, atol=1e-4)
    assert [panel.title for panel in result.panels()[0]] == [
        "reference", "a", "a, aligned", "dogs", "dogs, aligned"
    ]  # fmt: skip


def test_errors(tmp_path: Path) -> None:
    alphas = (1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)).cumprod(0)
    cases: tuple[tuple[type[Exception], dict[str, Any], str], ...] = (
        (ModelError, {"denoiser": GaussianDenoiser(alphas, 0.0, 1.0)}, "no self-attention layer"),
        (InputError, {"guidance": 2.0}, "guidance is the weight of a text: pass prompts"),
        (InputError, {"prompts": ["a dog"]}, "takes no prompt"),
        (UnknownName, {"layers": ["up_blocks.0.attention.0"]}, "did you mean 'up_blocks.0.attentions.0'"),
        (InputError, {"images": torch.rand(1, 1, 16, 16)}, "takes 3 channels, the images have 1"),
    )
    for kind, options, message in cases:
        with pytest.raises(kind, match=message):
            run("style_aligned", **{"images": "builtin:scenes/1", "steps": 1} | options)


def test_flux_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
    pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")
    with pytest.raises(InputError, match="Stable Diffusion 1, 2, XL and 3 and unconditional models are"):
        run("style_aligned", images="builtin:scenes/1", denoiser=write_pipeline("flux", tmp_path))
