"""Memory of methods over data sets by the number of images.

``python -m tests.benchmarks.bounded_memory [FEWER MORE [METHOD ...]]`` runs each call in its own process with
an output folder. Memory is the peak of private memory (RssAnon), sampled while it runs: rows of features are
in a file that is mapped, whose pages the system can reclaim.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

CALLS = {
    "embed": {},
    "top_patches": {"channels": "all", "k": 3},
    "activation_statistics": {},
    "robust_accuracy": {"attacks": ["fgsm"], "eps": [0.01], "pictures": 10**9, "seed": 0},
}

_PROGRAM = """
    import sys
    from phosphene import run
    run({name!r}, dataset="builtin:scenes/{count}", out={out!r}, progress=False, **{params!r})
"""


def measure(name: str, count: int) -> tuple[float, float, float]:
    """Seconds, peak of private memory in MB and size of the result in MB."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        code = textwrap.dedent(_PROGRAM).format(name=name, count=count, out=str(out), params=CALLS[name])
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen([sys.executable, "-c", code])
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                break
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.02)
        if process.wait():
            raise RuntimeError(f"{name} with {count} images ended with {process.returncode}")
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return time.perf_counter() - started, peak / 1024, size / 1e6


def main() -> None:
    small, large = (int(text) for text in (sys.argv[1:3] or ["5000", "100000"]))
    print(f"| method | s, {small:,} | {large:,} | ratio | MB, {small:,} | {large:,} | ratio | result, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in sys.argv[3:] or CALLS:
        first, second = measure(name, small), measure(name, large)
        cells = [f"{first[0]:.0f}", f"{second[0]:.0f}", f"{second[0] / first[0]:.1f}"]
        cells += [f"{first[1]:.0f}", f"{second[1]:.0f}", f"{second[1] / first[1]:.2f}", f"{second[2]:.1f}"]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
