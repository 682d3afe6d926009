"""What a method costs beside its peers and its bare passes: in one process, in turns, smallest of several.

``make bench`` prints them all; ``python -m tests.benchmarks saliency pgd`` times some rows only. Ratios below
1 mean that Phosphene is cheaper; *the limit* is the simplest loop of the passes that cannot be avoided.
"""

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from tests.benchmarks import attacks, embeddings, seeing

Work = Callable[[], object]
ROUNDS = 5
#: Seconds after which a row is not timed again.
ENOUGH = 20
SUITES = (
    *(seeing.saliency, seeing.gradients, seeing.cams, seeing.occlusion),
    *(attacks.fgsm, attacks.pgd, attacks.carlini_wagner, attacks.deepfool),
    *(attacks.hop_skip_jump, attacks.universal),
    *(embeddings.nearest_neighbors, embeddings.pca),
)


def seconds(work: Work) -> tuple[float, float]:
    """Of the processor, over all its cores, and by the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


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
            for who, work in works.items():
                if subject:  # what it finds for how many passes
                    print(f"    {who}: {subject[0].account(work)}", flush=True)
                else:
                    work()
            rounds: list[list[tuple[float, float]]] = []
            while len(rounds) < ROUNDS and np.sum(rounds) < ENOUGH:
                rounds.append([seconds(work) for work in works.values()])
            best = np.min(rounds, axis=0)
            for who, (cpu, clock) in zip(works, best, strict=True):
                shares = ("", "") if who == "phosphene" else [f"{t:.2f}" for t in best[0] / (cpu, clock)]
                shown = title if who == "phosphene" else ""
                print(
                    f"{shown:<58}{who:<28}{cpu:>9.3f}{shares[0]:>7}{clock:>10.3f}{shares[1]:>7}", flush=True
                )


if __name__ == "__main__":
    main()
