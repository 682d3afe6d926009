"""Parameters as text: values of every type are read back as they were."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, create_model

from phosphene import InputError
from phosphene.parameter_text import (
    bounds_text,
    default_text,
    kind_text,
    option_name,
    read_document,
    read_option,
)
from phosphene_plugins.gallery._gallery_page import write_option

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.floats(allow_nan=False)

KINDS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "flag": (bool, st.booleans()),
    "maybe flag": (bool | None, st.none() | st.booleans()),
    "int": (int, st.integers(-(2**53), 2**53)),
    "float": (float, NUMBERS),
    "text": (str, WORDS),
    "maybe int": (int | None, st.none() | st.integers()),
    "maybe float": (float | None, st.none() | NUMBERS),
    "maybe text": (str | None, st.none() | WORDS),
    "choice": (Literal["linf", "l2", "none"], st.sampled_from(["linf", "l2", "none"])),
    "choice of numbers": (Literal[1, 2, 4], st.sampled_from([1, 2, 4])),
    "choice or nothing": (Literal["a", "b"] | None, st.sampled_from([None, "a", "b"])),
    "texts": (list[str], st.lists(WORDS)),
    "maybe texts": (list[str] | None, st.none() | st.lists(WORDS)),
    "ints": (list[int], st.lists(st.integers())),
    "floats": (list[float], st.lists(NUMBERS)),
    "pair": (tuple[int, int], st.tuples(st.integers(), st.integers())),
    "one or many": (int | list[int], st.integers() | st.lists(st.integers())),
    "text or many": (str | list[str], WORDS | st.lists(WORDS)),
    "weights": (dict[str, float], st.dictionaries(WORDS, NUMBERS)),
    "bounded": (Annotated[float, Field(gt=0, le=1)], st.floats(1e-300, 1)),
    "nested": (list[list[int]], st.lists(st.lists(st.integers()))),
}


def field_of(annotation: Any) -> Any:
    model = create_model("params", __config__=ConfigDict(extra="forbid"), some_value=(annotation, ...))
    return model, model.model_fields["some_value"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_values_survive_text_and_back(kind: str, data: st.DataObject) -> None:
    annotation, values = KINDS[kind]
    model, field = field_of(annotation)
    value = data.draw(values)
    words = write_option("--some-value", value, field)
    if annotation is bool:
        assert words == [f"--{'' if value else 'no-'}some-value"]
        return
    name, text = words if len(words) == 2 else words[0].split("=", 1)
    assert name == "--some-value"
    assert not (len(words) == 2 and text.startswith("-"))
    again = model(some_value=read_option(text, field)).some_value
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (float, "1e-3", 0.001),
        (float, "8/255", 8 / 255),
        (float | None, "none", None),
        (int, "1e3", 1000),
        (list[str], "conv1,conv2,conv3", ["conv1", "conv2", "conv3"]),
        (list[str], '["a,b"]', ["a,b"]),
        (list[int], "1,2,3", [1, 2, 3]),
        (list[int] | None, "7", [7]),
        (list[int] | None, "none", None),
        (str | None, "3", "3"),
        (dict[str, float], "a=1,b=1e-2,c=3", {"a": 1, "b": 0.01, "c": 3}),
        (dict[str, float], '{"a": 2}', {"a": 2}),
        (int | list[int], "4", 4),
        (int | list[int], "4,5", [4, 5]),
        (str, "none", "none"),
    ],
)
def test_alternative_notations_are_read(annotation: Any, text: str, value: Any) -> None:
    model, field = field_of(annotation)
    assert model(some_value=read_option(text, field)).some_value == value


def test_unreadable_text_is_left_to_validation() -> None:
    assert read_option("many", field_of(int)[1]) == "many"
    assert read_option("1.5", field_of(int)[1]) == 1.5
    assert read_option("8/0", field_of(float)[1]) == "8/0"
    assert read_option("1.2.3/4", field_of(float)[1]) == "1.2.3/4"


def test_texts_of_type_bounds_and_default() -> None:
    described = Annotated[float, Field(gt=0, le=1)]
    several = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    model = create_model("params", eps=(described, 8 / 255), layers=(list[str] | None, None), on=(bool, True),
                         norm=(Literal["linf", "l2"], "linf"), seed=(Annotated[int, Field(lt=2**63)], 0),
                         sizes=(several, [3]))  # fmt: skip
    schemas = model.model_json_schema()["properties"]
    assert [kind_text(s) for s in schemas.values()] == [
        "FLOAT", "TEXT,...|none", "true|false", "linf|l2", "INT", "INT,...",
    ]  # fmt: skip
    bounds = [bounds_text(s) for s in schemas.values()]
    assert bounds == ["> 0, <= 1", "", "", "", "", "at least 1 items, each >= 1"]
    assert [default_text(s) for s in schemas.values()] == ["0.03137", "none", "true", "linf", "0", "3"]


def test_reserved_option_names_get_the_methods_prefix() -> None:
    assert option_name("step_size", "pgd") == "--step-size"
    assert option_name("images", "pgd") == "--image"
    assert option_name("weights", "gram_texture") == "--gram-texture-weights"
    assert option_name("lambda_", "pgd") == "--lambda"
    assert option_name("json", "pgd") == "--pgd-json"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    size: Annotated[int, Field(ge=1)] = 1
    value: int | list[int] = 0


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    parts: list[Part] = []
    title: str | None = None


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"titel": "x"}, "@(titel): no key 'titel'; there is parts, title - did you mean 'title'?"),
        ({"parts": [{"name": "a", "sise": 1}]},
         "@(parts, 0, sise): no key 'sise'; there is name, size, value - did you mean 'size'?"),
        ({"parts": [{"name": "a"}, {}]}, "@(parts, 1, name): 'parts.1.name' is missing"),
        ({"parts": [{"name": "a", "size": 0}]},
         "@(parts, 0, size): parts.0.size=0 should be greater than or equal to 1"),
        ({"parts": [{"name": "a", "value": "b"}]},
         "@(parts, 0, value): parts.0.value='b' should be a valid integer, unable to parse string as an "
         "integer or a valid list"),
        ({"parts": [5]}, "@(parts, 0): parts.0=5 should be a mapping of keys"),
        ({"parts": {}, "title": 5},
         "@(parts): parts={} should be a valid list\n@(title): title=5 should be a valid string"),
        ("text", "@(): 'text' should be a mapping of keys"),
    ],
)  # fmt: skip
def test_invalid_document_is_refused_with_position_and_nearest_key(document: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_document(Document, document, lambda position: f"@({', '.join(map(str, position))})")
    assert str(refusal.value) == message


def test_valid_document_becomes_its_model() -> None:
    read = read_document(Document, {"parts": [{"name": "a", "value": [1]}]}, str)
    assert read == Document(parts=[Part(name="a", value=[1])])


def test_empty_mapping_is_empty_text() -> None:
    _, field = field_of(dict[str, dict[str, Any]])
    assert write_option("--params", {}, field) == ["--params", ""]
    assert read_option("", field) == {}
