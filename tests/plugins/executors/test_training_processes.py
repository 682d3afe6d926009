"""Trainings by several processes: the same steps as one process, and what happens when one of them ends."""

import os
import signal
import threading
from contextlib import nullcontext

import psutil
import pytest
import torch
from torch import nn

from phosphene import (
    DivergenceError,
    InputError,
    PhospheneError,
    TensorDataset,
    checkpoints,
    methods,
    replay,
    run,
)
from phosphene.testing.observation import assert_same_result
from phosphene.training import GradientSteps, train, use_training_executor
from phosphene_plugins.executors._training_processes import TrainingProcesses

pytestmark = pytest.mark.xdist_group("executors")

IMAGES = torch.rand(11, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Squares(nn.Module):
    """A network with a loss of its own, which can be sent: a parameter without a gradient, and a buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(48, 2), nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(3))
        draws = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        self.mean = self.mean.double()

    def loss(self, images, indices, progress):
        self.mean = 0.9 * self.mean + 0.1 * images.detach().mean((0, 2, 3))
        return self.linear(images.flatten(1)).square().sum(1)


class Faulty(Squares):
    """A loss that fails, or ends the process, in any other process than that of the test."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.own = fault, os.getpid()

    def loss(self, images, indices, progress):
        if os.getpid() != self.own and progress > 0:
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "error":
                raise InputError(f"no loss for images {indices}")
            return super().loss(images, indices, progress) * torch.inf
        return super().loss(images, indices, progress)


def trainings():
    """The processes of trainings that this process has started."""
    return [p for p in psutil.Process().children() if "_training_worker" in " ".join(p.cmdline())]


def fit(network, processes, batch=5, steps=4, optimizer=torch.optim.AdamW):
    executor = TrainingProcesses(processes)
    with use_training_executor(executor):
        history = train(
            network, TensorDataset(IMAGES), network.loss, optimizer(network.parameters(), lr=0.01),
            steps=steps, batch=batch, seed=3, max_batch=2,
        )  # fmt: skip
    return history, executor.largest_group


@pytest.mark.parametrize(("processes", "batch"), [(2, 5), (3, 2)])
def test_steps_are_those_of_one_process(processes, batch):
    local, parallel = Squares(), Squares()
    expected, _ = fit(local, 1, batch)
    history, size = fit(parallel, processes, batch)
    assert size == min(processes, batch)
    torch.testing.assert_close(history.losses, expected.losses, rtol=1e-12, atol=0)
    for (name, value), reference in zip(
        parallel.named_parameters(), dict(local.named_parameters()).values(), strict=True
    ):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-14, msg=name)
    # No gradient in any process: no weight decay either.
    assert torch.equal(parallel.unused.weight, Squares().unused.weight)
    assert not trainings()


def test_interrupted_training_resumes_to_the_same_bits_and_is_replayed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    options = {"dataset": "builtin:scenes/12", "steps": 3, "batch": 5, "seed": 0, "progress": False}
    local = run("smooth_activations", **options)
    options |= {"executor": "processes:2", "out": tmp_path / "net"}

    def stop(event):
        if event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("smooth_activations", **options | {"progress": stop})
    assert not trainings()
    resumed = run("smooth_activations", **options)
    torch.testing.assert_close(resumed.losses, local.losses, rtol=1e-5, atol=0)
    assert resumed.provenance.processes == 2 and local.provenance.processes == 1
    complete = replay(tmp_path / "net")
    assert complete.same and complete.result.provenance.processes == 2


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in methods if "training" in methods[name].spec.needs])
def test_every_training_has_the_same_bits_in_every_run(name):
    options = {"dataset": "builtin:scenes/12", "steps": 3, "batch": 5, "seed": 0, "executor": "processes:2"}
    if name == "synthesis.data_free_distillation":  # needs statistics of batch normalization
        options |= {"model": "builtin:shapes-resnet", "images": 8, "inversion_steps": 2}
    context = nullcontext()
    if name == "defenses.lipschitz_fit":  # torch does not pickle parametrized modules
        context = pytest.warns(UserWarning, match="runs in this process: it cannot be sent")
    with context:
        first, second = (run(name, progress=False, **options) for _ in range(2))
    assert_same_result(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("kill", PhospheneError, "process 1 of the training was ended by SIGKILL"),
        ("error", InputError, "no loss for images"),
        ("infinite", DivergenceError, "step 1: the loss is no longer finite"),
    ],
)
def test_fault_of_another_process_ends_the_training(fault, error, message):
    with pytest.raises(error, match=message):
        fit(Faulty(fault), 2)
    assert not trainings()


def test_a_training_that_cannot_be_sent_runs_in_this_process():
    network = Squares()
    network.lock = threading.Lock()
    with pytest.warns(UserWarning, match=r"runs in this process: it cannot be sent \(.*lock"):
        history, size = fit(network, 2)
    assert size == 1
    assert torch.equal(history.losses, fit(Squares(), 1)[0].losses)


def test_buffers_are_those_of_the_first_process():
    network = Squares()
    task = GradientSteps(
        network, TensorDataset(IMAGES), network.loss, torch.optim.SGD(network.parameters(), 0.1),
        lambda progress: 1.0, 0, 3, 6, 6, 11, 0,
    )  # fmt: skip

    class Second:
        rank, size = 1, 2

        def add(self, values):
            return values

        def first(self, values):
            return torch.full_like(values, 7)

    task.run(0, Second())
    assert network.mean.tolist() == [7, 7, 7]


def test_replay_refuses_more_processes_than_cores(tmp_path):
    run("smooth_activations", dataset="builtin:scenes/4", steps=1, batch=2, seed=0, out=tmp_path / "net")
    file = tmp_path / "net" / "result.json"
    text = file.read_text()
    assert '"processes": 1' in text
    file.write_text(text.replace('"processes": 1', '"processes": 3000'))
    with pytest.raises(InputError, match="trained by 3000 processes, and this machine has"):
        replay(tmp_path / "net")
