"""Attribution of answers: the image tokens that each word of a vision-language model's answer depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from phosphene import InputError, Reference, at_least_float32, hookimpl, method, progress_bar
from phosphene.roles import Images
from phosphene.spec import UnitRange

from ._answer_maps_result import AnswerMaps
from ._answer_models import AnswerModel, Pass, generate_answer
from ._answer_role import Answerer, Question

#: A sink receives more than this many times the mean attention of an image token.
SINK_FACTOR = 4.0
Measure = Literal["gradient_attention", "attention", "gradient_x_input", "grad_cam"]


class _OneLayer(AnswerModel):
    """One attention of a text token to image tokens, whose maps have a closed form."""

    name, uri, input_size, grid = "one layer", None, (4, 6), (2, 3)
    ends = frozenset([0])

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.queries = torch.randn(4, 3, generator=draw, dtype=torch.float64)
        self.head = torch.randn(3, 4, generator=draw, dtype=torch.float64)

    def image_tokens(self, image: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(image, 2)[0].flatten(1).T

    def read(self, tokens: Tensor, ids: Sequence[int]) -> Pass:
        attention = (self.queries[list(ids)] @ tokens.T).softmax(1)[None, None]  # (1, 1, L, T)
        logits = attention[0, 0] @ tokens @ self.head
        return Pass(logits, [attention], torch.arange(len(ids)), torch.arange(len(tokens)))

    def encode(self, text: str) -> list[int]:
        return [int(digit) for digit in text]

    encode_answer = encode

    def decode(self, number: int) -> str:
        return str(number)


class _WithSink(_OneLayer):
    """A token that attracts the attention of the query 2."""

    def image_tokens(self, image: Tensor) -> Tensor:
        tokens = super().image_tokens(image)
        return tokens + torch.nn.functional.one_hot(torch.tensor(4), 6)[:, None] * 3 * self.queries[2]


def _oracle() -> None:
    """Of one attention layer all maps follow from its weights by hand."""
    model = _OneLayer()
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    call: Any = answer_attribution
    kinds: tuple[Measure, ...] = ("gradient_attention", "attention", "gradient_x_input", "grad_cam")
    for measure in kinds:
        for score in ("logit", "log_probability"):
            result = call(images, model, question="2", answer="131", measure=measure, score=score, tokens=4)
            assert result.words == (("1", "3", "1", ""),) * 2 and result.answers == ("1 3 1",) * 2
            for n, image in enumerate(images):
                x = model.image_tokens(image[None])
                for t, (query, word) in enumerate(((2, 1), (1, 3), (3, 1))):
                    a = (x @ model.queries[query]).softmax(0)
                    logits = a @ x @ model.head
                    probabilities = logits.softmax(0)
                    torch.testing.assert_close(result.probabilities[n, t], probabilities[word])
                    # dS/dlogits: the word's own, and minus the probabilities of the log probability.
                    slope = torch.eye(4, dtype=torch.float64)[word]
                    slope = slope - probabilities if score == "log_probability" else slope
                    w = model.head @ slope
                    value = x @ w  # dS/da, as S is linear in a
                    gradient = a[:, None] * w + (a * (value - a @ value))[:, None] * model.queries[query]
                    expected = {
                        "gradient_attention": (a * value).relu(),
                        "attention": a,
                        "gradient_x_input": (x * gradient).sum(1),
                        "grad_cam": (x @ gradient.mean(0)).relu(),
                    }[measure]
                    torch.testing.assert_close(result.maps[n, t], expected.view(2, 3))
            assert not result.maps[:, 3].any() and not result.probabilities[:, 3].any()
    # An image of one color is its own control; without an answer the likeliest words are taken.
    flat = images.mean((2, 3), keepdim=True).expand_as(images).contiguous()
    ramp = call(flat, model, question="2", answer="13", measure="gradient_attention", tokens=2)
    assert (ramp.control_similarity.abs() < 1e-9).all()  # a constant map correlates with nothing
    free = call(images, model, question="2", tokens=1)
    x = model.image_tokens(images[:1])
    best = int(((x @ model.queries[2]).softmax(0) @ x @ model.head).argmax())
    assert free.words[0][0] == ("" if best == 0 else str(best))
    # Tokens that attract nearly all attention, whatever the image, are sinks.
    sink = torch.full((1, 1, 6), 0.05)
    sink[..., 4] = 0.75  # 4.5 times the mean
    sinks = _sinks(sink, sink, torch.tensor([0]), (2, 3))
    assert sinks.tolist() == [[False, False, False], [False, True, False]]
    assert not _sinks(sink, torch.full((1, 1, 6), 1 / 6), torch.tensor([0]), (2, 3)).any()
    assert not _sinks(sink.clamp(max=0.45), sink, torch.tensor([0]), (2, 3)).any()
    # One of six tokens is added to the query of the word, in any image: the share of the maps on it.
    model = _WithSink()
    options: dict[str, Any] = {"question": "2", "answer": "1", "tokens": 1, "score": "logit"}
    options["measure"] = "gradient_x_input"
    result, control = (call(x, model, **options) for x in (images, flat))
    assert result.sinks.tolist() == [[[False, False, False], [False, True, False]]] * 2
    positive = result.maps.clamp(min=0).flatten(2)
    assert (result.maps < 0).any()
    torch.testing.assert_close(result.sink_share, positive[:, :, 4] / positive.sum(2))
    for n in range(2):
        pair = torch.stack([result.maps[n, 0].flatten(), control.maps[n, 0].flatten()])
        torch.testing.assert_close(result.control_similarity[n, 0], torch.corrcoef(pair)[0, 1])


@method(
    family="vision_language",
    references=[
        Reference(
            key="chefer2021b",
            title="Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder "
            "Transformers",
            authors="Chefer, Gur, Wolf",
            year=2021,
            url="https://arxiv.org/abs/2103.15679",
        ),
        Reference(
            key="selvaraju2017",
            title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
            authors="Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra",
            year=2017,
            url="https://arxiv.org/abs/1610.02391",
        ),
        Reference(
            key="darcet2024",
            title="Vision Transformers Need Registers",
            authors="Darcet, Oquab, Mairal, Bojanowski",
            year=2024,
            url="https://arxiv.org/abs/2309.16588",
        ),
    ],
    invariants=[UnitRange(field="probabilities"), UnitRange(field="sink_share")],
    oracle=_oracle,
    quick={"tokens": 2},
    demo={"question": "describe", "tokens": 5},
)
def answer_attribution(
    images: Images,
    answer_model: Answerer,
    *,
    question: Question = "what shape",
    answer: Annotated[
        str | None, Field(min_length=1, description="answer to explain; default: the network's own")
    ] = None,
    measure: Annotated[
        Measure, Field(description="what the maps show, by the attention or by image tokens")
    ] = "gradient_attention",
    score: Annotated[
        Literal["logit", "log_probability"], Field(description="score of a word that is differentiated")
    ] = "log_probability",
    tokens: Annotated[int, Field(ge=1, le=1000, description="largest number of tokens of an answer")] = 6,
) -> AnswerMaps:
    """Attribution of a vision-language model's answer: a map of the image for every generated token.

    S_t = log p(y_t | image, question, y_1 ... y_t-1);  x_i the image tokens of the decoder

    grad_cam: ReLU(sum_d (mean_i dS_t / dx_id) x_id),  gradient_x_input: sum_d x_id dS_t / dx_id

    attention: mean over layers and heads of A_ti,  gradient_attention: that of ReLU(A_ti dS_t / dA_ti)

    with A_ti the attention of the token that predicts y_t to image token i: self-attention of a decoder with
    the image in its sequence (LLaVA), cross-attention otherwise (BLIP). y is the likeliest token at each step
    until the end, or ``answer``. ``score="logit"`` differentiates the logit of y_t, which other words share
    a part of; log p(y_t) also falls where the image speaks for another word.

    Attention misleads: some image tokens, often at borders or in plain areas, attract it whatever the image
    and the question (sinks). Two checks say so. The maps are computed again for an image of the mean color,
    with the same words: ``control_similarity`` near 1 says that a map shows the network and not the image.
    ``sinks`` are image tokens with more than four times the mean attention for both images, averaged over the
    words, layers and heads; ``sink_share`` is their share of a map.

    Images are resized to the network's input size, without a crop, whatever its own processor does with other
    shapes. ``answer_model`` is "hf:folder" with a LLaVA or a BLIP of transformers, the bundled network, which
    answers "what shape", "what background" and "describe", or an ``AnswerModel``.

    Returns:
        ``maps`` (N, tokens, h, w), raw, zeros after the end; ``words``, ``answers``, ``probabilities`` (N,
        tokens); the checks ``control_similarity``, ``sink_share`` (N, tokens) and ``sinks`` (N, h, w).

    Raises:
        InputError: a question that the network cannot read, an answer of more than ``tokens`` tokens, or a
            folder without a configuration.
        ModelError: an architecture that is not supported, or a folder without tokenizer or processor.

    Example::
        from phosphene import run

        result = run("answer_attribution", images="builtin:scenes/2", question="what background", tokens=4)
        result.answers
        result.maps.shape  # (2, 4, 8, 8)

    Source:
        Chefer et al. 2021, section 3; Selvaraju et al. 2017, section 3 and 8.2; sinks: Darcet et al. 2024.
    """
    prompt = answer_model.encode(question)
    fixed = None if answer is None else answer_model.encode_answer(answer)
    if fixed is not None and len(fixed) > tokens:
        raise InputError(f"the answer has {len(fixed)} tokens: pass tokens={len(fixed)}, not {tokens}")
    results = []
    for image in progress_bar(images.split(1), "answers", len(images)):
        results.append(_explain(answer_model, image, prompt, fixed, measure, score, tokens))
    stacked = [
        torch.stack(parts).to(images) for parts in zip(*(result[1:5] for result in results), strict=True)
    ]
    return AnswerMaps(
        images=images,
        words=tuple(result[0] for result in results),
        maps=stacked[0],
        probabilities=stacked[1],
        control_similarity=stacked[2],
        sink_share=stacked[3],
        sinks=torch.stack([result[5] for result in results]).to(images.device),
        question=question,
        measure=measure,
    )


def _explain(
    model: AnswerModel,
    image: Tensor,
    prompt: Sequence[int],
    fixed: Sequence[int] | None,
    measure: Measure,
    score: str,
    most: int,
) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Words, maps (T, h, w), probabilities (T,), similarity with the control (T,), sinks' shares, sinks."""
    pixels = model.prepare(image)
    with torch.no_grad():
        content = model.image_tokens(pixels)
        numbers = list(fixed) if fixed is not None else generate_answer(model, content, prompt, most)
        control = model.image_tokens(pixels.mean((2, 3), keepdim=True).expand_as(pixels).contiguous())
    height, width = model.grid
    shape = (most, height, width)
    maps, controls = content.new_zeros(shape), content.new_zeros(shape)
    probabilities = content.new_zeros(most)
    sinks = torch.zeros(height, width, dtype=torch.bool, device=content.device)
    if numbers:
        own = _maps(model, content, prompt, numbers, measure, score)
        other = _maps(model, control, prompt, numbers, measure, score)
        count = len(numbers)
        maps[:count], probabilities[:count] = own[0].view(-1, height, width), own[1]
        controls[:count] = other[0].view(-1, height, width)
        rows = torch.arange(count, device=content.device)
        sinks = _sinks(own[2], other[2], rows, model.grid)
    share = maps.clamp(min=0).flatten(1)
    on_sinks = (share * sinks.flatten()).sum(1) / share.sum(1).clamp(min=torch.finfo(share.dtype).tiny)
    words = [model.decode(number) for number in numbers] + [""] * (most - len(numbers))
    similarity = _correlation(maps.flatten(1), controls.flatten(1))
    return tuple(words), maps, probabilities, similarity, on_sinks, sinks


