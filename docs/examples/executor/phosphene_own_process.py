"""``executor="own-process"``: each run in a fresh interpreter, whose crash or memory is not ours."""

import dataclasses
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from phosphene import PhospheneError, hookimpl


def in_own_process(run):
    """Carry out a ``Run`` in a new process, and give its result or raise its error.

    What it is about goes there as a pickle, in a folder that nobody else may read. So a model or a
    target that was defined in a notebook or a ``lambda`` cannot go; and a progress callable does not.
    """
    import torch

    if callable(run.progress):
        run = dataclasses.replace(run, progress=False)
    try:
        errand = pickle.dumps((run, torch.get_num_threads()))  # the sums are the same on as many threads
    except Exception as error:
        raise PhospheneError(f"this run cannot be sent to another process: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "errand").write_bytes(errand)
        done = subprocess.run([sys.executable, "-m", __name__, folder])
        if done.returncode:
            raise PhospheneError(f"the process that carried out {run.method} ended with {done.returncode}")
        outcome = pickle.loads(Path(folder, "outcome").read_bytes())
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def carry_out(folder):
    """What the new process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits, and who ends us then
    import torch

    run, threads = pickle.loads(Path(folder, "errand").read_bytes())
    torch.set_num_threads(threads)
    try:
        outcome = run.execute_locally()
    except Exception as error:
        outcome = error
    Path(folder, "outcome").write_bytes(pickle.dumps(outcome))


@hookimpl
def phosphene_executors():
    return {"own-process": in_own_process}


if __name__ == "__main__":
    carry_out(sys.argv[1])
