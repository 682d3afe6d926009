"""``help``, ``inspect.signature`` and ``repr`` of methods and results."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

from phosphene import Model as ModelObject
from phosphene import method, methods, run
from phosphene.registry.docstrings import with_arguments
from phosphene.results import Attribution
from phosphene.roles import Images, LayerName, Model
from phosphene.spec import ParameterGroup


class Smoothing(ParameterGroup):
    """Parameters of a blur."""

    sigma: Annotated[float, Field(gt=0, le=9, description="standard deviation of the blur, in pixels")] = 1.5
    sizes: Annotated[list[Annotated[int, Field(ge=1)]] | None, Field(description="sizes")] = None


@method(family="tests")
def smoothed(
    model: Model,
    images: Images,
    *,
    layer: Annotated[LayerName | None, Field(description="layer that is read")] = None,
    smoothing: Smoothing = Smoothing(sigma=2.5),
    mode: Annotated[Literal["same", "full"], Field(description="size of the output")] = "same",
    count: Annotated[int, Field(ge=1)],
) -> Attribution:
    """Mean of the color channels.

    maps = mean_c x_c

    Returns:
        ``Attribution``; ``maps`` (N, H, W).

    Source: none.
    """
    return Attribution(images=images, maps=images.mean(1), targets=("",) * len(images))


def test_signature_has_plain_types_and_flattened_groups() -> None:
    signature = inspect.signature(smoothed)
    assert list(signature.parameters) == ["model", "images", "layer", "sigma", "sizes", "mode", "count"]
    types = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    assert types == {
        "model": ModelObject, "images": Tensor, "layer": str | None, "sigma": float,
        "sizes": list[int] | None, "mode": Literal["same", "full"], "count": int,
    }  # fmt: skip
    assert signature.return_annotation is Attribution
    assert signature.parameters["sigma"].default == 2.5
    assert signature.parameters["count"].default is inspect.Parameter.empty
    signature.bind("model", "images", sigma=1.0, count=3)


@pytest.mark.parametrize("name", ["pgd", "class_visualization", "compare_attributions", "occlusion"])
def test_no_signature_shows_pydantic(name: str) -> None:
    text = str(inspect.signature(methods[name]))
    assert "Annotated" not in text
    assert "FieldInfo" not in text


def test_help_shows_signature_and_arguments_before_returns() -> None:
    text = pydoc.render_doc(smoothed, renderer=pydoc.plaintext)
    signature, *rest = (text.index(part) for part in ("smoothed(model", "Args:", "Returns:", "Source:"))
    assert signature < rest[0] < rest[1] < rest[2]
    assert "sigma: standard deviation of the blur, in pixels (> 0, <= 9)" in text
    assert "images: images (N, C, H, W) in [0, 1]" in text
    assert "sizes: sizes (>= 1)" in text
    assert "Args:" not in smoothed.spec.description


def test_arguments_that_a_docstring_describes_keep_their_text() -> None:
    doc = "Summary.\n\nArgs:\n    steps: own text,\n        continued.\n\nReturns:\n    maps.\n"
    merged = with_arguments(doc, {"steps": "generated", "eps": "radius"})
    assert merged == (
        "Summary.\n\nArgs:\n    steps: own text,\n        continued.\n    eps: radius\n\nReturns:\n    maps."
    )
    assert with_arguments("Summary.", {"eps": "radius"}) == "Summary.\n\nArgs:\n    eps: radius"


def test_repr_of_the_registry_lists_families_without_torch() -> None:
    program = "import sys; from phosphene import methods; print(methods); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{len(methods)} methods"
    assert any(line.startswith("  attacks ") and "apgd, bim" in line for line in lines)


def test_repr_of_a_method_names_and_summarizes_it() -> None:
    assert repr(smoothed) == "<method tests.smoothed: Mean of the color channels.>"


def test_repr_of_a_result_describes_each_field_in_a_line() -> None:
    result = run("pgd", images="builtin:scenes/2", steps=1, seed=0)
    first, *lines = repr(result).splitlines()
    assert first == "AdversarialExamples of attacks.pgd"
    fields = dict(line.split(maxsplit=1) for line in lines)
    assert fields.keys() == {name for name, _ in result.fields()}
    assert fields["adversarial"].startswith("float32 (2, 3, 64, 64) in [")
    assert fields["success"].startswith("bool (2,), ")
    assert fields["queries"] == "None"
    images = torch.zeros(1, 3, 2, 2)
    plain = Attribution(images=images, maps=images[:, 0], targets=("a very long name " * 20,))
    assert max(map(len, repr(plain).splitlines())) < 130
