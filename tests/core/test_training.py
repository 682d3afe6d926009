"""The training loop: order, seeds, resuming; labels and splits; and trained models as results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import (
    DivergenceError,
    InputError,
    ModelError,
    ProgressEvent,
    TensorDataset,
    UnknownName,
    load_model,
    load_result,
    methods,
    run,
)
from phosphene.data import SceneDataset
from phosphene.training import (
    TrainedModel,
    WeightsOnly,
    label_reader,
    train,
    train_test_split,
    trainable_copy,
)

fit = methods["adversarial_training"]
QUICK: dict[str, Any] = {"steps": 3, "batch": 2, "attack_steps": 1, "seed": 3}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.fixture(scope="module")
def dataset() -> TensorDataset:
    images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, [str(n % 3) for n in range(7)])


def run_loop(net: nn.Module, dataset: TensorDataset, **changed: Any) -> tuple[Any, list[list[int]]]:
    batches: list[list[int]] = []
    steps, parts = changed.get("steps", 7), -(-4 // changed.get("max_batch", 4))

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        assert torch.equal(images, dataset.images[list(indices)])
        assert progress == len(batches) // parts / steps
        batches.append(list(indices))
        return net(images).square().mean(1)

    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    return train(net, dataset, loss, optimizer, **{"steps": 7, "batch": 4, "seed": 0} | changed), batches


def test_every_epoch_is_a_permutation(dataset: TensorDataset) -> None:
    history, batches = run_loop(network(), dataset)
    indices = sum(batches, [])
    for round_ in range(4):
        assert sorted(indices[7 * round_ : 7 * round_ + 7]) == list(range(7))
    assert indices[:7] != indices[7:14]
    assert history.losses.shape == (7,) and history.losses[-1] < history.losses[0]
    few = Counter(sum(run_loop(network(), dataset, count=5, steps=5)[1], []))
    assert few == Counter({n: 4 for n in range(5)})


def test_order_depends_on_the_seed_alone(dataset: TensorDataset) -> None:
    same, other = run_loop(network(), dataset)[1], run_loop(network(), dataset, seed=1)[1]
    assert same == run_loop(network(), dataset)[1] != other


def test_gradient_accumulation_equals_one_batch(dataset: TensorDataset) -> None:
    complete, parts = network().double(), network().double()
    double_dataset = TensorDataset(dataset.images.double())
    one, _ = run_loop(complete, double_dataset)
    other, batches = run_loop(parts, double_dataset, max_batch=3)
    assert {len(part) for part in batches} == {2}
    torch.testing.assert_close(one.losses, other.losses)
    for first, second in zip(complete.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_schedule_scales_the_learning_rate_and_evaluations_are_regular(dataset: TensorDataset) -> None:
    net, calls = network(), []
    history, _ = run_loop(
        net, dataset, schedule=lambda progress: 0.0, evaluate=lambda: calls.append(0) or {"w": 0.5}
    )
    for parameter, before in zip(net.parameters(), network().parameters(), strict=True):
        assert torch.equal(parameter, before) and not parameter.requires_grad
    assert history.evaluation_steps.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert history.curves["w"].tolist() == [0.5] * 8 and len(calls) == 8


def test_previews_are_drawn_at_equal_intervals(dataset: TensorDataset) -> None:
    previews = iter(torch.arange(4) / 255)
    history, _ = run_loop(network(), dataset, frames=3, preview=lambda: next(previews).expand(2, 3, 4, 4))
    assert history.frames is not None and history.frames.dtype == torch.uint8
    assert torch.equal(history.frames, torch.arange(3).byte().view(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 4))
    assert len(run_loop(network(), dataset, steps=2, frames=9, preview=lambda: torch.ones(1))[0].frames) == 2
    assert run_loop(network(), dataset, preview=lambda: torch.ones(1))[0].frames is None


def test_checkpoints_are_stored_at_equal_intervals(dataset: TensorDataset) -> None:
    net = network()
    history, _ = run_loop(net, dataset, checkpoints=3)
    assert history.checkpoint_steps == (3, 5, 7) and len(history.checkpoints) == 3
    for steps, saved in zip(history.checkpoint_steps, history.checkpoints, strict=True):
        # The learning rate is constant, so a shorter training is the beginning of this one.
        shorter = network()
        run_loop(shorter, dataset, steps=steps)
        assert all(torch.equal(saved[name], tensor) for name, tensor in shorter.state_dict().items())
    assert run_loop(network(), dataset, steps=2, checkpoints=9)[0].checkpoint_steps == (1, 2)
    assert run_loop(network(), dataset)[0].checkpoints == ()


def test_images_are_read_once_while_they_fit_into_the_cache() -> None:
    class Counted(SceneDataset):
        def read(self, indices: Sequence[int]) -> Tensor:
            read.extend(indices)
            return super().read(indices)

    read: list[int] = []
    net = network()
    loss = lambda images, indices, progress: net(images).mean(1)
    train(net, Counted(4), loss, torch.optim.SGD(net.parameters(), 0.1), steps=6, batch=3, seed=0)
    assert sorted(read) == [0, 1, 2, 3]


def test_interrupted_training_resumes_bit_by_bit(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"dataset": "builtin:scenes/8", **QUICK, "steps": 6, "checkpoints": 3}
    complete = run("adversarial_training", **arguments, out=tmp_path / "complete")

    def stop(event: ProgressEvent) -> None:
        if event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("adversarial_training", **arguments, out=tmp_path / "cut", progress=stop)
    events: list[ProgressEvent] = []
    again = run("adversarial_training", **arguments, out=tmp_path / "cut", progress=events.append)
    assert [event.total for event in events] == [2, 2]
    assert torch.equal(complete.losses, again.losses) and torch.equal(
        complete.evaluation_steps, again.evaluation_steps
    )
    for one, other in zip(complete.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.checkpoint_steps == (2, 4, 6)
    for saved, expected in zip(again.checkpoints, complete.checkpoints, strict=True):
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adversarial_training", {"attack_steps": 1}),
        ("smooth_activations", {}),
        ("interval_bounds_fit", {}),
        ("lipschitz_fit", {}),
        ("defensive_distillation", {}),
    ],
)
def test_every_training_of_a_classifier_stores_checkpoints_of_its_network(
    name: str, options: dict[str, Any], dataset: TensorDataset
) -> None:
    model = load_model(network(), input_size=(3, 8, 8))
    common = {"steps": 3, "batch": 2, "seed": 3, "held_out": 0.2, "checkpoints": 2}
    result = methods[name](model, dataset, **common, **options)
    first, last = result.checkpoints
    state = result.network.state_dict()
    assert result.checkpoint_steps == (2, 3) and first.keys() == last.keys() == state.keys()
    assert all(torch.equal(last[key], state[key]) for key in state)
    assert not all(torch.equal(first[key], state[key]) for key in state)


def test_original_model_is_unchanged(dataset: TensorDataset) -> None:
    model = load_model(network().train(), input_size=(3, 8, 8))
    before = model.digest
    result = fit(model, dataset, **QUICK)
    assert model.digest == before and model.module.training
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
    assert result.model().digest != before
    assert not result.network.training and not any(p.requires_grad for p in result.network.parameters())


def test_loss_that_is_not_finite_raises(dataset: TensorDataset) -> None:
    net = network()
    with torch.no_grad():
        net[0].weight.fill_(1e30)
    with pytest.raises(DivergenceError, match="lower lr"):
        fit(load_model(net, input_size=(3, 8, 8)), dataset, **QUICK)


def test_untrainable_models_and_missing_labels_are_refused(dataset: TensorDataset) -> None:
    with pytest.raises(ModelError, match="no weights"):
        trainable_copy(load_model(nn.Flatten(), input_size=(3, 8, 8)))
    model = load_model(network(), input_size=(3, 8, 8))
    with pytest.raises(InputError, match='labels="predicted"'):
        label_reader(model, TensorDataset(dataset.images))
    with pytest.raises(InputError, match="class 7"):
        label_reader(model, TensorDataset(dataset.images[:1], ["7"]))
    named = load_model(network(), input_size=(3, 8, 8), classes=["cat", "dog", "cow"])
    with pytest.raises(UnknownName, match=r"did you mean 'dog'\? 'dig' is a label of the data set: choose"):
        label_reader(named, TensorDataset(dataset.images[:1], ["dig"]))


def test_labels_are_true_or_predicted(dataset: TensorDataset) -> None:
    model = load_model(network(), input_size=(3, 8, 8))
    assert label_reader(model, dataset)([4, 0, 4]).tolist() == [1, 0, 1]
    predicted = label_reader(model, TensorDataset(dataset.images), "predicted")([5, 2])
    assert torch.equal(predicted, model(dataset.images[[5, 2]]).argmax(1))


def test_last_images_are_held_out(dataset: TensorDataset) -> None:
    assert train_test_split(dataset, 0.3) == (5, range(5, 7))
    assert train_test_split(dataset, 0.01) == (7, range(7))
    assert train_test_split(TensorDataset(dataset.images[:1]), 0.9) == (1, range(1))
    assert train_test_split(SceneDataset(1000), 0.5) == (500, range(500, 564))


# --- the trained model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "robust"
    run("adversarial_training", dataset="builtin:scenes/8", **QUICK, out=out)
    return out


def test_trained_model_loads_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = load_result(folder)
    assert isinstance(result, TrainedModel)
    monkeypatch.chdir(folder.parent)
    model, origin = load_model("trained:robust"), load_model("builtin:shapes-vgg")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(images), result.model()(images))
    assert not torch.equal(model(images), origin(images))
    assert model.classes == origin.classes and model.input_size == origin.input_size
    assert torch.equal(model.mean, origin.mean) and torch.equal(model.std, origin.std)
    assert model.source is not None and model.source["uri"] == f"trained:{folder}"
    behind = load_model("defended:jpeg()|trained:robust")
    assert behind.source is not None and behind.source["uri"] == f"defended:jpeg(quality=75)|trained:{folder}"
    assert behind.digest != model.digest


def test_trained_model_can_be_trained_again(folder: Path, tmp_path: Path) -> None:
    model = f"trained:{folder}"
    again = run("adversarial_training", model=model, dataset="builtin:scenes/8", **QUICK, out=tmp_path / "b")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(load_model(f"trained:{tmp_path / 'b'}")(images), again.model()(images))


def test_network_passed_as_an_object_is_built_by_the_caller(dataset: TensorDataset, tmp_path: Path) -> None:
    double = load_model(network().double(), input_size=(3, 8, 8), mean=[0.5] * 3)
    result = fit(double, TensorDataset(dataset.images.double(), dataset.classes), **QUICK)
    result.save(tmp_path / "own")
    loaded = load_result(tmp_path / "own")
    assert isinstance(loaded, TrainedModel) and isinstance(loaded.network, WeightsOnly)
    with pytest.raises(ModelError, match=r"passed as an object.*load_model\(module, weights=folder\)"):
        loaded.model()
    with pytest.raises(ModelError, match="passed as an object"):
        load_model(f"trained:{tmp_path / 'own'}")
    own = load_model(network().double(), weights=tmp_path / "own", mean=[0.5] * 3, input_size=(3, 8, 8))
    images = dataset.images.double()
    assert torch.equal(own(images), result.model()(images))


def test_folders_without_a_trained_model_are_refused(folder: Path, tmp_path: Path) -> None:
    run("saliency", images="builtin:scenes/1", out=tmp_path / "map")
    with pytest.raises(InputError, match="contains an Attribution"):
        load_model(f"trained:{tmp_path / 'map'}")
    with pytest.raises(InputError, match="no network"):
        load_model(network(), weights=tmp_path / "map")
    with pytest.raises(InputError, match="no saved result"):
        load_model("trained:nowhere")
    with pytest.raises(InputError, match="its own weights"):
        load_model(f"trained:{folder}", weights="DEFAULT")


def test_defended_model_is_trained_through_its_defense(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": "defended:bit_depth(bits=3)|builtin:shapes-vgg", **QUICK}
    result = run("adversarial_training", dataset="builtin:scenes/8", **arguments, out=tmp_path / "d")
    model = load_model(f"trained:{tmp_path / 'd'}")
    assert [name for name, _ in model.defenses] == ["bit_depth(bits=3)"]
    assert model.digest == result.model().digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_network_trained_from_half_precision_is_not_rounded_when_it_is_loaded(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load_model("builtin:shapes-vgg", dtype=dtype)
    trained: Any = run(
        "adversarial_training", model=model, dataset="builtin:scenes/8", **QUICK, out=tmp_path / "out"
    )
    loaded: Any = load_result(tmp_path / "out")
    state = trained.network.state_dict()
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    for name, tensor in loaded.network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.model()(images), trained.model()(images))
    assert torch.equal(load_model(f"trained:{tmp_path / 'out'}")(images), trained.model()(images))


def test_weights_of_several_precisions_are_loaded_as_they_are_saved(tmp_path: Path) -> None:
    model = load_model("builtin:shapes-vgg")
    trained: Any = run("adversarial_training", model=model, dataset="builtin:scenes/8", **QUICK)
    first = next(iter(trained.network.state_dict()))
    trained.network.get_submodule(first.rpartition(".")[0]).half()
    trained.save(tmp_path / "out")
    loaded: Any = load_result(tmp_path / "out")
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name


def test_losses_of_a_double_network_may_exceed_single_precision() -> None:
    from phosphene import methods
    from phosphene.testing import Case

    result = Case("double", params={"eps": 1e-55}).run(methods["lipschitz_fit"])
    assert result.losses.dtype == torch.float64 and result.losses.isfinite().all()
    assert result.losses.max() > 1e39
