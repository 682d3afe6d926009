"""Style sweeps: every way is what neural_style alone makes of it, and each picture is by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import Model, load_model, load_result, methods

sweep, paint = methods["style.style_sweep"], methods["style.neural_style"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("builtin:shapes-vgg", dtype=torch.float64)


def test_oracle() -> None:
    assert sweep.spec.oracle is not None
    sweep.spec.oracle()


@pytest.mark.parametrize("over", ["intensity", "scale"])
def test_every_way_is_what_neural_style_makes_of_it(model: Model, over: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    content, styles = (torch.rand(2, 3, 32, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    made = sweep(model, content, styles, over=over, values=(0.5, 2.0), steps=5)
    assert made.stylized.shape == (2, 2, 3, 32, 40) and made.losses.shape == (5, 2, 2)
    for n in range(2):
        for v, value in enumerate((0.5, 2.0)):
            one = {"style_weight": value} if over == "intensity" else {"style_scale": value}
            alone = paint(model, content[n : n + 1], styles, steps=5, total_variation=1.0, **one)
            torch.testing.assert_close(made.stylized[n, v], alone.stylized[0], atol=1e-8, rtol=0)
            torch.testing.assert_close(made.losses[:, n, v], alone.losses[:, 0])
    assert [len(group) for group in made.panels()] == [3, 3]
    assert torch.equal(load_result(made.save(tmp_path / "a")).stylized, made.stylized)
