"""Text-to-image pipelines of diffusers: the same images as diffusers' own call, and what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_pipelines import KINDS, write_pipeline
from torch import Tensor

from phosphene import InputError, ModelError, run
from phosphene.generative import Denoiser, load_pipeline

diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")

ALPHAS = torch.tensor([0.9, 0.5, 0.0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_pipeline(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def _sample(denoiser: Denoiser, x: Tensor, times: list[int], guidance: float) -> Tensor:
    prompted, empty = denoiser.prompted("a dogs"), denoiser.prompted("")
    for t, next_t in pairwise(times):
        output = prompted.predict(x, t)
        if guidance != 1:
            away = empty.predict(x, t)
            output = away + guidance * (output - away)
        x = denoiser.step(x, output, t, next_t)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_the_pipelines_own_call(folders: dict[str, Path], kind: str) -> None:
    """Four steps with guidance from the same noise: latents and image to 1e-5."""
    denoiser = load_pipeline(folders[kind])
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[kind], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 4}
    with torch.no_grad():
        if kind in ("sd3", "flux"):
            guidance = 1.5 if kind == "sd3" else 1.0
            latents = x if kind == "sd3" else pipe._pack_latents(x, 1, 4, 8, 12)
            options |= {"sigmas": [1, 0.75, 0.5, 0.25], "guidance_scale": guidance}
            if kind == "flux":
                options["guidance_scale"] = 3.5
            result = _sample(denoiser, x, [1000, 750, 500, 250, 0], guidance)
        else:
            guidance, latents = 1.5, x
            pipe.scheduler = diffusers.DDIMScheduler.from_config(
                pipe.scheduler.config, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=0,
                clip_sample=False,
            )  # fmt: skip
            options |= {"guidance_scale": guidance}
            result = _sample(denoiser, x, [750, 500, 250, 0], guidance)
        expected = pipe("a dogs", latents=latents, output_type="latent", **options).images
        if kind == "flux":
            expected = pipe._unpack_latents(expected, 16, 24, pipe.vae_scale_factor)
        image = pipe("a dogs", latents=latents, output_type="pt", **options).images
    assert result.std() > 0.3 and not torch.allclose(result, x, atol=0.1)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(denoiser.decode(result).clamp(0, 1), image, atol=1e-5, rtol=0)
    # Encoding is the pipeline's too: the mode of the posterior, shifted and scaled.
    latents = pipe.vae.encode(2 * image - 1).latent_dist.mode()
    shift = pipe.vae.config.shift_factor or 0.0
    torch.testing.assert_close(denoiser.encode(image), (latents - shift) * pipe.vae.config.scaling_factor)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_tokens_are_input_embeddings_of_every_encoder(folders: dict[str, Path], kind: str) -> None:
    """A token with the embedding of a word is that word, and predictions have gradients of it."""
    denoiser = load_pipeline(folders[kind])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    token = torch.stack([denoiser.token_embedding(word) for word in ("a", ",")])
    assert token.shape == (2, denoiser.token_width)
    if kind not in ("sd3", "flux"):  # a T5 reads the star and the space before it as another piece
        with torch.no_grad():
            same = denoiser.with_tokens("dog *", token[:1]).predict(x, 400)
            torch.testing.assert_close(same, denoiser.prompted("dog a").predict(x, 400), atol=1e-5, rtol=0)
    token.requires_grad_()
    output = denoiser.with_tokens("a * dog", token).predict(x, 400)
    (gradient,) = torch.autograd.grad(output.square().sum(), token)
    # Every encoder's part of both tokens has a gradient.
    for part in gradient.split(denoiser._widths, 1):
        assert (part.abs().amax(1) > 0).all()
    direction = torch.randn(token.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ahead, behind = (
            denoiser.with_tokens("a * dog", token + s * direction).predict(x, 400).square().sum()
            for s in (1e-2, -1e-2)
        )
    slope = (ahead - behind) / 2e-2
    assert abs(slope - (gradient * direction).sum()) < 0.02 * abs(slope) + 2e-3
    with pytest.raises(InputError, match=r"has no \*"):
        denoiser.with_tokens("a dog", token)
    with pytest.raises(InputError, match=rf"shape \(n, {denoiser.token_width}\)"):
        denoiser.with_tokens("*", token[:, 1:])


@pytest.mark.parametrize("kind", KINDS)
def test_diffusion_style_takes_every_pipeline(folders: dict[str, Path], kind: str) -> None:
    images, styles = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    options: dict[str, Any] = {"denoiser": folders[kind], "steps": 2, "style_prompt": "a", "guidance": 2}
    plain, injected, warm = (
        run(
            "diffusion_style", images=images, styles=styles, inject=inject, temperature=temperature, **options
        )
        for inject, temperature in (("nothing", 1.5), ("attention", 1.5), ("attention", 4.0))
    )
    assert not torch.equal(plain.stylized, injected.stylized)
    assert not torch.equal(warm.stylized, injected.stylized)  # the queries' normalization does not undo it
    if kind in ("sd3", "flux"):
        with pytest.raises(ModelError, match="no residual block"):
            run("diffusion_style", images=images, styles=styles, inject="features", **options)
    two = torch.cat([styles, images])
    if kind == "flux":
        for wrong in (two, torch.rand(1, 3, 16, 20)):
            with pytest.raises(InputError, match="one style of the images' size, 16 x 16"):
                run("diffusion_style", images=images, styles=wrong, **options)
    else:
        assert run("diffusion_style", images=images, styles=two, **options).stylized.shape == images.shape


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_prompt_attribution_takes_every_pipeline(folders: dict[str, Path], kind: str) -> None:
    """The maps of words are the attention of diffusers' own projections, summed by hand."""
    denoiser: Any = load_pipeline(folders[kind])
    result = run("prompt_attribution", text_denoiser=denoiser, prompt="a dogs", steps=1, guidance=1, seed=4,
                 size=[16, 16])  # fmt: skip
    assert result.words == ("a", "dogs") and (result.maps.amax((1, 2)) > 0).all()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    prompted = denoiser.prompted("a dogs")
    scores: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores.append((query @ key.mT / query.shape[3] ** 0.5).softmax(3)[0])
        return attend(query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        prompted.predict(x, denoiser.time_steps - 1)
    text = prompted.prompt.shape[1]
    tokens = [positions for _, positions in denoiser.word_tokens("a dogs")]
    maps = []
    for attention in scores:
        size = attention.shape[1:]
        if kind == "sdxl":
            # Cross-attention has the tokens as keys; that of the middle block has 16 positions.
            part = attention if size[1] == text and size[0] != 16 else None
        elif size[1] <= text:
            part = None  # over the image alone, as the second attention of a block
        else:
            part = attention[:, :-text, -text:] if kind == "sd3" else attention[:, text:, :text]
        if part is not None:
            side = int(part.shape[1] ** 0.5)
            words = torch.stack([part[:, :, at].sum(2) for at in tokens], 1).unflatten(2, (side, side))
            maps.append(torch.nn.functional.interpolate(words, (16, 16), mode="bicubic").mean(0))
    assert len(maps) == {"sdxl": 6, "sd3": 2, "flux": 2}[kind]
    torch.testing.assert_close(result.maps, torch.stack(maps).mean(0).clamp(0, 1), atol=1e-5, rtol=0)


def _edit(folder: Path, target: Path, name: str, **changes: Any) -> Path:
    """A copy of a pipeline with other entries in one of its JSON files."""
    shutil.copytree(folder, target)
    file = target / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


def test_what_is_not_supported_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    supported = "supported are unconditional pipelines, StableDiffusionPipeline"
    cases = (
        ("flux", "model_index.json", {"_class_name": "HunyuanDiTPipeline"}, f"HunyuanDiT.*{supported}"),
        ("sdxl", "model_index.json", {"requires_aesthetics_score": True}, f"aesthetic score.*{supported}"),
        ("sd15", "scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"},
         "predicts 'flow_prediction': a UNet's epsilon, v_prediction and sample are supported"),
        ("sd3", "model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]},
         "with DDIMScheduler is not supported: it takes FlowMatchEulerDiscreteScheduler"),
    )  # fmt: skip
    for n, (kind, file, changes, message) in enumerate(cases):
        with pytest.raises(ModelError, match=message):
            load_pipeline(_edit(folders[kind], tmp_path / str(n), file, **changes))
    pickles = tmp_path / "pickles"
    shutil.copytree(folders["sd3"], pickles)
    weights = next((pickles / "text_encoder").glob("*.safetensors"))
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(InputError, match="cannot be read as a pipeline of safetensors"):
        load_pipeline(pickles)