def _maps(
    model: AnswerModel,
    tokens: Tensor,
    prompt: Sequence[int],
    numbers: Sequence[int],
    measure: Measure,
    score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (T', T) of the T' words, their probabilities (T',), and the attention (layers, T', T) of them."""
    with torch.enable_grad():
        leaf = tokens.detach().requires_grad_()
        # The last token predicts nothing that is asked for.
        result = model.read(leaf, [*prompt, *numbers[:-1]])
        predictions = range(len(prompt) - 1, len(prompt) - 1 + len(numbers))
        log_probabilities = at_least_float32(result.logits).log_softmax(-1)
        values = log_probabilities if score == "log_probability" else at_least_float32(result.logits)
        maps = []
        for row, number in zip(predictions, numbers, strict=True):
            query = int(result.rows[row])
            attended = [part[0, :, query, result.columns] for part in result.attentions]
            if measure == "attention":
                maps.append(torch.stack([part.mean(0) for part in attended]).mean(0))
                continue
            inputs = result.attentions if measure == "gradient_attention" else [leaf]
            slopes = torch.autograd.grad(values[row, number], inputs, retain_graph=True, allow_unused=True)
            if measure == "gradient_attention":
                parts = [
                    torch.zeros_like(a) if g is None else (a * g[0, :, query, result.columns]).relu()
                    for a, g in zip(attended, slopes, strict=True)
                ]
                maps.append(torch.stack([part.mean(0) for part in parts]).mean(0))
            else:
                gradient = slopes[0][-math.prod(model.grid) :]
                patches = leaf[-math.prod(model.grid) :]
                if measure == "grad_cam":
                    maps.append((patches @ gradient.mean(0)).relu())
                else:
                    maps.append((patches * gradient).sum(1))
    queries = result.rows[list(predictions)]
    attention = torch.stack([part[0].mean(0)[queries][:, result.columns] for part in result.attentions])
    probabilities = log_probabilities[list(predictions), list(numbers)].exp()
    return torch.stack(maps).detach(), probabilities.detach(), attention.detach()


def _sinks(first: Tensor, second: Tensor, rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Image tokens (h, w) of much attention in both (layers, words, T), averaged over layers and words."""
    both = torch.stack([part[:, rows].mean((0, 1)) for part in (first, second)])
    relative = both / both.mean(1, keepdim=True).clamp(min=torch.finfo(both.dtype).tiny)
    return (relative.amin(0) > SINK_FACTOR).view(grid)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row; 0 where one of them is constant."""
    centered = [rows - rows.mean(1, keepdim=True) for rows in (first, second)]
    # Rounding errors of a constant map are no variation.
    norms = [
        torch.where(part.norm(dim=1) > 1e-6 * rows.norm(dim=1), part.norm(dim=1), torch.inf)
        for part, rows in zip(centered, (first, second), strict=True)
    ]
    return ((centered[0] * centered[1]).sum(1) / (norms[0] * norms[1])).clamp(-1, 1)


@hookimpl
def phosphene_methods():
    return [answer_attribution]
