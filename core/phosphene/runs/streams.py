"""Streams: a per-image method over a data set, batch by batch, with its results in shards on disk.

The result of batch b is that of the same batch in a run on all images at once, bit for bit, where the method
is not random. A random method draws batch 0 from the run's seed, and batch b from a seed that is derived from
the run's seed and b: a stream is the same wherever it was interrupted, and wherever its batches are computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import RESUME_HINT, CheckpointWarning
from ..data.datasets import Batch, Dataset, TensorDataset
from ..data.folds import Fold, ShardExecutor, State, shard_ranges
from ..errors import InputError, ModelError, type_name
from ..files.unfinished_folders import UnfinishedFolder
from ..graceful_stop import StopRequest, allow_early_stop
from ..models import Model
from ..models.batch_size import batch_size as default_batch_size
from ..models.batch_size import max_batch
from ..models.digest import checksum
from ..models.optimized_copy import allow_optimized, plan_passes
from ..models.tasks import EXCLUSIVE
from ..progress import ProgressEvent, check_reporter, progress_bar, report_progress
from ..registry.method import Method
from ..results import Provenance, Result, check_output_folder
from ..results.result_stream import (
    ResultStream,
    encode_shard,
    load_pyarrow,
    read_shard_document,
    shard_name,
    write_summary,
)
from ..results.tables import Table
from ..roles import AS_OBJECT, ROLES, InputContext
from ..roles.images import read_dataset
from ..roles.table import is_per_image
from ..spec.spec import Input, MethodSpec
from ..targets import Objective
from ..torch_state import cpu_by_default, fork_random_state, random_lock, seed_generators
from ..training.labels import label_reader
from .executors import execute, find_executor
from .prepare import find_method, move_to_device, prepare, read_inputs
from .prepared_run import PreparedRun
from .saved_results import load_result

#: The value of a target, labels or masks that stands for those of the data set.
FROM_DATASET = {"target": "label", "labels": "label", "masks": "mask"}

#: The columns of every index that are no fields of the result.
_COLUMNS = ("id", "target", "prediction", "confidence", "shard", "row")


def run_stream(
    name: str | Method[..., Any],
    *,
    out: str | os.PathLike[str] | None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | None | Callable[[ProgressEvent], None] = None,
    executor: str = "local",
    **arguments: Any,
) -> ResultStream:
    """Run a per-image method over a data set, one batch in memory, and save a ``ResultStream`` in ``out``.

    The same run with the same ``out`` resumes after an interruption: the batches that were completed are not
    computed again. Arguments are those of ``run``.
    """
    method = find_method(name)
    if out is None:
        raise InputError(
            f"{method.spec.short_name} over a data set is streamed to a folder: add out=folder, "
            "or pass images that fit into memory"
        )
    check_output_folder(out)
    load_pyarrow()
    # An executor that computes shards has all batches of the stream at once, any other one batch as a run.
    shards = getattr(find_executor(executor), "shard_executor", None)
    check_reporter(progress)
    each = executor if shards is None else "local"
    how: dict[str, Any] = {"device": device, "batch_size": batch_size, "executor": each}
    with torch.inference_mode(False), cpu_by_default(), max_batch(batch_size):
        batches = _Batches.read(name, method, how, arguments)
        identity = batches.identity()
        settings = {"size": batches.size, "seed": batches.seed}
        with UnfinishedFolder(out, identity, settings) as folder:
            batches = dataclasses.replace(batches, **folder.settings)
            try:
                with report_progress(progress), allow_early_stop() as stop:
                    if shards is None:
                        _write_shards(batches, folder, stop)
                    else:
                        with shards(batches.shared(), executor) as workers:
                            _write_computed_shards(batches, folder, workers)
            except BaseException as error:
                if identity is not None and _next_shard(folder):
                    error.add_note(RESUME_HINT)
                raise
            _finish(batches, folder)
    result = load_result(out)
    assert isinstance(result, ResultStream)
    return result


@dataclass(frozen=True)
class _Batches:
    """The batches of a stream as prepared runs: the call, its data set, and the values for each image.

    ``fixed`` are the arguments that all batches share, ``each`` those with a value for every image, and
    ``from_dataset`` the inputs whose values are the data set's labels or masks. ``first`` is the first batch,
    prepared. ``seed`` is that of the run, drawn where ``requested_seed`` is None.
    """

    method: Method[..., Any]
    dataset: Dataset
    size: int
    seed: int | None
    requested_seed: int | None
    requested_size: int | None
    device: str | torch.device | None
    fixed: Mapping[str, Any] = field(repr=False)
    each: Mapping[str, Any] = field(repr=False)
    from_dataset: tuple[Input, ...]
    first: PreparedRun = field(repr=False)

    @classmethod
    def read(
        cls,
        name: str | Method[..., Any],
        method: Method[..., Any],
        how: Mapping[str, Any],
        arguments: Mapping[str, Any],
    ) -> _Batches:
        """Read everything but the images, and prepare the first batch."""
        spec, images = method.spec, _images(method.spec)
        names = {declared.name for declared in spec.inputs}
        params = {n: v for n, v in arguments.items() if n not in names}
        complete = method.validate(params)  # before the model is loaded: bad parameters fail early
        fixed = {n: v for n, v in arguments.items() if n in names}
        model = None
        if (owner := spec.input("model")) is not None:
            value = owner.value(fixed.get(owner.name))
            read = ROLES[owner.role].make(value, InputContext(load_result=load_result))
            model = fixed[owner.name] = move_to_device(read, how["device"])
        value = images.value(fixed.pop(images.name, None))
        dataset = read_dataset(
            ROLES[images.role].default if value is None else value, None if images.own_size else model
        )
        if len(dataset) == 0:
            raise InputError("the data set is empty")
        from_dataset = tuple(i for i in spec.inputs if _is_from_dataset(i, fixed.get(i.name), dataset, model))
        fixed = {n: v for n, v in fixed.items() if n not in {i.name for i in from_dataset}}
        each = {
            i.name: fixed.pop(i.name) for i in spec.inputs if _is_list(i, fixed.get(i.name), len(dataset))
        }
        size = how["batch_size"] or (1 if model is None else default_batch_size(model))
        seed = requested_seed = complete[method.seed] if method.seed is not None else None
        if method.seed is not None and seed is None:
            seed = secrets.randbits(31)
        batches = cls(
            method=method,
            dataset=dataset,
            size=size,
            seed=seed,
            requested_seed=requested_seed,
            requested_size=how["batch_size"],
            device=how["device"],
            fixed=fixed,
            each=each,
            from_dataset=from_dataset,
            first=None,  # type: ignore[arg-type]
        )
        indices = tuple(range(min(size, len(dataset))))
        values = batches._inputs(Batch(indices, dataset.read(indices), dataset))
        first = prepare(name, **{**how, "batch_size": size}, progress=False, **values, **params)
        # Read once: networks, styles, a target.
        shared = [i.name for i in spec.inputs if not ROLES[i.role].per_image]
        shared = [n for n in shared if n not in values.keys() - fixed.keys()]
        fixed |= {n: first.inputs[n] for n in shared}
        return dataclasses.replace(batches, fixed=fixed, first=first)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"method": None}  # that of ``first``, which is pickled by its name

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"method": state["first"].implementation})

    def shared(self) -> dict[str, Any]:
        """What all batches are computed from, by the name of the input."""
        return {**self.fixed, **self.each, _images(self.method.spec).name: self.dataset}

    @property
    def title(self) -> str:
        """Description of the progress bar."""
        return f"{self.method.spec.short_name} over {len(self.dataset):,} images"

    @property
    def passes(self) -> int:
        """Images that a call on the data set in memory would pass through the model, forward and backward."""
        return sum(self.first.passes(len(self.dataset)) or ())

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The inputs of a batch, as ``run`` takes them."""
        inputs = {**self.fixed, _images(self.method.spec).name: batch.images}
        for name, values in self.each.items():
            inputs[name] = values[batch.indices[0] : batch.indices[-1] + 1]
        for declared in self.from_dataset:
            inputs[declared.name] = self._values(declared, batch.indices)
        return inputs

    def prepare(self, batch: Batch, number: int) -> PreparedRun:
        """A batch as a prepared run, with its seed. Raises InputError that names the images."""
        try:
            seeded = {} if self.method.seed is None else {self.method.seed: self._seed(number)}
            complete = {**self.first.complete_params, **seeded}
            with max_batch(self.size):
                inputs = read_inputs(self.method, self._inputs(batch), complete, self.device)
        except InputError as error:
            raise InputError(f"{_range_text(batch.indices)}: {error}") from error
        images = _images(self.method.spec).name
        sizes = ["x".join(map(str, run[images].shape[2:])) for run in (self.first.inputs, inputs)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{_range_text(batch.indices)}: images of a stream have one size, not {sizes[0]} and "
                f"{sizes[1]} (height x width); resize and crop files: --image-size 256, or "
                'images={"files": ..., "size": 256}'
            )
        return dataclasses.replace(
            self.first,
            inputs=inputs,
            params={**self.first.params, **seeded},
            complete_params=complete,
            batch_size=self.size,
        )

    def _seed(self, number: int) -> int | None:
        """The run's seed for batch 0, and 31 bits of a digest of seed and number for the others."""
        if number == 0:
            return self.seed
        digest = hashlib.sha256(f"{self.seed}/{number}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def _values(self, declared: Input, indices: Sequence[int]) -> Any:
        """The labels or masks of the data set for these images."""
        if declared.role == "masks":
            if (masks := self.dataset.masks(indices)) is None:
                raise InputError("the data set has no mask for some of these images")
            return masks
        owner = self.method.spec.input("model")
        assert owner is not None
        labels = label_reader(self.fixed[owner.name], self.dataset)(indices)
        return labels if declared.role == "labels" else labels.tolist()

    def identity(self) -> str | None:
        """A digest of the run without its batches; None if an input has no record to compare.

        A data set is compared by its name and first image; without a name by its first and last image, and in
        memory by all images, labels and masks.
        """
        spec, recorded = self.method.spec, dict[str, Any]()
        for declared in spec.inputs:
            role, value = ROLES[declared.role], self.first.inputs[declared.name]
            if declared.name in self.each:
                recorded[declared.name] = _fingerprint(self.each[declared.name])
            elif declared in self.from_dataset:
                recorded[declared.name] = FROM_DATASET[declared.role]
            elif role.per_image and isinstance(value, Tensor):  # the batch size may differ when it resumes
                recorded[declared.name] = checksum(value[:1])
            elif declared.role != "model":
                if not role.is_identified(value):
                    return None
                recorded[declared.name] = role.fingerprint(value)
        if isinstance(self.dataset, TensorDataset):
            classes, objects = self.dataset.classes, self.dataset.objects
            masks = None if objects is None else checksum(objects)
            recorded["in memory"] = [checksum(self.dataset.images), classes and [*classes], masks]
        elif self.dataset.uri is None:
            recorded["last"] = checksum(self.dataset.read([len(self.dataset) - 1]))
        params = dict(self.first.complete_params)
        if self.method.seed is not None:
            params[self.method.seed] = self.requested_seed
        params = spec.params(**params).model_dump(mode="json")
        parts = [
            *(spec.name, self.method.distribution, params, self.requested_size, recorded),
            *(self.dataset.uri, len(self.dataset), self.first.model_digest),
        ]
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """The inputs as the stream saves them, without the model."""
        recorded = self.method.record_inputs(self.first.inputs)
        for declared in self.method.spec.inputs:
            name, role = declared.name, declared.role
            if name in self.each:
                values = self.each[name]
                kind = type(values).__name__
                simple = isinstance(values, Tensor) or all(isinstance(v, (str, int)) for v in values)
                recorded[name] = values if simple else f"a {kind} {AS_OBJECT}"
            elif declared in self.from_dataset:
                recorded[name] = FROM_DATASET[role]
            elif role == "images":
                recorded[name] = self.dataset.uri or f"{type_name(self.dataset)} {AS_OBJECT}"
            elif ROLES[role].per_image:
                recorded[name] = None if self.fixed.get(name) is None else f"{role} {AS_OBJECT}"
        return recorded


def _images(spec: MethodSpec) -> Input:
    declared = spec.input("images")
    assert declared is not None
    return declared


def _is_from_dataset(declared: Input, value: Any, dataset: Dataset, model: Model | None) -> bool:
    """Whether the values of an input are the labels or masks of the data set."""
    word = FROM_DATASET.get(declared.role)
    if declared.role == "masks" and value is None:
        return dataset.masks([0]) is not None
    value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    if word is None or not isinstance(value, str) or value != word:
        return False
    if declared.role != "masks" and model is not None and word in map(str.lower, model.classes or ()):
        index = model.class_index(word)
        raise InputError(
            f"{declared.name}={word!r} has two readings: the class of {model.name}, 'class:{index}', or the "
            "labels of the data set, which can be passed as a list"
        )
    return True


def _is_list(declared: Input, value: Any, count: int) -> bool:
    """Whether an input has a value for each image of the data set. InputError for another number."""
    if not is_per_image(declared.role) or not isinstance(value, (list, tuple, Tensor, np.ndarray)):
        return False
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        return False
    if len(value) != count and len(value) != 1:
        raise InputError(
            f"{count:,} images of the data set need one value of {declared.name}, or one each, "
            f"not {len(value):,}"
        )
    return len(value) == count


def _fingerprint(values: Any) -> Any:
    """JSON that differs between lists of different values; of objects it differs in every process."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    if isinstance(values, Tensor):
        return [list(values.shape), str(values.dtype), checksum(values)]
    return [_fingerprint(v) if isinstance(v, (Tensor, np.ndarray)) else v for v in values]


def _next_shard(folder: UnfinishedFolder) -> int:
    """The number of complete shards: they are written one after another."""
    number = 0
    while (folder.writing / shard_name(number)).is_file():
        number += 1
    return number


def _sound_shards(folder: UnfinishedFolder) -> int:
    """The number of complete shards before the first that cannot be read, of which it warns."""
    for number in range(count := _next_shard(folder)):
        try:
            read_shard_document(folder.writing / shard_name(number))
        except InputError as error:
            warnings.warn(
                f"{error}: it and those after it are computed again", CheckpointWarning, stacklevel=2
            )
            return number
    return count


class _Shard(TypedDict):
    """A shard before it is written: its tensors, its metadata and the columns of its index."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    columns: list[str]


def _compute_shard(batches: _Batches, batch: Batch) -> _Shard:
    """The shard of a batch, whose number follows from its first image."""
    prepared = batches.prepare(batch, batch.indices[0] // batches.size)
    result = execute(prepared)
    index = _index_rows(batches, prepared, result, batch)
    tensors, metadata = encode_shard(result, index)
    return {"tensors": tensors, "metadata": metadata, "columns": [*index]}


def _save_shard(batches: _Batches, folder: UnfinishedFolder, number: int, shard: _Shard) -> None:
    """Write a shard. Raises InputError where the columns of its index are not those of the first shard."""
    columns = shard["columns"]
    if number and columns != (first := [*read_shard_document(folder.writing / shard_name(0))["index"]]):
        names = ", ".join(sorted({*first} ^ {*columns}))
        start = number * batches.size
        indices = range(start, min(start + batches.size, len(batches.dataset)))
        raise InputError(f"{_range_text(indices)}: the images before them differ in {names}")
    folder.save_tensors(shard_name(number), shard["tensors"], shard["metadata"])


def _write_shards(batches: _Batches, folder: UnfinishedFolder, stop: StopRequest) -> None:
    """Compute the batches that have no shard yet in this process, or with an executor of single runs."""
    done, size, dataset = _sound_shards(folder), batches.size, batches.dataset
    total = -(-len(dataset) // size)
    if done == total:
        return
    remaining = progress_bar(dataset.batches(size, done * size), batches.title, total - done)
    with plan_passes(batches.passes):
        for number, batch in enumerate(remaining, start=done):
            shard = _compute_shard(batches, batch)
            if stop.stopped_at is not None:
                raise KeyboardInterrupt  # the batch ended early: the next run computes it again
            _save_shard(batches, folder, number, shard)


class _Shards(Fold[Any]):
    """The shards of a stream as states of a fold, one for each batch, which are not merged."""

    shard_batches = 1

    def __init__(self, batches: _Batches) -> None:
        self.batches = batches
        owner = batches.method.spec.input("model")
        self.model: Model | None = None if owner is None else batches.fixed[owner.name]

    def update(self, state: State, batch: Batch) -> State:
        with plan_passes(self.batches.passes):
            return {**_compute_shard(self.batches, batch)}


def _write_computed_shards(batches: _Batches, folder: UnfinishedFolder, workers: ShardExecutor) -> None:
    """Have the batches that have no shard yet computed elsewhere, and write them in their order."""
    done, size, dataset = _sound_shards(folder), batches.size, batches.dataset
    ranges = shard_ranges(done * size, len(dataset), size)
    if not ranges:
        return
    states = workers.states(_Shards(batches), dataset, size, ranges, None)
    for number, state in enumerate(progress_bar(states, batches.title, len(ranges)), start=done):
        _save_shard(batches, folder, number, cast("_Shard", state))


def _range_text(indices: Sequence[int]) -> str:
    return f"images {indices[0]} to {indices[-1]}"


def _index_rows(batches: _Batches, prepared: PreparedRun, result: Result, batch: Batch) -> Table:
    """The rows of the index for a batch: id, target, prediction, confidence, one-valued fields."""
    predictions, confidences = _predictions(batches, prepared, result)
    table: Table = {
        "id": [batches.dataset.id(index) for index in batch.indices],
        "target": _target_names(batches, prepared, result),
        "prediction": predictions,
        "confidence": confidences,
    }
    for name in type(result).per_image:
        value = getattr(result, name)
        if isinstance(value, Tensor) and value.ndim == 1:
            value = value.tolist()
        if name == "targets" or not isinstance(value, (tuple, list)):
            continue
        if all(isinstance(item, (str, int, float)) for item in value):
            table[f"result_{name}" if name in _COLUMNS else name] = list(value)
    return table


def _target_names(batches: _Batches, prepared: PreparedRun, result: Result) -> list[str | None]:
    """The name of each image's target: the result's, or the class that is its label."""
    count = len(prepared.inputs[_images(batches.method.spec).name])
    targets = getattr(result, "targets", None)
    if isinstance(targets, tuple) and len(targets) == count:
        return [str(target) for target in targets]
    labels, owner = batches.method.spec.input("labels"), batches.method.spec.input("model")
    if labels is None or owner is None:
        return [None] * count
    value, model = prepared.inputs[labels.name], prepared.inputs[owner.name]
    if isinstance(value, Objective):
        return [*value.names(model, count)]
    return [model.class_name(index) for index in value.tolist()]


def _predictions(
    batches: _Batches, prepared: PreparedRun, result: Result
) -> tuple[list[str | None], list[float | None]]:
    """The class that the model predicts for each image, and its probability; None without such classes.

    They are those in the result, or computed.
    """
    names, confidences = (getattr(result, f"{field}_before", None) for field in ("names", "confidence"))
    if names is not None and isinstance(confidences, Tensor):
        return [*names], confidences.tolist()
    images = prepared.inputs[_images(batches.method.spec).name]
    nothing: tuple[list[str | None], list[float | None]] = ([None] * len(images), [None] * len(images))
    owner = batches.method.spec.input("model")
    if owner is None:
        return nothing
    model: Model = prepared.inputs[owner.name]
    if model.task not in EXCLUSIVE:
        return nothing
    seed = 0 if batches.method.seed is None else prepared.complete_params[batches.method.seed] or 0
    try:
        with (
            model.guard(),
            torch.no_grad(),
            random_lock,
            fork_random_state(),
            allow_optimized(model, len(images)),
        ):
            seed_generators(seed)
            probabilities = model.to_probabilities(model(images).double(), images)
    except ModelError:  # an undeclared network whose output is no logits, of which a layer is explained
        return nothing
    confidence, classes = probabilities.max(1)
    return [model.class_name(index) for index in classes.tolist()], confidence.tolist()


def _finish(batches: _Batches, folder: UnfinishedFolder) -> None:
    """Write the index, the figure and the document, and give the folder its name."""
    documents = (
        read_shard_document(folder.writing / shard_name(number)) for number in range(_next_shard(folder))
    )
    provenance: dict[str, Any] = {}
    seconds = 0.0
    for document in documents:
        provenance = provenance or document["provenance"]
        seconds += document["provenance"]["seconds"]
    method = batches.method
    params = dict(provenance["params"])
    if method.seed is not None:
        params[method.seed] = batches.seed
    recorded = batches.record()
    shapes = {n: f"tensor {tuple(v.shape)}" if isinstance(v, Tensor) else v for n, v in recorded.items()}
    summary = Provenance.model_validate(provenance | {"params": params, "inputs": shapes})
    summary = summary.model_copy(update={"seconds": round(seconds, 4)})
    stream = ResultStream(
        count=len(batches.dataset),
        shard_size=batches.size,
        result_type=method.result.__name__,
        _find_method=lambda name: method,
        provenance=summary,
        inputs=recorded,
        uri=str(folder.writing),
    )
    with folder.new_files() as new:
        write_summary(stream, new, folder.token)
    folder.finish()