def test_an_inpainting_pipeline_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "inpainting"
    shutil.copytree(folders["sd15"], target)
    config = dict(diffusers.UNet2DConditionModel.load_config(target / "unet"), in_channels=9)
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(target / "unet")
    with pytest.raises(ModelError, match="reads 9 channels, of which 4 are latents"):
        load_pipeline(target)


def test_steps_are_exact_at_pure_noise() -> None:
    """x_0 is the network's where the signal is zero, for v_prediction, sample and a flow."""
    clean, noise = torch.full((1, 3, 2, 2), 0.25), torch.randn(1, 3, 2, 2)

    class Constant(Denoiser):
        def forward(self, x: Tensor, t: int) -> Tensor:
            signal, level = self.levels(t)
            return {
                "v_prediction": signal * noise - level * clean,
                "sample": clean,
                "flow_prediction": noise - clean,
            }[self.prediction]

    for prediction in ("v_prediction", "sample", "flow_prediction"):
        flow = prediction == "flow_prediction"
        denoiser = Constant(sigmas=torch.tensor([0.0, 0.4, 1.0])) if flow else Constant(ALPHAS)
        denoiser.prediction = prediction  # type: ignore[assignment]
        stepped = denoiser.step(noise, denoiser.predict(noise, 2), 2, 1)
        signal, level = denoiser.levels(1)
        torch.testing.assert_close(stepped, signal * clean + level * noise)
        torch.testing.assert_close(denoiser.eps(noise, 2), noise)
    with pytest.raises(InputError, match="either alphas_cumprod or sigmas"):
        Constant()
