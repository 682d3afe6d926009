"""Influence of training images: checkpoints from files and trainings, networks of every kind, refusals."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from phosphene import InputError, ModelError, TensorDataset, load_model, replay, run
from phosphene.testing.networks import make_network
from phosphene.training import TrainedModel, train, trainable_copy

GRADIENT_METHODS = ("tracin", "influence_functions", "trak")


def labeled(count: int, side: int = 24, classes: int = 3) -> TensorDataset:
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, [str(n % classes) for n in range(count)])


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return load_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), input_size=(3, 2, 2))


def test_checkpoints_are_read_from_files_and_folders(linear, tmp_path):
    """Files, a folder of files in the order of their names, and state dicts are the same checkpoints."""
    data, images = labeled(7, 2), labeled(2, 2).images
    states = [{n: t * factor for n, t in linear.module.state_dict().items()} for factor in (0.5, 1.0)]
    files = [tmp_path / f"step_{n}.safetensors" for n in range(2)]
    for file, state in zip(files, states, strict=True):
        save_file(state, file)
    inputs = {"model": linear, "images": images, "dataset": data}
    results = [
        run("tracin", **inputs, checkpoints=value, learning_rates=[0.1, 0.01])
        for value in (states, files, str(tmp_path))
    ]
    assert all(torch.equal(result.values, results[0].values) for result in results)
    alone = [run("tracin", **inputs, checkpoints=state).values for state in states]
    torch.testing.assert_close(results[0].values, 0.1 * alone[0] + 0.01 * alone[1])
    torch.testing.assert_close(alone[1], run("tracin", **inputs).values)


@pytest.mark.parametrize("stored", [0, 1])
def test_a_training_is_a_checkpoint_and_the_run_can_be_repeated(tmp_path, stored):
    options = {"dataset": "builtin:scenes/12", "seed": 0, "steps": 2, "batch": 4, "checkpoints": stored}
    run("adversarial_training", **options, attack_steps=1, out=tmp_path / "training")
    inputs = {"images": "builtin:scenes/1", "dataset": "builtin:scenes/6", "layers": ["classifier"]}
    result = run("tracin", **inputs, checkpoints=tmp_path / "training", out=tmp_path / "out")
    trained = run("tracin", model=f"trained:{tmp_path / 'training'}", **inputs)
    assert torch.equal(result.values, trained.values)
    assert not torch.equal(result.values, run("tracin", **inputs).values)
    assert replay(tmp_path / "out").same


def test_checkpoints_within_a_training_are_those_of_gradient_descent(linear, tmp_path):
    """A linear layer: weights of gradient descent and products of gradients in closed form."""
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(7, 3, 2, 2, generator=draw, dtype=torch.float64)
    network, data = linear.module.double(), TensorDataset(images[:5], ["2", "0", "1", "1", "0"])
    model = load_model(network, input_size=(3, 2, 2))
    features = model.normalize(images).flatten(1)
    classes = torch.eye(3, dtype=torch.float64)[[*map(int, data.classes), 2, 0]]
    weight, bias, products = network[1].weight.detach(), network[1].bias.detach(), []
    for _ in range(4):
        errors = ((features @ weight.T + bias).softmax(1) - classes)[:5] / 5
        weight, bias = weight - 0.3 * errors.T @ features[:5], bias - 0.3 * errors.sum(0)
        errors = (features @ weight.T + bias).softmax(1) - classes
        products.append(((errors @ errors.T) * (features @ features.T + 1))[5:, :5])

    trained = trainable_copy(model)

    def loss(images, indices, progress):
        return nn.functional.cross_entropy(trained(images), classes[indices].argmax(1), reduction="none")

    optimizer = torch.optim.SGD(trained.module.parameters(), 0.3)
    history = train(trained.module, data, loss, optimizer, steps=4, batch=5, seed=0, checkpoints=2)
    fields = {"labels": (), "previews": images[:0]}
    result = TrainedModel.from_training("defenses.adversarial_training", trained, model, history, **fields)
    result.save(tmp_path / "training")
    inputs = {"model": model, "images": images[5:], "labels": [2, 0], "dataset": data}
    rates = {"learning_rates": [0.3, 0.1]}
    expected = 0.3 * products[1] + 0.1 * products[3]
    for checkpoints in (result, tmp_path / "training", [f"{tmp_path}/training#{n}" for n in (1, 2)]):
        values = run("tracin", **inputs, checkpoints=checkpoints, **rates).values
        torch.testing.assert_close(values, expected)
    alone = run("tracin", **inputs, checkpoints=f"{tmp_path}/training#2").values
    torch.testing.assert_close(alone, products[3])
    with pytest.raises(InputError, match="stored 2 checkpoints, there is no #3"):
        run("tracin", **inputs, checkpoints=f"{tmp_path}/training#3")


@pytest.mark.parametrize("name", ["relu6", "gelu", "tokens", "nhwc", "heads", "multihead", "functional"])
def test_kronecker_factors_of_every_kind_of_layer(name):
    """Above all eigenvalues, the damping alone divides: values are products of gradients."""
    model = make_network(name)
    model.module.double()
    data = labeled(6)
    model_layers = model.structure.layers
    layers = [
        n
        for n, layer in model.layers.items()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and n in model_layers and model_layers[n].calls == 1
    ]
    inputs = {"model": model, "images": labeled(2).images, "dataset": data}
    result = run("influence_functions", **inputs, damping=1e12, seed=0)
    expected = run("tracin", **inputs, layers=layers).values / 6e12
    torch.testing.assert_close(result.values, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_padding_modes_and_groups_of_convolutions_have_exact_factors():
    """A layer's mean of (input, output gradient) moments is that of its gradients at a single position."""
    from phosphene_plugins.influence.influence_functions import _as_matrices, _flatten, _inputs, _outputs

    draw = torch.Generator().manual_seed(0)
    for options in (
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": (0, 2), "padding_mode": "reflect", "groups": 2},
        {"padding": "valid", "bias": False},
    ):
        layer = nn.Conv2d(4, 6, (3, 2), **options).double()
        values = torch.rand(3, 4, 7, 6, generator=draw, dtype=torch.float64, requires_grad=True)
        output = layer(values)
        errors = torch.rand(output.shape, generator=draw, dtype=torch.float64)
        # The gradient is the sum over positions of products of what both functions return.
        rows = torch.einsum("ngto,ngti->ngoi", _outputs(layer, errors), _inputs(layer, values.detach()))
        for n in range(3):
            own = errors * (torch.arange(3) == n).view(3, 1, 1, 1)
            gradients = torch.autograd.grad(output, list(layer.parameters()), own, retain_graph=True)
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.testing.assert_close(_as_matrices(layer, flat[None])[0], rows[n])
            torch.testing.assert_close(_flatten(layer, rows[n : n + 1])[0], flat)


