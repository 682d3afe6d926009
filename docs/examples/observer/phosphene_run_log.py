"""Run log: one line of JSON per run, in the file that PHOSPHENE_RUN_LOG names."""

import json
import os
import time

from phosphene import hookimpl

_start_times: dict[int, float] = {}


@hookimpl
def phosphene_before_run(run):
    _start_times[id(run)] = time.perf_counter()


@hookimpl
def phosphene_after_run(run, result, error):
    seconds = time.perf_counter() - _start_times.pop(id(run))
    file = os.environ.get("PHOSPHENE_RUN_LOG")
    if not file:
        return
    entry = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "method": run.method,
        "params": dict(run.params),
        "model": getattr(run.inputs.get("model"), "name", None),
        "seconds": round(seconds, 3),
        "outcome": "ok" if error is None else f"{type(error).__name__}: {error}",
        "type": None if result is None else type(result).__name__,
    }
    line = json.dumps(entry, default=str) + "\n"
    with open(file, "a", encoding="utf-8") as log:
        log.write(line)  # in one write: two processes may append to the same file
