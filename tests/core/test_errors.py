"""Messages of exceptions, also after pickling."""

import pickle

import pytest
import torch

from phosphene import InputError, MissingExtra, PhospheneError, UnknownName, methods, prepare, run
from phosphene.errors import type_name, value_repr


@pytest.mark.parametrize(
    "error",
    [
        UnknownName("layer", "layer5", ["conv1", "layer4"], "this model"),
        UnknownName("method", "nothing", []),
        UnknownName("class", "cat", ["dog"], "the network", "'cat' is a label"),
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
    advised = UnknownName("class", "cap", ["tabby", "cat"], "it", "'cap' is a label")
    assert str(advised) == "no class 'cap'; it has tabby, cat - did you mean 'cat'? 'cap' is a label"
    assert str(UnknownName("class", "x", ["tabby"], "it", "pass y")) == "no class 'x'; it has tabby; pass y"


@pytest.mark.parametrize(("value", "text"), [(1, "an int"), ("a", "a str"), (InputError(), "an InputError")])
def test_types_have_their_article(value, text):
    assert type_name(value) == text


def test_missing_extra_names_the_install_command():
    message = str(MissingExtra("phosphene check", "testing"))
    assert message == "phosphene check needs an optional library: pip install 'phosphene[testing]'"


def test_no_error_prints_an_array() -> None:
    tensor = torch.rand(1, 3, 8, 8)
    for value in (tensor, tensor.numpy(), [tensor], (tensor.numpy(), 1), {"a": tensor}, tensor > 0.5):
        options = {option: value for option in ("progress", "executor", "device", "batch_size", "out")}
        calls = [("pgd", name, item) for name, item in options.items()]
        calls += [("pgd", name, value) for name in methods["pgd"].spec.params.model_fields]
        calls += [("grad_cam", "layer", value), ("pgd", "model", value), ("pgd", "image", value)]
        calls += [(name, i.name, value) for name in ("pgd", "saliency", "embed", "deep_dream", "style_sweep")
                  for i in methods[name].spec.inputs if i.name != "model"]  # fmt: skip
        for method, argument, item in calls:
            try:
                (run if argument == "out" else prepare)(method, **{argument: item})
            except PhospheneError as error:
                text = str(error)
                assert "tensor(" not in text and "array(" not in text and "[[" not in text, (method, argument)


def test_a_misspelled_input_is_named() -> None:
    for method, wrong, right in (
        ("pgd", "image", "images"),
        ("embed", "data", "dataset"),
        ("pgd", "label", "labels"),
    ):
        with pytest.raises(UnknownName, match=f"did you mean '{right}'"):
            run(method, **{wrong: 3})


def test_values_in_messages_are_short():
    assert value_repr([torch.zeros(2, 3), 1.5, "a"]) == "[<Tensor of shape (2, 3)>, 1.5, 'a']"
    assert value_repr(torch.zeros(2).numpy()) == "<ndarray of shape (2,)>"
    assert value_repr({"x": 1}) == "{'x': 1}" and value_repr("ab" * 99, 10) == "'ababab..."
    assert value_repr(list(range(12))) == str(list(range(12)))
