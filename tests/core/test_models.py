"""``Model``: one convention over any network, for any outputs, layouts, precision and mode."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from phosphene import InputError, Model, ModelError, UnknownName, load_model, methods, replay, run
from phosphene.data import TensorDataset


def small(channels: int = 3, classes: int = 3, **parts: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


class Returning(nn.Module):
    """A network that returns its logits inside another object."""

    def __init__(self, container) -> None:
        super().__init__()
        self.net = small()
        self.container = container

    def forward(self, x: torch.Tensor):
        return self.container(self.net(x))


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


# --- outputs and inputs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "container",
    [
        lambda z: (z, z[:, :, None]),
        lambda z: [z[:, :, None], z],
        lambda z: {"loss": z.sum(), "logits": z},
        lambda z: {"out": z, "aux": z * 0},
        lambda z: {"scores": z},
        lambda z: {"loss": z.sum(), "scores": z},
        Output,
    ],
    ids=["tuple", "list", "logits", "out", "only", "first", "attribute"],
)
def test_logits_are_read_from_any_container(container):
    model = load_model(Returning(container), input_size=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model(images), model.module.net(images))
    assert model.class_count == 3
    assert methods["saliency"](model, images, 1).maps.any()


def test_output_function_reads_logits_that_are_not_recognized():
    odd = Returning(lambda z: "nothing")
    empty = Returning(lambda z: {})
    for net, kind in ((odd, "str"), (empty, "dict")):
        message = f"returns a {kind} without recognizable logits; .*output=lambda"
        with pytest.raises(ModelError, match=message):
            load_model(net, input_size=(3, 8, 8))(torch.rand(1, 3, 8, 8))
    model = load_model(Returning(lambda z: {"a": z, "b": -z}), input_size=(3, 8, 8), output=lambda r: r["b"])
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(model(images), -model.module.net(images))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels):
    model = load_model(small(channels), mean=[0.5] * channels, std=[0.2] * channels)
    images = torch.rand(2, channels, 32, 32)
    assert methods["saliency"](model, images, 0).maps.shape == (2, 32, 32)
    torch.testing.assert_close(model(images), model.module((images - 0.5) / 0.2))
    with pytest.raises(InputError, match=f"takes {channels} channels, the images have 3"):
        methods["saliency"](model, torch.rand(1, 3, 32, 32), 0)
    with pytest.raises(InputError, match="mean has 4 numbers"):
        load_model(small(channels), mean=[0.5] * 4, input_size=(channels, 8, 8))


@pytest.mark.parametrize("side", [32, 384])
def test_unknown_input_size_is_that_of_the_images(side):
    model = load_model(small())
    result = methods["activation_maps"](model, torch.rand(1, 3, side, side), layer="1")
    assert result.provenance.model["input_size"] == [3, side, side]
    view = model.for_images(torch.rand(2, 3, side, side))
    assert view.input_size == (3, side, side)
    assert view.map_shape("1") == (6, side, side)
    assert view.structure is model.structure_at((3, side, side))
    assert model.input_size == (3, 224, 224)
    assert not model.size_known


def test_known_input_size_does_not_follow_the_images():
    model = load_model(small(), input_size=(3, 8, 8))
    assert model.size_known
    assert model.for_images(torch.rand(1, 3, 32, 32)) is model
    assert methods["saliency"](model, torch.rand(1, 3, 32, 32), 0).provenance.model["input_size"] == [3, 8, 8]


def test_view_shares_everything_but_the_input_size():
    model = load_model(small())
    view = model.at_size((3, 20, 28))
    assert view.module is model.module
    assert view.digest == model.digest
    assert view.structure is model.at_size((3, 20, 28)).structure
    assert model.at_size((3, 224, 224)) is model
    assert view.structure is not model.structure


def test_size_that_the_network_does_not_take_is_refused():
    model = load_model("torchvision:vit_b_32", image_size=64, num_classes=3)
    assert model.input_size == (3, 64, 64)
    with pytest.raises(
        InputError, match=r"does not take images of \(3, 96, 96\); its input size is \(3, 64, 64\)"
    ):
        methods["saliency"](model, torch.rand(1, 3, 96, 96), 0)
    wrong = load_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_size=(3, 8, 8))
    with pytest.raises(ModelError, match=r"pass load_model\(..., input_size"):
        _ = wrong.structure


# --- no call changes a model ---------------------------------------------------------------------------


def fixed_size(side: int) -> nn.Sequential:
    """A network that takes images of one size only."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * side**2, 3))


