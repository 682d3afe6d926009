"""Time of methods, of other libraries and of bare passes: in one process, interleaved, minimum of several.

``make bench`` prints all rows; ``python -m tests.benchmarks saliency pgd`` some of them. Ratios below 1 mean
that Phosphene is faster; *the limit* is the simplest loop of the necessary passes.
"""

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from tests.benchmarks import attacks, attribution, embeddings, reading

Work = Callable[[], object]
ROUNDS = 5
#: Seconds after which a row is not repeated.
MAX_SECONDS = 20
SUITES = (
    *(attribution.saliency, attribution.gradients, attribution.cams, attribution.occlusion),
    *(attacks.fgsm, attacks.pgd, attacks.carlini_wagner, attacks.deepfool),
    *(attacks.hop_skip_jump, attacks.universal),
    *(embeddings.nearest_neighbors, embeddings.pca),
    reading.reading,
)


def seconds(work: Work) -> tuple[float, float]:
    """CPU time, over all cores, and wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    warnings.filterwarnings("ignore", module="captum")
    suites = {suite.__name__: suite for suite in SUITES}
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; ratios are phosphene to the other's"
    )
    print(f"{'':<58}{'':<28}{'CPU s':>9}{'ratio':>7}{'wall s':>10}{'ratio':>7}")
    for name in sys.argv[1:] or suites:
        for title, ours, peers, *subject in suites[name]():
            works = {"phosphene": ours, **peers}
            for library, work in works.items():
                if subject:  # success, distance and number of passes
                    print(f"    {library}: {subject[0].summary(work)}", flush=True)
                else:
                    work()
            rounds: list[list[tuple[float, float]]] = []
            while len(rounds) < ROUNDS and np.sum(rounds) < MAX_SECONDS:
                rounds.append([seconds(work) for work in works.values()])
            minimum = np.min(rounds, axis=0)
            for library, (cpu, wall) in zip(works, minimum, strict=True):
                ratios = (
                    ("", "") if library == "phosphene" else [f"{t:.2f}" for t in minimum[0] / (cpu, wall)]
                )
                label = title if library == "phosphene" else ""
                print(
                    f"{label:<58}{library:<28}{cpu:>9.3f}{ratios[0]:>7}{wall:>10.3f}{ratios[1]:>7}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
