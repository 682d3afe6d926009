"""Style sweeps: each value equals a run of neural_style, and images are independent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import Model, load_model, load_result, methods

style_sweep, neural_style = methods["style.style_sweep"], methods["style.neural_style"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("builtin:shapes-vgg", dtype=torch.float64)


def test_oracle() -> None:
    assert style_sweep.spec.oracle is not None
    style_sweep.spec.oracle()


@pytest.mark.parametrize("over", ["intensity", "scale"])
def test_each_value_equals_neural_style(model: Model, over: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    content, styles = (torch.rand(2, 3, 32, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    result = style_sweep(model, content, styles, over=over, values=(0.5, 2.0), steps=5)
    assert result.stylized.shape == (2, 2, 3, 32, 40) and result.losses.shape == (5, 2, 2)
    for n in range(2):
        for v, value in enumerate((0.5, 2.0)):
            option = {"style_weight": value} if over == "intensity" else {"style_scale": value}
            alone = neural_style(model, content[n : n + 1], styles, steps=5, total_variation=1.0, **option)
            torch.testing.assert_close(result.stylized[n, v], alone.stylized[0], atol=1e-8, rtol=0)
            torch.testing.assert_close(result.losses[:, n, v], alone.losses[:, 0])
    assert [len(group) for group in result.panels()] == [3, 3]
    assert torch.equal(load_result(result.save(tmp_path / "a")).stylized, result.stylized)
