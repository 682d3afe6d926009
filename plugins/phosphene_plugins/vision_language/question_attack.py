"""HotFlip on a question about an image: words whose replacement changes the answer, Ebrahimi et al. 2018."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, at_least_float32, hookimpl, method, progress_bar
from phosphene.roles import Images

from ..attacks._hotflip import embedding_leaves, replacement_trials
from ._answer_models import AnswerModel, Pass, generate_answer
from ._answer_role import Answerer, Question
from ._changed_questions import ChangedQuestions


class _SumOfWords(AnswerModel):
    """Logits that are linear in the embeddings of the words so far and in the image's mean color."""

    name, uri, input_size, grid = "sum of words", None, (2, 2), (1, 1)
    ends, special = frozenset([0]), frozenset([0, 1])

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.words = nn.Embedding.from_pretrained(
            torch.randn(9, 4, generator=draw, dtype=torch.float64), freeze=False
        )
        self.head = torch.randn(4, 9, generator=draw, dtype=torch.float64)
        self.colors = torch.randn(3, 9, generator=draw, dtype=torch.float64)
        self.weights = torch.tensor([0.7, 1.3, 0.4, 0.9, 1.1, 0.6, 0.8, 1.2], dtype=torch.float64)

    def image_tokens(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)).double()

    def embedding(self, tokens: Tensor) -> nn.Embedding:
        return self.words

    def read(self, tokens: Tensor, ids: Sequence[int]) -> Pass:
        embedded = self.words(torch.tensor([list(ids)]))[0] * self.weights[: len(ids), None]
        logits = embedded.cumsum(0) @ self.head + tokens[0] @ self.colors
        return Pass(logits, [], torch.arange(len(ids)), torch.arange(1))

    def encode(self, text: str) -> list[int]:
        return [int(digit) for digit in text.replace(" ", "")]

    encode_answer = encode

    def decode(self, number: int) -> str:
        return str(number)


class _ImageFirst(_SumOfWords):
    """The word 1 is the image's place holder, which is not embedded: an embedding of zeros."""

    def read(self, tokens: Tensor, ids: Sequence[int]) -> Pass:
        text = torch.tensor([n for n, number in enumerate(ids) if number != 1])
        embedded = torch.zeros(len(ids), 4, dtype=torch.float64)
        embedded = embedded.index_add(0, text, self.words(torch.tensor([list(ids)])[:, text])[0])
        logits = (embedded * self.weights[: len(ids), None]).cumsum(0) @ self.head + tokens[0] @ self.colors
        return Pass(logits, [], torch.arange(len(ids)), torch.arange(1))


def _place_holders_are_words_of_zeros(images: Tensor) -> None:
    """Of a token that is not embedded, the others' gradients stay at their positions."""
    words, place_holder = _SumOfWords(), _ImageFirst()
    with torch.no_grad():
        words.words.weight[1] = 0
    call: Any = question_attack
    for question in ("137", "317", "371", "131"):
        options: dict[str, Any] = {"question": question, "replacements": 2, "candidates": 1, "tokens": 1}
        expected, result = (call(images, model, **options) for model in (words, place_holder))
        assert result.questions == expected.questions and result.replaced.any()
        torch.testing.assert_close(result.scores, expected.scores)


def _search_ends_where_no_word_is_better(images: Tensor) -> None:
    """All candidates on the way to an answer that is not reached: the steepest ascent, by hand."""
    model = _SumOfWords()

    def score(question: Sequence[int]) -> float:
        tokens = model.image_tokens(images[:1])
        logits = model.read(tokens, [*question, 5]).logits[-2:].detach().log_softmax(1)
        return float(logits[0, 5] + logits[1, 2])

    question, scores = [1, 3, 7], [score([1, 3, 7])]
    while True:
        trials = [[1, *(v if i == n else question[n] for n in (1, 2))] for i in (1, 2) for v in range(2, 9)]
        best = max(trials, key=score)
        if score(best) <= scores[-1]:
            break
        question = best
        scores.append(score(best))
    call: Any = question_attack
    options: dict[str, Any] = {"question": "137", "answer": "52", "targeted": True, "tokens": 2}
    result = call(images[:1], model, replacements=9, candidates=99, **options)
    assert not result.success.any() and 2 < len(scores) < 9
    expected = scores + scores[-1:] * (10 - len(scores))
    torch.testing.assert_close(result.scores, torch.tensor([expected], dtype=torch.float64))


