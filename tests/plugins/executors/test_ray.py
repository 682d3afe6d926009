"""``executor="ray"``: equal to ``local``, also when a worker is killed or a machine is lost."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
import torch
from tests.plugins.executors.test_training_processes import IMAGES, Faulty

import phosphene_plugins.executors.ray as executor
from phosphene import (
    Dataset,
    DivergenceError,
    InputError,
    MissingExtra,
    PhospheneError,
    TensorDataset,
    methods,
    run,
)
from phosphene.data import use_shard_executor
from phosphene.models.batch_size import max_batch
from phosphene.testing.cases import Case
from phosphene.testing.checks.work import accepted_case
from phosphene.testing.networks import make_network
from phosphene.testing.observation import assert_same_result
from phosphene.training import train, use_training_executor

ray = pytest.importorskip("ray", reason="the extra phosphene[ray] is not installed")

#: One Ray for all tests, and no other executor's processes beside it.
pytestmark = pytest.mark.xdist_group("executors")

#: Trainings read a data set in an order that matters, so they are no folds. UMAP compiles for a minute.
OVER_DATA_SETS = [
    pytest.param(name, marks=() if name.startswith("activations.") else pytest.mark.nightly)
    for name in methods
    if (spec := methods[name].spec).input("dataset") is not None and "training" not in spec.needs
]


@pytest.fixture(scope="module")
def shards():
    """The executor on a local Ray with two workers."""
    from phosphene_plugins.executors._ray_shards import RayShards

    handler = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=2, object_store_memory=10**8, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, handler)  # that of Ray would end this process in other tests
    with RayShards() as shards:
        yield shards
    ray.shutdown()


@pytest.fixture
def model():
    return make_network("gap")


class Slow(Dataset):
    """A data set that notes the process and the machine that read each image, and can kill a process."""

    def __init__(self, dataset, folder, seconds=0.0, deaths=0):
        self.dataset, self.folder, self.seconds, self.deaths = dataset, folder, seconds, deaths

    def __len__(self):
        return len(self.dataset)

    def read(self, indices):
        if 20 in indices and len([*self.folder.glob("death*")]) < self.deaths:
            (self.folder / f"death{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "none"
        (self.folder / f"{indices[0]}.{node}").touch()
        return self.dataset.read(indices)

    def labels(self, indices):
        return self.dataset.labels(indices)


@pytest.fixture
def dataset():
    images = torch.rand(41, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, [f"class {n % 5}" for n in range(41)])


@pytest.mark.parametrize("name", OVER_DATA_SETS)
def test_every_method_over_a_data_set_is_the_same_on_ray(shards, name):
    method = methods[name]
    case = accepted_case(method, Case(dataset=19))
    assert case is not None
    with max_batch(2):
        expected = case.run(method)
        with use_shard_executor(shards):
            result = case.run(method)
    assert_same_result(result, expected, rtol=0, atol=0)
    assert result.provenance.model == expected.provenance.model


def test_a_killed_worker_is_replaced_and_its_shard_is_computed_again(shards, model, dataset, tmp_path):
    expected = run("activation_statistics", model=model, dataset=dataset, batch_size=2)
    result = run(
        "activation_statistics",
        model=model,
        dataset=Slow(dataset, tmp_path, deaths=2),
        batch_size=2,
        executor="ray:auto",
    )
    assert len([*tmp_path.glob("death*")]) == 2
    assert_same_result(result, expected, rtol=0, atol=0)
    assert ray.is_initialized()


def test_a_training_on_ray_is_that_of_two_processes(shards):
    options = {"dataset": "builtin:scenes/12", "steps": 3, "batch": 5, "seed": 0, "progress": False}
    expected = run("smooth_activations", executor="processes:2", **options)
    result = run("smooth_activations", executor="ray:auto", **options)
    assert_same_result(result, expected, rtol=0, atol=0)
    assert result.provenance.processes == 2


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("kill", PhospheneError, "process 1 of the training ended"),
        ("error", InputError, "no loss for images"),
        ("infinite", DivergenceError, "step 1: the loss is no longer finite"),
    ],
)
def test_fault_of_another_process_ends_a_training_on_ray(shards, fault, error, message):
    from phosphene_plugins.executors._ray_training import RayTrainingProcesses

    network, data = Faulty(fault), TensorDataset(IMAGES)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    with use_training_executor(RayTrainingProcesses()), pytest.raises(error, match=message):
        train(network, data, network.loss, optimizer, steps=4, batch=5, seed=3)


@pytest.mark.nightly
def test_a_stream_is_the_same_on_ray_and_a_killed_worker_is_replaced(shards, model, dataset, tmp_path):
    options = {"labels": [n % 3 for n in range(41)], "steps": 2, "seed": 3, "batch_size": 4, "model": model}
    expected = run("pgd", images=dataset, out=tmp_path / "local", **options)
    (tmp_path / "notes").mkdir()
    slow = Slow(dataset, tmp_path / "notes", deaths=1)
    result = run("pgd", images=slow, out=tmp_path / "shared", executor="ray:auto", **options)
    assert len([*slow.folder.glob("death*")]) == 1
    assert result.to_pandas().equals(expected.to_pandas())
    assert_same_result(result[:], expected[:], rtol=0, atol=0)


@pytest.mark.nightly
def test_a_shard_that_kills_its_workers_three_times_is_an_error(shards, model, dataset, tmp_path):
    with use_shard_executor(shards), pytest.raises(PhospheneError, match=r"images 16 to 23 died 3 times"):
        run("embed", model=model, dataset=Slow(dataset, tmp_path, deaths=9), batch_size=2)
    assert len([*tmp_path.glob("death*")]) == 3


def test_the_error_of_a_worker_is_raised(shards, model, dataset):
    with use_shard_executor(shards), pytest.raises(TypeError, match="unsupported operand") as caught:
        run("embed", model=model, dataset=Slow(dataset, folder=None), batch_size=2)
    assert "In the worker process" in caught.value.__notes__[0]


def test_another_cluster_than_the_connected_one_is_refused(shards):
    with pytest.raises(InputError, match=r"connected to the Ray cluster .*, not to 10\.0\.0\.1:6379"):
        run("embed", executor="ray:10.0.0.1:6379")


@pytest.mark.parametrize("address", [" auto", "local"])
def test_invalid_addresses_are_refused(address):
    with pytest.raises(InputError, match="should be the address of a cluster, such as 'ray:auto'"):
        run("embed", executor=f"ray:{address}")


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'phosphene\[ray\]'"):
        run("embed", executor="ray")


def test_the_handler_of_sigterm_is_restored(monkeypatch):
    """Ray's own would end a run without its result."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: signal.signal(signal.SIGTERM, lambda *_: None))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with executor._connection("local"):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_machine_without_a_cluster_says_how_to_start_one(monkeypatch):
    def init(*_, **__):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PhospheneError, match="no Ray cluster runs on this machine: start one with"):
        run("embed", executor="ray:auto")


