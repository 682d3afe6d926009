"""Prompt attribution (DAAM): the pixels that each word of a prompt drew, by a diffusion model's attention."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    ModelError,
    Reference,
    UnknownName,
    at_least_float32,
    fork_random_state,
    hookimpl,
    method,
    progress_bar,
)
from phosphene.generative import Denoiser, Pipeline
from phosphene.hooks import RecordAttention, Tap, guard
from phosphene.roles import Seed
from phosphene.spec import Agrees, Cost, PixelRange, UnitRange, ceil, maximum, minimum, param

from ._color_words import SPREAD, WORDS, ColorWords
from ._prompt_maps_result import PromptMaps
from ._text_denoiser_role import TextDenoiser


class _TinyAttention(nn.Module):
    """Projections of an attention layer of two heads with three channels each."""

    heads = 2

    def __init__(self, text: bool) -> None:
        super().__init__()
        self.is_cross_attention = text
        self.to_q, self.to_k, self.to_v = nn.Linear(3, 6), nn.Linear(5 if text else 3, 6), nn.Linear(5, 6)


class _TinyTextDenoiser(Denoiser):
    """Noise of four attention layers: at half and full resolution, in the middle, and without text.

    A text is one letter per token after a start token; words are separated by spaces.
    """

    multiple, image_size = 2, (6, 4)

    def __init__(self) -> None:
        super().__init__(torch.tensor([0.95, 0.8, 0.5, 0.2]))
        self.down_blocks = nn.ModuleList([_TinyAttention(True)])
        self.up_blocks = nn.ModuleList([_TinyAttention(True), _TinyAttention(False)])
        self.mid_block = _TinyAttention(True)
        self.letters = nn.Parameter(torch.randn(27, 5))
        self.text = "z"

    def tokens(self) -> Tensor:
        """The embedding (L, 5) of the text: the start, and each letter."""
        return self.letters[[0, *(1 + ord(c) - ord("a") for c in self.text if c != " ")]]

    def scores(self, layer: Any, x: Tensor, pooled: int) -> Tensor:
        """Attention (heads, h w, L) of positions of x (3, H, W), pooled, to the text."""
        positions = F.avg_pool2d(x, pooled).flatten(1).T
        query, key = layer.to_q(positions[None])[0], layer.to_k(self.tokens()[None])[0]
        heads = [(query[:, 3 * h : 3 * h + 3] @ key[:, 3 * h : 3 * h + 3].T) / 3**0.5 for h in range(2)]
        return torch.stack(heads).softmax(2)

    def forward(self, x: Tensor, t: int) -> Tensor:
        without_text: Any = self.up_blocks[1]
        without_text.to_q(x.flatten(2).mT), without_text.to_k(x.flatten(2).mT)
        layers = ((self.down_blocks[0], 2), (self.up_blocks[0], 1), (self.mid_block, 2))
        bias = sum(self.scores(layer, x[0], pooled)[..., 0].mean() for layer, pooled in layers)
        return 0.3 * x + bias

    def prompted(self, text: str) -> _TinyTextDenoiser:
        view = copy.copy(self)
        view.text = text
        return view

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        return _letter_tokens(text)


def _letter_tokens(text: str) -> list[tuple[str, list[int]]]:
    """The words of a text, with the numbers of their letters after a start token."""
    words, start = [], 1
    for word in text.split():
        words.append((word, list(range(start, start + len(word)))))
        start += len(word)
    return words


class _JointAttention(nn.Module):
    """Attention of two heads with three channels over the tokens of image and text."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 6), nn.Linear(6, 6)

    def heads(self, tokens: Tensor) -> list[Tensor]:
        """Queries and keys (1, heads, L, channels) of tokens (1, L, D)."""
        return [part(tokens).unflatten(2, (2, 3)).transpose(1, 2) for part in (self.to_q, self.to_k)]

    def forward(self, tokens: Tensor) -> Tensor:
        query, key = self.heads(tokens)
        return F.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)


