"""The bundled diffusion model: a small UNet denoiser of scenes and textures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..generative.denoisers import Denoiser
from .networks import load_generator

DENOISER = "shapes-diffusion"
#: Channels at 32 x 32, 16 x 16 and 8 x 8 positions (of a 64 x 64 image), and of the time embedding.
FINE, MIDDLE, COARSE, TIME = 32, 64, 128, 64


class ResnetBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the time embedding scales and shifts the second's input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(TIME, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.norm2(branch) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(branch))


class SelfAttention(nn.Module):
    """Self-attention over all positions, residual: x + softmax(Q K^T / sqrt(d)) V, heads of 16 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // 16
        self.norm = nn.GroupNorm(8, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (
            projection(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.to_out(attended).transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """One resolution of the UNet: resample, concatenate the skip connection, residual blocks, attention."""

    def __init__(
        self, resample: nn.Module, inputs: int, outputs: int, *, attentions: int, blocks: int
    ) -> None:
        super().__init__()
        self.resample = resample
        self.resnets = nn.ModuleList(ResnetBlock(outputs if n else inputs, outputs) for n in range(blocks))
        self.attentions = nn.ModuleList(SelfAttention(outputs) for _ in range(attentions))

    def forward(self, x: Tensor, time: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.resample(x)
        x = x if skip is None else torch.cat([x, skip], 1)
        for block in self.resnets:
            x = block(x, time)
        for attention in self.attentions:
            x = attention(x)
        return x


def upsample(inputs: int, outputs: int) -> nn.Module:
    """Twice the resolution by nearest neighbors, then a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1))


class ShapesDenoiser(Denoiser):
    """A UNet of three resolutions with self-attention, its modules named as in diffusers.

    Takes x_t (N, 3, H, W), with H and W divisible by 8, and predicts v. Blocks of 2x2 pixels become channels,
    so that the UNet is fast enough on a CPU.
    """

    prediction = "v_prediction"
    multiple = 8

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")
        super().__init__((1 - betas).cumprod(0))
        self.time_embedding = nn.Sequential(
            nn.Linear(TIME, TIME), nn.SiLU(), nn.Linear(TIME, TIME), nn.SiLU()
        )
        self.down_blocks = nn.ModuleList(
            [
                Stage(nn.Conv2d(12, FINE, 3, padding=1), FINE, FINE, blocks=1, attentions=0),
                Stage(nn.Conv2d(FINE, MIDDLE, 3, 2, padding=1), MIDDLE, MIDDLE, blocks=1, attentions=0),
                Stage(nn.Conv2d(MIDDLE, COARSE, 3, 2, padding=1), COARSE, COARSE, blocks=1, attentions=1),
            ]
        )
        self.up_blocks = nn.ModuleList(
            [
                Stage(upsample(COARSE, MIDDLE), 2 * MIDDLE, MIDDLE, blocks=1, attentions=1),
                Stage(upsample(MIDDLE, FINE), 2 * FINE, FINE, blocks=2, attentions=1),
            ]
        )
        self.norm_out, self.conv_out = nn.GroupNorm(8, FINE), nn.Conv2d(FINE, 12, 3, padding=1)

    def forward(self, x: Tensor, t: int | Tensor) -> Tensor:
        time = torch.as_tensor(t, device=x.device).view(-1, 1)
        angles = time * torch.exp(torch.arange(TIME // 2, device=x.device) * (-9.2 / (TIME // 2 - 1)))
        time = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1).to(x))
        x, skips = F.pixel_unshuffle(x, 2), []
        for stage in self.down_blocks:
            skips.append(x := stage(x, time))
        for stage, skip in zip(self.up_blocks, skips[-2::-1], strict=True):
            x = stage(x, time, skip)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), 2)


def load_denoiser() -> ShapesDenoiser:
    """The bundled diffusion model, trained, in eval mode, on the CPU."""
    denoiser = load_generator(ShapesDenoiser, DENOISER)
    denoiser.uri = f"builtin:{DENOISER}"
    return denoiser
