"""Saving replaces earlier results only, is atomic at every operation, and is refused before the work."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.forked import Killed, at_operation, in_child, start

from phosphene import InputError, Result, checkpoints, load_result, run
from phosphene.files import check_output_folder, system
from phosphene.files.work_folders import sweep, work_folder
from phosphene.results import Synthesis

#: In one process, one of the first: it takes longer to fork one that has grown.
pytestmark = pytest.mark.xdist_group("forks")


class Plain(Synthesis):
    """A result whose figure takes no time."""

    def png(self) -> bytes:
        return b"figure"


def plain(count: int) -> Plain:
    """A result with this number of images, whose values are its number."""
    return Plain(
        images=torch.full((count, 3, 4, 4), count / 10), scores=torch.zeros(1, count), targets=("a",) * count
    )


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def own_names(count: int) -> list[str]:
    pictures = [f"pictures/{number:03d}.png" for number in range(count)]
    return sorted(["arrays.safetensors", "picture.png", "pictures", *pictures, "result.json"])


def is_complete(folder: Path) -> bool:
    """Whether the document, the arrays and the images of a folder are of one result."""
    result = load_result(folder)
    count = len(result.images)
    same = torch.equal(result.images, plain(count).images)
    return same and set(own_names(count)) <= set(names(folder))


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without an atomic exchange of folders."""
    if request.param == "two renames":
        monkeypatch.setattr(system, "_renameat2", lambda: None)
    return str(request.param)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can read and change; pytest's own belong to one user."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def as_other_user(function: Callable[[], Any]) -> Any:
    """What a function returns in a process without the rights of root."""

    def child() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return function()

    return in_child(child)


# --- what is replaced and what stays ------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"mine": 1}',
        "[]",
        "not JSON",
        "[" * 100_000,
        '{"format": 1, "type": "Attribution"}',
        '{"format": true, "type": "a", "fields": {}, "inputs": {}, "provenance": null}',
        '{"format": 1, "type": "a", "fields": {}, "inputs": {}, "provenance": {"mine": 1}}',
        None,
    ],
)
def test_folder_of_another_program_is_refused_and_unchanged(tmp_path: Path, text: str | None) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    if text is None:
        os.mkfifo(folder / "result.json")  # reading it would not return
    else:
        (folder / "result.json").write_text(text)
    (folder / "thesis.txt").write_text("years of work")
    before = names(tmp_path)
    with pytest.raises(InputError, match=r"result\.json, thesis\.txt.*no saved result of Phosphene"):
        run("saliency", out=folder)
    with pytest.raises(InputError, match="files other than a result"):
        plain(1).save(folder)
    assert names(tmp_path) == before
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("files", [True, False], ids=["with a list of files", "of version 0.2"])
def test_own_files_are_replaced_and_others_stay(tmp_path: Path, renaming: str, files: bool) -> None:
    out = plain(4).save(tmp_path / "a")
    document = json.loads((out / "result.json").read_text())
    assert document["files"] == [name for name in own_names(4) if name != "pictures"]
    if not files:
        del document["files"]
        (out / "result.json").write_text(json.dumps(document))
    others = {"notes.txt": "mine", "pictures/notes.txt": "mine, too", "data/deep/table.csv": "1,2"}
    for name, text in others.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    os.mkfifo(out / "pipe")
    (out / "link").symlink_to("nowhere")
    inode = (out / "notes.txt").stat().st_ino
    for count in (2, 1):
        plain(count).save(out)
        added = ["data", "data/deep", "link", "pipe", *others]
        assert names(out) == sorted([*own_names(count), *added])
        assert {name: (out / name).read_text() for name in others} == others
        assert (out / "notes.txt").stat().st_ino == inode
        assert is_complete(out)
        assert os.listdir(tmp_path) == ["a"]


