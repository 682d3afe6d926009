"""``prompt_attribution``: a tiny Stable Diffusion against diffusers' own attention, bundled words, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import InputError, ModelError, PhospheneError, UnknownName, load_result, replay, run
from phosphene.generative import Denoiser, load_pipeline
from phosphene_plugins.vision_language._color_words import WORDS, ColorWords
from phosphene_plugins.vision_language.prompt_attribution import _cross_attention


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent, text-conditioned pipeline of random weights, whose word "dogs" has two tokens."""
    diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("latent")
    pieces = ["<|startoftext|>", "<|endoftext|>", *"adogs", "a</w>", "d</w>", "g</w>", "s</w>", ",</w>"]
    pieces += ["do", "dog", "dog</w>"]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g\ndo g</w>\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8, unk_token="<|endoftext|>"
    )
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=8, block_out_channels=(8, 16),
        norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


def test_words_are_those_of_the_tokenizer(pipeline: Path) -> None:
    denoiser = load_pipeline(pipeline)
    assert denoiser.image_size == (16, 16)
    assert denoiser.word_tokens("a dogs, dog") == [("a", [1]), ("dogs", [2, 3]), ("dog", [5])]
    assert denoiser.word_tokens("") == []
    with pytest.raises(InputError, match="the text has 9 tokens, of which the model reads 8"):
        denoiser.word_tokens("a a a a a a a")


def test_maps_are_the_attention_of_diffusers(pipeline: Path, tmp_path: Path) -> None:
    """Probabilities by diffusers' own function, recorded by a processor, give the same maps."""
    attention_processor = pytest.importorskip("diffusers.models.attention_processor")
    result: Any = run(
        "prompt_attribution", text_denoiser=pipeline, prompt="a dogs", steps=2, guidance=3.0, size=[16, 32],
        seed=4,
    )  # fmt: skip
    assert result.words == ("a", "dogs") and result.maps.shape == (2, 16, 32)
    saved = result.save(tmp_path / "result")
    assert load_result(saved).inputs["text_denoiser"] == str(pipeline)
    assert replay(saved).same

    denoiser = load_pipeline(pipeline)
    default = _cross_attention(denoiser, None)
    names = [name for name, _ in denoiser.named_modules() if name.endswith("attn2")]
    assert default == [name for name in names if "mid_block" not in name] and len(names) == len(default) + 1
    recorded: list[tuple[str, torch.Tensor]] = []

    class Recorder(attention_processor.AttnProcessor):  # type: ignore[name-defined,misc]
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
            if encoder_hidden_states is not None:
                query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
                query, key = attn.head_to_batch_dim(query), attn.head_to_batch_dim(key)
                recorded.append((self.name, attn.get_attention_scores(query, key)))
            return super().__call__(attn, hidden_states, encoder_hidden_states)

    denoiser.unet.set_attn_processor(
        {
            name: Recorder(name.removesuffix(".processor")) if "attn2" in name else processor
            for name, processor in denoiser.unet.attn_processors.items()
        }
    )
    x = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(4))
    prompted, empty = denoiser.prompted("a dogs"), denoiser.prompted("")
    maps, count = torch.zeros(2, 16, 32), 0
    with torch.no_grad():
        for t, next_t in ((999, 500), (500, 0)):  # 499.5 is rounded to the even number
            recorded.clear()
            noise = prompted.eps(x, t)
            for name, scores in recorded:
                if "mid_block" not in name:
                    height = round((scores.shape[1] / 2) ** 0.5)
                    for head in scores.mT.unflatten(2, (height, 2 * height)):
                        large = torch.nn.functional.interpolate(head[None], (16, 32), mode="bicubic")[0]
                        maps += torch.stack([large[1], large[2] + large[3]])
                        count += 1
            away = empty.eps(x, t)
            noise = away + 3 * (noise - away)
            (a, s), (b, r) = denoiser.levels(t), denoiser.levels(next_t)
            x = b * (x - s * noise) / a + r * noise
        image = denoiser.decode(x)[0].clamp(0, 1)
    assert torch.allclose(result.maps, maps / count, atol=1e-5)
    assert torch.allclose(result.image, image, atol=1e-4)


def test_maps_of_the_bundled_words_cover_what_each_word_drew() -> None:
    """Pixels whose color is the sun's lie in its mask, and no others."""
    result: Any = run("prompt_attribution", prompt="Sun in the sky above sea", seed=3)
    assert result.image.shape == (3, 64, 64) and result.words == ("Sun", "in", "the", "sky", "above", "sea")
    for word in ("sun", "sky", "sea"):
        color = torch.tensor(WORDS[word][0])[:, None, None]
        drawn = (result.image - color).abs().amax(0) < 0.25
        mask = result.masks()[[w.lower() for w in result.words].index(word)]
        overlap = float((drawn & mask).sum() / (drawn | mask).sum())
        assert overlap > 0.8, f"{word}: {overlap}"
    assert not result.maps[1].any() and not result.masks()[1].any()
    assert [len(group) for group in result.panels()] == [1] * 4  # the image and the words with attention
    assert result.table()["word"] == list(result.words)


class _Unconditional(Denoiser):
    """A denoiser without text."""


class _NoAttention(ColorWords):
    """Text without cross-attention, and without a size."""

    image_size = None

    def __init__(self) -> None:
        super().__init__()
        del self.attention


def test_errors(pipeline: Path) -> None:
    alphas = torch.tensor([0.9, 0.1])
    cases: list[tuple[type[PhospheneError], dict[str, Any], str]] = [
        (InputError, {"text_denoiser": _Unconditional(alphas)}, "not conditioned on text.*pass the folder"),
        (InputError, {"text_denoiser": "resnet18"}, "no folder at .resnet18.; the bundled .* reads prompts"),
        (InputError, {"text_denoiser": 5}, "a pipeline's folder, not an int"),
        (InputError, {"prompt": "..."}, "has no words"),
        (InputError, {"prompt": "a dog"}, "draws none of these words; it draws sky, night"),
        (
            InputError,
            {"text_denoiser": pipeline, "prompt": "a " * 9},
            "11 tokens, of which the model reads 8",
        ),
        (InputError, {"layers": []}, "layers is empty"),
        (UnknownName, {"layers": ["attentio"]}, "did you mean 'attention'"),
        (InputError, {"text_denoiser": _NoAttention()}, "pass size="),
        (ModelError, {"text_denoiser": _NoAttention(), "size": [8, 8]}, "no cross-attention"),
    ]
    for kind, options, words in cases:
        with pytest.raises(kind, match=words):
            run("prompt_attribution", steps=2, **options)
    result: Any = run("prompt_attribution", steps=2, seed=0)
    for threshold in (0.0, 1.5):
        with pytest.raises(InputError, match="a share of the maximum"):
            result.masks(threshold)
