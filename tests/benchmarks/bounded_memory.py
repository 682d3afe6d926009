"""Memory, time and bytes written of methods over data sets by the number of images.

``python -m tests.benchmarks.bounded_memory [FEWER MORE [METHOD ...]]`` writes bundled scenes as JPEG files
with a manifest of their labels into a temporary folder, and runs each call in its own process with an output
folder. Memory is the peak of private memory (RssAnon), sampled while it runs: rows of features are in a file
that is mapped, whose pages the system can reclaim. Time is that of the processor. Checkpoints are
the bytes that are written beside those of the result.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from PIL import Image

from phosphene.data import SceneDataset

CALLS = {
    "embed": {},
    "top_patches": {"channels": "all", "k": 3},
    "activation_statistics": {},
    "robust_accuracy": {"attacks": ["fgsm"], "eps": [0.01], "pictures": 10**9, "seed": 0},
}

_PROGRAM = """
    from phosphene import run
    run({name!r}, dataset={manifest!r}, out={out!r}, progress=False, **{params!r})
"""


def write_scenes(folder: Path, counts: list[int]) -> None:
    """Bundled scenes as ``n.jpg`` and manifests ``COUNT.csv`` of the first ones."""
    scenes = SceneDataset(max(counts))
    rows = []
    for batch in scenes.batches(500):
        pixels = (batch.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for index, label, image in zip(batch.indices, batch.labels or (), pixels, strict=True):
            Image.fromarray(image).save(folder / f"{index}.jpg", quality=95)
            rows.append((f"{index}.jpg", label))
    for count in counts:
        with (folder / f"{count}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *rows[:count]])


def start_run(name: str, manifest: Path, out: Path) -> subprocess.Popen[bytes]:
    """A process that runs the call of a method over the images of a manifest and saves the result."""
    values = {"name": name, "manifest": str(manifest), "out": str(out), "params": CALLS[name]}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(_PROGRAM).format(**values)])


def measure(name: str, manifest: Path) -> tuple[float, float, float, float]:
    """Seconds of the processor, peak of private memory, size of the result and bytes written in MB."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        process = start_run(name, manifest, out)
        peak, written = 0, 0
        while True:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max([peak, *(int(line.split()[1]) for line in status if line.startswith("RssAnon"))])
                counters = Path(f"/proc/{process.pid}/io").read_text().splitlines()
                written = max([written, *(int(line.split()[1]) for line in counters if line[:5] == "wchar")])
            except OSError:
                pass
            done, code, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.02)
        if code:
            raise RuntimeError(f"{name} with {manifest} ended with {code}")
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return usage.ru_utime + usage.ru_stime, peak / 1024, size / 1e6, written / 1e6


def main() -> None:
    small, large = (int(text) for text in (sys.argv[1:3] or ["5000", "100000"]))
    print(
        f"| method | CPU s, {small:,} | {large:,} | ratio | MB, {small:,} | {large:,} | ratio "
        "| result, MB | checkpoints, MB | ratio |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), [small, large])
        for name in sys.argv[3:] or CALLS:
            first, second = (measure(name, Path(folder, f"{count}.csv")) for count in (small, large))
            cells = [f"{first[0]:.0f}", f"{second[0]:.0f}", f"{second[0] / first[0]:.1f}"]
            cells += [f"{first[1]:.0f}", f"{second[1]:.0f}", f"{second[1] / first[1]:.2f}"]
            checkpoints = second[3] - second[2]
            cells += [f"{second[2]:.1f}", f"{checkpoints:.1f}", f"{checkpoints / second[2]:.2f}"]
            print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
