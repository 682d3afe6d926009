"""``run``: a method by name, its inputs read from paths, names and URIs."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ..checkpoints import Checkpoint, checkpoint_path, use_checkpoint
from ..graceful_stop import allow_early_stop
from ..progress import ProgressEvent
from ..results import Result, check_output_folder
from .executors import executors, run_with_observers
from .prepare import prepare


def run(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | None | Callable[[ProgressEvent], None] = None,
    executor: str = "local",
    **arguments: Any,
) -> Result:
    """Run a method by name, its inputs as a person writes them; the bundled world gives what is left out.

    ``arguments`` are the method's inputs and parameters: a model as a ``Model`` or a URI, images as
    a tensor, a path, several, a folder or ``builtin:scenes/8``, a target as ``"tabby"`` or
    ``"layer4[17]"``, a data set as a folder. ``out``: a folder to save the result in; long work
    that was cut off goes on where it was when it is given the same one again. ``batch_size``: at
    most so many images at once. ``progress``: False for silence, a callable for events. ``executor``:
    where it is carried out, "local" or a plugin's.

    Ctrl-C ends what is drawn step by step early, and the result is as it stood then
    (``provenance.interrupted`` says where); a second one, and any in other work, is a KeyboardInterrupt.
    """
    if out is not None:
        check_output_folder(out)
    how: dict[str, Any] = {"device": device, "batch_size": batch_size, "progress": progress}
    request = prepare(name, executor=executor, **how, **arguments)
    identity = None if out is None else request.identity()
    with ExitStack() as stack:
        checkpoint = None
        if out is not None and identity is not None:
            checkpoint = Checkpoint(checkpoint_path(out), identity)
            stack.enter_context(use_checkpoint(stack.enter_context(checkpoint)))
        stop = stack.enter_context(allow_early_stop())
        result = run_with_observers(request, executors()[executor])
        if checkpoint is not None:
            checkpoint.unfinished = stop.stopped_at is not None
        if out is not None:
            result.save(out)
        return result
