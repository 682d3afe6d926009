"""Runs over a data set that are killed at random moments and resumed: their results bit by bit.

``python -m tests.benchmarks.killed_runs [IMAGES KILLS [METHOD ...]]`` runs each call of ``bounded_memory``
twice, each time in a process of its own: without an interruption, and ended by SIGKILL at random moments and
started again with the same output folder until it is complete. Every file of the two results is compared; of
``result.json`` all but the time of the run. The last column is the processor time of all attempts in terms of
that of the run without an interruption: it includes a start for each kill, and what is computed again.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.bounded_memory import CALLS, start_run, write_scenes


def attempt(name: str, manifest: Path, out: Path, kill_after: float | None = None) -> tuple[bool, float]:
    """Whether a run was killed before its end, and its processor time. RuntimeError if it fails."""
    process = start_run(name, manifest, out)
    started, killed = time.monotonic(), False
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        if kill_after is not None and not killed and time.monotonic() - started > kill_after:
            process.kill()
            killed = True
        time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode > 0:
        raise RuntimeError(f"{name} with {manifest} ended with {process.returncode}")
    return process.returncode < 0, usage.ru_utime + usage.ru_stime


def same_files(first: Path, second: Path) -> bool:
    """Whether two results have the same files with the same bytes, except for the time of the run."""
    names = [
        sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()) for out in (first, second)
    ]
    return names[0] == names[1] and all(_content(first / n) == _content(second / n) for n in names[0])


def _content(file: Path) -> object:
    if file.name != "result.json":
        return file.read_bytes()
    document = json.loads(file.read_text())
    for name in ("started", "seconds"):
        del document["provenance"][name]
    return document


def compare(name: str, manifest: Path, kills: int, moments: random.Random) -> str:
    """The row of a method. RuntimeError where a hidden file is left beside the result."""
    with tempfile.TemporaryDirectory() as folder:
        complete, resumed = Path(folder, "complete"), Path(folder, "resumed")
        started = time.monotonic()
        _, cpu = attempt(name, manifest, complete)
        wall = time.monotonic() - started
        total, count, running = 0.0, 0, True
        while running:
            # Shorter than wall / kills on average, so that the run is not complete before the last kill.
            kill_after = moments.uniform(0, 1.5 * wall / kills) if count < kills else None
            running, seconds = attempt(name, manifest, resumed, kill_after)
            count += running
            total += seconds
        if left := sorted({path.name for path in Path(folder).iterdir()} - {"complete", "resumed"}):
            raise RuntimeError(f"{name} left {left} beside its result")
        same = "yes" if same_files(complete, resumed) else "NO"
    return f"| {name} | {cpu:.0f} | {wall:.0f} | {count} | {same} | {total:.0f} | {total / cpu:.2f} |"


def main(folder: Path) -> None:
    images, kills = (int(text) for text in (sys.argv[1:3] or ["100000", "10"]))
    manifest = folder / f"{images}.csv"
    if not manifest.exists():
        write_scenes(folder, [images])
    print("| method | CPU s | s | kills | same bits | CPU s of all attempts | ratio |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |", flush=True)
    moments = random.Random(0)
    for name in sys.argv[3:] or CALLS:
        print(compare(name, manifest, kills, moments), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scenes:
        main(Path(scenes))
