"""The signature, JSON schema and command line of a method accept the same values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from phosphene import methods
from phosphene.parameter_text import read_option
from phosphene.testing.cases import properties_of, values
from phosphene_plugins.gallery._gallery_page import write_option


def read_from_command_line(value: Any, field: FieldInfo) -> Any:
    """The value, written as an option and read again."""
    written = write_option("--it", value, field)
    if field.annotation is bool:
        return written == ["--it"]
    (text,) = written[1:] or [written[0].partition("=")[2]]
    return read_option(text, field)


@pytest.mark.parametrize("name", sorted(methods))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_are_equal_in_python_json_and_command_line(name: str, data: st.DataObject) -> None:
    method = methods[name]
    schemas = properties_of(json.loads(json.dumps(method.spec.params_schema)))
    values_by_name = {name: data.draw(values(schema), label=name) for name, schema in schemas.items()}
    in_python = method.validate(values_by_name)
    from_json = method.spec.params.model_validate_json(json.dumps(values_by_name))
    assert {parameter: getattr(from_json, parameter) for parameter in in_python} == in_python
    fields = method.spec.params.model_fields
    from_command_line = {p: read_from_command_line(value, fields[p]) for p, value in values_by_name.items()}
    assert method.validate(from_command_line) == in_python
    # Parameters recorded in the provenance are valid parameters.
    recorded = method.spec.params(**in_python).model_dump(mode="json")
    assert method.validate(json.loads(json.dumps(recorded))) == in_python
