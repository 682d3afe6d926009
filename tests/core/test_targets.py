"""Targets: objects, their short forms, scores and gradients at layers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phosphene import (
    Channel,
    Class,
    Custom,
    Direction,
    InputError,
    Layer,
    Model,
    ModelError,
    Neuron,
    UnknownName,
    input_gradient,
    layer_gradients,
    load_model,
    scores,
)
from phosphene.targets import Predicted, parse_target


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, part in [
        ("stem", nn.Conv2d(3, 4, 3, padding=1)), ("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flat", nn.Flatten()), ("head", nn.Linear(4, 3)),
    ]:  # fmt: skip
        net.add_module(name, part)
    return load_model(net.double(), input_size=(3, 6, 6), classes=["tabby, tabby cat", "tench", "crane"])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (2, Class(2)), ("2", Class(2)), ("tench", Class(1)), ("class:tench", Class(1)),
        ("Tabby cat", Class(0)), ("class:2", Class(2)),
        ([0, "crane", 1], Class((0, 2, 1))), (torch.tensor([2, 1]), Class((2, 1))),
        ("relu", Layer("relu")), ("relu[2]", Channel("relu", 2)), ("relu[2,3,5]", Neuron("relu", 2, 3, 5)),
        (" stem[1, 2 ,3] ", Neuron("stem", 1, 2, 3)),
        (Layer("relu"), Layer("relu")), (Class(1), Class(1)),
    ],
)  # fmt: skip
def test_short_forms_of_targets(model, text, expected):
    assert parse_target(text, model) == expected


def test_number_as_text_may_be_a_layer_or_a_class():
    model = load_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), input_size=(3, 8, 8)
    )
    with pytest.raises(InputError, match="'class:1' or 'layer:1'"):
        parse_target("1", model)
    assert parse_target("layer:1", model) == Layer("1")
    assert parse_target("class:1", model) == Class(1)
    assert parse_target(1, model) == Class(1)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tensch", UnknownName, "did you mean 'tench'"),
        ("class:tensch", UnknownName, "did you mean 'tench'"),
        ("relo[1]", UnknownName, "no layer 'relo'.*did you mean 'relu'"),
        (Channel("relo", 1), UnknownName, "no layer 'relo'.*did you mean 'relu'"),
        ("relu[2,3]", InputError, r"layer\[channel\] or layer\[channel,y,x\]"),
        (3, InputError, "class 3 does not exist: .* has 3 classes"),
        (-1, InputError, "class -1 does not exist"),
        ([0, 7], InputError, "class 7 does not exist"),
        (True, InputError, "not a bool"),
        (1.5, InputError, "not a float"),
    ],
)
def test_invalid_targets_are_refused(model, text, error, message):
    with pytest.raises(error, match=message):
        parse_target(text, model)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("relu[-1]", InputError, "layer 'relu' has no channel -1: channels are counted from 0"),
        ("relu[0,0,-2]", InputError, "layer 'relu' has no column -2"),
        (Custom(lambda logits: logits[:, 0] * torch.nan), InputError, "the target <lambda> returned NaN"),
        (Channel("relu", 4), InputError, "layer 'relu' has 4 channels, so channel 4 does not exist"),
        (Neuron("relu", 0, 6, 0), InputError, "has 6 rows, so row 6 does not exist"),
        (Neuron("relu", 0, 0, 6), InputError, "has 6 columns, so column 6 does not exist"),
        (Neuron("head", 0, 0, 0), ModelError, "layer 'head' has no spatial map, only channels"),
        (Direction("relu", torch.ones(3)), InputError, "has 4 channels, the direction has 3"),
        (Custom(lambda logits: logits.sum()), InputError, "one number per image"),
    ],
)
def test_units_that_do_not_exist_are_refused(model, images, target, error, message):
    with pytest.raises(error, match=message):
        scores(model, images, target)


def test_scores_equal_their_definitions(model, images):
    logits = model(images)
    maps = model.features(images, "relu")
    direction = torch.tensor([1.0, -2.0, 0.0, 3.0])
    for target, expected in [
        (1, logits[:, 1]),
        ([2, 0, 1], logits[[0, 1, 2], [2, 0, 1]]),
        (None, logits.amax(1)),
        (Layer("relu"), maps.square().mean((1, 2, 3))),
        ("relu[2]", maps[:, 2].mean((1, 2))),
        ("relu[2,3,5]", maps[:, 2, 3, 5]),
        ("head[1]", logits[:, 1]),
        (Direction("relu", direction), torch.einsum("nchw,c->nhw", maps, direction.double()).mean((1, 2))),
        (Direction("head", direction[:3]), logits @ direction[:3].double()),
        (lambda z: z.logsumexp(1), logits.logsumexp(1)),
        (lambda z, k=1: z[:, k], logits[:, 1]),
        (lambda z, tap: z[:, 0] + tap["relu"].sum((1, 2, 3)), logits[:, 0] + maps.sum((1, 2, 3))),
    ]:
        torch.testing.assert_close(scores(model, images, target), expected)


def test_predicted_class_is_fixed_by_the_first_images(model, images):
    target = Predicted()
    first = scores(model, images, target)
    predicted = model(images).argmax(1)
    torch.testing.assert_close(first, model(images).amax(1))
    darker = model(images * 0)
    torch.testing.assert_close(scores(model, images * 0, target), darker[range(3), predicted])
    assert target.names(model, 3) == tuple(model.class_name(i) for i in predicted.tolist())
    assert target.to_json() is None
    assert str(Predicted()) == "the predicted class"


@pytest.mark.parametrize(
    "wrong",
    [Class(3), Class(-1), Class((0, 9)), [None], [True], torch.tensor([1.5]), torch.eye(2), [], Class(())],
)
def test_classes_that_do_not_exist_are_refused_in_every_form(model, wrong):
    with pytest.raises(InputError):
        parse_target(wrong, model)


def test_numpy_numbers_and_mixed_lists_are_classes(model):
    assert parse_target(np.int64(2), model) == parse_target(np.array(2), model) == Class(2)
    assert (
        parse_target([np.int64(2), "tench"], model) == parse_target(np.array([2, 1]), model) == Class((2, 1))
    )
    assert parse_target(Class([2, 1]), model) == Class((2, 1))
    assert parse_target("relu [2]", model) == Channel("relu", 2)


def test_number_of_classes_must_be_one_or_that_of_the_images(model, images):
    for wrong in ((0,), (0, 1)):
        with pytest.raises(InputError, match=f"3 images need one class, or one each, not {len(wrong)}"):
            scores(model, images, wrong)


def test_directions_in_the_same_layer_are_not_equal():
    one = Direction("relu", torch.ones(4))
    assert one == one
    assert one != Direction("relu", torch.zeros(4))


def test_select_takes_rows_in_order_and_repeats_them(model, images):
    assert Class((2, 0, 1)).select([0, 0, 2]) == Class((2, 2, 1))
    assert Class(1).select([0, 0]) == Class(1)
    target = Predicted()
    predicted = model(images).argmax(1)
    scores(model, images, target)
    assert target.select([2, 2]) == Class((int(predicted[2]),) * 2)


def test_names_of_targets(model):
    assert Class(0).names(model, 2) == ("tabby, tabby cat",) * 2
    assert Class((1, 2)).names(model, 2) == ("tench", "crane")
    assert Neuron("relu", 2, 3, 5).names(model, 1) == ("relu[2,3,5]",)
    assert str(Direction("relu", torch.ones(4))) == "a direction in relu"
    assert Custom(len).names(model, 1) == ("len",)


@settings(deadline=None, max_examples=50)
@given(
    target=st.one_of(
        st.builds(Class, st.integers(0, 2)),
        st.builds(Class, st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)),
        st.builds(Channel, st.just("relu"), st.integers(0, 3)),
        st.builds(Neuron, st.just("relu"), *[st.integers(0, 3)] * 3),
    )
)
def test_json_form_is_parsed_back_to_the_same_target(model, target):
    assert parse_target(target.to_json(), model) == target


def test_layer_gradients_equal_those_of_the_full_graph(model, images):
    pairs = layer_gradients(model, images, [2, 0, 1], "stem", "relu")
    stem = model.module.stem(images).detach().requires_grad_()
    maps = stem.relu()
    logits = model.module.head(maps.mean((2, 3)))
    expected = torch.autograd.grad(logits[range(3), [2, 0, 1]].sum(), [stem, maps])
    for (activations, gradient), output, expected_gradient in zip(pairs, (stem, maps), expected, strict=True):
        assert not activations.requires_grad and not gradient.requires_grad
        torch.testing.assert_close(activations, output.detach())
        torch.testing.assert_close(gradient, expected_gradient)


def test_layer_gradients_are_refused_where_the_target_does_not_depend_on_the_layer(model, images):
    with model.guard():
        with pytest.raises(ModelError, match="stem.1. does not depend on layer 'relu': choose a layer below"):
            layer_gradients(model, images, "stem[1]", "relu")
        with pytest.raises(ModelError, match="layer 'relu' has not run"):
            layer_gradients(model, images, "stem[1]", "stem", "relu")
        with pytest.raises(ModelError, match="not a map"):
            layer_gradients(model, images, 0, "flat")


def test_scores_of_a_model_without_a_known_size_use_the_images_size() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)
    )
    model, images = load_model(network), torch.rand(2, 3, 8, 8)  # takes 8x8 images only, not 224x224
    assert torch.equal(scores(model, images, [2, 0]), model(images)[[0, 1], [2, 0]])
    assert input_gradient(model, images, 1).shape == images.shape
    ((maps, gradients),) = layer_gradients(model, images, 1, "1")
    assert maps.shape == gradients.shape == (2, 4, 6, 6)
    assert not model.size_known