class _TinyJointDenoiser(Pipeline):
    """Noise of two layers over image and text, one with projections of the text, and of one without text."""

    multiple, image_size, prediction, autoencoder = 2, (4, 6), "epsilon", None

    def __init__(self, first: Literal["image first", "text first"]) -> None:
        Denoiser.__init__(self, torch.tensor([0.95, 0.8, 0.5, 0.2]))
        self.joint_attention = first
        projecting: Any = _JointAttention()
        projecting.added_kv_proj_dim = 6
        self.transformer_blocks, self.image_only = nn.ModuleList([projecting]), _JointAttention()
        self.single_transformer_blocks = nn.ModuleList([_JointAttention()])
        self.register_buffer("letters", torch.randn(27, 6))
        self.register_buffer("prompt", torch.zeros(1, 1, 6))

    @property
    def joint_layers(self) -> tuple[Any, Any]:
        """The layers over image and text."""
        return self.transformer_blocks[0], self.single_transformer_blocks[0]

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens (1, L, 6) of an image (1, 3, H, W) and the text, or of the text and an image."""
        assert self.prompt is not None
        image = x.flatten(2).mT.repeat(1, 1, 2)
        return torch.cat(
            [image, self.prompt] if self.joint_attention == "image first" else [self.prompt, image], 1
        )

    def forward(self, x: Tensor, t: int) -> Tensor:
        self.image_only(x.flatten(2).mT.repeat(1, 1, 2))
        return 0.3 * x + sum(layer(self.tokens(x)).mean() for layer in self.joint_layers)

    def prompted(self, text: str) -> _TinyJointDenoiser:
        view, letters = copy.copy(self), [ord(c) - ord("a") + 1 for c in text if c != " "]
        view._buffers = {**self._buffers, "prompt": self.get_buffer("letters")[[0, *letters]][None]}
        return view

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        return _letter_tokens(text)


def maps_of_joint_attention_by_hand() -> None:
    """The part of the attention over image and text that is from positions to words, at one step."""
    orders: tuple[Literal["image first", "text first"], ...] = ("image first", "text first")
    for first in orders:
        with fork_random_state():
            torch.manual_seed(0)
            denoiser = _TinyJointDenoiser(first).double().requires_grad_(False)
        result = prompt_attribution(denoiser, prompt="ab c", steps=1, guidance=1.0, seed=5)  # type: ignore[arg-type]
        x = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        maps = torch.zeros(2, 4, 6, dtype=torch.float64)
        for layer in denoiser.joint_layers:
            query, key = layer.heads(denoiser.prompted("ab c").tokens(x))
            probabilities = (query @ key.mT / 3**0.5).softmax(3)[0].mean(0)
            start, image = (24, slice(24)) if first == "image first" else (0, slice(4, None))
            letters = probabilities[image, start + 1 : start + 4].T.view(3, 4, 6)
            maps += torch.stack([letters[0] + letters[1], letters[2]]) / 2
        torch.testing.assert_close(result.maps, maps, atol=1e-9, rtol=0)


def maps_of_a_tiny_network_by_hand() -> None:
    """Layers, heads, steps and word pieces summed one by one; the image by four steps of DDIM."""
    with fork_random_state():
        torch.manual_seed(0)
        denoiser = _TinyTextDenoiser().double().requires_grad_(False)
    call: Any = prompt_attribution
    x_3 = torch.randn(1, 3, 6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    down, up, middle = "down_blocks.0", "up_blocks.0", "mid_block"
    for layers, guidance in ((None, 1.0), ([up], 2.0), ([middle, down], 3.0)):
        result = call(denoiser, prompt="ab c", steps=3, guidance=guidance, layers=layers, seed=5)
        text, empty = denoiser.prompted("ab c"), denoiser.prompted("")
        x, sums, terms = x_3, torch.zeros(2, 6, 4, dtype=torch.float64), 0
        for t in (3, 2, 1):
            for name in layers or (down, up):
                pooled = 1 if name == up else 2
                for head in text.scores(text.get_submodule(name), x[0], pooled):
                    grid = head.T.view(4, 6 // pooled, 4 // pooled)  # start, a, b, c
                    large = F.interpolate(grid[None], (6, 4), mode="bicubic")[0]
                    sums[0] += large[1] + large[2]
                    sums[1] += large[3]
                    terms += 1
            noise = empty(x, t) + guidance * (text(x, t) - empty(x, t))
            (a, s), (b, r) = denoiser.levels(t), denoiser.levels(t - 1)
            x = b * (x - s * noise) / a + r * noise
        torch.testing.assert_close(result.maps, (sums / terms).clamp(0, 1), atol=1e-9, rtol=0)
        torch.testing.assert_close(result.image, ((x[0] + 1) / 2).clamp(0, 1), atol=1e-9, rtol=0)
        assert result.words == ("ab", "c") and result.prompt == "ab c"
    masks = result.masks(0.9)
    assert torch.equal(masks[1], result.maps[1] >= 0.9 * result.maps[1].max())
    # An odd size is drawn at the next multiple and cropped.
    assert call(denoiser, prompt="a", size=[5, 3], steps=1, seed=0).maps.shape == (1, 5, 3)


def color_words_are_the_optimal_denoiser() -> None:
    """eps = -sigma grad log p_t(x), of the mixture's density differentiated by autograd."""
    model = ColorWords().prompted("sea of sun")
    x = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for t in (100, 500, 900):
        a, sigma = model.levels(t)
        logits = torch.stack([_log_weight(word, 4, 6) for word in ("sea", "sun")])
        colors = torch.tensor([[2 * value - 1 for value in WORDS[word][0]] for word in ("sea", "sun")])
        distance = (x - a * colors[:, :, None, None]).square().sum(1)
        density = (logits.log_softmax(0) - distance / (2 * (a**2 * SPREAD**2 + sigma**2))).logsumexp(0)
        (score,) = torch.autograd.grad(density.sum(), x)
        torch.testing.assert_close(model.eps(x.detach(), t), -sigma * score, atol=2e-4, rtol=1e-3)