@pytest.mark.nightly
def test_a_cluster_loses_a_machine(model, dataset, tmp_path):
    """One of two machines is removed in the middle: what it computed and had not delivered is repeated."""
    from ray.cluster_utils import Cluster

    expected = run("embed", model=model, dataset=dataset, batch_size=1)
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    slow = Slow(dataset, tmp_path, seconds=0.3)

    def remove():
        while len([*tmp_path.glob(f"*.{second.node_id}")]) < 6:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        result = run("embed", model=model, dataset=slow, batch_size=1, executor=f"ray:{cluster.address}")
    finally:
        remover.join()
        cluster.shutdown()
    assert_same_result(result, expected, rtol=0, atol=0)
    assert len({file.suffix for file in tmp_path.iterdir()}) == 2 and not ray.is_initialized()


_SLOW = """
    import time
    from pathlib import Path
    import torch
    from phosphene import TensorDataset, run

    class Slow(TensorDataset):
        def read(self, indices):
            Path(FOLDER, f"{indices[0]}.read").touch()
            time.sleep(0.3)
            return super().read(indices)

    run("embed", dataset=Slow(torch.rand(4000, 3, 64, 64)), batch_size=2, executor="ray", progress=False)
"""


@pytest.mark.nightly
def test_an_interrupted_run_ends_the_ray_that_it_started(tmp_path):
    program = textwrap.dedent(_SLOW).replace("FOLDER", repr(str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len([*tmp_path.glob("*.read")]) < 4:
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {child.name() for child in started}
    process.send_signal(signal.SIGINT)
    _, text = process.communicate()
    gone, alive = psutil.wait_procs(started, timeout=20)
    assert "KeyboardInterrupt" in text and len(gone) >= 2 and not alive
