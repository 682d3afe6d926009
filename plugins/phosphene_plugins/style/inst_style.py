"""InST: a style learned as words of a diffusion model's prompt (textual inversion), applied to images."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    DivergenceError,
    InputError,
    Reference,
    fork_random_state,
    hookimpl,
    method,
    progress_bar,
)
from phosphene.generative import Denoiser
from phosphene.hooks import guard
from phosphene.roles import Content, Seed, Styles
from phosphene.spec import Cost, InvariantTo, PixelRange, SameShape, param, size

from ..vision_language._text_denoiser_role import TextDenoiser
from ._ddim import (
    WITHOUT_TEXT,
    Guidance,
    ddim,
    decode_cropped,
    encode_padded,
    guided,
    require_channels_of,
    timesteps,
)
from ._learned_style_result import LearnedStylization
from ._pixel_features import draw_images


class _LinearDenoiser(Denoiser):
    """Predicts x_0 = B v + 0.1 (t + 1) x, of the mean v (D,) of the prompt's words."""

    prediction = "sample"

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.tensor([0.95, 0.9, 0.8, 0.6, 0.4, 0.2]))
        self.weight = nn.Parameter(weight)
        self.words = weight.new_zeros(1, weight.shape[1])

    @property
    def token_width(self) -> int:
        return self.weight.shape[1]

    def prompted(self, text: str) -> _LinearDenoiser:
        return self.with_tokens("", self.weight.new_full((1, self.token_width), len(text) / 2))

    def with_tokens(self, text: str, tokens: Tensor) -> _LinearDenoiser:
        view = copy.copy(self)
        view.words = tokens + len(text) / 10
        return view

    def token_embedding(self, word: str) -> Tensor:
        return torch.linspace(-1, len(word), self.token_width, dtype=self.weight.dtype)

    def forward(self, x: Tensor, t: int) -> Tensor:
        return _draw(self.weight, self.words, x, t)


def _draw(weight: Tensor, words: Tensor, x: Tensor, t: int) -> Tensor:
    assert x.ndim == 4
    return (weight @ words.mean(0))[:, None, None] + 0.1 * (t + 1) * x


