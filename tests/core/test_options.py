"""Parameters on a command line: what is written is read back as the same value, whatever its type."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict, Field, create_model

from phosphene.options import (
    bounds_text,
    default_text,
    is_flag,
    kind_text,
    parameter_schemas,
    read_option,
    write_option,
)

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


def schema_of(annotation: Any) -> Any:
    model = create_model("params", __config__=ConfigDict(extra="forbid"), some_value=(annotation, ...))
    return model, parameter_schemas(model.model_json_schema())["some_value"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_value_survives_the_command_line(kind: str, data: st.DataObject) -> None:
    annotation, values = KINDS[kind]
    model, schema = schema_of(annotation)
    value = data.draw(values)
    words = write_option("some_value", value, schema)
    if is_flag(schema):
        assert words == [f"--{'' if value else 'no-'}some-value"]
        return
    name, text = words if len(words) == 2 else words[0].split("=", 1)
    assert name == "--some-value"
    assert not (len(words) == 2 and text.startswith("-"))
    again = model(some_value=read_option([text], schema)).some_value
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    ("annotation", "texts", "value"),
    [
        (float, ["1e-3"], 0.001),
        (float, ["8/255"], 8 / 255),
        (float | None, ["none"], None),
        (int, ["1e3"], 1000),
        (list[str], ["conv1,conv2", "conv3"], ["conv1", "conv2", "conv3"]),
        (list[str], ['["a,b"]'], ["a,b"]),
        (list[int], ["1", "2,3"], [1, 2, 3]),
        (list[int] | None, ["7"], [7]),
        (list[int] | None, ["none"], None),
        (str | None, ["3"], "3"),
        (dict[str, float], ["a=1,b=1e-2", "c=3"], {"a": 1, "b": 0.01, "c": 3}),
        (dict[str, float], ['{"a": 2}'], {"a": 2}),
        (int | list[int], ["4"], 4),
        (int | list[int], ["4,5"], [4, 5]),
        (str, ["none"], "none"),
    ],
)
def test_people_write_values_in_their_own_ways(annotation: Any, texts: list[str], value: Any) -> None:
    model, schema = schema_of(annotation)
    assert model(some_value=read_option(texts, schema)).some_value == value


def test_what_cannot_be_read_is_left_for_the_validation_to_name() -> None:
    assert read_option(["many"], schema_of(int)[1]) == "many"
    assert read_option(["1.5"], schema_of(int)[1]) == 1.5
    assert read_option(["8/0"], schema_of(float)[1]) == "8/0"
    assert read_option(["1.2.3/4"], schema_of(float)[1]) == "1.2.3/4"


def test_help_tells_kind_bounds_and_default() -> None:
    described = Annotated[float, Field(gt=0, le=1)]
    several = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    model = create_model("params", eps=(described, 8 / 255), layers=(list[str] | None, None), on=(bool, True),
                         norm=(Literal["linf", "l2"], "linf"), seed=(Annotated[int, Field(lt=2**63)], 0),
                         sizes=(several, [3]))  # fmt: skip
    schemas = parameter_schemas(model.model_json_schema())
    assert [kind_text(s) for s in schemas.values()] == [
        "FLOAT", "TEXT,...|none", "true|false", "linf|l2", "INT", "INT,...",
    ]  # fmt: skip
    bounds = [bounds_text(s) for s in schemas.values()]
    assert bounds == ["> 0, <= 1", "", "", "", "", "at least 1 items, each >= 1"]
    assert [default_text(s) for s in schemas.values()] == ["0.03137", "", "yes", "linf", "0", "3"]
