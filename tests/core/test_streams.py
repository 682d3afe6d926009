"""Streams: a per-image method over a data set in shards, equal to the run in memory, resumed after a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tests.core.forked import Killed, at_operation, in_child, start
from torch import Tensor, nn

import phosphene.runs.streams
from phosphene import (
    InputError,
    MissingExtra,
    Model,
    Result,
    SceneDataset,
    TensorDataset,
    UnknownName,
    load_model,
    load_result,
    methods,
    read_images,
    replay,
    run,
)
from phosphene.builtin.scenes import CLASSES
from phosphene.checkpoints import CheckpointWarning
from phosphene.cli.main import main
from phosphene.files import system
from phosphene.images import write_png
from phosphene.results import Attribution, ResultStream
from phosphene.testing.observation import assert_same_result

COUNT, SIZE = 5, 2


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else."""
    monkeypatch.setattr(Result, "png", lambda self: b"")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    module = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return load_model(module.eval(), input_size=(3, 16, 16), classes=CLASSES)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data(images: Tensor) -> TensorDataset:
    masks = images.mean(1) > 0.5
    return TensorDataset(images, [CLASSES[i] for i in (3, 1, 4, 1, 5)], masks)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images in the batches that were computed."""
    counts: list[int] = []
    execute = phosphene.runs.streams.execute

    def count(prepared: Any) -> Result:
        counts.append(len(prepared.inputs["images"]))
        return execute(prepared)

    monkeypatch.setattr("phosphene.runs.streams.execute", count)
    return counts


def stream(name: str, out: Path, **arguments: Any) -> ResultStream:
    result = run(name, out=out, **{"batch_size": SIZE, "progress": False, **arguments})
    assert isinstance(result, ResultStream)
    return result


def content(folder: Path) -> dict[str, bytes]:
    """The files of a stream, but its document, which has times, and the times in its shards."""
    files = {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix != ".json"}
    return {name: _without_times(path.read_bytes()) for name, path in files.items()}


def _without_times(data: bytes) -> bytes:
    if data[8:10] != b'{"':
        return data
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"].pop("phosphene", "{}"))
    document.pop("provenance", None)
    return json.dumps([header, document], sort_keys=True).encode() + data[8 + length :]


# --- equal to the run in memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("grad_cam", {}),
        ("grad_cam", {"target": "star"}),
        ("grad_cam", {"layer": ["0", "2"]}),
        ("lrp", {"target": [3, 1, 4, 1, 5]}),
        ("fgsm", {"labels": [3, 1, 4, 1, 5]}),
        ("fgsm", {"labels": torch.tensor([3, 1, 4, 1, 5])}),
        ("carlini_wagner", {"steps": 2, "search_steps": 1}),
        ("jpeg", {}),
        ("activation_maps", {}),
        ("interval_bounds", {}),
    ],
)
def test_stream_equals_the_run_in_memory(
    name: str, arguments: dict[str, Any], model: Model, images: Tensor, data: TensorDataset, tmp_path: Path
) -> None:
    streamed = stream(name, tmp_path / "a", model=model, images=data, **arguments)
    expected = run(name, model=model, images=images, batch_size=SIZE, progress=False, **arguments)
    assert_same_result(streamed[:], expected)
    assert len(streamed) == COUNT
    for number, single in enumerate(streamed):
        assert_same_result(single, expected.select([number]))
        assert_same_result(streamed[number - COUNT], single)
    assert_same_result(type(expected).concatenate([*streamed.batches()]), expected)


@pytest.mark.parametrize("name", ["neural_style", "fast_style", "deep_dream", "feature_inversion"])
def test_optimised_images_stream(name: str, tmp_path: Path) -> None:
    few = {} if name == "fast_style" else {"steps": 2, "seed": 0}
    whole = {"images": "builtin:scenes/3", **few, "batch_size": SIZE, "progress": False}
    streamed = run(name, out=tmp_path / "a", stream=True, **whole)
    assert isinstance(streamed, ResultStream)
    assert_same_result(streamed[:1].select([0]), streamed[0])
    # The first batch has the run's seed.
    first = run(name, **{**whole, "images": "builtin:scenes/2"})
    assert_same_result(streamed[:2], first)


def test_one_large_batch_is_the_run_in_memory(
    model: Model, images: Tensor, data: TensorDataset, tmp_path: Path
) -> None:
    streamed = stream("pgd", tmp_path / "a", model=model, images=data, seed=3, steps=2, batch_size=9)
    expected = run("pgd", model=model, images=images, seed=3, steps=2, batch_size=9, progress=False)
    assert_same_result(streamed[:], expected)


def test_a_copy_is_used_as_for_all_images(model: Model, images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    module(images)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.rand(8)
    network = load_model(module.eval(), input_size=(3, 16, 16))
    many = torch.cat([images] * 3)
    streamed = stream("saliency", tmp_path / "a", model=network, images=TensorDataset(many), batch_size=1)
    expected = run("saliency", model=network, images=many, batch_size=1, progress=False)
    assert expected.provenance is not None
    assert streamed.provenance is not None
    assert expected.provenance.model is not None
    assert expected.provenance.model["optimized_copy"]
    assert streamed.provenance.model == expected.provenance.model
    assert_same_result(streamed[:], expected)


def test_labels_and_masks_of_the_data_set(model: Model, data: TensorDataset, tmp_path: Path) -> None:
    numbers = [3, 1, 4, 1, 5]
    for name, values in (("grad_cam", {"target": "label"}), ("fgsm", {"labels": "label"})):
        streamed = stream(name, tmp_path / name, model=model, images=data, **values)
        expected = stream(
            name, tmp_path / f"{name} list", model=model, images=data, **dict.fromkeys(values, numbers)
        )
        assert_same_result(streamed[:], expected[:])
        assert streamed.table()["target"] == [CLASSES[i] for i in numbers]
    masks = stream("saliency_segmentation", tmp_path / "masks", model=model, images=data)
    numbers_per_image: Any = masks[:]
    assert numbers_per_image.iou.shape == (COUNT,)
    assert masks.inputs["masks"] == "mask"
    plain = TensorDataset(data.images)
    with pytest.raises(InputError, match="the data set has no labels"):
        stream("grad_cam", tmp_path / "none", model=model, images=plain, target="label")
    named = load_model(model.module, input_size=(3, 16, 16), classes=["label", *CLASSES[1:]])
    with pytest.raises(InputError, match="two readings: the class of .*'class:0', or the labels"):
        stream("grad_cam", tmp_path / "none", model=named, images=data, target="label")
    with pytest.raises(UnknownName, match="no class or layer .labels."):
        stream("grad_cam", tmp_path / "none", model=model, images=data, target="labels")


def test_random_methods_draw_each_batch_from_its_own_seed(
    model: Model, data: TensorDataset, tmp_path: Path
) -> None:
    same = TensorDataset(data.images[:1].repeat(COUNT, 1, 1, 1))
    streamed = stream("smooth_grad", tmp_path / "a", model=model, images=same, seed=1, target=0, samples=2)
    maps = streamed[:].maps  # type: ignore[attr-defined]
    assert not torch.equal(maps[:2], maps[2:4])
    again = stream("smooth_grad", tmp_path / "b", model=model, images=same, seed=1, target=0, samples=2)
    assert_same_result(again[:], streamed[:])
    assert streamed.provenance is not None
    assert streamed.provenance.seed == 1


# --- which calls are streams ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    for number, image in enumerate(SceneDataset(3).read(range(3))):
        write_png(image, path / f"{number}.png")
    return path


def test_images_that_are_read_as_a_data_set_stream(folder: Path, tmp_path: Path) -> None:
    manifest = folder / "photos.csv"
    manifest.write_text("image,label\n0.png,star\n1.png,square\n2.png,circle\n")
    streamed = stream("grad_cam", tmp_path / "a", images=manifest, target="label")
    assert streamed.table()["target"] == ["star", "square", "circle"]
    assert streamed.table()["id"] == ["0.png", "1.png", "2.png"]
    pairs = [(read_images(folder)[i], i) for i in range(3)]
    dataset: Any = torch.utils.data.Subset(pairs, [0, 1, 2])  # type: ignore[arg-type]
    loader: Any = torch.utils.data.DataLoader(dataset)
    expected = run("saliency", images=folder, batch_size=SIZE, progress=False)
    for name, value in (("dataset", dataset), ("loader", loader)):
        assert_same_result(stream("saliency", tmp_path / name, images=value)[:], expected)


def test_folders_files_and_patterns_stream_where_asked(folder: Path, tmp_path: Path) -> None:
    expected = run("saliency", images=folder, batch_size=SIZE, progress=False)
    assert isinstance(expected, Attribution)  # a folder alone is a batch in memory
    listed = [str(folder / f"{n}.png") for n in range(3)]
    for number, value in enumerate((folder, str(folder / "*.png"), listed, [str(folder)])):
        assert_same_result(stream("saliency", tmp_path / str(number), images=value, stream=True)[:], expected)
    single = stream("saliency", tmp_path / "one", images=folder / "0.png", stream=True)
    assert_same_result(single[:], run("saliency", images=folder / "0.png", progress=False))
    sized = stream("fast_style", tmp_path / "size", images={"files": folder, "size": 32}, stream=True)
    assert sized[0].images.shape == (1, 3, 32, 32)  # type: ignore[attr-defined]


def test_calls_in_memory_name_the_stream(model: Model, data: TensorDataset, folder: Path) -> None:
    with pytest.raises(InputError, match=r"not a TensorDataset, which is streamed: phosphene.run\(name"):
        methods["saliency"](model, data, None)
    with pytest.raises(InputError, match="a TensorDataset is a data set, which is streamed"):
        read_images(data, model)
    manifest = folder / "photos.csv"
    manifest.write_text("image\n0.png\n")
    for value in (manifest, [folder / "0.png", manifest]):
        with pytest.raises(InputError, match="photos.csv is a data set, which is streamed"):
            read_images(value, model)


def test_calls_that_cannot_stream_are_refused(
    model: Model, data: TensorDataset, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="grad_cam over a data set is streamed to a folder: add out=folder"):
        run("grad_cam", model=model, images=data)
    with pytest.raises(InputError, match="nearest_neighbors cannot be streamed: its result has no row"):
        stream("nearest_neighbors", tmp_path / "a", model=model, images=data)
    with pytest.raises(InputError, match="pca cannot be streamed"):
        stream("pca", tmp_path / "a", model=model, stream=True)
    with pytest.raises(InputError, match="images is a data set, which is only streamed"):
        stream("grad_cam", tmp_path / "a", model=model, images=data, stream=False)
    with pytest.raises(InputError, match="5 images of the data set need one value of target, or one each"):
        stream("grad_cam", tmp_path / "a", model=model, images=data, target=[1, 2])
    with pytest.raises(InputError, match="the data set is empty"):
        stream("grad_cam", tmp_path / "a", model=model, images=TensorDataset(data.images[:0]))
    write_png(torch.rand(3, 20, 30), folder / "9.png")
    with pytest.raises(InputError, match="images 3 to 3: images of a stream have one size, not 64x64 and 20"):
        stream("fast_style", tmp_path / "a", images=folder, stream=True, batch_size=1)
    broken = data.images.clone()
    broken[3, 0, 0, 0] = 2
    with pytest.raises(InputError, match=r"images 2 to 3: pixels must lie in \[0, 1\]"):
        stream("grad_cam", tmp_path / "b", model=model, images=TensorDataset(broken))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"phosphene\[tables\]"):
        stream("grad_cam", tmp_path / "a", model=model, images=data)


# --- the folder -------------------------------------------------------------------------------------


def test_folder_and_index(model: Model, data: TensorDataset, tmp_path: Path) -> None:
    streamed = stream("fgsm", tmp_path / "a", model=model, images=data, labels="label")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    shards = {f"shard-{n:06d}.safetensors" for n in range(3)}
    assert names >= {"result.json", "index.parquet", "picture.png", *shards}
    loaded = load_result(tmp_path / "a")
    assert isinstance(loaded, ResultStream)
    frame = loaded.to_pandas()
    assert [*frame.columns[:4]] == ["id", "target", "prediction", "confidence"]
    assert [*frame.row] == [0, 1, 0, 1, 0]
    examples: Any = loaded[:]
    assert [*frame.success] == examples.success.tolist()
    maps = stream("saliency", tmp_path / "maps", model=model, images=data).to_pandas()
    with torch.no_grad():
        expected = model(data.images).softmax(1)
    for table in (frame, maps):  # of the attack's own predictions, and computed
        np.testing.assert_allclose(table.confidence, expected.amax(1), rtol=1e-5)
        assert [*table.prediction] == [model.class_name(i) for i in expected.argmax(1).tolist()]
    assert [len(rows) for rows in loaded.index_rows(3)] == [3, 2]
    assert loaded.save_figure(tmp_path / "figure.png").stat().st_size > 1000
    assert loaded.lines() == ["5 images in 3 shards of AdversarialExamples"]
    loaded.save(tmp_path / "copy")
    copied = load_result(tmp_path / "copy")
    assert isinstance(copied, ResultStream)
    assert_same_result(copied[1:4], streamed[1:4])
    assert content(tmp_path / "copy")["index.parquet"] == content(tmp_path / "a")["index.parquet"]


def test_reading_is_lazy(model: Model, data: TensorDataset, tmp_path: Path) -> None:
    stream("saliency", tmp_path / "a", model=model, images=data)
    loaded = load_result(tmp_path / "a")
    assert isinstance(loaded, ResultStream)
    (tmp_path / "a" / "shard-000001.safetensors").write_bytes(b"damaged")
    assert loaded[4]
    with pytest.raises(InputError, match="shard-000001.safetensors is no shard of a stream"):
        loaded[2]
    with pytest.raises(IndexError):
        loaded[5]
    with pytest.raises(InputError, match="the slice contains none of the 5 images"):
        loaded[3:3]
    with pytest.raises(InputError, match="a number or a slice"):
        loaded["first"]  # type: ignore[call-overload]
    (tmp_path / "a" / "shard-000001.safetensors").unlink()
    with pytest.raises(InputError, match="not a complete result: it has no shard-000001.safetensors"):
        load_result(tmp_path / "a")


def test_replay_of_a_stream_is_refused(model: Model, data: TensorDataset, tmp_path: Path) -> None:
    streamed = stream("saliency", tmp_path / "a", model=model, images=data)
    with pytest.raises(InputError, match="a stream is not replayed"):
        replay(tmp_path / "a")
    streamed[1].save(tmp_path / "one")
    with pytest.raises(InputError, match="part of a stream"):
        replay(tmp_path / "one", model=model)


def test_earlier_result_is_replaced_and_other_files_stay(
    model: Model, images: Tensor, data: TensorDataset, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    run("saliency", model=model, images=images, out=out, progress=False)
    (out / "notes.txt").write_text("mine")
    stream("saliency", out, model=model, images=data)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "pictures" / "999.png").exists()
    short = stream("saliency", out, model=model, images=TensorDataset(images[:2]))
    assert len(short) == 2
    assert not (out / "shard-000001.safetensors").exists()
    assert (out / "notes.txt").read_text() == "mine"
    run("saliency", model=model, images=images, out=out, progress=False)
    assert not (out / "shard-000000.safetensors").exists()
    assert not (out / "index.parquet").exists()
    assert os.listdir(tmp_path) == ["a"]


def test_folders_of_others_are_refused(model: Model, data: TensorDataset, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="contains files other than a result"):
        stream("saliency", tmp_path / "a", model=model, images=data)
    hidden = tmp_path / ".b.stream"
    hidden.mkdir()
    (hidden / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="was not written by Phosphene"):
        stream("saliency", tmp_path / "b", model=model, images=data)
    assert (hidden / "thesis.tex").read_text() == "mine"


def test_two_processes_do_not_write_one_stream(model: Model, data: TensorDataset, tmp_path: Path) -> None:
    class Slow(TensorDataset):
        def read(self, indices: Any) -> Tensor:
            time.sleep(0.3)
            return super().read(indices)

    slow = Slow(data.images)
    wait = start(lambda: len(stream("saliency", tmp_path / "a", model=model, images=slow)))
    while not (tmp_path / ".a.stream" / "writing" / "shard-000000.safetensors").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process is writing the result"):
        stream("saliency", tmp_path / "a", model=model, images=data)
    assert wait() == COUNT


# --- interruptions ------------------------------------------------------------------------------------


class Interrupting(TensorDataset):
    """Raises an error when an image is read, once."""

    error: BaseException | None = None

    def batches(self, size: int, start: int = 0) -> Iterator[Any]:
        for batch in super().batches(size, start):
            if 2 in batch.indices and self.error is not None:
                error, self.error = self.error, None
                raise error
            yield batch


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("disk")])
def test_interrupted_stream_resumes(
    error: BaseException, model: Model, data: TensorDataset, tmp_path: Path, batches: list[int]
) -> None:
    dataset = Interrupting(data.images)
    dataset.error = error
    arguments = {"model": model, "images": dataset, "seed": None, "samples": 2}
    with pytest.raises(type(error)) as caught:
        stream("smooth_grad", tmp_path / "a", **arguments)
    assert "the same output folder resumes" in caught.value.__notes__[0]
    assert os.listdir(tmp_path) == [".a.stream"]
    resumed = stream("smooth_grad", tmp_path / "a", **arguments)
    assert batches == [2, 2, 1]
    assert os.listdir(tmp_path) == ["a"]
    assert resumed.provenance is not None  # the seed that the interrupted run drew
    arguments["seed"] = resumed.provenance.seed
    straight = stream("smooth_grad", tmp_path / "b", **arguments)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert_same_result(straight[:], resumed[:])


@pytest.mark.parametrize("damage", ["short", "other format"])
def test_damaged_shard_is_a_warning_and_is_computed_again(
    damage: str, model: Model, data: TensorDataset, tmp_path: Path, batches: list[int]
) -> None:
    class Failing(TensorDataset):
        broken = True

        def batches(self, size: int, start: int = 0) -> Iterator[Any]:
            for batch in super().batches(size, start):
                if self.broken and 4 in batch.indices:
                    raise KeyboardInterrupt
                yield batch

    dataset = Failing(data.images)
    with pytest.raises(KeyboardInterrupt):
        stream("saliency", tmp_path / "a", model=model, images=dataset)
    shard = tmp_path / ".a.stream" / "writing" / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100] if damage == "short" else b"{}")
    dataset.broken = False
    batches.clear()
    with pytest.warns(CheckpointWarning, match="shard-000001.* is no shard .* computed again"):
        resumed = stream("saliency", tmp_path / "a", model=model, images=dataset)
    assert batches == [2, 1] and os.listdir(tmp_path) == ["a"]
    straight = stream("saliency", tmp_path / "b", model=model, images=data.images, stream=True)
    assert_same_result(resumed[:], straight[:])


def test_other_runs_do_not_resume(
    model: Model, data: TensorDataset, tmp_path: Path, batches: list[int]
) -> None:
    middle = data.images.clone()
    middle[2] = middle[0]
    named = TensorDataset(data.images, ["star"] * COUNT)
    changes: list[dict[str, Any]] = [
        *({"target": 1}, {"batch_size": 1}, {"target": sum_of_logits}),
        *({"images": TensorDataset(middle)}, {"images": named}),
    ]
    for change in changes:
        dataset = Interrupting(data.images)
        dataset.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            stream("saliency", tmp_path / "a", **{"model": model, "images": dataset})
        batches.clear()
        changed = {"model": model, "images": dataset, **change}
        stream("saliency", tmp_path / "a", **changed)
        assert sum(batches) == COUNT
    dataset.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:  # a callable cannot be compared
        stream("saliency", tmp_path / "b", model=model, images=dataset, target=sum_of_logits)
    assert not hasattr(caught.value, "__notes__")
    assert os.listdir(tmp_path) == ["a"]


def sum_of_logits(logits: Tensor) -> Tensor:
    return logits.sum(1)


def test_graceful_stop_loses_only_the_running_batch(
    model: Model, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phosphene.optimize import image_optimizer  # the loop that stops after a step

    arguments = {"model": model, "images": data, "steps": 4, "seed": 0}
    straight = stream("feature_inversion", tmp_path / "b", **arguments)
    evaluations = itertools.count()
    first = image_optimizer.progress_bar

    def interrupting(*values: Any, **more: Any) -> Any:
        for item in first(*values, **more):
            if next(evaluations) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    monkeypatch.setattr(image_optimizer, "progress_bar", interrupting)
    with pytest.raises(KeyboardInterrupt) as caught:
        stream("feature_inversion", tmp_path / "a", **arguments)
    assert "resumes" in caught.value.__notes__[0]
    assert len([*(tmp_path / ".a.stream" / "writing").iterdir()]) == 1
    assert_same_result(stream("feature_inversion", tmp_path / "a", **arguments)[:], straight[:])


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(system, "_renameat2", lambda: None)
    return str(request.param)


def kill_at_operations(
    numbers: Iterator[int],
    model: Model,
    data: TensorDataset,
    tmp_path: Path,
    batches: list[int],
    before: bool,
) -> int:
    """Kill a stream at each of these operations on files and resume it; the last number that killed it."""
    expected = stream("saliency", tmp_path / "expected", model=model, images=data)
    last = 0
    for number in numbers:
        parent = tmp_path / str(number)
        parent.mkdir()
        out = parent / "a"
        if before:
            run("saliency", model=model, images=data.images[:1], out=out, progress=False)
            (out / "notes.txt").write_text("mine")

        def work(out: Path = out, number: int = number) -> None:
            at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            stream("saliency", out, model=model, images=data)

        try:
            in_child(work)
        except Killed:
            last = number
        else:
            break
        writing = parent / ".a.stream" / "writing"
        # With the notes it is complete, or the earlier result after the exchange.
        possible = (0, 3) if (writing / "notes.txt").exists() else (3 - len([*writing.glob("shard-*")]),)
        batches.clear()
        resumed = stream("saliency", out, model=model, images=data)
        assert len(batches) in possible, number
        assert_same_result(resumed[:], expected[:])
        assert content(out) == content(tmp_path / "expected") | ({"notes.txt": b"mine"} if before else {}), (
            number
        )
        assert os.listdir(parent) == ["a"], number
    return last


@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
def test_killed_stream_resumes(
    before: bool, renaming: str, model: Model, data: TensorDataset, tmp_path: Path, batches: list[int]
) -> None:
    if before or renaming == "exchange":
        steps = iter(range(10 + 7 * before, 10_000, 23))
        assert kill_at_operations(steps, model, data, tmp_path, batches, before) > 60


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
def test_stream_killed_at_every_operation_resumes(
    before: bool, renaming: str, model: Model, data: TensorDataset, tmp_path: Path, batches: list[int]
) -> None:
    assert kill_at_operations(itertools.count(1), model, data, tmp_path, batches, before) > 60


#: A program that streams scenes; the test kills it.
PROGRAM = """
import sys
from phosphene import run
run("pgd", images="builtin:scenes/{count}", labels="label", seed=5, steps=2, batch_size=4, stream=True,
    out=sys.argv[1], progress=False)