def test_a_list_of_files_cannot_name_others(tmp_path: Path) -> None:
    out = plain(1).save(tmp_path / "a")
    (tmp_path / "victim.txt").write_text("mine")
    (out / "notes.txt").write_text("mine")
    document = json.loads((out / "result.json").read_text())
    document["files"] += [
        "../victim.txt",
        str(tmp_path / "victim.txt"),
        "notes.txt",
        3,
        "pictures/../notes.txt",
    ]
    (out / "result.json").write_text(json.dumps(document))
    plain(2).save(out)
    assert (tmp_path / "victim.txt").read_text() == (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["film.gif", "pictures/000.png", "pictures/071.png"])
def test_another_file_under_a_name_that_a_result_needs_is_refused(tmp_path: Path, name: str) -> None:
    out = Plain(images=torch.zeros(0, 3, 4, 4), scores=torch.zeros(1, 0), targets=()).save(tmp_path / "a")
    (out / "pictures").mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(InputError, match=f"contains {name}, which is no file of the result"):
        plain(1).save(out)
    assert (out / name).read_text() == "mine"


def test_linked_folder_of_images_is_refused(tmp_path: Path) -> None:
    out = plain(2).save(tmp_path / "a")
    (out / "pictures").rename(tmp_path / "elsewhere")
    (out / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="contains pictures"):
        plain(1).save(out)
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["000.png", "001.png"]


def test_file_that_appears_during_the_save_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = plain(2).save(tmp_path / "a")
    exchange = system.exchange

    def late(first: Path, second: Path) -> bool:
        (out / "notes.txt").write_text("just in time")
        return exchange(first, second)

    monkeypatch.setattr(system, "exchange", late)
    plain(1).save(out)
    assert (out / "notes.txt").read_text() == "just in time"
    assert is_complete(out)