def test_result_does_not_depend_on_what_ran_before():
    def draw(model: Model) -> torch.Tensor:
        return methods["class_visualization"](model, 0, steps=2, seed=0).images

    fresh, used = load_model(small()), load_model(small())
    methods["saliency"](used, torch.rand(1, 3, 40, 48), 0)
    used.features(torch.rand(1, 3, 20, 28), "1")
    expected = draw(fresh)
    assert expected.shape == (1, 3, 224, 224)
    assert torch.equal(draw(used), expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("class_visualization", {"target": 0, "steps": 2, "seed": 0, "size": 20}),
        ("saliency", {"images": torch.full((1, 3, 40, 48), 0.5), "target": 0}),
        ("grad_cam", {"images": torch.full((1, 3, 20, 28), 0.5), "target": 0}),
    ],
)
def test_replay_on_a_fresh_wrapper_gives_the_same_bits(name, arguments, tmp_path):
    model = load_model(small())
    methods["saliency"](model, torch.rand(1, 3, 32, 32), 0)
    methods[name](model, **arguments).save(tmp_path / "result")
    again = replay(tmp_path / "result", model=load_model(small()))
    assert again.same, str(again)
    sizes = [result.provenance.model["input_size"] for result in (again.saved, again.result)]
    assert sizes[0] == sizes[1]


def test_replay_reports_another_input_size(tmp_path):
    methods["class_visualization"](load_model(small()), 0, steps=2, seed=0, size=20).save(tmp_path / "result")
    again = replay(tmp_path / "result", model=load_model(small(), input_size=(3, 32, 32)))
    assert "the model's input size" in again.changed


def test_threads_with_two_image_sizes_share_a_model():
    model, errors = load_model(small()), []
    sizes = ((32, 32), (20, 28), (40, 24))
    images = {size: torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) for size in sizes}
    expected = {s: methods["activation_maps"](load_model(small()), images[s]).maps for s in sizes}

    def work(size: tuple[int, int]) -> None:
        for _ in range(40):
            try:
                maps = methods["activation_maps"](model, images[size]).maps
                assert torch.equal(maps, expected[size])
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert model.input_size == (3, 224, 224)


def test_network_that_does_not_take_the_default_size_works_on_its_images():
    model = load_model(fixed_size(32))
    images = torch.rand(2, 3, 32, 32)
    assert methods["grad_cam"](model, images, 1).maps.shape == (2, 32, 32)
    assert methods["saliency"](model, images).maps.shape == (2, 32, 32)
    assert run("saliency", model=model, images=images, target=0, progress=False).maps.any()
    labels = run("fgsm", model=model, images=images, progress=False).labels  # the predicted classes
    assert torch.equal(labels, model(images).argmax(1))
    dataset = TensorDataset(torch.rand(6, 3, 32, 32))
    assert methods["embed"](model, dataset).features.shape[0] == 6
    visualization = methods["class_visualization"](model, 0, steps=2, seed=0, size=32).images
    assert visualization.shape == (1, 3, 32, 32)
    assert model.input_size == (3, 224, 224)


def test_unsupported_default_size_is_refused_and_input_size_suggested():
    message = r"does not take images of \(3, 224, 224\), the default .*; pass load_model\(..., input_size"
    with pytest.raises(ModelError, match=message):
        methods["class_visualization"](load_model(fixed_size(32)), 0, steps=2, seed=0)
    with pytest.raises(ModelError, match=r"images of \(3, 40, 40\); pass load_model\(..., input_size"):
        methods["saliency"](load_model(fixed_size(32)), torch.rand(1, 3, 40, 40), 0)
    with pytest.raises(InputError, match=r"does not take images of \(3, 40, 40\)\. Its error: "):
        load_model(fixed_size(32))(torch.rand(1, 3, 40, 40))


def test_first_images_among_the_inputs_decide_the_size():
    model = load_model(small())
    styles = torch.rand(1, 3, 16, 16)
    result = methods["neural_style"](model, torch.rand(1, 3, 32, 24), styles, steps=1, seed=0)
    assert result.provenance.model["input_size"] == [3, 32, 24]


