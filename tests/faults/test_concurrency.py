"""Threads, processes and asyncio on one model, with mixed sizes and methods: the bits of a serial run."""

from __future__ import annotations

import asyncio
import functools
import itertools
import multiprocessing
import random
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.state import differences, mixed_network, network_state, settings

from phosphene import Model, load_model, load_result, methods, run
from phosphene.testing.observation import assert_same_result, changes

#: Methods and parameters; those with a ``size`` draw their own images.
CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("saliency", {}), ("smooth_grad", {"samples": 3, "seed": 1}), ("integrated_gradients", {"steps": 4}),
    ("guided_backprop", {}), ("grad_cam", {}), ("layer_cam", {}), ("score_cam", {}), ("ablation_cam", {}),
    ("occlusion", {"window": 4, "stride": 2}), ("rise", {"masks": 8, "seed": 2}), ("fgsm", {}),
    ("pgd", {"steps": 3, "seed": 3}), ("square", {"max_queries": 12, "seed": 4}),
    ("class_visualization", {"steps": 3, "seed": 5}),
)  # fmt: skip
SIDES = (8, 11)


def make_model(size_known: bool) -> Model:
    return load_model(mixed_network(), input_size=(3, 8, 8) if size_known else None)


def images(side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.rand(2, 3, side, side, generator=generator)


def compute(model: Model, call: tuple[str, dict[str, Any], int]) -> Any:
    """The result of one method on images of one side."""
    name, params, side = call
    method = methods[name]
    inputs: dict[str, Any] = {"model": model}
    for declared in method.spec.inputs:
        if declared.role == "images":
            inputs[declared.name] = images(side)
        elif declared.role == "labels":
            inputs[declared.name] = torch.tensor([0, 1])
        elif declared.role == "target":
            inputs[declared.name] = 1
    return method(**inputs, **params, **({"size": side} if name == "class_visualization" else {}))


def calls(size_known: bool) -> list[tuple[str, dict[str, Any], int]]:
    """Every method at every size."""
    sides = SIDES[:1] if size_known else SIDES
    return [(name, params, side) for (name, params), side in itertools.product(CALLS, sides)]


@functools.cache
def serial_results(size_known: bool) -> list[Any]:
    return [compute(make_model(size_known), call) for call in calls(size_known)]


def check_equal(results: list[tuple[int, Any]], size_known: bool) -> None:
    for number, result in results:
        assert_same_result(result, serial_results(size_known)[number])


def in_threads(size_known: bool, workers: int, repeats: int) -> None:
    """All calls in random order on one model, in several threads."""
    model, serial = make_model(size_known), serial_results(size_known)
    numbers = list(range(len(serial))) * repeats
    random.Random(0).shuffle(numbers)
    network, before = network_state(model), settings()
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda n: compute(model, calls(size_known)[n]), numbers))
    check_equal(list(zip(numbers, results, strict=True)), size_known)
    assert not changes(network, network_state(model)) + differences(before, settings())


@pytest.mark.parametrize("size_known", [True, False])
def test_threads_return_the_bits_of_a_serial_run(size_known: bool) -> None:
    in_threads(size_known, workers=4, repeats=2)


@pytest.mark.nightly
@pytest.mark.parametrize("size_known", [True, False])
def test_many_threads_return_the_bits_of_a_serial_run(size_known: bool) -> None:
    in_threads(size_known, workers=16, repeats=30)


@pytest.mark.parametrize("size_known", [True, False])
def test_asyncio_tasks_return_the_bits_of_a_serial_run(size_known: bool) -> None:
    model = make_model(size_known)

    async def compute_all() -> list[Any]:
        tasks = [asyncio.to_thread(compute, model, call) for call in calls(size_known)]

        async def directly(call: tuple[str, dict[str, Any], int]) -> Any:
            await asyncio.sleep(0)
            return compute(model, call)  # blocks the loop, between the threads' work

        return await asyncio.gather(*tasks, *map(directly, calls(size_known)))

    results = asyncio.run(compute_all())
    check_equal([(n % len(calls(size_known)), r) for n, r in enumerate(results)], size_known)


def compute_number(number: int) -> tuple[int, Any]:
    """In another process: the result of a call on a model that was built there."""
    torch.set_num_threads(1)
    return number, compute(make_model(False), calls(False)[number])


@pytest.mark.nightly
def test_processes_return_the_bits_of_a_serial_run() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        check_equal(list(pool.map(compute_number, range(0, len(calls(False)), 2))), False)


def save_repeatedly(folder: str, number: int) -> None:
    """In another process: the same run, saved to the same folder as by all others."""
    torch.set_num_threads(1)
    for _ in range(3):
        run("saliency", images=images(8), target=1, model=make_model(True), out=folder, progress=False)


def test_four_processes_save_to_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    out = tmp_path / "out"
    workers = [context.Process(target=save_repeatedly, args=(str(out), n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    expected = methods["saliency"](make_model(True), images(8), 1)
    assert torch.equal(load_result(out).maps, expected.maps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_downloads_of_several_processes_share_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four threads fetch the same weights: torch's cache holds one complete file."""
    import hashlib

    from phosphene_plugins.models._downloads import fetch_weights

    data = bytes(range(256)) * 4096
    name = f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / name).write_bytes(data)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    url, barrier, paths = (tmp_path / "server" / name).as_uri(), threading.Barrier(4), []

    def fetch() -> None:
        barrier.wait()
        paths.append(fetch_weights(url))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert {path.read_bytes() for path in paths} == {data}
    assert [path.name for path in (tmp_path / "cache" / "checkpoints").iterdir()] == [name]
