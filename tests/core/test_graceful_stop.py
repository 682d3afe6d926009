"""Ctrl-C during an optimization: the result so far is returned, and the same run resumes from it."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from phosphene import (
    Class,
    Model,
    checkpoints,
    load_model,
    load_result,
    methods,
    prepare,
    replay,
    report_progress,
    run,
)
from phosphene.cli.main import main
from phosphene.graceful_stop import Terminated, allow_early_stop, stoppable
from phosphene.progress import ProgressEvent
from phosphene.registry import plugins
from phosphene.results import Synthesis

METHOD, STEPS = "class_visualization", 12


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    return load_model(network, mean=[0.5] * 3, std=[0.2] * 3, input_size=(3, 12, 12))


@contextmanager
def ctrl_c(*at: int) -> Iterator[list[ProgressEvent]]:
    """Send the signal of Ctrl-C after these numbers of progress events."""
    events: list[ProgressEvent] = []

    def listen(event: ProgressEvent) -> None:
        events.append(event)
        if len(events) in at:
            signal.raise_signal(signal.SIGINT)

    with report_progress(listen):
        yield events
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def make(model: Model, **more: Any) -> Any:
    return run(METHOD, model=model, **{"target": [0, 3], "steps": STEPS, "seed": 1, "jitter": 2} | more)


def test_ctrl_c_returns_the_result_of_the_steps_so_far(model: Model) -> None:
    with ctrl_c(4) as events:
        result = make(model)
    assert result.provenance.interrupted == f"after 5 of {STEPS} steps"
    short = make(model, steps=5)
    assert torch.equal(result.images, short.images) and torch.equal(result.scores, short.scores)
    assert short.provenance.interrupted is None
    assert events[3].note == f"objective {float(result.scores[3].mean()):.4g}"


def test_ctrl_c_at_the_last_step_interrupts_nothing(model: Model) -> None:
    with ctrl_c(STEPS):
        assert make(model).provenance.interrupted is None
    with ctrl_c(STEPS - 1):
        assert make(model).provenance.interrupted is None


def test_second_ctrl_c_interrupts_and_restores_the_model(model: Model, tmp_path: Path) -> None:
    def twice(event: ProgressEvent) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), report_progress(twice):
        make(model, out=tmp_path / "a")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "a").exists()
    assert all(p.requires_grad for p in model.module.parameters())


def test_ctrl_c_interrupts_direct_calls_and_other_work(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt), ctrl_c(2):
        methods[METHOD](model, Class(0), steps=4)
    with pytest.raises(KeyboardInterrupt), ctrl_c(1):
        run("pgd", model=model, images=torch.rand(1, 3, 12, 12), steps=3)


def test_ctrl_c_in_one_batch_keeps_the_others(model: Model) -> None:
    complete = make(model)
    with ctrl_c(4):
        result = make(model, batch_size=1, frames=3)
    assert result.images.shape == complete.images.shape and result.scores.shape == (5, 2)
    torch.testing.assert_close(result.scores[:5, 0], complete.scores[:5, 0])
    assert torch.equal(result.scores[:, 1], result.scores[:1, 1].expand(5))  # one step is taken
    assert len(result.frames) == 2


@pytest.mark.parametrize(
    "more",
    [{}, {"optimizer": "sgd", "parametrization": "pixels"}, {"optimizer": "normalized-sgd"}, {"frames": 4}],
    ids=str,
)
def test_same_run_resumes_after_ctrl_c(model: Model, tmp_path: Path, more: dict[str, Any]) -> None:
    out, complete = tmp_path / "a", make(model, **more)
    with ctrl_c(7):
        make(model, out=out, **more)
    saved = load_result(out)
    assert saved.provenance.interrupted and (tmp_path / ".a.unfinished").is_file()
    request = prepare(METHOD, model=model, target=[0, 3], steps=STEPS, seed=1, jitter=2, **more)
    assert not request.produced(saved) and request.produced(complete)
    assert "where it ended" in " ".join(replay(out, model=model).changed)
    with ctrl_c() as events:
        again = make(model, out=out, **more)
    assert len(events) == STEPS - 8
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    for name, value in complete.fields():
        resumed = getattr(again, name)
        assert torch.equal(value, resumed) if isinstance(value, torch.Tensor) else value == resumed


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_lbfgs_run_resumes_to_the_same_bits(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    arguments: dict[str, Any] = {"model": model, "sample": torch.rand(2, 3, 12, 12), "steps": 16, "seed": 0}
    complete = run("gram_texture", **arguments)

    def crash(event: ProgressEvent) -> None:
        if event.done == cut:
            raise OSError("the machine is gone")

    with pytest.raises(OSError, match="gone"), report_progress(crash):
        run("gram_texture", out=tmp_path / "a", **arguments)
    with ctrl_c() as events:
        again = run("gram_texture", out=tmp_path / "a", **arguments)
    assert len(events) == 16 - cut
    assert torch.equal(complete.images, again.images) and torch.equal(complete.scores, again.scores)


def test_saved_result_is_accepted_as_start(model: Model, tmp_path: Path) -> None:
    result = make(model, out=tmp_path / "a", parametrization="pixels")
    for start in (tmp_path / "a", str(tmp_path / "a"), result, result.images):
        more = make(model, start=start, steps=1, lr=1e-6, parametrization="pixels", blur_every=0)
        assert (more.images - result.images).abs().max() < 1e-5
    one = make(model, start=result.images[:1], steps=1, lr=1e-6, blur_every=0)
    assert (one.images[1] - result.images[0]).abs().max() < 1e-3
    assert replay(make(model, start=result, steps=3).save(tmp_path / "b"), model=model).same


def test_frames_are_intermediate_images(model: Model, tmp_path: Path) -> None:
    result = make(model, frames=4)
    assert result.frames.shape == (4, 2, 3, 12, 12) and result.frames.dtype == torch.uint8
    for frame, steps in zip(result.frames, (3, 6, 9, 12), strict=True):
        assert torch.equal(frame, (make(model, steps=steps).images * 255).round().byte())
    assert len(make(model, frames=50).frames) == STEPS
    folder = result.save(tmp_path / "a")
    with Image.open(folder / "film.gif") as animation:
        assert (animation.n_frames, animation.size) == (4, (24, 12))
    assert torch.equal(load_result(folder).frames, result.frames)
    assert not (make(model).save(tmp_path / "b") / "film.gif").exists()


def test_interrupted_command_saves_and_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", METHOD, "--target", "star", "--steps", "6", "--seed", "0", "--size", "16", "--out", "a"]
    with ctrl_c(2), pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 130
    captured = capsys.readouterr()
    assert "saved in a" in captured.out and "interrupted after 3 of 6 steps" in captured.err
    assert "resumes" in captured.err
    assert isinstance(load_result("a"), Synthesis)
    Path("request.json").write_text(json.dumps({"params": {"steps": 6, "seed": 0, "size": 16}, "out": "b"}))
    with ctrl_c(2), pytest.raises(SystemExit):
        main(["run", METHOD, "--json", "request.json"])
    assert json.loads(capsys.readouterr().out)["provenance"]["interrupted"] == "after 3 of 6 steps"
    with contextlib.suppress(SystemExit):
        main(words)
    assert load_result("a").provenance.interrupted is None


def test_other_signal_handlers_and_threads_are_not_affected() -> None:
    ours = lambda number, frame: None
    signal.signal(signal.SIGINT, ours)
    try:
        with allow_early_stop(), stoppable() as stop:
            assert signal.getsignal(signal.SIGINT) is ours
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = []

    def elsewhere() -> None:
        with allow_early_stop(), stoppable():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


# --- SIGTERM --------------------------------------------------------------------------------------


@contextmanager
def sigterm(*at: int, times: int = 1) -> Iterator[list[ProgressEvent]]:
    """Send SIGTERM after these numbers of progress events."""
    events: list[ProgressEvent] = []

    def listen(event: ProgressEvent) -> None:
        events.append(event)
        for _ in range(times if len(events) in at else 0):
            signal.raise_signal(signal.SIGTERM)

    with report_progress(listen):
        yield events


def assert_default_handlers() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_returns_the_result_of_the_steps_so_far(model: Model, tmp_path: Path) -> None:
    with sigterm(4):
        result = make(model, out=tmp_path / "a")
    assert_default_handlers()
    assert result.provenance.interrupted == f"after 5 of {STEPS} steps"
    assert torch.equal(result.images, make(model, steps=5).images)
    assert torch.equal(make(model, out=tmp_path / "a").images, make(model).images)


def test_second_sigterm_and_sigterm_in_other_work_interrupt(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt), sigterm(1, times=2):
        make(model)
    assert_default_handlers()
    with pytest.raises(SystemExit) as left, sigterm(1):
        run("pgd", model=model, images=torch.rand(1, 3, 12, 12), steps=3)
    assert left.value.code == 143
    assert_default_handlers()
    assert all(p.requires_grad for p in model.module.parameters())


def test_other_handlers_of_sigterm_are_not_replaced(model: Model) -> None:
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        with sigterm(2):
            assert make(model).provenance.interrupted is None
        assert received == [1]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("stoppable_work", [True, False])
def test_command_exits_with_143_after_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stoppable_work: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", METHOD, "--target", "star", "--steps", "6", "--seed", "0", "--size", "16", "--out", "a"]
    if not stoppable_work:
        words = ["run", "pgd", "--image", "builtin:scenes/1", "--steps", "4", "--out", "a"]
    with sigterm(2), pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 143
    assert_default_handlers()
    assert Path("a").exists() == stoppable_work


def test_a_termination_while_a_plugin_is_imported_does_not_break_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def terminate(_plugin: object) -> None:
        raise Terminated

    monkeypatch.setattr(plugins, "_timed_import", terminate)
    with pytest.raises(Terminated):
        plugins.load_plugin.__wrapped__(methods.plugins["phosphene:attribution.saliency"])