def _log_weight(word: str, height: int, width: int) -> Tensor:
    """log pi of a word at each position, up to a constant of the position."""
    _, center, spread, weight = WORDS[word]
    row, column = ((torch.arange(side) + 0.5) / side for side in (height, width))
    rows, columns = ((p - m) / h for p, m, h in zip((row, column), center, spread, strict=True))
    return weight - (rows.square()[:, None] + columns.square()) / 2


def _posteriors(calls: Any) -> Tensor:
    """Maps of the bundled model: the mean posterior of each word during the sampling, from densities."""
    prompt, size = calls.params["prompt"], calls.params["size"] or [64, 64]
    words = [word for word, _ in calls.inputs["text_denoiser"].word_tokens(prompt)]
    drawing = [word for word in words if word in WORDS]
    model = calls.inputs["text_denoiser"]
    shape = [side + side % 2 for side in size]
    random = torch.Generator().manual_seed(calls.params["seed"])
    x = torch.randn(1, 3, *(side // 2 for side in shape), generator=random)
    times = torch.linspace(0, 999, calls.params["steps"] + 1, dtype=torch.float64).round().long().tolist()
    sums = torch.zeros(len(words), *x.shape[2:])

    def denoise(x: Tensor, t: int, words: list[str]) -> tuple[Tensor, Tensor]:
        a, sigma = model.levels(t)
        v = a**2 * SPREAD**2 + sigma**2
        weights = torch.stack([_log_weight(word, *x.shape[2:]) for word in words]).log_softmax(0)
        colors = torch.tensor([[2 * value - 1 for value in WORDS[word][0]] for word in words])
        posterior = (weights - (x - a * colors[:, :, None, None]).square().sum(1) / (2 * v)).softmax(0)
        means = a * colors[:, :, None, None] + a**2 * SPREAD**2 / v * (x - a * colors[:, :, None, None])
        return (x - (posterior[:, None] * means).sum(0)) / sigma, posterior

    for t, next_t in pairwise(times[::-1]):
        noise, posterior = denoise(x, t, drawing)
        for n, word in enumerate(words):
            if word in drawing:
                sums[n] += posterior[drawing.index(word)]
        empty = denoise(x, t, list(WORDS))[0]
        noise = empty + calls.params["guidance"] * (noise - empty)
        (a, s), (b, r) = model.levels(t), model.levels(next_t)
        x = b * (x - s * noise) / a + r * noise
    large = F.interpolate(sums[None] / (len(times) - 1), shape, mode="bicubic")[0]
    return large.clamp(0, 1)[:, : size[0], : size[1]]


def _oracle() -> None:
    """Tiny networks by hand, and the bundled model against the gradient of its density."""
    maps_of_a_tiny_network_by_hand()
    maps_of_joint_attention_by_hand()
    assert _times(4, 9) == _times(4, 3) == [3, 2, 1, 0]
    color_words_are_the_optimal_denoiser()


@method(
    family="vision_language",
    references=[
        Reference(
            key="tang2023",
            title="What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
            authors="Tang, Liu, Pandey, Jiang, Yang, Kumar, Stenetorp, Lin, Ture",
            year=2023,
            url="https://arxiv.org/abs/2210.04885",
        ),
        Reference(
            key="song2021",
            title="Denoising Diffusion Implicit Models",
            authors="Song, Meng, Ermon",
            year=2021,
            url="https://arxiv.org/abs/2010.02502",
        ),
        Reference(
            key="ho2022",
            title="Classifier-Free Diffusion Guidance",
            authors="Ho, Salimans",
            year=2022,
            url="https://arxiv.org/abs/2207.12598",
        ),
    ],
    invariants=[PixelRange(field="image"), UnitRange(field="maps")],
    relations=[Agrees(_posteriors, tolerance=1e-3, networks=("gap",))],
    # Guidance other than 1 evaluates the noise without the prompt as well.
    cost=Cost(forward=param.steps * (1 + minimum(1, ceil(maximum(param.guidance - 1, 1 - param.guidance))))),
    oracle=_oracle,
    quick={"steps": 3},
)
def prompt_attribution(
    text_denoiser: TextDenoiser,
    *,
    prompt: Annotated[
        str, Field(min_length=1, description="text that the image is drawn from")
    ] = "sun and cloud in the sky above sea and sand",
    steps: Annotated[int, Field(ge=1, le=10_000, description="number of DDIM steps of the sampling")] = 50,
    guidance: Annotated[
        float, Field(ge=0, le=100, description="weight of the prompt against the empty prompt")
    ] = 7.5,
    layers: Annotated[
        list[str] | None,
        Field(
            description="cross-attention layers that are averaged; default: those of down and up blocks, "
            "without the middle block"
        ),
    ] = None,
    size: Annotated[
        list[Annotated[int, Field(ge=1, le=4096)]] | None,
        Field(
            min_length=2,
            max_length=2,
            description="height and width of the image; default: those that the model was trained on",
        ),
    ] = None,
    seed: Seed = None,
) -> PromptMaps:
    """Prompt attribution (DAAM): an image drawn from a prompt, and the pixels that each word drew.

    F_tlh = softmax(Q K^T / sqrt(d))  attention of positions to tokens at time t, layer l, head h
    D_w = mean over t, l, h of sum over the tokens k of word w of upsampled F_tlh[:, :, k]

    x_T ~ N(0, I) is sampled by DDIM with eps = eps_empty + guidance (eps_prompt - eps_empty); the attention
    is that of eps_prompt. Upsampling to the image is bicubic, its negative values are set to 0. The paper
    has the sum in place of the mean over t, l and h, which only scales all maps, and divides each map by its
    maximum where it is drawn or compared with a threshold: so do ``figure()`` and ``masks(threshold)``.
    Punctuation and the tokens of start, end and padding belong to no word; they receive much attention, so
    that the words' maps add up to less than 1.

    Attention tells where the word was read. What other words would have drawn, it does not tell, and text
    encoders mix words: an adjective's map often covers its object, and words of one category each other's.

    In Stable Diffusion 3 and Flux image and text attend to each other in one layer: F is then the part of
    softmax(Q [K_image, K_text]^T / sqrt(d)) of image positions to text tokens, so that a position's
    attention to other positions lowers all words' maps. The attention of one layer is in memory at a time,
    (heads, L, L) for the L tokens of image and text.

    ``text_denoiser`` is the folder of a text-to-image pipeline of diffusers (Stable Diffusion 1, 2, XL or 3,
    Flux), or a ``Denoiser`` with ``prompted`` and ``word_tokens`` whose cross-attention layers have the
    parts of diffusers (``to_q``, ``to_k``, ``heads``, ``is_cross_attention``). The default,
    builtin:color-words, draws landscapes from ten words without a trained network: its attention is the
    posterior probability that a word drew the pixel, so that its maps are right by construction. It shows
    the method, not a model.

    Returns:
        ``image`` (C, H, W) in [0, 1], ``maps`` (words, H, W) in [0, 1], raw, and ``words``.

    Raises:
        InputError: a model without text, a prompt without words or with more tokens than the model reads,
            or no ``size`` where the model has none.
        ModelError: a model without cross-attention between positions and tokens.
        UnknownName: layers that are no cross-attention of the model.

    Example::
        from phosphene import run

        result = run("prompt_attribution", prompt="the moon at night above the sea", steps=10, seed=0)
        result.words  # ("the", "moon", "at", "night", "above", "the", "sea")
        result.maps.shape  # (7, 64, 64)

    Source: Tang et al. 2023, section 2.2, equations 5 to 8.
    """
    words = text_denoiser.word_tokens(prompt)
    if not words:
        raise InputError(f"the prompt {prompt!r} has no words")
    height, width = size or text_denoiser.image_size or (0, 0)
    if not height:
        raise InputError("this diffusion model does not record its image size: pass size=[height, width]")
    chosen = _cross_attention(text_denoiser, layers)
    with_prompt, with_empty = text_denoiser.prompted(prompt), text_denoiser.prompted("")
    joint_layers = [name for name in chosen if not _is_cross(with_prompt.get_submodule(name))]
    cross_layers = [name for name in chosen if name not in joint_layers]
    parts = [f"{name}.{part}" for name in cross_layers for part in ("to_q", "to_k")]
    modules = {part: with_prompt.get_submodule(part) for part in parts}
    weight = next(text_denoiser.parameters(), torch.zeros(()))
    multiple = text_denoiser.multiple
    padded = [-(-side // multiple) * multiple for side in (height, width)]
    with guard(text_denoiser), torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        blank = weight.new_zeros(1, text_denoiser.channels, *padded, dtype=dtype)
        shape = text_denoiser.encode(blank).shape
        random = torch.Generator().manual_seed(seed or 0)
        x = torch.randn(shape, generator=random, dtype=blank.dtype).to(blank)
        times = _times(text_denoiser.time_steps, steps)
        attention: dict[str, Tensor] = {}  # (words, positions), summed over the steps

        def add(name: str, probabilities: Tensor) -> None:
            by_word = torch.stack([probabilities[:, tokens].sum(1) for _, tokens in words])
            attention[name] = attention.get(name, 0) + by_word

        def add_joint(name: str, probabilities: Tensor) -> Tensor:
            joint.maps.clear()  # else the attention of all layers would be in memory at once
            if name:
                add(name, _image_to_text(probabilities[0], with_prompt))
            return probabilities

        joint = RecordAttention({name: with_prompt.get_submodule(name) for name in joint_layers}, add_joint)
        for t, next_t in progress_bar(list(pairwise(times)), "Sampling"):
            with Tap(modules) as tap, joint if joint_layers else nullcontext():
                output = with_prompt.predict(x, t)
                for name in cross_layers:
                    layer = with_prompt.get_submodule(name)
                    add(name, _attention(layer, tap[f"{name}.to_q"], tap[f"{name}.to_k"]))
            if guidance != 1:
                empty = with_empty.predict(x, t)
                output = empty + guidance * (output - empty)
            x = text_denoiser.step(x, output, t, next_t)
        maps = torch.stack([_upsample(a, name, shape[2:], padded) for name, a in attention.items()]).mean(0)
        image = text_denoiser.decode(x)[0].clamp(0, 1)
    return PromptMaps(
        image=image[:, :height, :width],
        maps=(maps / (len(times) - 1)).clamp(0, 1)[:, :height, :width].to(image),
        words=tuple(word for word, _ in words),
        prompt=prompt,
    )


def _times(count: int, steps: int) -> list[int]:
    """Time steps from count - 1 to 0 in ``steps`` equal intervals, or each once where there are fewer."""
    times = torch.linspace(count - 1, 0, min(steps, count - 1) + 1, dtype=torch.float64)
    numbers: list[int] = times.round().long().tolist()
    return numbers


def _cross_attention(denoiser: Denoiser, requested: list[str] | None) -> list[str]:
    """Names of the layers in which positions attend to text: those requested, or all outside the middle."""
    available = [
        name
        for name, layer in denoiser.named_modules()
        if _is_cross(layer) or _is_joint(denoiser, name, layer)
    ]
    if not available:
        raise ModelError("this diffusion model has no cross-attention between positions and words")
    if requested is not None and not requested:
        raise InputError("layers is empty: name a cross-attention layer, or pass None for the default")
    for name in requested or ():
        if name not in available:
            raise UnknownName("cross-attention layer", name, available, "this diffusion model")
    return requested or [name for name in available if "mid_block" not in name] or available


def _is_cross(layer: Any) -> bool:
    return bool(
        getattr(layer, "is_cross_attention", False) and hasattr(layer, "to_q") and hasattr(layer, "to_k")
    )


def _is_joint(denoiser: Denoiser, name: str, layer: Any) -> bool:
    """Whether a layer's attention is over image and text together: with projections of the text of its own,
    or in a block whose tokens are both."""
    return (
        isinstance(denoiser, Pipeline)
        and denoiser.joint_attention is not None
        and hasattr(layer, "to_q")
        and (getattr(layer, "added_kv_proj_dim", None) is not None or "single_transformer_blocks" in name)
    )


def _image_to_text(probabilities: Tensor, denoiser: Any) -> Tensor:
    """Attention (positions, tokens), the mean over the heads, from that of all tokens (heads, L, L)."""
    text = denoiser.prompt.shape[1]
    if denoiser.joint_attention == "image first":
        return probabilities[:, :-text, -text:].mean(0)
    return probabilities[:, text:, :text].mean(0)


def _attention(layer: Any, query: Tensor, key: Tensor) -> Tensor:
    """Attention (positions, tokens), the mean over the heads, from the projections (1, ..., heads d)."""
    query, key = (
        at_least_float32(projection[0]).unflatten(1, (layer.heads, -1)).transpose(0, 1)
        for projection in (query, key)
    )
    scale = getattr(layer, "scale", query.shape[2] ** -0.5)
    return (scale * query @ key.mT).softmax(2).mean(0)


def _upsample(attention: Tensor, name: str, latent: torch.Size, size: list[int]) -> Tensor:
    """Attention (words, positions) of a layer, as maps (words, H, W)."""
    positions = attention.shape[1]
    height = round((positions * latent[0] / latent[1]) ** 0.5)
    if height == 0 or positions % height:
        raise ModelError(
            f"the {positions} positions of {name} are no reduced grid of {latent[0]} x {latent[1]} latents"
        )
    return F.interpolate(attention.unflatten(1, (height, -1))[None], size, mode="bicubic")[0]


@hookimpl
def phosphene_methods():
    return [prompt_attribution]
