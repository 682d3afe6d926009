"""Checkpoints: an interrupted run resumes, and no other run uses its checkpoint."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tests.core.forked import Killed, at_operation, in_child

from phosphene import (
    InputError,
    Result,
    checkpoints,
    load_result,
    method,
    resumable,
    run,
    save_progress,
    saved_progress,
)
from phosphene.results import Synthesis
from phosphene.roles import Dataset, Model, Seed

#: In one process, one of the first: it takes longer to fork one that has grown.
pytestmark = pytest.mark.xdist_group("forks")

#: Indices of the images that were read, and indices at which a run is interrupted once.
read: list[int] = []
cuts: list[int] = []


@method(family="activations", needs=["dataset"])
def mean_color(model: Model, dataset: Dataset, *, gain: float = 1.0, seed: Seed = None) -> Synthesis:
    """Sum the mean colors of a data set, one image at a time, and add a little noise at the end."""
    state = saved_progress() or {"done": 0, "total": torch.zeros(3)}
    for batch in dataset.batches(1, state["done"]):
        index = batch.indices[0]
        if index in cuts:
            cuts.remove(index)
            raise KeyboardInterrupt
        read.append(index)
        state = {"done": index + 1, "total": state["total"] + gain * batch.images.mean((0, 2, 3))}
        save_progress(**state)
    color = 0.9 * state["total"] / len(dataset) + 0.1 * torch.rand(3)
    return Synthesis(images=color.view(1, 3, 1, 1), scores=torch.zeros(1, 1), targets=("mean",))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {"mean_color": mean_color, mean_color.spec.name: mean_color}
    monkeypatch.setattr("phosphene.runs.prepare.methods", registry)
    monkeypatch.setattr("phosphene.runs.prepared_run.methods", registry)
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    read.clear()
    cuts.clear()


def make(out: Path | None, count: int = 5, **params: Any) -> Result:
    return run("mean_color", dataset=f"builtin:scenes/{count}", out=out, **params)


def interrupt_run(out: Path, **params: Any) -> None:
    cuts.append(3)
    with pytest.raises(KeyboardInterrupt) as caught:
        make(out, **params)
    assert "the same output folder resumes" in caught.value.__notes__[0]


def test_interrupted_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    out = tmp_path / "result"
    interrupt_run(out)
    assert [path.name for path in tmp_path.iterdir()] == [".result.unfinished"]
    again = make(out)
    assert read == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    seed = again.provenance.seed  # the seed of the interrupted run: none was passed
    assert torch.equal(make(None, seed=seed).images, load_result(out).images)


@pytest.mark.parametrize("other", [{"gain": 0.5}, {"count": 6}, {"seed": 3}])
def test_checkpoint_of_another_run_is_not_used(tmp_path: Path, other: dict[str, Any]) -> None:
    interrupt_run(tmp_path / "result")
    read.clear()
    make(tmp_path / "result", **other)
    assert read[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_checkpoint_is_written_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 1e6)
    written: list[Path] = []
    monkeypatch.setattr(checkpoints.Checkpoint, "write", lambda self: written.append(self.file))
    make(tmp_path / "result")
    assert written == []


def test_without_output_folder_no_checkpoint_exists(tmp_path: Path) -> None:
    save_progress(done=1)
    assert saved_progress() == {}
    make(None)
    assert list(tmp_path.iterdir()) == []


def test_run_on_a_dataset_object_has_no_checkpoint(tmp_path: Path) -> None:
    cuts.append(3)
    with pytest.raises(KeyboardInterrupt):
        run("mean_color", dataset=torch.rand(5, 3, 64, 64), out=tmp_path / "result")
    assert list(tmp_path.iterdir()) == []


def test_methods_called_inside_do_not_use_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = checkpoints.Checkpoint(tmp_path / "checkpoint", "id")
    checkpoint.state = {"done": 1}
    with checkpoints.use_checkpoint(checkpoint), checkpoints.claim_checkpoint():
        assert saved_progress() == {"done": 1}
        with checkpoints.claim_checkpoint():
            assert saved_progress() == {}
            save_progress(done=7)
        assert saved_progress() == {"done": 1}


def test_resumable_skips_completed_items_and_restores_the_state(tmp_path: Path) -> None:
    done: list[str] = []

    def collect(fail_at: str | None) -> dict[str, Any]:
        state: dict[str, Any] = {"letters": "", "sum": torch.zeros(1)}
        for letter in resumable("abcd", state, "letters"):
            if letter == fail_at:
                raise KeyboardInterrupt
            done.append(letter)
            state["letters"] += letter
            state["sum"] = state["sum"] + ord(letter)
        return state

    def call(checkpoint: checkpoints.Checkpoint, fail_at: str | None = None) -> list[dict[str, Any]]:
        with checkpoint, checkpoints.use_checkpoint(checkpoint), checkpoints.claim_checkpoint():
            # Two loops in one call: each has a slot of its own.
            return [collect(None), collect(fail_at)]

    with pytest.raises(KeyboardInterrupt):
        call(checkpoints.Checkpoint(tmp_path / "checkpoint", "id"), fail_at="c")
    assert "".join(done) == "abcdab"
    states = call(checkpoints.Checkpoint(tmp_path / "checkpoint", "id"))
    assert "".join(done) == "abcdabcd"
    assert [(state["letters"], state["sum"].item()) for state in states] == [("abcd", 394.0)] * 2


def test_resumable_without_a_checkpoint_is_a_plain_loop() -> None:
    state = {"count": 0}
    for number in resumable([2, 3], state, "numbers"):
        state["count"] += number
    assert state == {"count": 5}


def test_a_state_replaces_that_of_its_loop(tmp_path: Path) -> None:
    checkpoint = checkpoints.Checkpoint(tmp_path / "checkpoint", "id")
    with checkpoints.use_checkpoint(checkpoint), checkpoints.claim_checkpoint():
        first, second = checkpoints.CheckpointSlot(), checkpoints.CheckpointSlot()
        first.save({"total": 1, "part": 2})
        second.save({"total": 3})
        first.save({"total": 4})
    assert checkpoint.state == {"0.total": 4, "1.total": 3}


# --- a checkpoint is a help, not a risk -----------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        SafetensorError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_checkpoint_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    writes: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        writes.append(1)
        raise error

    monkeypatch.setattr(checkpoints, "save_tensors", fail)
    with pytest.warns(checkpoints.CheckpointWarning, match="cannot resume if it is interrupted") as caught:
        result = make(tmp_path / "result")
    assert len(caught) == len(writes) == 1
    assert read == [0, 1, 2, 3, 4]
    assert torch.equal(load_result(tmp_path / "result").images, result.images)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_interruption_after_a_failed_checkpoint_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", fail)
    cuts.append(3)
    with pytest.warns(checkpoints.CheckpointWarning), pytest.raises(KeyboardInterrupt) as caught:
        make(tmp_path / "result")
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_earlier_checkpoint_remains_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = checkpoints.save_tensors, itertools.count()

    def fail_from_the_third(*arguments: Any) -> None:
        if next(count) >= 2:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_tensors", fail_from_the_third)
        with pytest.warns(checkpoints.CheckpointWarning):
            interrupt_run(tmp_path / "result")
    read.clear()
    make(tmp_path / "result")
    assert read == [2, 3, 4]


@pytest.mark.parametrize("kind", ["text", "safetensors", "folder", "FIFO", "link"])
def test_file_that_is_no_checkpoint_is_unchanged(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ".result.unfinished"
    match kind:
        case "text":
            file.write_text("mine")
        case "safetensors":
            save_file({"mine": torch.ones(3)}, file)
        case "folder":
            file.mkdir()
        case "FIFO":
            os.mkfifo(file)
        case "link":
            file.symlink_to("nowhere")
    before = file.lstat()
    with pytest.warns(checkpoints.CheckpointWarning, match="is no checkpoint that can be read"):
        make(tmp_path / "result")
    assert read == [0, 1, 2, 3, 4]
    after = file.lstat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    read.clear()
    cuts.append(3)
    with pytest.warns(checkpoints.CheckpointWarning), pytest.raises(KeyboardInterrupt) as caught:
        make(tmp_path / "other" / ".." / "result")
    assert not hasattr(caught.value, "__notes__")


def test_permissions_of_a_checkpoint_follow_the_umask(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:
        interrupt_run(tmp_path / "result")
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((tmp_path / ".result.unfinished").stat().st_mode) == 0o640


def test_killed_checkpoint_leaves_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    for number in itertools.count(1):

        def write(number: int = number) -> None:
            checkpoint = checkpoints.Checkpoint(tmp_path / ".a.unfinished", "id")
            checkpoint.state = {"step": 1, "weights": torch.ones(3)}
            checkpoint.write()
            at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            checkpoint.write()

        try:
            in_child(write)
        except Killed:
            killed = True
        else:
            killed = False
        with checkpoints.Checkpoint(tmp_path / ".a.unfinished", "id") as checkpoint:
            assert checkpoint.state["step"] == 1
            checkpoint.unfinished = True
        assert os.listdir(tmp_path) == [".a.unfinished"]
        if not killed:
            break
    assert number > 5


def test_run_on_a_disk_that_becomes_full_warns_and_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(checkpoint: checkpoints.Checkpoint) -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return True

    def work() -> tuple[list[int], str]:
        monkeypatch.setattr(checkpoints.Checkpoint, "due", fill_disk)
        with (
            pytest.warns(checkpoints.CheckpointWarning, match="File too large") as caught,
            pytest.raises(InputError) as refusal,
        ):
            make(tmp_path / "result")
        assert len(caught) == 1
        return read, str(refusal.value)

    images, message = in_child(work)
    assert images == [0, 1, 2, 3, 4]
    assert "File too large" in message
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_refused_before_the_first_image(tmp_path: Path) -> None:
    def work() -> list[int]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        with pytest.raises(InputError, match="nothing can be saved in .*File too large"):
            make(tmp_path / "result")
        return read

    assert in_child(work) == []
