"""A log of every run, one line of JSON each, in the file that PHOSPHENE_RUN_LOG names."""

import json
import os
import time

from phosphene import hookimpl

_begun: dict[int, float] = {}


@hookimpl
def phosphene_before_run(run):
    _begun[id(run)] = time.perf_counter()


@hookimpl
def phosphene_after_run(run, result, error):
    seconds = time.perf_counter() - _begun.pop(id(run))
    file = os.environ.get("PHOSPHENE_RUN_LOG")
    if not file:
        return
    told = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "method": run.method,
        "params": dict(run.params),
        "model": getattr(run.inputs.get("model"), "name", None),
        "seconds": round(seconds, 3),
        "outcome": "ok" if error is None else f"{type(error).__name__}: {error}",
        "type": None if result is None else type(result).__name__,
    }
    line = json.dumps(told, default=str) + "\n"
    with open(file, "a", encoding="utf-8") as log:
        log.write(line)  # at once: two processes may share the file
