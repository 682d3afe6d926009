"""Folds: states of parts of a data set, their rows in files, and runs that are resumed after a kill."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from phosphene import Fold, TensorDataset, checkpoints, load_result, methods, run
from phosphene.checkpoints import Checkpoint, CheckpointWarning, claim_checkpoint, use_checkpoint
from phosphene.data import LabelRows, Rows, shard_ranges, shard_state, use_shard_executor
from phosphene.testing.checks import CHECKS
from phosphene.testing.checks.folds import state_difference
from phosphene.testing.observation import assert_same_result


class Means(Fold):
    """The mean of every image, their sum, and their labels."""

    def start(self):
        return {"means": Rows(), "labels": LabelRows(), "sum": torch.zeros(()).double()}

    def update(self, state, batch):
        means = batch.images.double().mean((1, 2, 3))
        state["means"].write(batch.indices[0], means)
        state["labels"].write_labels(batch.indices[0], batch.labels)
        return state | {"sum": state["sum"] + means.sum()}

    def merge(self, first, second):
        rows = {name: first[name].merge(second[name]) for name in ("means", "labels")}
        return rows | {"sum": first["sum"] + second["sum"]}

    def finish(self, state):
        return state["means"].tensor(), state["labels"].labels(), float(state["sum"])


class Noise(Fold):
    """A random number for every image."""

    random = True

    def start(self):
        return {"noise": Rows()}

    def update(self, state, batch):
        state["noise"].write(batch.indices[0], torch.rand(len(batch.images)))
        return state

    def merge(self, first, second):
        return {"noise": first["noise"].merge(second["noise"])}

    def finish(self, state):
        return state["noise"].tensor()


class Reversed:
    """An executor that computes the last shard first."""

    def states(self, fold, dataset, size, shards, seed):
        states = [shard_state(fold, dataset, size, shard, seed) for shard in reversed(shards)]
        return iter(states[::-1])


@pytest.fixture
def dataset():
    images = torch.rand(37, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, [f"class {7 * n % 5}" for n in range(37)])


def test_a_fold_is_the_same_wherever_its_shards_are_computed(dataset):
    means, labels, total = Means().run(dataset, 3)
    torch.testing.assert_close(means, dataset.images.double().mean((1, 2, 3)))
    assert labels == tuple(dataset.classes) and total == pytest.approx(float(means.sum()))
    with use_shard_executor(Reversed()):
        again = Means().run(dataset, 3)
    assert torch.equal(again[0], means) and again[1:] == (labels, total)
    assert len(Means().run(dataset, 3, stop=20)[0]) == 20
    assert shard_ranges(3, 37, 16) == [range(3, 19), range(19, 35), range(35, 37)]


def test_random_folds_have_a_seed_for_each_batch(dataset):
    torch.manual_seed(5)
    noise = Noise().run(dataset, 3)
    torch.manual_seed(5)
    with use_shard_executor(Reversed()):
        assert torch.equal(Noise().run(dataset, 3), noise)
    assert len(noise.unique()) == len(noise)


@pytest.mark.parametrize("stop", [6, 15, 36])
def test_an_interrupted_fold_resumes_with_the_rows_in_its_file(dataset, tmp_path, monkeypatch, stop):
    """With a checkpoint, rows of complete shards are in a file; a run that was interrupted continues."""
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    expected, batches = Means().run(dataset, 3), []

    class Interrupted(Means):
        def update(self, state, batch):
            if batch.indices[0] == stop and not batches:
                batches.append(stop)
                raise KeyboardInterrupt
            if batches:
                batches.append(batch.indices[0])
            return super().update(state, batch)

    def attempt():
        with Checkpoint(tmp_path / "c", "x") as checkpoint, use_checkpoint(checkpoint), claim_checkpoint():
            return Interrupted().run(dataset, 3)

    with pytest.raises(KeyboardInterrupt):
        attempt()
    (folder,) = tmp_path.glob("c.rows-*")
    complete = stop // 12 * 12
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == {
        "0.means.rows": complete * 8,
        "0.labels.rows": complete * 4,
    }
    means, labels, total = attempt()
    assert torch.equal(means, expected[0]) and (labels, total) == expected[1:]
    assert batches[1] == stop and not list(tmp_path.iterdir())


def test_a_full_disk_moves_the_rows_into_memory(dataset, tmp_path, monkeypatch):
    expected = Means().run(dataset, 3)
    append, calls = Rows._append, []

    def fail(self, first, rows):
        calls.append(first)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, first, rows)

    monkeypatch.setattr(Rows, "_append", fail)
    warned = pytest.warns(CheckpointWarning, match="No space left")
    with (
        Checkpoint(tmp_path / "c", "x") as checkpoint,
        use_checkpoint(checkpoint),
        claim_checkpoint(),
        warned,
    ):
        means, labels, total = Means().run(dataset, 3)
    assert torch.equal(means, expected[0]) and (labels, total) == expected[1:]
    assert not list(tmp_path.iterdir())


def _interrupt(file, identity, **attributes):
    """An interrupted run whose checkpoint has these attributes."""
    with Checkpoint(file, identity) as checkpoint:
        checkpoint.state = {"done": 1}
        for name, value in attributes.items():
            setattr(checkpoint, name, value)
        if not attributes:
            checkpoint.store_rows("rows", Rows())
        raise KeyboardInterrupt


def test_a_disk_that_is_full_after_resuming_is_a_warning_too(dataset, tmp_path, monkeypatch):
    """Restored rows warn of a later failure as those of an uninterrupted run do."""
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    expected = Means().run(dataset, 3)
    _interrupt_means(dataset, tmp_path / "c")

    def fail(self, first, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Rows, "_append", fail)
    with pytest.warns(CheckpointWarning, match="No space left"):
        means, labels, total = _run_with_checkpoint(Means(), dataset, tmp_path / "c")
    assert torch.equal(means, expected[0]) and (labels, total) == expected[1:]


def _run_with_checkpoint(fold, dataset, file):
    with Checkpoint(file, "x") as checkpoint, use_checkpoint(checkpoint), claim_checkpoint():
        return fold.run(dataset, 3)


def _interrupt_means(dataset, file):
    """Leave the checkpoint of the means of 24 images."""

    class Interrupted(Means):
        def update(self, state, batch):
            if batch.indices[0] == 24:
                raise KeyboardInterrupt
            return super().update(state, batch)

    with pytest.raises(KeyboardInterrupt):
        _run_with_checkpoint(Interrupted(), dataset, file)


def test_sums_and_rows_are_merged_by_default(dataset):
    """The default merge adds numbers and tensors and joins rows; another value needs a merge of its own."""
    rows = Rows()
    rows.write(0, torch.ones(2))
    other = Rows()
    other.write(2, torch.zeros(1))
    merged = Fold.merge(Noise(), {"n": 1, "rows": rows, "a": torch.ones(2)}, {"n": 2, "rows": other})
    assert merged["n"] == 3 and merged["rows"].tensor().tolist() == [1, 1, 0]
    assert merged["a"].tolist() == [1, 1]
    with pytest.raises(TypeError, match="merge of its own for 'names', a list"):
        Fold.merge(Noise(), {"names": ["a"]}, {"names": ["b"]})


def test_a_checkpoint_that_names_a_foreign_folder_or_file_is_refused(tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "0.means.rows").write_bytes(b"mine")
    with pytest.raises(KeyboardInterrupt):
        _interrupt(tmp_path / "c", "x", rows=foreign)
    with pytest.warns(CheckpointWarning, match="invalid folder"), Checkpoint(tmp_path / "c", "x") as second:
        assert second.state == {} and second.rows is None
    assert (foreign / "0.means.rows").read_bytes() == b"mine"
    rows = Rows()
    record = {"chunks": [], "file": "../x.rows", "shape": [], "dtype": "float64", "count": 1}
    with pytest.raises(Exception, match="invalid file"):
        rows.restore(record, [], tmp_path, print)
    with pytest.raises(Exception, match="missing"):
        rows.restore(record | {"file": "x.rows"}, [], tmp_path, print)


def test_the_copy_that_computed_a_part_is_recorded_by_the_run_that_resumes(tmp_path, monkeypatch):
    """A run whose images were complete when it was interrupted makes no pass of its own."""
    options = {"dataset": "builtin:scenes/24", "progress": False}

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("phosphene_plugins.activations.top_patches.located_units", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("top_patches", **options, out=tmp_path / "result")
    resumed = run("top_patches", **options, out=tmp_path / "result")
    complete = run("top_patches", **options)
    assert resumed.provenance.model["optimized_copy"] is complete.provenance.model["optimized_copy"] is True
    assert torch.equal(resumed.scores, complete.scores)


class Largest(Fold):
    """The indices of all images, in a state that is empty at first."""

    def update(self, state, batch):
        return self.merge(state, {"indices": [*batch.indices]})

    def merge(self, first, second):
        return {"indices": [*first.get("indices", ()), *second.get("indices", ())]}


@pytest.mark.parametrize("stop", range(0, 37, 3))
def test_no_image_is_merged_twice(dataset, tmp_path, monkeypatch, stop):
    """What was merged at the end of a shard is no longer a part of the shard in progress."""
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)

    class Killed(Largest):
        def update(self, state, batch):
            if batch.indices[0] == stop:
                # As after SIGKILL: the checkpoint is the last one that was written.
                monkeypatch.setattr(Checkpoint, "write", lambda self: None)
                raise KeyboardInterrupt
            return super().update(state, batch)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as monkeypatch:
        _run_with_checkpoint(Killed(), dataset, tmp_path / "c")
    assert _run_with_checkpoint(Largest(), dataset, tmp_path / "c")["indices"] == [*range(37)]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: shutil.rmtree(folder), "missing"),
        (lambda folder: (folder / "0.means.rows").unlink(), "missing"),
        (lambda folder: os.truncate(folder / "0.labels.rows", 8), "incomplete"),
        (lambda folder: _replace_by_link(folder / "0.means.rows"), "missing"),
        (lambda folder: _replace_by_folder(folder), "missing"),
    ],
    ids=["folder missing", "file missing", "short file", "link", "folder replaced by a link"],
)
def test_damaged_rows_are_a_warning_and_are_computed_again(dataset, tmp_path, monkeypatch, damage, problem):
    """Without the rows of a checkpoint, the fold starts again; files of others stay as they are."""
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    expected = Means().run(dataset, 3)
    (tmp_path / "mine").write_bytes(b"mine")
    _interrupt_means(dataset, tmp_path / "c")
    (folder,) = tmp_path.glob("c.rows-*")
    damage(folder)
    with pytest.warns(CheckpointWarning, match=f"is damaged .*rows is {problem}") as caught:
        means, labels, total = _run_with_checkpoint(Means(), dataset, tmp_path / "c")
    assert torch.equal(means, expected[0]) and (labels, total) == expected[1:]
    assert (tmp_path / "mine").read_bytes() == b"mine"
    # A link stays where the file would be written: the rows are in memory then.
    assert len(caught) == 1 + (folder / "0.means.rows").is_symlink()


def _replace_by_link(file):
    file.unlink()
    file.symlink_to(file.parent.parent / "mine")


def _replace_by_folder(folder):
    (folder.parent / "photos").mkdir()
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "photos")


def test_loops_before_damaged_rows_are_not_computed_again(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    computed, cut = [], [True]

    class Counted(Means):
        def __init__(self, name):
            self.name = name

        def update(self, state, batch):
            if cut and self.name == "third":
                raise KeyboardInterrupt
            computed.append(self.name)
            return super().update(state, batch)

    def attempt():
        with (
            Checkpoint(tmp_path / "c", "x") as checkpoint,
            use_checkpoint(checkpoint),
            claim_checkpoint(),
        ):
            return [Counted(name).run(dataset, 3) for name in ("first", "second", "third")]

    with pytest.raises(KeyboardInterrupt):
        attempt()
    (folder,) = tmp_path.glob("c.rows-*")
    (folder / "1.means.rows").unlink()
    computed.clear(), cut.clear()
    with pytest.warns(CheckpointWarning, match=r"1\.means\.rows is missing"):
        results = attempt()
    assert {*computed} == {"second", "third"} and not list(tmp_path.iterdir())
    assert all(torch.equal(result[0], Means().run(dataset, 3)[0]) for result in results)


def test_a_file_of_others_in_the_folder_of_rows_stays(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupt(tmp_path / "c", "x")
    (folder,) = tmp_path.glob("c.rows-*")
    (folder / "notes.txt").write_text("mine")
    _run_with_checkpoint(Means(), dataset, tmp_path / "c")
    assert [*tmp_path.iterdir()] == [folder] and (folder / "notes.txt").read_text() == "mine"


def test_rows_of_a_replaced_run_are_removed(tmp_path):
    """The checkpoint of another run with the same output folder is replaced, its rows with it."""
    for identity in ("first", "second"):
        with pytest.raises(KeyboardInterrupt):
            _interrupt(tmp_path / "c", identity)
        assert len(list(tmp_path.glob("c.rows-*"))) == 1
    assert len(list(tmp_path.iterdir())) == 2


_KILLED = """
    import sys, phosphene.checkpoints
    from phosphene import run
    phosphene.checkpoints.INTERVAL = 0.05
    run("embed", dataset=sys.argv[2], out=sys.argv[1], batch_size=8, progress=False)