def steps_of_the_words_and_of_the_sampling_by_hand() -> None:
    """Two steps of Adam from the initial word, and sampling from predicted or inverted noise, by hand."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, generator=draw, dtype=torch.float64)
    denoiser = _LinearDenoiser(weight)
    styles, images = draw_images(2, 3, 4, 10, seed=1), draw_images(2, 3, 4, 5, seed=2)
    call: Any = inst_style
    cases: tuple[tuple[dict[str, Any], list[int]], ...] = (
        ({"inversion": "attention", "tokens": 3, "strength": 0.6, "steps": 3, "seed": 3}, [3, 2, 1, 0]),
        ({"inversion": "embedding", "tokens": 2, "strength": 1.0, "steps": 5, "seed": 0}, [5, 4, 3, 2, 1, 0]),
        ({"inversion": "embedding", "tokens": 1, "strength": 0.01, "steps": 9, "seed": 4}, [1, 0]),
    )
    for case, (options, times) in enumerate(cases):
        text, guidance = ("a *", 2.5) if case == 1 else ("*", 1.0)
        noise, words, losses = _fit_by_hand(denoiser, styles, text, **options)
        inverted: dict[str, Any] = {"invert_content": case == 0, "content_prompt": "sky"}
        options |= {"text": text, "guidance": guidance, "fit_steps": 2, "lr": 0.1, **inverted}
        result = call(images, styles, denoiser, initial="ink", **options)
        torch.testing.assert_close(result.tokens, words)
        torch.testing.assert_close(result.fit_losses, losses)
        assert result.style == ("a learned word" if options["tokens"] == 1 else f"{len(words)} learned words")
        assert not result.fit_losses.requires_grad and result.text == text
        learned = result.tokens + len(text) / 10
        empty, caption = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 1.5, dtype=torch.float64)

        def step(x: Tensor, t: int, after: int, output: Tensor) -> Tensor:
            signal, level = denoiser.levels(max(t, after))  # where the output is computed, in both directions
            eps = (x - signal * output) / level
            (signal, level), (next_signal, next_level) = denoiser.levels(t), denoiser.levels(after)
            return next_signal * (x - level * eps) / signal + next_level * eps

        for n, x in enumerate((2 * images - 1).split(1)):
            if case == 0:
                for t, after in zip(times[:0:-1], times[-2::-1], strict=True):
                    x = step(x, t, after, _draw(weight, caption, x, after))
            else:
                signal, level = denoiser.levels(times[0])
                mixed = signal * x + level * noise[..., : x.shape[3]]
                predicted = (mixed - signal * _draw(weight, learned, mixed, times[0])) / level
                x = signal * x + level * predicted
            for t, after in zip(times, times[1:], strict=False):
                clean = _draw(weight, learned, x, t)
                without = _draw(weight, empty, x, t)
                x = step(x, t, after, without + guidance * (clean - without))
            drawn = (x + 1) / 2
            torch.testing.assert_close(result.stylized[n : n + 1], drawn.clamp(0, 1))
    assert (drawn < 0).any() and (drawn > 1).any()
    for unfit in ((images[:, :1], styles), (images, styles[:, :1])):
        try:
            call(*unfit, denoiser, fit_steps=1)
        except InputError:
            continue
        raise AssertionError("images of one channel are not refused")
    assert _deviation(torch.ones(2, 3)) == 1


def _fit_by_hand(
    denoiser: _LinearDenoiser, styles: Tensor, text: str, *, inversion: str, tokens: int, seed: int, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The noise of the content, the words (n, 2) after two steps, and the losses."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 3, 4, 5, generator=random, dtype=torch.float64)
    word = torch.tensor([-1.0, 3.0], dtype=torch.float64)  # whose components deviate by 2
    start = word.expand(tokens, -1)
    if tokens > 1:
        start = start + torch.randn(tokens, 2, generator=random, dtype=torch.float64)
    unit = (start[0, 0] - start[0, 1]).abs() / 2
    clean = 2 * styles - 1
    pooled = F.adaptive_avg_pool2d(clean, (4, 8))
    features = torch.stack(
        [
            torch.cat([image[:, y, x], image.new_tensor([y / 1.5 - 1, x / 3.5 - 1])])
            for image in pooled for y in range(4) for x in range(8)
        ]
    )  # fmt: skip
    features = (features - features.mean(0)) / (features.var(0, correction=0).sqrt() + 1e-6)
    with fork_random_state():
        torch.manual_seed(seed)
        names = [f"{kind}{n}" for n in range(2) for kind in "qkvo"]
        shapes = {"q": (2, 32), "k": (5, 32), "v": (5, 32), "o": (32, 2)}
        layers = {name: nn.Linear(*shapes[name[0]]).double() for name in names}
    for name in ("o0", "o1"):
        for parameter in layers[name].parameters():
            nn.init.zeros_(parameter)
    scaled = nn.Parameter(start / unit)
    trained = [scaled] if inversion == "embedding" else nn.ModuleDict(layers).parameters()
    optimizer = torch.optim.Adam(trained, lr=0.1)

    def words() -> Tensor:
        if inversion == "embedding":
            return scaled * unit
        x = start
        for n in range(2):
            query, key, value = (layers[f"{kind}{n}"] for kind in "qkv")
            attended = F.scaled_dot_product_attention(query(x / unit), key(features), value(features))
            x = x + unit * layers[f"o{n}"](attended)
        return x

    losses = []
    for lr in (0.1, 0.05):
        t = int(torch.randint(6, (), generator=random))
        eps = torch.randn(clean.shape, generator=random, dtype=torch.float64)
        signal, level = denoiser.levels(t)
        x = signal * clean + level * eps
        with torch.enable_grad():
            loss = (_draw(denoiser.weight.detach(), words() + len(text) / 10, x, t) - clean).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        losses.append(loss.detach())
    return noise, words().detach(), torch.stack(losses)


class _Attention(nn.Module):
    """Words computed from a style's positions by layers of cross-attention: v <- v + O softmax(Q K^T) V.

    ``start`` (n, D) are the words before the first step, because O begins at zero; ``features`` (L, C) those
    of the style's positions, standardized.
    """

    def __init__(self, start: Tensor, features: Tensor, layers: int = 2, width: int = 32) -> None:
        super().__init__()
        self.start, self.features, self.width = start, features, width
        self.unit = _deviation(start)
        names = [f"{kind}{n}" for n in range(layers) for kind in "qkvo"]
        inputs = {"q": start.shape[1], "k": features.shape[1], "v": features.shape[1], "o": width}
        outputs = {"q": width, "k": width, "v": width, "o": start.shape[1]}
        self.layers = nn.ModuleDict({n: nn.Linear(inputs[n[0]], outputs[n[0]]) for n in names}).to(start)
        for n in range(layers):
            self.layers[f"o{n}"].requires_grad_(False).apply(_set_zero).requires_grad_()
        self.depth = layers

    def forward(self) -> Tensor:
        words = self.start
        for n in range(self.depth):
            query = self.layers[f"q{n}"](words / self.unit)
            key, value = self.layers[f"k{n}"](self.features), self.layers[f"v{n}"](self.features)
            attended = (query @ key.mT / self.width**0.5).softmax(1) @ value
            words = words + self.unit * self.layers[f"o{n}"](attended)
        return words


def _set_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


class _Words(nn.Module):
    """The words themselves as parameters, in units of ``unit``."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.unit = _deviation(start)
        self.scaled = nn.Parameter(start / self.unit)

    def forward(self) -> Tensor:
        return self.unit * self.scaled