def test_permissions_of_an_earlier_folder_remain(tmp_path: Path, renaming: str) -> None:
    out = plain(1).save(tmp_path / "a")
    out.chmod(0o770)
    plain(2).save(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o770


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    earlier = os.umask(umask)
    try:
        plain(2).save(tmp_path / "a")
    finally:
        os.umask(earlier)
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        usual = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == usual, path


def test_everything_is_on_the_disk_before_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = plain(1).save(tmp_path / "a")
    steps: list[str] = []
    fsync, exchange = os.fsync, system.exchange

    def record(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(system, "exchange", lambda *paths: steps.append("exchange") or exchange(*paths))
    plain(1).save(out)
    before = [*own_names(1), "writing"]
    assert sorted(steps[: steps.index("exchange")]) == sorted(Path(name).name for name in before)
    assert steps[steps.index("exchange") :] == ["exchange", tmp_path.name]


# --- refused before the work --------------------------------------------------------------------


def make_entry(kind: str, path: Path) -> None:
    match kind:
        case "file":
            path.write_text("mine")
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            # The name of a socket is limited to 108 bytes, which a temporary folder may exceed.
            earlier = Path.cwd()
            os.chdir(path.parent)
            try:
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(path.name)
            finally:
                os.chdir(earlier)
        case "device":
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        case "symbolic link to nothing":
            path.symlink_to("nowhere")


KINDS = ["file", "FIFO", "socket", "symbolic link to nothing"] + (["device"] if os.geteuid() == 0 else [])


@pytest.mark.parametrize("below", ["", "below", "below/it"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_folder_is_refused_and_unchanged(
    tmp_path: Path, kind: str, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phosphene.runs.run.prepare", lambda *_, **__: pytest.fail("the work was begun"))
    entry = tmp_path / "entry"
    make_entry(kind, entry)
    before = entry.lstat()
    for save in (lambda out: run("saliency", out=out), plain(1).save):
        with pytest.raises(InputError, match=f"entry is a {kind}; results are saved in a folder"):
            save(entry / below)
    after = entry.lstat()
    assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)
    assert os.listdir(tmp_path) == ["entry"]


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("a\0b", "NUL"),
        ("\ud800", "characters that no file name may contain"),
        ("x" * 300, "has 300 bytes"),
        ("x" * 250, "has 250 bytes; at most 243"),
        ("ü" * 125, "has 250 bytes; at most 243"),
        ("x" * 256 + "/result", "has 256 bytes"),
        ("/".join(["x" * 200] * 30), "bytes; at most"),
        (b"result", "is no path"),
        (3, "is no path"),
        (["a"], "is no path"),
        ("loop/result", "symbolic links"),
    ],
    ids=str,
)
def test_invalid_paths_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Any, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    monkeypatch.setattr("phosphene.runs.run.prepare", lambda *_, **__: pytest.fail("the work was begun"))
    with pytest.raises(InputError, match=problem):
        run("saliency", out=out)
    with pytest.raises(InputError, match=problem):
        plain(1).save(out)
    assert os.listdir() == ["loop"]


def test_longest_accepted_name_is_saved_and_has_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 243)
    plain(1).save(out)
    checkpoint = checkpoints.Checkpoint(checkpoints.checkpoint_path(out), "id")
    checkpoint.state = {"step": 1}
    checkpoint.write()
    assert checkpoint.stored
    assert len(os.listdir(tmp_path)) == 2


def test_working_directory_and_its_parents_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = plain(1).save(tmp_path / "a")
    monkeypatch.chdir(out / "pictures")
    for folder, verb in ((".", "is"), ("..", "contains"), (out, "contains"), (tmp_path, "contains")):
        with pytest.raises(InputError, match=f"{verb} the working directory"):
            plain(1).save(folder)


def test_removed_working_directory_is_reported(tmp_path: Path) -> None:
    def save() -> str:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        plain(1).save(tmp_path / "a")
        with pytest.raises(InputError, match="no longer exists") as refusal:
            plain(1).save("b")
        return str(refusal.value)

    assert in_child(save)
    assert is_complete(tmp_path / "a")


def test_folder_that_cannot_be_written_to_is_refused(open_folder: Path) -> None:
    (open_folder / "closed").mkdir(0o555)

    def save() -> None:
        for out in (open_folder / "closed" / "a", open_folder / "closed" / "new" / "a"):
            with pytest.raises(InputError, match="nothing can be saved in .*closed: Permission denied"):
                check_output_folder(out)

    as_other_user(save)
    assert os.listdir(open_folder / "closed") == []


def test_unreadable_parent_and_unchangeable_result_are_refused(open_folder: Path) -> None:
    def save() -> None:
        (open_folder / "secret").mkdir(0)
        with pytest.raises(InputError, match="Permission denied"):
            check_output_folder(open_folder / "secret" / "a")
        out = plain(1).save(open_folder / "a")
        for folder in (out / "pictures", out):
            folder.chmod(0o555)
            with pytest.raises(InputError, match="cannot be changed: .*Permission denied"):
                check_output_folder(out)
            folder.chmod(0o755)

    as_other_user(save)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create another user's folder")
def test_other_users_result_in_a_shared_folder_is_refused(open_folder: Path) -> None:
    plain(1).save(open_folder / "a").chmod(0o777)
    open_folder.chmod(0o1777)

    def save() -> None:
        with pytest.raises(InputError, match="belongs to another user"):
            plain(2).save(open_folder / "a")

    as_other_user(save)
    assert is_complete(open_folder / "a")


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    def save() -> None:
        limit_files(1000)
        with pytest.raises(InputError, match="nothing can be saved in .*File too large"):
            check_output_folder(tmp_path / "a")

    in_child(save)
    assert os.listdir(tmp_path) == []


def test_disk_that_becomes_full_is_one_sentence(tmp_path: Path) -> None:
    out = plain(1).save(tmp_path / "a")

    def save() -> str:
        limit_files(5000)
        with pytest.raises(InputError) as refusal:
            Plain(images=torch.zeros(40, 3, 9, 9), scores=torch.zeros(1, 40), targets=("a",) * 40).save(out)
        return str(refusal.value)

    message = in_child(save)
    assert message.startswith(f"the result cannot be saved in {out}: ")
    assert "File too large" in message
    assert is_complete(out)
    assert os.listdir(tmp_path) == ["a"]


def test_command_reports_a_full_disk_in_one_line(tmp_path: Path) -> None:
    script = (
        "import resource; from phosphene.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
        "main(['run', 'saliency', '--quiet', '--out', 'a'])"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("phosphene: the result cannot be saved in a: ")
    assert ended.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


# --- faults at every operation ------------------------------------------------------------------


def prepare_folder(tmp_path: Path) -> Path:
    """An earlier result with two files of the user's."""
    out = plain(3).save(tmp_path / "a")
    (out / "notes.txt").write_text("mine")
    (out / "pictures" / "notes.txt").write_text("mine")
    return out


def has_notes(out: Path) -> bool:
    return (out / "notes.txt").is_file() and (out / "pictures" / "notes.txt").is_file()


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk: a killed process loses nothing that it had written."""
    monkeypatch.setattr(system, "sync", lambda path: None)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize(
    ("renaming", "before"),
    [("exchange", True), ("two renames", True), ("exchange", False)],
    indirect=["renaming"],
    ids=["exchange", "two renames", "new folder"],
)
def test_kill_at_every_operation_leaves_a_complete_result(
    tmp_path: Path, renaming: str, before: bool
) -> None:
    for number in itertools.count(1):
        parent = tmp_path / str(number)
        parent.mkdir()
        out = prepare_folder(parent) if before else parent / "a"

        def save(out: Path = out, number: int = number) -> None:
            at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            plain(2).save(out)

        try:
            in_child(save)
        except Killed:
            killed = True
        else:
            killed = False
        if before and renaming == "exchange":
            assert out.is_dir()
            assert has_notes(out)
        if before:  # without an exchange, loading completes what was begun
            assert is_complete(out), number
        plain(1).save(out)
        assert is_complete(out)
        assert has_notes(out) or not before
        assert os.listdir(parent) == ["a"], number
        if not killed:
            break
    assert number > 30


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize(
    ("renaming", "before"),
    [("exchange", True), ("two renames", True), ("exchange", False)],
    indirect=["renaming"],
    ids=["exchange", "two renames", "new folder"],
)
@pytest.mark.filterwarnings("ignore:the temporary folder")
def test_error_at_every_operation_is_one_sentence(tmp_path: Path, renaming: str, before: bool) -> None:
    for number in itertools.count(1):
        parent = tmp_path / str(number)
        parent.mkdir()
        out = prepare_folder(parent) if before else parent / "a"

        def save(out: Path = out, number: int = number) -> bool:
            raised: list[int] = []

            def fail() -> None:
                raised.append(number)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            at_operation(number, fail)
            with suppress(InputError):
                plain(2).save(out)
            return bool(raised)

        raised = in_child(save)
        assert not before or (is_complete(out) and has_notes(out)), number
        plain(1).save(out)
        assert is_complete(out)
        assert has_notes(out) or not before
        assert os.listdir(parent) == ["a"], number
        if not raised:
            break
    assert number > 30


def kill_at_random(parent: Path, count: int, seed: int) -> None:
    """Kill processes that save in a loop: the result is complete after each one, and nothing else is left."""
    out, draw = prepare_folder(parent), random.Random(seed)
    start_time = time.perf_counter()
    for number in range(10):
        plain(1 + number % 3).save(out)
    duration = (time.perf_counter() - start_time) / 10

    def save_forever() -> None:
        for number in itertools.count():
            plain(1 + number % 3).save(out)

    for _ in range(count):
        wait = start(save_forever)
        time.sleep(draw.uniform(0, 4 * duration))
        os.kill(wait.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(Killed):
            wait()
        assert is_complete(out)
        assert has_notes(out)
    plain(1).save(out)
    assert is_complete(out)
    assert os.listdir(parent) == ["a"]


def test_kills_at_random_times_leave_complete_results(tmp_path: Path, renaming: str) -> None:
    kill_at_random(tmp_path, 15, seed=0)


@pytest.mark.nightly
def test_many_kills_at_random_times_leave_complete_results(tmp_path: Path, renaming: str) -> None:
    kill_at_random(tmp_path, 500, seed=1)


def test_kill_between_two_renames_is_completed_by_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_renameat2", lambda: None)
    out = prepare_folder(tmp_path)
    move = system.move

    def kill_before_second(source: Path, target: Path) -> None:
        if target == out and source.name == "ready":
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target)

    def save() -> None:
        monkeypatch.setattr(system, "move", kill_before_second)
        plain(2).save(out)

    for recover in (lambda: load_result(out), lambda: plain(4).save(out)):
        with pytest.raises(Killed):
            in_child(save)
        assert not out.exists()
        recover()
        assert is_complete(out)
        assert has_notes(out)
        assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.EIO, "broken")], ids=repr)
def test_interruption_between_two_renames_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    monkeypatch.setattr(system, "_renameat2", lambda: None)
    out = prepare_folder(tmp_path)
    move, failed = system.move, list[Path]()

    def fail_once(source: Path, target: Path) -> None:
        if target == out and not failed:
            failed.append(source)
            raise interruption
        move(source, target)

    monkeypatch.setattr(system, "move", fail_once)
    with pytest.raises((KeyboardInterrupt, InputError)):
        plain(2).save(out)
    assert is_complete(out)
    assert has_notes(out)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_file_systems_without_an_exchange_are_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(system, "_renameat2", lambda: refuse)
    out = prepare_folder(tmp_path)
    plain(2).save(out)
    assert is_complete(out)
    assert has_notes(out)
    assert os.listdir(tmp_path) == ["a"]


# --- several processes --------------------------------------------------------------------------


def test_processes_that_save_into_one_folder(tmp_path: Path, renaming: str) -> None:
    out = prepare_folder(tmp_path)

    def save_often(first: int) -> int:
        for number in range(25):
            plain(first + number % 3).save(out)
        return first

    children = [start(lambda first=first: save_often(first)) for first in (1, 2, 4)]
    assert [wait() for wait in children] == [1, 2, 4]
    assert is_complete(out)
    assert has_notes(out)
    assert os.listdir(tmp_path) == ["a"]


def test_replaced_folder_is_removed_between_the_renames_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is at the output folder when the replaced one's other files return to it, until the lock."""
    monkeypatch.setattr(system, "_renameat2", lambda: None)
    out, away = prepare_folder(tmp_path), tmp_path / "away"
    move, lock, renamed = system.move, system.lock, list[Path]()

    def move_after_rename(source: Path, target: Path) -> None:
        if target.parent == out and source.parent.name.startswith("old") and not renamed:
            renamed.append(out.rename(away))  # the other process's first rename
        move(source, target)

    def lock_after_rename(folder: Path) -> AbstractContextManager[None]:
        if away.exists():
            away.rename(out)  # its second one
        return lock(folder)

    monkeypatch.setattr(system, "move", move_after_rename)
    monkeypatch.setattr(system, "lock", lock_after_rename)
    plain(2).save(out)
    monkeypatch.undo()
    assert len(load_result(out).images) == 2
    assert is_complete(out)
    assert has_notes(out)
    assert os.listdir(tmp_path) == ["a"]


def test_folder_that_appears_while_it_is_replaced_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renaming: str
) -> None:
    """Another process renames its result to the output folder directly after it was read as missing."""
    out, other = tmp_path / "a", plain(4).save(tmp_path / "b")
    read, sync_tree = Path.stat, system.sync_tree

    def rename_after_reading(path: Path, **options: Any) -> os.stat_result:
        if path == out and other.exists():
            other.rename(out)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return read(path, **options)

    def sync_and_start(folder: Path) -> None:
        sync_tree(folder)
        monkeypatch.setattr(Path, "stat", rename_after_reading)

    monkeypatch.setattr(system, "sync_tree", sync_and_start)
    plain(2).save(out)
    monkeypatch.undo()
    assert names(out) == own_names(2)
    assert os.listdir(tmp_path) == ["a"]


def test_files_of_a_result_that_replaces_another_meanwhile_are_not_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renaming: str
) -> None:
    """The result with 4 images replaces the one with 1 while the files beside it are linked."""
    out, other = plain(1).save(tmp_path / "a"), plain(4).save(tmp_path / "b")
    iterdir, away = Path.iterdir, tmp_path / "away"

    def list_after_replacement(folder: Path) -> Iterator[Path]:
        if folder == out and not away.exists():
            out.rename(away)
            other.rename(out)
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", list_after_replacement)
    plain(2).save(out)
    monkeypatch.undo()
    assert names(out) == own_names(2)
    plain(1).save(out)


