"""``executor="own-process"``: each run in a new interpreter, which may crash or leak without harm here."""

import dataclasses
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from phosphene import PhospheneError, hookimpl


def in_own_process(run):
    """Execute a ``PreparedRun`` in a new process, and return its result or raise its error.

    The run is pickled into a folder that only this user may read. So a model or a target that was defined in
    a notebook or as a ``lambda`` cannot be sent, and a progress callable is not.
    """
    import torch

    if callable(run.progress):
        run = dataclasses.replace(run, progress=False)
    try:
        # Sums depend on the number of threads.
        request = pickle.dumps((run, torch.get_num_threads()))
    except Exception as error:
        raise PhospheneError(f"this run cannot be sent to another process: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "request").write_bytes(request)
        process = subprocess.run([sys.executable, "-m", __name__, folder])
        if process.returncode:
            raise PhospheneError(f"the process that ran {run.method} ended with {process.returncode}")
        outcome = pickle.loads(Path(folder, "outcome").read_bytes())
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def execute_request(folder):
    """What the new process does: execute the run and write its result or its error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C interrupts the parent, which ends this process
    import torch

    run, threads = pickle.loads(Path(folder, "request").read_bytes())
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
    execute_request(sys.argv[1])