"""


def kill_at_random_moments(tmp_path: Path, count: int, kills: int) -> None:
    """Kill the program some times and let it end; the result is that of a run without kills."""
    program = PROGRAM.format(count=count)
    command = [sys.executable, "-c", program]
    subprocess.run([*command, str(tmp_path / "straight")], check=True)
    draw = random.Random(0)
    writing = tmp_path / ".killed.stream" / "writing"
    done = 0
    for _ in range(kills):
        process = subprocess.Popen([*command, str(tmp_path / "killed")])
        while process.poll() is None and len([*writing.glob("shard-*")]) <= done:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        process.kill()
        if process.wait() == 0:
            break
        assert len([*writing.glob("shard-*")]) >= done
        done = len([*writing.glob("shard-*")])
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    assert content(tmp_path / "killed") == content(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["killed", "straight"]


def test_child_killed_at_random_moments_resumes_to_the_same_bits(model: Model, tmp_path: Path) -> None:
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    arguments = {"model": model, "images": TensorDataset(images), "seed": 5, "samples": 2}
    stream("smooth_grad", tmp_path / "straight", **arguments)
    draw = random.Random(0)
    for _ in range(3):
        wait: Any = start(lambda: len(stream("smooth_grad", tmp_path / "killed", **arguments)))
        time.sleep(draw.random() * 0.2)
        os.kill(wait.pid, signal.SIGKILL)
        with suppress(Killed):
            wait()
    stream("smooth_grad", tmp_path / "killed", **arguments)
    assert content(tmp_path / "killed") == content(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["killed", "straight"]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_process_killed_ten_times_resumes_to_the_same_bits(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, 400, 10)


# --- memory ---------------------------------------------------------------------------------------------


class Noise(SceneDataset):
    """Images that are drawn when they are read."""

    uri = None

    def read(self, indices: Any) -> Tensor:
        draws = [torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(i)) for i in indices]
        return torch.stack(draws)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    model = load_model(module.eval(), input_size=(3, 128, 128))

    def peak(count: int) -> int:
        def work() -> int:
            dataset = Noise(count)
            stream("saliency", tmp_path / str(count), model=model, images=dataset, batch_size=8)
            for _ in ResultStream.batches(load_result(tmp_path / str(count))):  # type: ignore[arg-type]
                pass
            return int(psutil.Process().memory_info().peak_wset if os.name == "nt" else _peak())

        result: int = in_child(work)
        return result

    small, large = peak(100), peak(2000)  # 2,000 images with maps are 520 MB
    assert large < 1.2 * small, (small, large)


def _peak() -> int:
    """The largest resident memory of this process, bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


# --- the command line ---------------------------------------------------------------------------------------


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a")
    main_without_exit(
        "run", "saliency", "--image", str(folder), "--out", out, "--stream", "--batch-size", "2"
    )
    assert "3 images in 2 shards of Attribution" in capsys.readouterr().out
    assert isinstance(load_result(out), ResultStream)
    main_without_exit("table", out, str(tmp_path / "table.csv"))
    assert (tmp_path / "table.csv").read_text().startswith("id,target,prediction,confidence,")
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"inputs": {"images": str(folder)}, "out": out, "stream": True}))
    main_without_exit("run", "saliency", "--json", str(request))
    response = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert response["type"] == "ResultStream"
    assert "index.parquet" in response["files"]


def main_without_exit(*words: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert not left.value.code, words