def test_reader_never_mixes_two_results(tmp_path: Path) -> None:
    out = plain(1).save(tmp_path / "a")

    def save_often() -> None:
        for number in range(60):
            plain(1 + number % 3).save(out)

    wait = start(save_often)
    for _ in range(100):
        result = load_result(out)
        count = len(result.targets)  # the targets are in the document, the images in the arrays
        assert torch.equal(result.images, plain(count).images)
    wait()


def work_folder_of(tmp_path: Path, **changes: Any) -> Path:
    """A folder as a process leaves it that is killed while it writes a result."""

    def kill() -> None:
        with work_folder(tmp_path / "a") as work:
            (work / "writing").mkdir()
            (work / "writing" / "arrays.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(Killed):
        in_child(kill)
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith(".phosphene-"))
    return folder


def test_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    folder = work_folder_of(tmp_path)
    sweep(tmp_path)
    assert not folder.exists()


def test_folders_of_living_processes_other_machines_and_programs_are_unchanged(tmp_path: Path) -> None:
    folder = work_folder_of(tmp_path)
    host, boot, pid, start_time, digits = folder.name.removeprefix(".phosphene-").split("-")
    own_start = system.start_time(os.getpid())
    unchanged = [
        f".phosphene-{host}-{boot}-{os.getpid()}-{own_start}-{digits}",
        f".phosphene-{host}-{boot}-{os.getpid()}--{digits}",
        f".phosphene-{'0' * 12}-{boot}-{pid}-{start_time}-{digits}",
        ".phosphene-abcdefgh",
        f"{folder.name}-mine",
    ]
    for name in unchanged:
        folder.rename(tmp_path / name)
        sweep(tmp_path)
        assert names(tmp_path / name) == ["owner.json", "writing", "writing/arrays.safetensors"]
        (tmp_path / name).rename(folder)
    # The same number, but another process; and the same machine before it was started again.
    for name in (
        f".phosphene-{host}-{boot}-{os.getpid()}-1-{digits}",
        f".phosphene-{host}-{'0' * 8}-{os.getpid()}-{own_start}-{digits}",
    ):
        folder.rename(tmp_path / name)
        sweep(tmp_path)
        assert not (tmp_path / name).exists()
        folder = work_folder_of(tmp_path)


