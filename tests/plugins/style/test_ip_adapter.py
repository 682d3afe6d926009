"""IP-Adapter and InstantStyle: the images of diffusers' own call with tiny pipelines, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_image_adapters import EMBEDDING, HIDDEN, write_image_adapter
from tests.tiny_pipelines import _clip, _clip_tokenizer, write_pipeline
from torch import Tensor

from phosphene import InputError, ModelError, UnknownName, run
from phosphene.generative import load_image_adapter, load_pipeline
from phosphene_plugins.style import ip_adapter as module
from phosphene_plugins.style.diffusion_style import GaussianDenoiser

diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")

KINDS = ("sd15", "sd2", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines, and adapters ("sd15 adapter", "sd15 plus") of each."""
    written = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        written[kind] = write_pipeline(kind, folder)
        unet: Any = load_pipeline(written[kind]).unet
        written[f"{kind} adapter"] = write_image_adapter(folder / "adapter", unet)
        written[f"{kind} plus"] = write_image_adapter(folder / "plus", unet, plus=True)
    return written


@pytest.fixture
def four_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time steps of diffusers' DDIM with four steps, whose last one ends at 0."""
    monkeypatch.setattr(module, "timesteps", lambda count, steps: [0, 250, 500, 750])


def _by_diffusers(
    pipeline: Path, adapter: Path, images: Tensor, scale: Any, guidance: float, embeds: Any = None
) -> Tensor:
    """The images (N, C, 16, 16) of diffusers' own call, from the noise of seed 5."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=0,
        clip_sample=False,
    )  # fmt: skip
    pipe.load_ip_adapter(
        str(adapter.parent), subfolder="", weight_name=adapter.name, low_cpu_mem_usage=False,
        image_encoder_folder="image_encoder",
    )  # fmt: skip
    pipe.set_ip_adapter_scale(scale)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    drawn = []
    for image in images:
        pixels = pipe.feature_extractor([image], do_rescale=False, return_tensors="pt").pixel_values
        prompted = {"ip_adapter_image": pixels} if embeds is None else {"ip_adapter_image_embeds": [embeds]}
        drawn.append(
            pipe("a dogs", latents=x, height=16, width=16, num_inference_steps=4, guidance_scale=guidance,
                 output_type="pt", **prompted).images
        )  # fmt: skip
    return torch.cat(drawn)


#: diffusers' scales, and those of ``ip_adapter``.
SCALES = (
    (0.6, 0.6),
    ({"up": {"block_1": [0.0, 1.0]}}, {"up_blocks.1.attentions.1": 1.0}),
    ({"down": 0.5, "up": {"block_1": [1.5, 0.0]}}, {"down_blocks": 0.5, "up_blocks.1.attentions.0": 1.5}),
)


@pytest.mark.parametrize(("kind", "number"), [("sd15", 0), ("sd15", 2), ("sd2", 1), ("sdxl", 0), ("sdxl", 1)])
@pytest.mark.usefixtures("four_steps")
def test_images_are_those_of_diffusers(folders: dict[str, Path], kind: str, number: int) -> None:
    """Four steps with guidance, one scale and scales by block, two image prompts of another size."""
    images = torch.rand(2, 3, 18, 21, generator=torch.Generator().manual_seed(0))
    theirs, ours = SCALES[number]
    result: Any = run(
        "ip_adapter", images=images, denoiser=folders[kind], image_adapter=folders[f"{kind} adapter"],
        prompts=["a dogs"], scale=ours, guidance=1.5, seed=5,
    )  # fmt: skip
    with torch.no_grad():
        expected = _by_diffusers(folders[kind], folders[f"{kind} adapter"], images, theirs, 1.5)
    assert result.drawn.shape == (2, 1, 3, 16, 16) == result.plain.shape
    torch.testing.assert_close(result.drawn[:, 0], expected, atol=1e-5, rtol=0)
    assert (result.drawn[0] - result.plain[0]).abs().max() > 1e-2
    assert (result.drawn[0] - result.drawn[1]).abs().max() > 1e-3


@pytest.mark.usefixtures("four_steps")
def test_images_of_an_adapter_plus_are_those_of_diffusers(folders: dict[str, Path]) -> None:
    """Tokens of the image encoder; the blank image of the guidance is one of zeros."""
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    result: Any = run(
        "ip_adapter", images=images, denoiser=folders["sd15"], image_adapter=folders["sd15 plus"],
        prompts=["a dogs"], guidance=2.5, seed=5,
    )  # fmt: skip
    with torch.no_grad():
        expected = _by_diffusers(folders["sd15"], folders["sd15 plus"], images, 1.0, 2.5)
    torch.testing.assert_close(result.drawn[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("four_steps")
def test_instant_style_subtracts_texts_and_reads_style_blocks(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """XL: the pooled text, where its width is the image embedding's; else a CLIP with its text encoder."""
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"images": images, "prompts": ["a dogs"], "guidance": 1.5, "seed": 5}
    adapter = folders["sdxl adapter"]
    result: Any = run(
        "instant_style", denoiser=folders["sdxl"], image_adapter=adapter, content="dog", layout_scale=0.5,
        style_scale=0.75, content_scale=0.5, **options,
    )  # fmt: skip
    pipeline: Any = load_pipeline(folders["sdxl"]).prompted("dog")
    embedding = load_image_adapter(adapter).embeddings(images) - 0.5 * pipeline.pooled
    embeds = torch.stack([torch.zeros_like(embedding), embedding])
    scale = {"up": {"block_1": [0.0, 0.75]}, "down": {"block_0": [0.5]}}
    with torch.no_grad():
        expected = _by_diffusers(folders["sdxl"], adapter, images, scale, 1.5, embeds)
    torch.testing.assert_close(result.drawn[:, 0], expected, atol=1e-5, rtol=0)
    # A CLIP of image and text.
    text = _clip(8, True)
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(adapter.parent / "image_encoder")
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), projection_dim=EMBEDDING
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    _clip_tokenizer(tmp_path).save_pretrained(tmp_path / "clip")
    loaded = load_image_adapter(folders["sd15 adapter"], tmp_path / "clip")
    assert loaded.embed_text is not None
    tokens = _clip_tokenizer(tmp_path)(["a dog"], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = clip.get_text_features(tokens)
        expected = getattr(expected, "pooler_output", expected)[0]
        torch.testing.assert_close(loaded.embed_text("a dog"), expected)
        pixels = torch.rand(1, 3, 16, 16)
        expected = clip.get_image_features(
            loaded.embed.processor([pixels[0]], do_rescale=False, return_tensors="pt").pixel_values
        )
        torch.testing.assert_close(loaded.embeddings(pixels), getattr(expected, "pooler_output", expected))
    styled: Any = run(
        "instant_style", denoiser=folders["sd15"], image_adapter=loaded, content="dog", **options
    )
    plain: Any = run("instant_style", denoiser=folders["sd15"], image_adapter=loaded, **options)
    assert not torch.allclose(styled.drawn, plain.drawn, atol=1e-4)


def test_the_networks_of_the_pipeline_are_unchanged(folders: dict[str, Path]) -> None:
    pipeline: Any = load_pipeline(folders["sd15"])
    before = {name: value.clone() for name, value in pipeline.state_dict().items()}
    kinds = [type(processor) for processor in pipeline.unet.attn_processors.values()]
    images = torch.rand(1, 3, 16, 16)
    run("ip_adapter", images=images, denoiser=pipeline, image_adapter=folders["sd15 adapter"], steps=1)
    after = pipeline.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert kinds == [type(processor) for processor in pipeline.unet.attn_processors.values()]


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    alphas = (1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)).cumprod(0)
    adapter = folders["sd15 adapter"]
    sd15: dict[str, Any] = {"denoiser": folders["sd15"], "image_adapter": adapter}
    cases: tuple[tuple[type[Exception], str, dict[str, Any], str], ...] = (
        (ModelError, "ip_adapter", {"denoiser": GaussianDenoiser(alphas, 0.0, 1.0)}, "no attention layer"),
        (InputError, "ip_adapter", {"prompts": ["a dog"]}, "takes no prompt"),
        (InputError, "ip_adapter", {"denoiser": folders["sd15"]},
         "has keys for 3 layers of widths 32, 64, 128, this diffusion model has 4 layers of widths 8, 16"),
        (InputError, "ip_adapter", {"image_adapter": adapter}, "it is an adapter of another model"),
        (InputError, "ip_adapter", {"images": torch.rand(1, 1, 16, 16)}, "takes 3 channels, the image"),
        (UnknownName, "ip_adapter", {"scale": {"up_blocks.0.attention.0": 1.0}}, "mean 'up_blocks.0.att"),
        (UnknownName, "instant_style", {"style_blocks": ["up_blocks.3"]}, "up_blocks.3"),
        (InputError, "instant_style", {"content": "a dog"}, "has ten words, circle"),
        (InputError, "instant_style", {**sd15, "content": "a dog"}, "no text encoder belongs to the image"),
        (InputError, "instant_style", {**sd15, "image_adapter": folders["sd15 plus"], "content": "a"},
         "reads many tokens"),
        (InputError, "ip_adapter", {"image_adapter": 3}, "not an int"),
    )  # fmt: skip
    for kind, name, options, message in cases:
        with pytest.raises(kind, match=message):
            run(name, **{"images": "builtin:scenes/1", "steps": 1} | options)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_models_with_one_attention_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="IP-Adapters of Stable Diffusion 1, 2 and XL are supported"):
        run("ip_adapter", images="builtin:scenes/1", denoiser=write_pipeline(kind, tmp_path))


