"""Wall time of methods on each device: ``python -m tests.benchmarks.devices cpu cuda``; ``make bench-gpu``.

The minimum of several runs, of one method per kind of work, on a bundled network; work queued on a GPU is
waited for.
"""

import sys
import time

import torch

from phosphene import methods, prepare

#: Methods, with the parameters that make their work worth measuring.
RUNS = {
    "saliency": {"images": "builtin:scenes/32"},
    "occlusion": {"images": "builtin:scenes/8"},
    "pgd": {"images": "builtin:scenes/32", "steps": 40},
    "class_visualization": {"steps": 128, "seed": 0},
    "top_patches": {"dataset": "builtin:scenes/256"},
    "efros_leung": {"size": 48, "seed": 0},
}
ROUNDS = 5


def seconds(name: str, device: str) -> float:
    """The shortest of several runs, the first, which warms up, left out."""
    images = next((i.name for i in methods[name].spec.inputs if i.role == "images"), "images")
    arguments = {images if key == "images" else key: value for key, value in RUNS[name].items()}
    prepared, times = prepare(name, device=device, progress=False, **arguments), []
    for _ in range(ROUNDS + 1):
        clock = time.perf_counter()
        prepared.execute_locally()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - clock)
    return min(times[1:])


if __name__ == "__main__":
    devices = sys.argv[1:] or ["cpu", "cuda"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds on {', '.join(devices)}")
    for name in RUNS:
        print(f"{name:<24}" + "".join(f"{seconds(name, device):>10.3f}" for device in devices), flush=True)