"""


@pytest.mark.parametrize(
    ("kills", "scenes"), [(2, 256), pytest.param(10, 600, marks=pytest.mark.nightly)], ids=["2", "10"]
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, kills, scenes):
    """SIGKILL at any moment: no leftovers, and the result is that of one run."""
    dataset = f"builtin:scenes/{scenes}"
    expected = run("embed", dataset=dataset, batch_size=8, progress=False)
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(out), dataset]
    killed = 0
    while not out.exists():
        process = subprocess.Popen(command)
        waits_for = 2 + killed  # rows of further shards
        while process.poll() is None:
            files = list(tmp_path.glob(".out.unfinished.rows-*/*features.rows"))
            if killed < kills and files and files[0].stat().st_size >= waits_for * 32 * 512:
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
        assert process.returncode in (0, -signal.SIGKILL)
    assert killed and [path.name for path in tmp_path.iterdir()] == ["out"]

    assert_same_result(load_result(out), expected, rtol=0, atol=0)


def test_the_kit_compares_merged_states():
    """A merge that adds in single precision is caught."""

    CHECKS["states_are_merged"].function(methods["activation_statistics"])
    single = {"sum": torch.tensor([1.0, 2.0])}
    assert state_difference(single, {"sum": torch.tensor([1.0, 2.0 + 2e-7])}) > 1e-8
    assert state_difference(single, {"sum": torch.tensor([1, 2])}) == float("inf")
    assert state_difference({"a": 1}, {"b": 1}) == float("inf")


def test_the_kit_resumes_at_the_end_of_a_shard(monkeypatch):
    """A loop whose earlier values stay beside its last state counts images twice."""

    def save(slot, state, *, write=True):
        if slot._checkpoint is not None:
            values = {slot._name + name: value for name, value in state.items()}
            slot._checkpoint.state = slot._checkpoint.state | values

    monkeypatch.setattr(checkpoints.CheckpointSlot, "save", save)
    with pytest.raises(AssertionError, match="resumed before the last of two steps"):
        CHECKS["resumes"].function(methods["top_patches"])
