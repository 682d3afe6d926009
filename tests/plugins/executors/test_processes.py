"""``executor="processes"``: equal to ``local``, also when a worker is killed; no process is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext

import psutil
import pytest
import torch
from safetensors.torch import load_file

from phosphene import (
    Dataset,
    Fold,
    InputError,
    Model,
    PhospheneError,
    Result,
    TensorDataset,
    UnknownName,
    methods,
    run,
)
from phosphene.cli import main
from phosphene.data import FoldTask, Rows, use_shard_executor
from phosphene.models.batch_size import max_batch
from phosphene.testing.cases import Case
from phosphene.testing.checks.work import accepted_case
from phosphene.testing.networks import make_network
from phosphene.testing.observation import assert_same_result
from phosphene.torch_state import TorchSettings
from phosphene_plugins.executors._process_pool import ProcessPool
from phosphene_plugins.executors._sending import describe_error
from phosphene_plugins.executors.processes import Processes, default_workers

#: One pool for all tests.
pytestmark = pytest.mark.xdist_group("executors")

#: Trainings read a data set in an order that matters, so they are no folds. UMAP compiles for a minute.
OVER_DATA_SETS = [
    pytest.param(name, marks=pytest.mark.nightly if name == "embeddings.umap" else ())
    for name in methods
    if (spec := methods[name].spec).input("dataset") is not None and "training" not in spec.needs
]


@pytest.fixture(scope="module")
def pool():
    with ProcessPool(2) as pool:
        yield pool


@pytest.fixture
def model():
    return make_network("gap")


@pytest.fixture
def dataset():
    images = torch.rand(41, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, [f"class {n % 5}" for n in range(41)])


@pytest.mark.parametrize("name", OVER_DATA_SETS)
def test_every_method_over_a_data_set_is_the_same_on_processes(pool, name):
    method = methods[name]
    case = accepted_case(method, Case(dataset=19))
    assert case is not None
    with max_batch(2):
        expected = case.run(method)
        with use_shard_executor(pool):
            result = case.run(method)
    assert_same_result(result, expected, rtol=0, atol=0)
    assert result.provenance.model == expected.provenance.model


def test_a_run_leaves_the_model_and_its_weights_as_they_are(model, dataset):
    def state():
        return [(id(p), p.data_ptr(), p._version, p.is_shared(), p.requires_grad) for p in tensors]

    tensors = [*model.module.parameters(), *model.module.buffers(), dataset.images]
    before, processes = state(), psutil.Process().children(recursive=True)
    expected = run("embed", model=model, dataset=dataset, batch_size=2)
    result = run("embed", model=model, dataset=dataset, batch_size=2, executor="processes:2")
    assert_same_result(result, expected, rtol=0, atol=0)
    assert state() == before and psutil.Process().children(recursive=True) == processes


class Settings(Fold):
    """What an image is computed with, and random numbers where the fold is ``random``."""

    def start(self):
        return {"numbers": Rows(), "settings": []}

    def update(self, state, batch):
        state["numbers"].write(batch.indices[0], torch.rand(len(batch.images)))
        layer = torch.nn.Linear(1, 1)(torch.ones(1, 1))
        settings = [
            str(TorchSettings.current()),
            str(layer.dtype),
            layer.requires_grad,
            str(torch.ones(1).device),
        ]
        return state | {"settings": sorted({*state["settings"], *map(str, settings)})}

    def merge(self, first, second):
        settings = sorted({*first["settings"], *second["settings"]})
        return {"numbers": first["numbers"].merge(second["numbers"]), "settings": settings}

    def finish(self, state):
        return state["numbers"].tensor(), state["settings"]


def test_workers_compute_with_the_settings_and_the_seeds_of_the_call(pool, dataset):
    fold = Settings()
    fold.random = True
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.manual_seed(3)
            expected, after = fold.run(dataset, 2), torch.rand(3)
            torch.manual_seed(3)
            with use_shard_executor(pool):
                result = fold.run(dataset, 2)
            assert torch.equal(torch.rand(3), after)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(result[0], expected[0]) and result[1] == expected[1]
    assert len(expected[1]) == 4 and "bfloat16" in " ".join(expected[1])


def test_a_task_restores_the_settings_of_its_process(dataset):
    with torch.no_grad():
        task = FoldTask.capture(Settings(), dataset, 2, None)
    before = TorchSettings.current()
    task.compute(range(8))
    assert TorchSettings.current() == before


class Wrapped(Dataset):
    """Another data set, with attributes of its own."""

    def __init__(self, dataset, **attributes):
        self.dataset = dataset
        vars(self).update(attributes)

    def __len__(self):
        return len(self.dataset)

    def read(self, indices):
        return self.dataset.read(indices)

    def labels(self, indices):
        return self.dataset.labels(indices)


class Deadly(Wrapped):
    """Kills the process that reads the image 20, as long as there are files in the folder ``lives``."""

    def read(self, indices):
        if 20 in indices and (lives := sorted(self.lives.iterdir())):
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(indices)


@pytest.fixture
def deadly(dataset, tmp_path):
    return Deadly(dataset, lives=tmp_path)


def test_a_killed_worker_is_replaced_and_its_shard_is_computed_again(pool, model, dataset, deadly):
    for n in range(2):
        (deadly.lives / str(n)).touch()
    expected = run("activation_statistics", model=model, dataset=dataset, batch_size=2)
    with use_shard_executor(pool):
        result = run("activation_statistics", model=model, dataset=deadly, batch_size=2)
    assert not [*deadly.lives.iterdir()]
    assert_same_result(result, expected, rtol=0, atol=0)


def test_a_shard_that_kills_its_workers_three_times_is_an_error(pool, model, deadly):
    for n in range(9):
        (deadly.lives / str(n)).touch()
    with (
        use_shard_executor(pool),
        pytest.raises(PhospheneError, match=r"images 16 to 23 was ended by SIGKILL"),
    ):
        run("embed", model=model, dataset=deadly, batch_size=2)
    assert len([*deadly.lives.iterdir()]) == 6


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pgd", {"labels": "label", "steps": 2, "seed": 3}),
        ("grad_cam", {"target": [*range(3)] * 13 + [0, 1]}),
    ],
)
def test_a_stream_is_the_same_on_processes_and_a_killed_worker_is_replaced(
    pool, model, dataset, tmp_path, monkeypatch, name, arguments
):
    monkeypatch.setattr(Processes, "shard_executor", lambda *_: nullcontext(pool))
    monkeypatch.setattr(Result, "png", lambda self: b"")  # drawing takes longer than everything else
    count = model(dataset.images[:1]).shape[1]
    names = [f"class {n}" for n in range(count)]
    model = Model(model.module, input_size=model.input_size, classes=names)
    options = {"model": model, "batch_size": 4, "progress": False, **arguments}
    expected = run(name, images=dataset, out=tmp_path / "local", **options)
    (tmp_path / "lives").mkdir()
    (tmp_path / "lives" / "0").touch()
    deadly = Deadly(dataset, lives=tmp_path / "lives")
    result = run(name, images=deadly, out=tmp_path / "shared", executor="processes:2", **options)
    assert not [*deadly.lives.iterdir()]
    assert result.to_pandas().equals(expected.to_pandas())
    assert_same_result(result[:], expected[:], rtol=0, atol=0)
    for file in sorted((tmp_path / "local").glob("shard-*")):
        first, second = load_file(file), load_file(tmp_path / "shared" / file.name)
        assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


class Faulty(Fold):
    """Fails at an image."""

    def update(self, state, batch):
        if 20 in batch.indices:
            raise self.error
        return state

    def merge(self, first, second):
        return first

    def finish(self, state):
        return state


class LockedError(Exception):
    """An error that cannot be pickled."""

    def __init__(self, text):
        super().__init__(text, threading.Lock())


def test_the_error_of_a_worker_is_raised_with_its_traceback(pool, dataset):
    fold = Faulty()
    fold.error = ZeroDivisionError("by 20")
    with use_shard_executor(pool):
        with pytest.raises(ZeroDivisionError, match="by 20") as caught:
            fold.run(dataset, 2)
        assert "in update" in caught.value.__notes__[0]
        assert Settings().run(dataset, 2)[0].shape == (41,)
    assert describe_error(error := InputError("no image 20")) is error
    assert str(describe_error(LockedError("no lock"))).startswith(
        "LockedError in a worker process: ('no lock'"
    )


def test_what_cannot_be_sent_is_refused_with_its_name(dataset):
    with open(os.devnull, "rb") as file, pytest.raises(InputError) as caught:
        run("embed", dataset=Wrapped(dataset, files={"names": file}), executor="processes:2")
    text = str(caught.value)
    assert text.startswith("dataset.files['names'] (<_io.BufferedReader") and "BufferedReader" in text
    assert "__getstate__" in text and "executor='local'" in text
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    network[1].lock = threading.Lock()
    network = torch.nn.Sequential(network, torch.nn.Flatten(), torch.nn.LazyLinear(5))
    network(dataset.images[:1])
    with pytest.raises(InputError, match=r"model\.module\.0\.1\.lock .*cannot be sent"):
        run("embed", model=Model(network, input_size=(3, 32, 32)), dataset=dataset, executor="processes:2")


def test_local_functions_and_classes_are_sent(pool, dataset):
    shift = 0.25
    model = make_network("gap").defended(lambda images: images * shift, "shift")
    expected = run("embed", model=model, dataset=dataset, batch_size=2)
    with use_shard_executor(pool):
        assert_same_result(run("embed", model=model, dataset=dataset, batch_size=2), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "executor",
    ["processes:0", "processes:-2", "processes:two", "processes:2:3", "processes:1e3", "processes:²"],
)
def test_an_invalid_number_of_workers_is_refused(executor):
    with pytest.raises(InputError, match="number of worker processes, from 1 to 4096"):
        run("embed", executor=executor)


def test_invalid_names_of_executors_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'processes'"):
        run("embed", executor="processses:2")
    with pytest.raises(UnknownName, match="no executor 'processes:'"):
        run("embed", executor="processes:")
    with pytest.raises(InputError, match="executor 'local' takes no argument"):
        run("embed", executor="local:2")


def test_a_run_without_work_over_a_data_set_says_so(model):
    with pytest.warns(UserWarning, match="saliency was executed in this process: it has no work"):
        run("saliency", model=model, executor="processes:2")


def test_the_default_number_of_workers_follows_the_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert default_workers() == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with pytest.warns(UserWarning, match="one worker on 8 cores.*OMP_NUM_THREADS=1"):
        assert default_workers() == 1


_SLOW = """
    import sys, time
    from pathlib import Path
    import torch
    from phosphene import TensorDataset, run

    class Slow(TensorDataset):
        def read(self, indices):
            Path(sys.argv[1], f"{indices[0]}.read").touch()
            time.sleep(0.3)
            return super().read(indices)

    run("embed", dataset=Slow(torch.rand(4000, 3, 64, 64)), batch_size=2, out=sys.argv[1] + "/out",
        executor="processes:2", progress=False)
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.nightly) for n in (signal.SIGTERM, signal.SIGKILL))],
)
def test_no_process_is_left_behind(tmp_path, number):
    """A class and a run at the top level of a script, which is interrupted or killed."""
    command = [sys.executable, "-c", textwrap.dedent(_SLOW).replace("sys.argv[1]", repr(str(tmp_path)))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len([*tmp_path.glob("*.read")]) < 4:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    os.killpg(process.pid, number)
    _, text = process.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert len(gone) == 2 and not alive
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in text and "_process_worker" not in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--address", "auto"], "--address is an option of an executor: add --executor ray"),
        (["--executor", "processes", "--address", "auto"], "executor='processes:auto' should be the number"),
    ],
)
def test_the_address_is_the_argument_of_the_executor(capsys, words, text):
    with pytest.raises(SystemExit) as left:
        main(["run", "embed", *words])
    assert left.value.code == 2 and text in capsys.readouterr().err