@pytest.mark.parametrize("target", ["../victim", "/victim", "..", "", 3, None, "a\0b"])
def test_damaged_marker_touches_nothing(tmp_path: Path, target: Any) -> None:
    folder = work_folder_of(tmp_path)
    (folder / "owner.json").write_text(json.dumps({"target": target}))
    (folder / "ready").mkdir()
    (folder / "ready" / "notes.txt").write_text("mine")
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before


def test_links_in_an_abandoned_folder_are_not_followed(tmp_path: Path) -> None:
    out, folder = plain(1).save(tmp_path / "a"), work_folder_of(tmp_path)
    victim = plain(2).save(tmp_path / "b" / "victim")
    (folder / "ready").symlink_to(victim)
    (folder / "writing" / "link").symlink_to(victim)
    sweep(tmp_path)
    assert is_complete(victim)
    assert is_complete(out)


def test_other_files_in_an_abandoned_folder_return_to_theirs(tmp_path: Path) -> None:
    out, folder = plain(1).save(tmp_path / "a"), work_folder_of(tmp_path)
    earlier = plain(2).save(folder / "ready")
    (earlier / "notes.txt").write_text("mine")
    plain(3).save(tmp_path / "b")  # another folder's save completes it as well
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_saved_result_is_whatever_type_it_has(tmp_path: Path) -> None:
    result: Result = run("saliency", out=tmp_path / "a", progress=False)
    assert torch.equal(load_result(tmp_path / "a").maps, result.maps)
