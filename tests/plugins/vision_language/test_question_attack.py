"""Words of questions replaced: networks of transformers with random weights, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plugins.vision_language.test_answer_attribution import WORDS, blip, llava

from phosphene import InputError, ModelError, run
from phosphene_plugins.vision_language._answer_models import load_answer_model
from phosphene_plugins.vision_language.question_attack import _SumOfWords


@pytest.mark.parametrize("build", [llava, blip])
def test_one_step_with_all_candidates_is_the_exhaustive_search(
    build: Callable[[Path], tuple[str, Any]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    uri, _ = build(tmp_path / "network")
    model = load_answer_model(uri)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"question": "what is this", "answer": "a dog", "tokens": 2}
    options |= {"replacements": 1, "candidates": 1000, "targeted": True, "progress": False}
    result: Any = run("question_attack", images=image, answer_model=uri, **options)
    ids = model.encode("what is this")
    with torch.no_grad():
        content = model.image_tokens(image)

        def score(question: list[int]) -> float:
            rows = model.read(content, [*question, 8]).logits[len(question) - 1 :].log_softmax(-1)
            return float(rows[0, 8] + rows[1, 9])

        scores = {}
        for position, number in enumerate(ids):
            for word in range(5, len(WORDS)):
                if number >= 5:
                    trial = [*ids[:position], word, *ids[position + 1 :]]
                    scores[tuple(trial)] = score(trial)
    best = max(scores, key=scores.__getitem__)
    torch.testing.assert_close(float(result.scores[0, 1]), scores[best], rtol=1e-4, atol=1e-5)
    assert result.questions == (" ".join(WORDS[number] for number in best if number >= 5),)
    assert float(result.scores[0, 0]) == pytest.approx(score(ids), rel=1e-4)


def test_attacks_without_a_word_or_an_answer_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"targeted": True}, "needs the answer to reach"),
        ({"answer": "a star on sand", "tokens": 2}, "the answer has 4 tokens"),
        ({"question": "<end>"}, "has no word that could be replaced"),
        ({"question": "who"}, "has no word 'who'"),
    ]
    for options, words in cases:
        with pytest.raises(InputError, match=words):
            run("question_attack", images="builtin:scenes/1", **options)

    class Unknown(_SumOfWords):
        def embedding(self, tokens: torch.Tensor) -> Any:
            return super(_SumOfWords, self).embedding(tokens)

    with pytest.raises(ModelError, match=r"implement embedding\(tokens\)"):
        run(
            "question_attack", images=torch.rand(1, 3, 2, 2), answer_model=Unknown(), question="137", tokens=1
        )


def test_an_empty_answer_is_no_other_answer() -> None:
    """A network that falls silent is not fooled: no success, and the empty answers are counted."""
    image = torch.rand(1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"question": "137", "replacements": 4, "candidates": 99, "tokens": 1}
    before: Any = run("question_attack", images=image, answer_model=_SumOfWords(), **options)
    assert before.success.all() and before.answers_before != before.answers

    class Silent(_SumOfWords):
        ends = frozenset(range(9)) - {int(before.answers_before[0])}

    silent: Any = run("question_attack", images=image, answer_model=Silent(), **options)
    assert silent.answers == ("",) and silent.answers_before == before.answers_before
    assert not silent.success.any() and int(silent.replaced[0]) >= int(before.replaced[0])
    assert silent.lines()[0] == "'137' changed: 0 of 1 attacks succeed, 1 answers are empty"
