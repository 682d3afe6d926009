"""Tiny diffusers pipelines of random weights, written as safetensors into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

KINDS = ("sd15", "sd2", "sdxl", "sd3", "flux")
#: Pieces of the CLIP tokenizers: the word "dogs" has two tokens.
PIECES = ["<|startoftext|>", "<|endoftext|>", *"adogs*", "a</w>", "d</w>", "g</w>", "s</w>", ",</w>", "*</w>",
          "do", "dog", "dog</w>"]  # fmt: skip
UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip


def write_pipeline(kind: str, folder: Path) -> Path:
    """The folder of a pipeline of one of ``KINDS``, of 16 x 16 images (Flux records no size)."""
    import diffusers

    torch.manual_seed(0)
    shift = {"shift_factor": 0.1} if kind in ("sd3", "flux") else {}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.7,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **shift,
    )  # fmt: skip
    parts: dict[str, Any] = {"vae": vae}
    if kind in ("sd15", "sd2"):
        parts |= {
            "text_encoder": _clip(8, False), "tokenizer": _clip_tokenizer(folder), "safety_checker": None,
            "feature_extractor": None, "requires_safety_checker": False,
            "unet": diffusers.UNet2DConditionModel(
                sample_size=8, cross_attention_dim=8, attention_head_dim=4 if kind == "sd15" else (2, 4),
                use_linear_projection=kind == "sd2", **UNET,
            ),
            "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
            if kind == "sd15"
            else diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        }  # fmt: skip
        diffusers.StableDiffusionPipeline(**parts).save_pretrained(folder / "pipeline")
    elif kind == "sdxl":
        parts |= {
            "text_encoder": _clip(8, False), "text_encoder_2": _clip(12, True),
            "tokenizer": _clip_tokenizer(folder), "tokenizer_2": _clip_tokenizer(folder),
            "unet": diffusers.UNet2DConditionModel(
                sample_size=8, cross_attention_dim=20, attention_head_dim=(2, 4), use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=2,
                projection_class_embeddings_input_dim=6 * 8 + 6, **UNET,
            ),
            "scheduler": diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        }  # fmt: skip
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(folder / "pipeline")
    elif kind == "sd3":
        parts |= {
            "text_encoder": _clip(8, True), "text_encoder_2": _clip(12, True), "text_encoder_3": _t5(24),
            "tokenizer": _clip_tokenizer(folder), "tokenizer_2": _clip_tokenizer(folder),
            "tokenizer_3": _t5_tokenizer(),
            "transformer": diffusers.SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
                attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24,
                caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=16,
                qk_norm="rms_norm", dual_attention_layers=(0,),
            ),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        }  # fmt: skip
        diffusers.StableDiffusion3Pipeline(**parts).save_pretrained(folder / "pipeline")
    else:
        parts |= {
            "text_encoder": _clip(8, False), "text_encoder_2": _t5(16),
            "tokenizer": _clip_tokenizer(folder), "tokenizer_2": _t5_tokenizer(),
            "transformer": diffusers.FluxTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True,
                axes_dims_rope=(4, 4, 8),
            ),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.8, max_shift=0.8
            ),
        }  # fmt: skip
        diffusers.FluxPipeline(**parts).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _clip(width: int, projected: bool) -> Any:
    """A CLIP text encoder of three layers."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(_vocabulary()), hidden_size=width, intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=8, eos_token_id=1, bos_token_id=0, pad_token_id=1,
        projection_dim=6,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    encoder = kind(config)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def _t5(width: int) -> Any:
    """A T5 encoder of one layer."""
    import transformers

    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=12, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2, is_encoder_decoder=False
        )
    )


def _vocabulary() -> dict[str, int]:
    return {piece: n for n, piece in enumerate(dict.fromkeys(PIECES))}


def _clip_tokenizer(folder: Path) -> Any:
    import transformers

    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g\ndo g</w>\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8, unk_token="<|endoftext|>"
    )


def _t5_tokenizer() -> Any:
    """A T5 tokenizer of eleven pieces, the word "dogs" of two."""
    import transformers

    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁dog", "s", "▁", "▁*", "*", ",", "a"]
    return transformers.T5TokenizerFast(
        vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0, model_max_length=12
    )
