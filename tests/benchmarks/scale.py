"""Throughput of folds by executor on this machine, and a simulated schedule of shards on many workers.

``python -m tests.benchmarks.scale [IMAGES]`` runs ``embed`` and ``activation_statistics`` over bundled scenes
with executors, of which each is checked to return the bits of ``local``. The simulation computes shards one
after another in this process, as a worker does, and measures for each the seconds of its computation, of
packing its state, and of unpacking and merging it in the process of the run. A schedule on W workers then
follows on paper: a free worker takes the next shard, one process merges the states in their order. Its
efficiency is the sum of the workers' seconds / (W x the time of the schedule).
"""

import heapq
import os
import sys
import time
from typing import Any

import torch

from phosphene import SceneDataset, load_model, run
from phosphene.data import FoldTask, use_shard_executor
from phosphene.testing.observation import assert_same_result
from phosphene_plugins.executors._sending import pack, unpack

METHODS = ("embed", "activation_statistics")
BATCH = 32
#: Images of the data set whose schedule is simulated.
MILLION = 1_000_000


class Measured:
    """An executor in this process that measures the seconds of every shard's parts."""

    def __init__(self) -> None:
        self.work: list[float] = []
        self.merge: list[float] = []
        self.state_bytes = 0

    def states(self, fold: Any, dataset: Any, size: int, shards: Any, seed: int | None) -> Any:
        task = FoldTask.capture(fold, dataset, size, seed)
        for shard in shards:
            started = time.perf_counter()
            data = pack(task.compute(shard))
            computed = time.perf_counter()
            self.work.append(computed - started)
            self.state_bytes = len(data)
            yield task.receive(unpack(data))
            self.merge.append(time.perf_counter() - computed)


def schedule(work: list[float], merge: list[float], shards: int, workers: int) -> tuple[float, float]:
    """Seconds of a schedule of ``shards`` shards with these seconds, repeated, and its efficiency."""
    free = [0.0] * workers
    total = merged = 0.0
    for n in range(shards):
        seconds = work[n % len(work)]
        end = heapq.heappop(free) + seconds
        heapq.heappush(free, end)
        total += seconds
        merged = max(merged, end) + merge[n % len(merge)]
    return merged, total / (workers * merged)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    dataset, model = SceneDataset(count), load_model("builtin:shapes-vgg")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads a process")
    print(f"{'':<24}{'executor':<14}{'images':>8}{'seconds':>9}{'images/s':>10}")
    for name in METHODS:
        expected = None
        for executor in ("local", "processes:2", "ray"):
            started = time.perf_counter()
            result = run(
                name, model=model, dataset=dataset, batch_size=BATCH, executor=executor, progress=False
            )
            seconds = time.perf_counter() - started
            expected = expected or result
            assert_same_result(result, expected, rtol=0, atol=0)
            row = f"{name:<24}{executor:<14}{count:>8}{seconds:>9.1f}{count / seconds:>10.0f}"
            print(row, flush=True)
    for name in METHODS:
        measured = Measured()
        with use_shard_executor(measured):
            run(name, model=model, dataset=dataset, batch_size=BATCH, progress=False)
        work, merge = measured.work[1:], measured.merge[1:]  # the first makes the optimized copy
        mean = [1000 * sum(times) / len(times) for times in (work, merge)]
        print(
            f"{name}: a shard of {4 * BATCH} images takes {mean[0]:.0f} ms, its state has "
            f"{measured.state_bytes / 1e6:.2f} MB and is unpacked and merged in {mean[1]:.2f} ms"
        )
        for workers in (2, 16, 64):
            seconds, efficiency = schedule(work, merge, -(-MILLION // (4 * BATCH)), workers)
            print(f"    {workers:>3} workers: {MILLION:,} images in {seconds:,.0f} s, {efficiency:.0%}")


if __name__ == "__main__":
    main()