def _oracle() -> None:
    """All candidates: the exhaustive search. One candidate: the best first-order estimate, by hand."""
    model = _SumOfWords()
    images = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    call: Any = question_attack
    vectors, weights = model.words.weight.detach(), model.weights

    def log_probabilities(image: Tensor, question: Sequence[int]) -> Tensor:
        state = sum(w * vectors[word] for w, word in zip(weights, question, strict=False))
        return (state @ model.head + image.mean((1, 2)) @ model.colors).log_softmax(0)

    for targeted, sign in ((False, 1), (True, -1)):
        options: dict[str, Any] = {"question": "137", "replacements": 1, "tokens": 1, "targeted": targeted}
        options["answer"] = "5" if targeted else None  # else the network's own
        every, first = (call(images, model, candidates=count, **options) for count in (99, 1))
        for n, image in enumerate(images):
            before = log_probabilities(image, [1, 3, 7])
            own = int(before.argmax())
            word = 5 if targeted else own
            assert own != 5 and every.answers_before[n] == str(own or "")
            # The word 1 is special: only the second and the third are replaced, by no special word.
            trials = {(1, v, 7) for v in range(2, 9)} | {(1, 3, v) for v in range(2, 9)}
            scores = {trial: float(sign * log_probabilities(image, trial)[word]) for trial in trials}
            best = min(scores, key=scores.__getitem__)
            torch.testing.assert_close(every.scores[n, 0], before[word])
            torch.testing.assert_close(every.scores[n, 1], log_probabilities(image, best)[word])
            assert every.questions[n] == " ".join(map(str, best[1:]))
            assert int(every.replaced[n]) == (best != (1, 3, 7))
            after = int(log_probabilities(image, best).argmax())
            assert every.answers[n] == str(after or "")
            assert bool(every.success[n]) == ((after == 5) if targeted else (after not in (0, own)))
            # d log p_word / d e_i = w_i H (1_word - p), of which the largest change is the one candidate.
            gradient = model.head @ (torch.eye(9, dtype=torch.float64)[word] - before.exp())
            estimates = {
                (i, v): float(sign * weights[i] * (vectors[v] - vectors[old]) @ gradient)
                for i, old in ((1, 3), (2, 7))
                for v in range(2, 9)
                if v != old
            }
            position, chosen = min(estimates, key=estimates.__getitem__)
            trial = [1, 3, 7]
            trial[position] = chosen
            if sign * (log_probabilities(image, trial)[word] - before[word]) < 0:
                assert first.questions[n] == " ".join(map(str, trial[1:]))
            else:  # no candidate is better than the question itself
                assert first.questions[n] == "3 7" and int(first.replaced[n]) == 0
        assert every.replaced.any()
    _place_holders_are_words_of_zeros(images)
    _search_ends_where_no_word_is_better(images)
    # No answer is the end of the text: of several tokens that end it, the first one.
    silent = _SumOfWords()
    silent.ends = frozenset(range(9))
    result = call(images[:1], silent, question="137", replacements=0)
    torch.testing.assert_close(result.scores[0, 0], log_probabilities(images[0], [1, 3, 7])[0])
    # An answer that the network does not give is changed already; one of the network needs no step to it.
    other = call(images, model, question="137", answer="5", tokens=1)
    assert other.success.all() and not other.replaced.any()
    # An answer of several words: its log-probability is a sum, each word after the ones before it.
    result = call(images[:1], model, question="13", answer="52", replacements=0, tokens=2)
    expected = log_probabilities(images[0], [1, 3])[5] + log_probabilities(images[0], [1, 3, 5])[2]
    torch.testing.assert_close(result.scores[0, 0], expected)
    # The network's own answer is attacked where none is passed, until it changes.
    result = call(images, model, question="137", replacements=4, candidates=99, tokens=1)
    assert result.explained == result.answers_before
    for n in range(3):
        assert bool(result.success[n]) == (result.answers[n] not in ("", result.answers_before[n]))


