"""Texture synthesis against reference implementations: CPU time in one process, smallest of several.

``python -m tests.benchmarks.textures``. The reference is timed on part pixels and
extrapolated to all; ``--all`` lets it fill the complete image (minutes) and compares every pixel.
The limit of Efros-Leung is one product of all windows with all pixels in float32, and its minima.
"""

import sys
import time
from collections import deque
from collections.abc import Callable

import torch

from phosphene import methods, report_progress
from phosphene.builtin.textures import load_texture
from phosphene_plugins.textures import _textbook_textures as textbook_textures

ROUNDS = 3
SAMPLE, SIDE, WINDOW = 64, 128, 11


def cpu_seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def limit() -> float:
    windows, channels = (SAMPLE - WINDOW + 1) ** 2, 3 + 1
    table = torch.rand(channels * WINDOW**2, windows)
    templates = torch.rand(SIDE**2, channels * WINDOW**2)
    return cpu_seconds(lambda: [(part @ table).amin(1) for part in templates.split(1024)])


def reference(sample: torch.Tensor, all_pixels: bool) -> tuple[float, torch.Tensor | None]:
    """Seconds of the reference, nearly the same for each pixel, since every window is compared."""
    steps = textbook_textures.efros_leung(sample[0], SIDE, SIDE, window=WINDOW, seed=0)
    if all_pixels:
        images: deque[torch.Tensor] = deque(maxlen=1)
        return cpu_seconds(lambda: images.extend(steps), 1), images[0]
    pixels = 150
    return cpu_seconds(lambda: [next(steps) for _ in range(pixels)], 1) / pixels * (SIDE**2 - 9), None


def main() -> None:
    sample = load_texture("pebbles")[None, :, :SAMPLE, :SAMPLE]
    print(f"CPU seconds, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"Efros-Leung, {SAMPLE} -> {SIDE}, window {WINDOW}")
    with report_progress(False):
        bound, (loop, image) = limit(), reference(sample, "--all" in sys.argv)
        print(f"  {'limit':<24}{bound:>9.2f}\n  {'reference':<24}{loop:>9.2f}")
        for order in ("exact", "ring"):
            options = {"size": SIDE, "window": WINDOW, "order": order, "seed": 0}
            seconds = cpu_seconds(lambda options=options: methods["efros_leung"](sample, **options))
            ratios = f"reference / {loop / seconds:.0f}, limit x {seconds / bound:.1f}"
            print(f"  {order:<24}{seconds:>9.2f}   {ratios}")
            if image is not None and order == "exact":
                result = methods["efros_leung"](sample, **options).images[0]
                print(f"  {'same pixels':<24}{torch.equal(result.double(), image)!s:>9}")
        print(f"Wei-Levoy, {SAMPLE} -> {SIDE}, window 9")
        exhaustive, tree = (
            cpu_seconds(
                lambda size=size: methods["wei_levoy"](sample, size=SIDE, leaf_size=size, seed=0), rounds
            )
            for size, rounds in ((None, 1), (512, ROUNDS))
        )
        print(f"  {'one leaf':<24}{exhaustive:>9.2f}\n  {'leaves of 512':<24}{tree:>9.2f}", end="")
        print(f"   one leaf / {exhaustive / tree:.1f}")


if __name__ == "__main__":
    main()