def test_most_proponents_have_the_explained_class():
    """On the bundled network; the most similar example is the image itself."""
    inputs = {"images": "builtin:scenes/3", "dataset": "builtin:scenes/60"}
    for name, options in (
        ("influence_functions", {"layers": ["classifier"], "seed": 0}),
        ("similar_examples", {}),
        ("representer_points", {}),
    ):
        result = run(name, **inputs, **options, k=4)
        rows = zip(result.targets, result.proponents.tolist(), strict=True)
        own = [result.classes[index] == target for target, row in rows for index in row]
        assert sum(own) >= 9, name
        if name == "similar_examples":
            assert result.proponents[:, 0].tolist() == [0, 1, 2], name


def test_what_has_no_influence_is_refused(linear, tmp_path):
    data, images = labeled(6, 2), labeled(2, 2).images
    inputs = {"model": linear, "images": images, "dataset": data}
    for name in GRADIENT_METHODS:
        with pytest.raises(InputError, match="no classes"):
            run(name, **inputs | {"dataset": data.images})
        with pytest.raises(InputError, match="no class names"):
            run(name, **inputs | {"dataset": TensorDataset(data.images, ["no class"] * 6)})
        with pytest.raises(ModelError, match="has no weights"):
            run(name, **inputs, layers=["0"])
        with pytest.raises(InputError, match="must be classes"):
            run(name, **inputs, labels="contrast:0,1")
    with pytest.raises(InputError, match="2 checkpoints need one learning rate each, not 1"):
        run("tracin", **inputs, checkpoints=[linear.module.state_dict()] * 2, learning_rates=[0.1])
    with pytest.raises(ModelError, match="do not fit"):
        run("tracin", **inputs, checkpoints={"other.weight": torch.zeros(2)})
    with pytest.raises(InputError, match="neither a result nor weights"):
        run("tracin", **inputs, checkpoints=tmp_path)
    wide = load_model(nn.Sequential(nn.Flatten(), nn.Linear(9000, 2)), input_size=(3, 60, 50))
    pixels = torch.rand(2, 3, 60, 50)
    with pytest.raises(InputError, match="9,001 rows.*name other layers"):
        run("influence_functions", model=wide, images=pixels, dataset=TensorDataset(pixels, ["0", "1"]))
    several = load_model(nn.Sequential(nn.LayerNorm(2), nn.Flatten(), nn.Linear(12, 2)), input_size=(3, 2, 2))
    with pytest.raises(ModelError, match="cg"):
        run("influence_functions", **inputs | {"model": several}, layers=["0"])


class PartlyLabelled(TensorDataset):
    """The last image has no class."""

    def labels(self, indices):
        return None if len(self) - 1 in indices else super().labels(indices)


@pytest.mark.parametrize("name", [*GRADIENT_METHODS, "similar_examples", "representer_points"])
def test_an_image_without_a_class_is_refused(linear, name):
    data = labeled(6, 2)
    inputs = {
        "model": linear,
        "images": data.images[:1],
        "dataset": PartlyLabelled(data.images, data.classes),
    }
    options = {"fit": "classes"} if name == "representer_points" else {}
    with pytest.raises(InputError, match="some images of the data set have no class"):
        run(name, **inputs, **options)
