"""Diffusers folders: safetensors only, unconditional and latent models, and error messages."""

import json
import sys
from pathlib import Path

import pytest
import torch

from phosphene import InputError, MissingExtra, ModelError, load_result, replay, run
from phosphene.generative import load_pipeline
from phosphene_plugins.style._ddim import ddim
from phosphene_plugins.style._diffusion_hooks import self_attention_layers

diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")

UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pixel-space pipeline, with attention at its lower resolution."""
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DModel(sample_size=16, down_block_types=down, up_block_types=up, **UNET)
    folder = tmp_path_factory.mktemp("ddpm")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_an_unconditional_pixel_space_pipeline(pixels: Path, tmp_path: Path) -> None:
    images, style = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 18, 18)
    denoiser = load_pipeline(pixels)
    with torch.no_grad():
        x = 2 * images - 1
        assert torch.equal(denoiser.eps(x, 500), denoiser.unet(x, 500).sample)
    scheduler = diffusers.DDIMScheduler()
    assert torch.allclose(denoiser.alphas_cumprod.float(), scheduler.alphas_cumprod)
    assert denoiser.multiple == 2
    results = [
        run("diffusion_style", images=images, styles=style, denoiser=pixels, steps=2, inject=inject)
        for inject in ("attention", "features", "nothing")
    ]
    assert not torch.equal(results[0].stylized, results[2].stylized)
    assert not torch.equal(results[1].stylized, results[2].stylized)
    saved = results[0].save(tmp_path / "result")
    assert load_result(saved).inputs["denoiser"] == str(pixels)
    assert replay(saved).same


def test_a_ddim_step_equals_diffusers(pixels: Path) -> None:
    denoiser = load_pipeline(pixels)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noise = denoiser.eps(x, 400)
        expected = scheduler.step(noise, 400, x).prev_sample
        result = ddim(denoiser, denoiser.eps, x, [400, 300], "")
    assert torch.allclose(result, expected, atol=1e-5)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent, text-conditioned pipeline with v-prediction, as Stable Diffusion."""
    transformers = pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("latent")
    text_folder = folder / "text"
    text_folder.mkdir()
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a</w>"]
    (text_folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(vocabulary)}))
    (text_folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(text_folder / "vocab.json"),
        str(text_folder / "merges.txt"),
        model_max_length=5,
        unk_token=vocabulary[1],
    )
    text = transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=5, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **UNET,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


def test_a_text_conditioned_latent_pipeline(latent: Path) -> None:
    denoiser = load_pipeline(latent)
    assert denoiser.prompt is not None and denoiser.prompt.shape == (1, 5, 8)
    assert (denoiser.prediction, denoiser.multiple, denoiser.channels) == ("v_prediction", 4, 3)
    layers = self_attention_layers(denoiser)
    assert layers and all(
        name.startswith("unet.") and name.endswith("attn1") for name in layers if "mid" not in name
    )
    assert not any(name.endswith("attn2") for name in layers)
    images = torch.rand(1, 3, 18, 14)
    result = run("diffusion_style", images=images, styles=torch.rand(1, 3, 16, 16), denoiser=latent, steps=2)
    assert result.stylized.shape == images.shape
    with torch.no_grad():
        images = torch.rand(1, 3, 16, 16)
        x = denoiser.encode(images)
        mode = denoiser.autoencoder.encode(2 * images - 1).latent_dist.mode()
        assert torch.allclose(x, mode * denoiser.autoencoder.config.scaling_factor)
        output = denoiser.unet(x, 300, encoder_hidden_states=denoiser.prompt).sample
        signal, level = denoiser.levels(300)
        assert torch.allclose(denoiser.eps(x, 300), level * x + signal * output, atol=1e-6)
        decoded = denoiser.autoencoder.decode(mode).sample
        assert torch.allclose(denoiser.decode(x), (decoded + 1) / 2, atol=1e-5)


def test_prompts_condition_a_pipeline_and_its_style_transfer(latent: Path, pixels: Path) -> None:
    denoiser = load_pipeline(latent)
    prompted = denoiser.prompted("a a")
    assert prompted.unet is denoiser.unet and denoiser.prompted("").prompt.equal(denoiser.prompt)
    assert not prompted.prompt.equal(denoiser.prompt)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        output = denoiser.unet(x, 300, encoder_hidden_states=prompted.prompt).sample
        assert torch.allclose(prompted(x, 300), output) and not torch.allclose(denoiser(x, 300), output)
    options = {"images": torch.rand(1, 3, 16, 16), "styles": torch.rand(1, 3, 16, 16), "steps": 2}
    plain, *others = (
        run("diffusion_style", denoiser=latent, **options, **prompts).stylized
        for prompts in (
            {},
            {"content_prompt": "a"},
            {"style_prompt": "a a"},
            {"style_prompt": "a a", "guidance": 4},
        )
    )
    assert all(not torch.equal(other, plain) for other in others)
    with pytest.raises(InputError, match="takes no prompt"):
        run("diffusion_style", denoiser=pixels, **options, style_prompt="a")
    with pytest.raises(InputError, match="guidance is the weight of a text"):
        run("diffusion_style", denoiser=latent, **options, guidance=2)


def test_pickles_are_refused(pixels: Path, tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel.from_pretrained(pixels / "unet")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(
        tmp_path, safe_serialization=False
    )
    assert list(tmp_path.glob("unet/*.bin"))
    with pytest.raises(InputError, match="cannot be read as a pipeline of safetensors"):
        load_pipeline(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"not the folder of a diffusers pipeline: it has no model_index\.json"
    ):
        run("diffusion_style", denoiser=str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "Odd", "unet": ["diffusers", "NoSuchUNet"]}')
    with pytest.raises(InputError, match="cannot be read as a pipeline"):
        load_pipeline(tmp_path)
    with pytest.raises(InputError, match="a pipeline's folder, not an int"):
        run("diffusion_style", denoiser=5)
    with pytest.raises(InputError, match="no folder at 'nope'; the bundled .* is builtin:shapes-diffusion"):
        run("diffusion_style", denoiser="nope")


def test_a_class_conditioned_pipeline_is_refused(tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=16,
        num_class_embeds=3,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **UNET,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="conditioned on more than time and text"):
        load_pipeline(tmp_path)


def test_a_flow_matching_schedule_is_refused(pixels: Path, tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel.from_pretrained(pixels / "unet")
    diffusers.DDPMPipeline(unet, diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no noise schedule"):
        load_pipeline(tmp_path)


def test_a_missing_package_names_the_extra(pixels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"phosphene\[diffusion\]"):
        load_pipeline(pixels)
