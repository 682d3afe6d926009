"""InST: learned words of the bundled model and of tiny pipelines, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_pipelines import write_pipeline

from phosphene import DivergenceError, InputError, run
from phosphene.generative import load_pipeline
from phosphene_plugins.vision_language._color_words import WORDS, ColorWords


def test_learned_words_of_the_bundled_model_are_those_of_its_table() -> None:
    """A learned word with a word's numbers predicts what the word predicts, beside other words."""
    model = ColorWords()
    x = torch.randn(1, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([model.token_embedding(word) for word in ("moon", "sea")])
    for text, words in (("*", "moon sea"), ("sand * sky", "sand moon sea sky"), ("a *", "a moon sea")):
        learned = model.with_tokens(text, tokens).predict(x, 300)
        torch.testing.assert_close(learned, model.prompted(words).predict(x, 300), atol=2e-4, rtol=1e-4)
    assert torch.equal(model.prompted("moon").prompted("").predict(x, 300), model.predict(x, 300))
    assert set(WORDS) == {word for word in WORDS if model.token_embedding(word).shape == (8,)}


def test_words_learn_the_colors_of_a_style() -> None:
    """Two halves of the image in two colors: the two words have these colors, each on its side."""
    left, right = torch.tensor([0.9, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.8])
    style = torch.cat([c[:, None, None].expand(3, 32, 16) for c in (left, right)], 2)[None]
    result: Any = run("inst_style", images=style.flip(3), styles=style, tokens=2, inversion="embedding",
                      fit_steps=600, steps=5, lr=0.05, seed=1)  # fmt: skip
    colors = {bool(token[4] < 0.5): (token[:3] + 1) / 2 for token in result.tokens}
    assert (colors[True] - left).abs().max() < 0.05 and (colors[False] - right).abs().max() < 0.05
    assert result.fit_losses[-100:].mean() < 0.1 * result.fit_losses[:20].mean()


def test_words_of_attention_are_learned_by_default() -> None:
    """Sixteen words, which diverged at a learning rate of 0.05, fit a style as free words do."""
    options: dict[str, Any] = {"images": "builtin:scenes/1", "styles": "builtin:bricks", "tokens": 16}
    attention, free = (
        run("inst_style", inversion=inversion, fit_steps=300, steps=2, seed=0, **options)
        for inversion in ("attention", "embedding")
    )
    assert attention.fit_losses[-100:].mean() < 1.3 * free.fit_losses[-100:].mean()
    assert attention.fit_losses[-100:].mean() < 0.6 * attention.fit_losses[:50].mean()


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3", "flux"])
def test_every_pipeline_learns_words(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
    pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")
    folder = write_pipeline(kind, tmp_path)
    images, styles = (torch.rand(1, 3, 16, 14, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    options: dict[str, Any] = {"images": images, "styles": styles, "text_denoiser": folder, "text": "a *"}
    for more in ({"inversion": "attention"}, {"inversion": "embedding", "guidance": 2, "strength": 1.0}):
        result: Any = run("inst_style", tokens=2, initial="dog", fit_steps=2, steps=2, **options, **more)
        assert result.stylized.shape == images.shape and result.stylized.isfinite().all()
        assert result.tokens.shape == (2, load_pipeline(folder).token_width)
    with pytest.raises(InputError, match=r"has no \*"):
        run("inst_style", **options | {"text": "a dog"})


def test_a_model_that_learns_no_words_is_refused() -> None:
    class Fixed(ColorWords):
        token_width = 0

        def with_tokens(self, text: str, tokens: torch.Tensor) -> Any:
            return super(ColorWords, self).with_tokens(text, tokens)

    with pytest.raises(InputError, match="learns no words"):
        run("inst_style", images="builtin:scenes/1", text_denoiser=Fixed())
    with pytest.raises(InputError, match="takes 3 channels, the images have 1"):
        run("inst_style", images=torch.rand(1, 1, 16, 16), styles="builtin:swirls")


def test_words_too_far_from_any_text_are_an_error() -> None:
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DivergenceError, match=r"lower lr \(now 1\), fit_steps \(now 3\)"):
        run("inst_style", images=images, styles=images, lr=1, fit_steps=3, steps=2, seed=7)