@method(
    family="style",
    references=[
        Reference(
            key="zhang2023",
            title="Inversion-Based Style Transfer with Diffusion Models",
            authors="Zhang, Huang, Tang, Huang, Ma, Dong, Xu",
            year=2023,
            url="https://arxiv.org/abs/2211.13203",
        ),
        Reference(
            key="gal2023",
            title="An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual "
            "Inversion",
            authors="Gal, Alaluf, Atzmon, Patashnik, Bermano, Chechik, Cohen-Or",
            year=2023,
            url="https://arxiv.org/abs/2208.01618",
        ),
    ],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    relations=[InvariantTo("batch_order")],
    needs=["gradients", "training"],
    # Guidance other than 1 evaluates the noise without the text as well.
    cost=Cost(
        forward=param.fit_steps * size.styles
        + size.images * (1 + param.invert_content * (param.steps - 1))
        + size.images * param.steps * (1 + WITHOUT_TEXT),
        backward=param.fit_steps * size.styles,
    ),
    oracle=steps_of_the_words_and_of_the_sampling_by_hand,
    quick={"fit_steps": 3, "steps": 2},
    demo={
        "images": "builtin:scenes/2",
        "styles": "builtin:mosaic",
        "tokens": 16,
        "inversion": "embedding",
        "lr": 0.05,
        "content_prompt": "sky, snow, night, mountain",
    },
)
def inst_style(
    images: Content,
    styles: Styles,
    text_denoiser: TextDenoiser,
    *,
    text: Annotated[str, Field(description="prompt, in which * stands for the learned words")] = "*",
    tokens: Annotated[int, Field(ge=1, le=64, description="number of learned words")] = 8,
    inversion: Annotated[
        Literal["attention", "embedding"],
        Field(description="words computed from the style by cross-attention, or free parameters"),
    ] = "attention",
    initial: Annotated[
        str, Field(min_length=1, description="word whose embedding the learned words start from")
    ] = "style",
    fit_steps: Annotated[
        int, Field(ge=1, le=100_000, description="optimization steps of the learned words")
    ] = 500,
    lr: Annotated[
        float,
        Field(gt=0, le=1, description="learning rate of Adam, in units of the initial word's deviation"),
    ] = 0.01,
    strength: Annotated[
        float, Field(gt=0, le=1, description="time at which the content's sampling begins; 1: pure noise")
    ] = 0.6,
    steps: Annotated[int, Field(ge=1, le=10_000, description="number of DDIM steps of the sampling")] = 50,
    invert_content: Annotated[
        bool, Field(description="noise of the content by DDIM inversion, not by prediction of a drawn one")
    ] = True,
    content_prompt: Annotated[
        str, Field(description="caption of the content, for its inversion by DDIM")
    ] = "",
    guidance: Guidance = 1.0,
    seed: Seed = None,
) -> LearnedStylization:
    """InST: a style learned as words of a diffusion model by textual inversion, then applied to images.

    v = argmin_v E_{x_0, t, eps} | y_t - f_theta(x_t, t, prompt(v)) |^2        (x_0 the styles; theta fixed)

    with y_t what the network predicts (noise, v, x_0 or velocity). "attention" computes the words from the
    style: v = v_0 + sum over two layers of O softmax(Q(v) K(x_0)^T / sqrt(d)) V(x_0), with the projections
    as parameters and x_0 at up to 8 x 8 positions. "embedding" optimizes v itself, as textual inversion
    does. The paper attends to a CLIP embedding of the style, here it is the diffusion model's own x_0.

    Content z_0 is moved to z_t, t = ``strength`` T, by DDIM inversion with ``content_prompt``, and z_t is
    sampled to time 0 with the words. With ``invert_content=False``, as in the paper, noise is added instead,
    and replaced by what the network predicts of it with the words (stochastic inversion),

    eps' = eps_theta(sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, t, v)
    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps'

    All images have the same eps. Several styles are learned as one. The paper learns one word; more than one
    start beside ``initial``, at random.

    ``text_denoiser`` is the folder of a text-to-image pipeline of diffusers (Stable Diffusion 1, 2, XL or 3,
    Flux), or a ``Denoiser`` with ``with_tokens``. The bundled builtin:color-words draws each position in the
    color of one word: its words learn the colors of a style and where they are, not its strokes. Positions
    are independent of each other in it, so that the predicted noise of stochastic inversion remains as grain.
    Words of ``content_prompt`` that the content does not show appear as shapes; the empty prompt is all ten.

    Returns:
        ``images`` (N, C, H, W) the content, ``stylized`` (N, C, H, W) in [0, 1], ``sources`` (S, C, H', W')
        the styles, ``tokens`` (n, D) the words' input embeddings, ``fit_losses`` (fit_steps,), ``text``.

    Raises:
        DivergenceError: samples that are not finite, since the learned words lie too far from any text.
        InputError: images with other channels than the model's, a text without ``*``, or a model that
            learns no words.

    Example::
        from phosphene import run

        result = run("inst_style", images="builtin:scenes/1", styles="builtin:swirls", fit_steps=20, steps=5)
        result.stylized.shape  # (1, 3, 64, 64)
        result.tokens.shape    # (8, 8)

    Source: Zhang et al. 2023, sections 3.2 and 3.3; Gal et al. 2023, equation 2.
    """
    denoiser = text_denoiser
    require_channels_of(denoiser, images=images, styles=styles)
    if "*" not in text:
        raise InputError(f"the text {text!r} has no *, which stands for the learned words")
    random = torch.Generator().manual_seed(seed or 0)
    with guard(denoiser):
        content, style = (encode_padded(denoiser, batch).detach() for batch in (images, styles))
        noise = torch.randn(1, *content.shape[1:], generator=random, dtype=content.dtype).to(content)
        start = denoiser.token_embedding(initial).to(content).expand(tokens, -1)
        if tokens > 1:  # equal words would have equal gradients and stay equal
            offsets = torch.randn(start.shape, generator=random, dtype=start.dtype).to(start)
            start = start + _deviation(start) / 2 * offsets
        with fork_random_state():
            torch.manual_seed(seed or 0)
            words = _Words(start) if inversion == "embedding" else _Attention(start, _positions(style))
        optimizer = torch.optim.Adam(words.parameters(), lr=lr)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / fit_steps)
        losses = []
        for _ in progress_bar(range(fit_steps), "Learning words"):
            t = int(torch.randint(denoiser.time_steps, (), generator=random))
            eps = torch.randn(style.shape, generator=random, dtype=style.dtype).to(style)
            signal, level = denoiser.levels(t)
            with torch.enable_grad():
                output = denoiser.with_tokens(text, words()).predict(signal * style + level * eps, t)
                loss = F.mse_loss(output, denoiser.target(style, eps, t))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            decay.step()
            losses.append(loss.detach())
        with torch.no_grad():
            learned = words()
            with_words, empty = denoiser.with_tokens(text, learned), denoiser.prompted("")
            with_caption = denoiser.prompted(content_prompt)
            predict = guided(with_words.predict, empty.predict, guidance)
            times = timesteps(max(1, round(strength * (denoiser.time_steps - 1))) + 1, steps)
            stylized = []
            for image, x_0 in zip(images.split(1), content.split(1), strict=True):
                if invert_content:
                    z = ddim(denoiser, with_caption.predict, x_0, times, "Inverting")
                else:
                    signal, level = denoiser.levels(times[-1])
                    eps = with_words.eps(signal * x_0 + level * noise, times[-1])
                    z = signal * x_0 + level * eps
                z = ddim(denoiser, predict, z, times[::-1], "Sampling")
                if not z.isfinite().all():
                    raise DivergenceError(
                        f"the samples with the learned words are no longer finite: lower lr (now {lr:g}), "
                        f"fit_steps (now {fit_steps}) or guidance (now {guidance:g})"
                    )
                stylized.append(decode_cropped(denoiser, z, image).clamp(0, 1))
    return LearnedStylization(
        images=images,
        stylized=torch.cat(stylized).to(images),
        style=f"{tokens} learned words" if tokens > 1 else "a learned word",
        sources=styles,
        tokens=learned.to(images),
        fit_losses=torch.stack(losses).to(images),
        text=text,
    )


def _deviation(start: Tensor) -> Tensor:
    """Standard deviation of the components of a word, the unit of steps; 1 where it is zero."""
    deviation = start[0].std(correction=0)
    return torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def _positions(style: Tensor) -> Tensor:
    """Standardized features (S h w, C + 2) of a style's x_0 at up to 8 x 8 positions, and the positions."""
    pooled = F.adaptive_avg_pool2d(style, (min(8, style.shape[2]), min(8, style.shape[3])))
    axes = [torch.linspace(-1, 1, side).to(style) for side in pooled.shape[2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(style), -1, -1, -1)
    features = torch.cat([pooled, grid], 1).movedim(1, -1).flatten(0, 2)
    return (features - features.mean(0)) / (features.std(0, correction=0) + 1e-6)


@hookimpl
def phosphene_methods():
    return [inst_style]