@method(
    family="vision_language",
    title="HotFlip",
    references=[
        Reference(
            key="ebrahimi2018",
            title="HotFlip: White-Box Adversarial Examples for Text Classification",
            authors="Ebrahimi, Rao, Lowd, Dou",
            year=2018,
            url="https://arxiv.org/abs/1712.06751",
        ),
        Reference(
            key="zou2023",
            title="Universal and Transferable Adversarial Attacks on Aligned Language Models",
            authors="Zou, Wang, Carlini, Nasr, Kolter, Fredrikson",
            year=2023,
            url="https://arxiv.org/abs/2307.15043",
        ),
    ],
    oracle=_oracle,
    quick={"tokens": 2, "replacements": 1, "candidates": 2},
    demo={"question": "what shape", "tokens": 4},
)
def question_attack(
    images: Images,
    answer_model: Answerer,
    *,
    question: Question = "what shape",
    answer: Annotated[
        str | None,
        Field(
            min_length=1, description="answer to change or to reach; default: the network's own, to change"
        ),
    ] = None,
    targeted: Annotated[bool, Field(description="reach the answer instead of changing it")] = False,
    replacements: Annotated[int, Field(ge=0, le=1000, description="largest number of replacements")] = 2,
    candidates: Annotated[
        int, Field(ge=1, le=100_000, description="replacements that are evaluated in each step")
    ] = 32,
    tokens: Annotated[int, Field(ge=1, le=1000, description="largest number of tokens of an answer")] = 6,
) -> ChangedQuestions:
    """HotFlip on a question about an image: words are replaced, one by one, until the answer changes.

    gain(i, v) = (e_v - e_(w_i)) . dS/de_i,   S = sum_t log p(y_t | image, question, y_1 ... y_t-1)

    with e the embeddings of the tokens, w_i the token at position i of the question and y the answer. In
    every step the ``candidates`` single replacements of the lowest gain (of a targeted attack the highest)
    are evaluated, and the one of the lowest S is applied, until the network's answer is another one,
    ``replacements`` steps are done or no candidate lowers S. An answer without text is no other answer: the
    search goes on, and where it ends with one, the attack has no success. The image stays as it is: this is
    the text side of an attack whose image side is ``pgd``. Special tokens, such as the start of a text and
    the image's place holder, are neither replaced nor inserted. The result is a sequence of tokens: a
    tokenizer may divide its text otherwise.

    ``answer_model`` is that of ``answer_attribution``; an ``AnswerModel`` of your own needs its method
    ``embedding``. A question that a network cannot read as a whole is refused by it.

    Returns:
        ``questions``, ``answers_before`` and ``answers`` (N texts), ``replaced`` (N,), ``scores`` (N, R + 1)
        after 0 to R replacements, ``success`` (N,).

    Raises:
        InputError: a targeted attack without an answer, an answer of more than ``tokens`` tokens, a question
            that the network cannot read or that has no word to replace.
        ModelError: an ``AnswerModel`` without ``embedding``.

    Example::
        from phosphene import run

        result = run("question_attack", images="builtin:scenes/2", question="what background", tokens=4)
        result.questions, result.answers

    Source:
        Ebrahimi et al. 2018, section 3; candidates that are evaluated: Zou et al. 2023, algorithm 1.
    """
    if targeted and answer is None:
        raise InputError("a targeted attack needs the answer to reach, answer='a star'")
    prompt = answer_model.encode(question)
    fixed = None if answer is None else answer_model.encode_answer(answer)
    if fixed is not None and len(fixed) > tokens:
        raise InputError(f"the answer has {len(fixed)} tokens: pass tokens={len(fixed)}, not {tokens}")
    if all(number in answer_model.special for number in prompt):
        raise InputError(f"the question {question!r} has no word that could be replaced")
    sign = -1 if targeted else 1
    text = lambda numbers: " ".join(answer_model.decode(number) for number in numbers)

    def succeeds(now: list[int], goal: list[int]) -> bool:
        """Whether the answer is the one to reach, or another one than ``goal``, which is not empty."""
        return now == goal if targeted else now != goal and bool(text(now).strip())

    rows: list[tuple[list[int], list[int], list[int], list[int], list[float]]] = []
    for image in progress_bar(images.split(1), "questions", len(images)):
        with torch.no_grad():
            content = answer_model.image_tokens(answer_model.prepare(image))
        before = generate_answer(answer_model, content, prompt, tokens)
        goal = fixed if fixed is not None else before
        scored = goal or [min(answer_model.ends)]  # no answer is the end of the text
        changed, now = list(prompt), before
        scores = [_score(answer_model, content, changed, scored)]
        for _ in range(replacements):
            if succeeds(now, goal):
                break
            trials = _trials(answer_model, content, changed, scored, sign, candidates)
            values = [_score(answer_model, content, trial, scored) for trial in trials]
            best = min(range(len(trials)), key=lambda n: sign * values[n], default=None)
            if best is None or sign * values[best] >= sign * scores[-1]:
                break
            changed = trials[best]
            scores.append(values[best])
            now = generate_answer(answer_model, content, changed, tokens)
        scores += scores[-1:] * (replacements + 1 - len(scores))
        rows.append((changed, before, now, goal, scores))
    success = [succeeds(now, goal) for _, _, now, goal, _ in rows]
    return ChangedQuestions(
        images=images,
        question=question,
        questions=tuple(text(n for n in changed if n not in answer_model.special) for changed, *_ in rows),
        explained=tuple(text(goal) for _, _, _, goal, _ in rows),
        answers_before=tuple(text(before) for _, before, *_ in rows),
        answers=tuple(text(now) for _, _, now, *_ in rows),
        replaced=torch.tensor(
            [sum(a != b for a, b in zip(changed, prompt, strict=True)) for changed, *_ in rows],
            device=images.device,
        ),
        scores=torch.tensor([scores for *_, scores in rows], dtype=torch.float64).to(images),
        success=torch.tensor(success, device=images.device),
    )


