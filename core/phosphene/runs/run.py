"""``run``: a method by name, its inputs read from paths, names and URIs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from ..checkpoints import Checkpoint, checkpoint_path, use_checkpoint
from ..errors import InputError
from ..graceful_stop import allow_early_stop
from ..progress import ProgressEvent
from ..registry.method import Method
from ..results import Result, check_output_folder
from ..roles import DifferentSizesError
from ..roles.images import is_dataset
from ..torch_state import restored
from .executors import execute
from .prepare import find_method, prepare


@restored
def run(
    name: str | Method[..., Any],
    *,
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | None | Callable[[ProgressEvent], None] = None,
    executor: str = "local",
    stream: bool | None = None,
    **arguments: Any,
) -> Result:
    """Run a method by name (or a ``Method``); default inputs are bundled images and models.

    Args:
        name: the method, such as "pgd".
        out: folder to save the result in. Long work that was interrupted resumes from its checkpoint when
            it is run again with the same arguments and the same folder.
        device: device for model and tensors, such as "cuda".
        batch_size: largest number of images in one pass through the model (default: what fits, up to 32).
        progress: False for no progress bars, or a callable that receives every ``ProgressEvent``.
        executor: where it runs: "local"; "processes" or "processes:4", worker processes that share the work
            over a data set; "ray" or "ray:ADDRESS", a Ray cluster; or the name of a plugin's executor.
        stream: True to run a per-image method batch by batch over images of which one batch is in memory at
            a time, and to return a ``ResultStream`` in ``out``. None: only where ``images`` is a data set, a
            manifest or a COCO file.
        arguments: the method's inputs and parameters. A model is a ``Model`` or a URI; images are a tensor,
            a path, a list, a folder or ``builtin:scenes/8``; a target is ``"tabby"`` or ``"layer4[17]"``; a
            data set is a folder or a ``Dataset``.

    Images of different sizes are no batch: a method whose results belong to single images runs on each by
    itself, and ``run`` returns a ``ResultSequence``, a result for each image in order, saved in ``out/000``,
    ``out/001``, ... Other methods refuse them.

    The first Ctrl-C or SIGTERM ends an optimization after the current step and returns its result, with the
    step in ``provenance.interrupted``. A second one, and any in other work, raises KeyboardInterrupt.
    """
    if _is_streamed(find_method(name), arguments, stream):
        from .streams import run_stream  # late: most runs do not need it

        return run_stream(
            name,
            out=out,
            device=device,
            batch_size=batch_size,
            progress=progress,
            executor=executor,
            **arguments,
        )
    if out is not None:
        check_output_folder(out)
    how: dict[str, Any] = {"device": device, "batch_size": batch_size, "progress": progress}
    try:
        prepared = prepare(name, executor=executor, **how, **arguments)
    except DifferentSizesError as error:
        from .separate_images import run_separately

        return run_separately(run, name, error, arguments, out=out, executor=executor, **how)
    identity = None if out is None else prepared.identity()
    with ExitStack() as stack:
        checkpoint = None
        if out is not None and identity is not None:
            checkpoint = Checkpoint(checkpoint_path(out), identity)
            stack.enter_context(use_checkpoint(stack.enter_context(checkpoint)))
        stop = stack.enter_context(allow_early_stop())
        result = execute(prepared)
        if checkpoint is not None:
            checkpoint.unfinished = stop.stopped_at is not None
        if out is not None:
            result.save(out)
        return result


def _is_streamed(method: Method[..., Any], arguments: Mapping[str, Any], stream: bool | None) -> bool:
    """Whether a call is a stream: where ``stream`` is true, and where its images can only be a data set.

    Raises InputError for a stream of a method without a row of its result for each image, and where
    ``stream`` is false for such images.
    """
    declared = method.spec.input("images")
    value = None if declared is None else arguments.get(declared.name)
    of_dataset = value is not None and is_dataset(value)
    if not (of_dataset if stream is None else stream or of_dataset):
        return False
    if declared is None or not (method.spec.batch_independent and method.result.per_image):
        raise InputError(
            f"{method.spec.short_name} cannot be streamed: its result has no row of its own for each image"
        )
    if stream is False:
        raise InputError(
            f"{declared.name} is a data set, which is only streamed: leave stream=False out, or pass images"
        )
    return True
