"""Messages of exceptions, also after pickling."""

import pickle

import pytest

from phosphene import InputError, MissingExtra, UnknownName


@pytest.mark.parametrize(
    "error",
    [
        UnknownName("layer", "layer5", ["conv1", "layer4"], "this model"),
        UnknownName("method", "nothing", []),
        InputError("no"),
        MissingExtra("phosphene check", "testing"),
    ],
)
def test_errors_can_be_pickled(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_unknown_name_lists_names_and_the_nearest():
    error = UnknownName("layer", "layer5", ["conv1", "layer4"], "this model")
    assert str(error) == "no layer 'layer5'; this model has conv1, layer4 - did you mean 'layer4'?"
    many = UnknownName("method", "q", [f"m{i}" for i in range(20)])
    assert str(many).endswith("m11, ... (20 in all)")
    assert "did you mean" not in str(UnknownName("class", "", ["tabby"]))


def test_missing_extra_names_the_install_command():
    message = str(MissingExtra("phosphene check", "testing"))
    assert message == "phosphene check needs an optional library: pip install 'phosphene[testing]'"