def _log_probability(
    model: AnswerModel, content: Tensor, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """S, the log-probability of the answer's tokens, on the graph."""
    logits = model.read(content, [*prompt, *answer[:-1]]).logits[len(prompt) - 1 :]
    # equivalent mutants: axis 1 is the last
    values = at_least_float32(logits).log_softmax(-1)
    return values[torch.arange(len(answer)), list(answer)].sum()


@torch.no_grad()
def _score(model: AnswerModel, content: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> float:
    return float(_log_probability(model, content, prompt, answer))


def _trials(
    model: AnswerModel, content: Tensor, prompt: Sequence[int], answer: Sequence[int], sign: int, count: int
) -> list[list[int]]:
    """The questions after the single replacements of the best first-order estimates."""
    layer = model.embedding(content)
    with torch.enable_grad(), embedding_leaves(layer) as calls:
        score = _log_probability(model, content, prompt, answer)
        slopes = torch.autograd.grad(score, [leaf for _, leaf in calls])
    embedded = [number for tokens, _ in calls for number in tokens.flatten().tolist()]
    slope = torch.cat([part.flatten(0, -2) for part in slopes])
    # A token of the text that is not embedded is the image's place holder.
    rows, numbers = [], iter(enumerate(embedded))
    for number in prompt:
        if number in model.special and number not in embedded:
            rows.append(-1)
            continue
        rows.append(next(row for row, value in numbers if value == number))
    text = torch.tensor(prompt, device=slope.device)
    complete = torch.stack([slope[row] if row >= 0 else torch.zeros_like(slope[0]) for row in rows])
    positions = [n for n, number in enumerate(prompt) if number not in model.special]
    excluded = torch.tensor([n for n in sorted(model.special) if n < layer.num_embeddings], dtype=torch.long)
    trials = replacement_trials(
        sign * complete,
        layer.weight.detach(),
        text,
        torch.tensor(positions, device=slope.device),
        excluded.to(slope.device),
        count,
    )
    return trials.tolist()


@hookimpl
def phosphene_methods():
    return [question_attack]