def test_files_that_are_no_adapter_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = folders["sd15 adapter"]
    tensors = load_file(adapter)
    torch.save(tensors, tmp_path / "adapter.bin")
    (tmp_path / "text.safetensors").write_text("no tensors")
    variants = {
        "other": {"weight": torch.zeros(1)},
        "faces": {"image_proj.norm.weight": torch.ones(8), "image_proj.proj.0.weight": torch.ones(8, 8),
                  "image_proj.proj.2.weight": torch.ones(8, 8)},
        "no values": {name: value for name, value in tensors.items() if "to_v" not in name},
    }  # fmt: skip
    for name, part in variants.items():
        save_file(part, tmp_path / f"{name}.safetensors")
    cases: tuple[tuple[type[Exception], str, str], ...] = (
        (
            InputError,
            "adapter.bin",
            "pickled weights .* never loaded; IP-Adapters are published",
        ),
        (InputError, "missing.safetensors", "there is no file"),
        (InputError, "text.safetensors", "cannot be read as safetensors"),
        (InputError, "other.safetensors", "is not an IP-Adapter, whose tensors are image_proj"),
        (ModelError, "faces.safetensors", "face recognition network"),
        (InputError, "no values.safetensors", "is not an IP-Adapter"),
    )
    for kind, file, message in cases:
        with pytest.raises(kind, match=message):
            load_image_adapter(tmp_path / file)
    shutil.copy(adapter, tmp_path)
    with pytest.raises(InputError, match=f"embeddings of {EMBEDDING} numbers in .*there is none"):
        load_image_adapter(tmp_path / adapter.name)
    encoder = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=EMBEDDING + 1,
        )  # fmt: skip
    )
    encoder.save_pretrained(tmp_path / "image_encoder")
    with pytest.raises(InputError, match=f"image_encoder has {EMBEDDING + 1}; load_image_adapter"):
        load_image_adapter(tmp_path / adapter.name)
    # Beside the folder of the file, as the adapters of XL that read the image encoder of 1.5 are published.
    shutil.copytree(adapter.parent / "image_encoder", tmp_path / "models" / "image_encoder")
    (tmp_path / "sdxl_models").mkdir()
    shutil.copy(adapter, tmp_path / "sdxl_models")
    assert load_image_adapter(tmp_path / "sdxl_models" / adapter.name).uri