def test_images_are_converted_to_the_networks_precision():
    model = load_model(small().double(), input_size=(3, 8, 8))
    assert model(torch.rand(1, 3, 8, 8)).dtype is torch.float64
    assert methods["saliency"](model, torch.rand(1, 3, 8, 8), 0).maps.dtype is torch.float64


# --- mode, freezing, compilation -------------------------------------------------------------------


def test_network_in_training_mode_runs_in_eval_mode_and_is_restored():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.LazyLinear(3)
    )
    net(torch.rand(2, 3, 8, 8))
    net.train()
    net[0].requires_grad_(False)
    model = load_model(net, input_size=(3, 8, 8))
    digest = model.digest
    images = torch.rand(2, 3, 8, 8)
    first, second = (methods["saliency"](model, images, 0).maps for _ in range(2))
    assert torch.equal(first, second)
    assert net.training
    assert net[3].training
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True]
    assert model.digest == digest


def test_wrapping_changes_nothing_in_the_module():
    net = small()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    load_model(net, mean=[0.5] * 3)
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_compiled_model_runs_its_original():
    net = small()

    def never(*_):
        raise AssertionError("compiled")

    model = load_model(torch.compile(net, backend=never), input_size=(3, 8, 8))
    assert model.module is net
    assert methods["saliency"](model, torch.rand(1, 3, 8, 8), 0).maps.any()
    assert list(model.layers) == ["0", "1", "2", "3", "4"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_models_with_compiled_parts_are_refused():
    net = small()
    net[0] = torch.compile(net[0])
    with pytest.raises(ModelError, match=r"^0 is compiled, .*as it was before torch.compile"):
        load_model(net)
    compiled = small()
    compiled.compile()
    with pytest.raises(ModelError, match="the module is compiled"):
        load_model(compiled)
    with pytest.raises(ModelError, match="the module is compiled"):
        load_model(torch.jit.trace(small(), torch.rand(1, 3, 8, 8)))


# --- structure -------------------------------------------------------------------------------------


class Overwriting(nn.Module):
    """As DenseNet: the features are overwritten by a ReLU that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(F.relu(self.features(x), inplace=True).mean((2, 3)))


def test_functional_in_place_relu_is_part_of_the_head():
    torch.manual_seed(0)
    model = load_model(Overwriting(), input_size=(3, 8, 8))
    assert model.head.relu
    images = torch.rand(2, 3, 8, 8)
    maps = model.features(images, model.head.layer)
    assert (maps < 0).any()
    logits = maps.relu().mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(logits, model(images))


def test_head_with_as_many_channels_as_classes():
    model = load_model(small(classes=6), input_size=(3, 8, 8))
    assert model.last_map == "1"
    assert model.head.layer == "1"


def test_maps_of_class_scores_are_not_the_last_map():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert load_model(net, input_size=(3, 8, 8)).last_map == "1"


def test_last_map_below_a_head_of_zeros():
    net = small()
    nn.init.zeros_(net[4].weight)
    nn.init.zeros_(net[4].bias)
    model = load_model(net, input_size=(3, 8, 8))
    assert model.last_map == "1"
    assert model.head.layer == "1"


def test_max_pooling_is_no_head():
    net = small()
    net[2] = nn.AdaptiveMaxPool2d(1)
    model = load_model(net, input_size=(3, 8, 8))
    assert model.last_map == "1"
    with pytest.raises(ModelError, match=r"no GAP \+ linear head"):
        _ = model.head


def test_network_without_spatial_maps_has_no_last_map():
    model = load_model(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 2)), input_size=(3, 8, 8)
    )
    with pytest.raises(ModelError, match="no layer with a spatial map"):
        _ = model.last_map
    assert model.embed(torch.rand(2, 3, 8, 8)).shape == (2, 5)


def test_network_with_one_output_has_no_classes_but_units():
    model = load_model(nn.Sequential(*small(classes=1), nn.Flatten(0)), input_size=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ModelError, match="task='binary'"):
        methods["saliency"](model, images)
    assert methods["saliency"](model, images, "4[0]").maps.any()
    assert methods["saliency"](model, images, lambda logits: logits[:, 0]).maps.any()


def test_embeddings_are_the_classifiers_input():
    model = load_model(small(), input_size=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model.module[4](model.embed(images)), model(images))


# --- layers, classes, identity -------------------------------------------------------------------


def test_unknown_layers_and_classes_are_refused_with_the_nearest():
    model = load_model(small(), classes=["tabby, tabby cat", "tench", "crane"], input_size=(3, 8, 8))
    assert model.class_index("TABBY CAT") == 0
    assert model.class_index("2") == 2
    assert model.class_name(1) == "tench"
    with pytest.raises(UnknownName, match="did you mean 'crane'"):
        model.class_index("cranes")
    with pytest.raises(UnknownName, match="no layer 'fc'"):
        model.layer_name("fc")
    with pytest.raises(InputError, match="has no class names; pass the index"):
        load_model(small(), input_size=(3, 8, 8)).class_index("tench")


def test_full_class_names_take_precedence_over_synonyms():
    net = small(classes=2)
    assert load_model(net, classes=["crane, bird", "crane"]).class_index("crane") == 1
    assert load_model(net, classes=["crane, bird", "crane"]).class_index("bird") == 0
    assert load_model(net, classes=["crane", "crane"]).class_index("crane") == 0
    assert (
        load_model(net, classes=["1", "0"]).class_index("1") == 0
    )  # the class named 1, not the class at index 1
    assert load_model(net, classes=["1", "0"]).class_index(1) == 1


@pytest.mark.parametrize("names", [["a"], list("abcde")])
def test_number_of_class_names_must_be_that_of_the_logits(names):
    model = load_model(small(), input_size=(3, 8, 8), classes=names)
    with pytest.raises(ModelError, match=f"returns 3 logits, but has {len(names)} class names"):
        methods["saliency"](model, torch.rand(1, 3, 8, 8))


def test_input_size_has_three_numbers():
    assert load_model(small(), input_size=[3, 8, 8]).input_size == (3, 8, 8)
    with pytest.raises(InputError, match=r"input_size must be \(C, H, W\), not \(8, 8\)"):
        load_model(small(), input_size=(8, 8))


def test_features_need_no_layer_above_to_take_the_size():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    images = torch.rand(1, 3, 16, 16)
    model = load_model(net, input_size=(3, 8, 8))
    assert model.features(images, "1").shape == (1, 4, 14, 14)
    with pytest.raises(InputError, match=r"does not take images of \(3, 16, 16\)"):
        model(images)
    unsized = load_model(net)
    assert unsized.features(torch.rand(1, 3, 8, 8), "1").shape == (1, 4, 6, 6)
    for _ in range(2):  # independent of earlier passes
        with pytest.raises(ModelError, match=r"images of \(3, 16, 16\); pass load_model\(..., input_size"):
            unsized.features(images, "1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_is_recognized_in_low_precision(dtype):
    model = load_model("builtin:shapes-vgg", dtype=dtype)
    assert model.head.layer == load_model("builtin:shapes-vgg").head.layer
    assert methods["cam"](model, torch.rand(1, 3, 64, 64), 0).maps.dtype is dtype


def test_digest_changes_with_the_weights():
    net = small()
    model = load_model(net)
    before = model.digest
    assert load_model(small()).digest == before
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1
    assert model.digest != before


def test_normalization_happens_inside():
    model = Model(small(), mean=[0.1, 0.2, 0.3], std=[1, 2, 4])
    gray = torch.full((1, 3, 1, 1), 0.5)
    torch.testing.assert_close(model.normalize(gray)[0, :, 0, 0], torch.tensor([0.4, 0.15, 0.05]))


def test_copy_has_its_own_weights_and_layers() -> None:
    model = load_model("builtin:shapes-vgg")
    images, before = torch.rand(1, 3, 64, 64), model.digest
    logits, names = model(images), list(model.structure.layers)
    other = model.copy()
    assert torch.equal(other(images), logits)
    assert (
        list(other.structure.layers) == names and other.layers["classifier"] is not model.layers["classifier"]
    )
    with torch.no_grad():
        other.layers["classifier"].weight.zero_()
    assert other.source is None and other.digest != before == model.digest
    assert torch.equal(model(images), logits)


def test_deep_copy_shares_no_cache() -> None:
    model = load_model(small(), input_size=(3, 8, 8))
    before, _ = model.digest, model.structure
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.module[0].weight.zero_()
    assert other.digest != before == model.digest
    assert other.head.weight.data_ptr() != model.head.weight.data_ptr()
