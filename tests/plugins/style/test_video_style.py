"""Video style transfer: still videos, hidden areas, reading and writing videos, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from phosphene import InputError, MissingExtra, Model, UnknownName, load_result, methods, run
from phosphene.builtin.clip import draw_clip
from phosphene.images import read_video, write_gif, write_mp4, write_png
from phosphene.roles import InputContext
from phosphene.roles.table import ROLES

video_style, neural_style = methods["style.video_style"], methods["style.neural_style"]


@pytest.fixture
def clip() -> Tensor:
    return draw_clip(3).frames[..., 8:40, 4:44].double()


@pytest.fixture
def styles() -> Tensor:
    return torch.rand(1, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_the_first_frame_and_frames_alone_are_those_of_neural_style(
    model: Model, clip: Tensor, styles: Tensor
) -> None:
    result = video_style(model, clip, styles, steps=4, compare=True, total_variation=2.0)
    plain = neural_style(model, clip, styles, steps=4, total_variation=2.0)
    torch.testing.assert_close(result.independent, plain.stylized, atol=1e-9, rtol=0)
    torch.testing.assert_close(result.stylized[0], plain.stylized[0], atol=1e-9, rtol=0)
    assert (result.flicker < 0.5 * result.independent_flicker).all()
    assert result.losses.shape == (4, 3) and result.flicker.shape == (2,)


def test_farneback_and_long_term_change_the_result(model: Model, clip: Tensor, styles: Tensor) -> None:
    plain, farneback, far = (
        video_style(model, clip, styles, steps=3, **options).stylized
        for options in ({}, {"flow": "farneback"}, {"long_term": (1, 2)})
    )
    assert not torch.equal(plain, farneback)
    assert torch.equal(plain[:2], far[:2]) and not torch.equal(plain[2], far[2])


def test_frames_are_shrunk_before_the_work(model: Model, clip: Tensor, styles: Tensor) -> None:
    result = video_style(model, clip, styles, steps=1, size=20)
    assert result.stylized.shape == (3, 3, 16, 20) and result.consistent.shape == (2, 16, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_term": (2, 2)}, "distances increase"),
        ({"size": 10}, "12 pixels a side or more"),
        ({"blend": [1, 2]}, "one weight each"),
    ],
)
def test_refusals(model: Model, clip: Tensor, styles: Tensor, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        video_style(model, clip, styles, steps=1, **options)


def test_without_opencv_the_extra_is_named(
    model: Model, clip: Tensor, styles: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtra, match=r"phosphene\[video\]"):
        video_style(model, clip, styles, steps=1)


def test_videos_in_and_out(tmp_path: Path, styles: Tensor) -> None:
    frames = draw_clip(4).frames
    write_mp4(list(frames), tmp_path / "film.mp4")
    write_gif(list(frames), tmp_path / "film.gif")
    (tmp_path / "frames").mkdir()
    for n, frame in enumerate(frames):
        write_png(frame, tmp_path / "frames" / f"{n:03d}.png")
    for name, tolerance in (("film.mp4", 0.05), ("film.gif", 0.05), ("frames", 0.003)):
        read = read_video(tmp_path / name)
        assert read.shape == frames.shape and (read - frames).abs().mean() < tolerance
    part = {"files": tmp_path / "film.mp4", "size": 32, "frames": 2, "start": 1, "every": 2}
    result = run("video_style", video=part, styles=["builtin:waves"], steps=1, fps=5)
    assert result.stylized.shape == (2, 3, 32, 32)
    result.save(tmp_path / "out")
    assert {"film.mp4", "film.gif", "picture.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    with Image.open(tmp_path / "out" / "film.gif") as film:
        assert film.info["duration"] == 200
    loaded = load_result(tmp_path / "out")
    assert torch.equal(loaded.stylized, result.stylized) and loaded.fps == 5
    for name in ("new.mp4", "new.gif"):
        assert loaded.save_video(tmp_path / name).is_file()
    with pytest.raises(InputError, match="is not overwritten"):
        loaded.save_video(tmp_path / "film.mp4")
    with pytest.raises(UnknownName, match=r"\.mp4"):
        loaded.save_video(tmp_path / "film.avi")
    with pytest.raises(InputError, match="cannot be written"):
        loaded.save_video(tmp_path / "nowhere" / "film.gif")


def test_figure_has_the_frames_and_their_flicker(model: Model, clip: Tensor, styles: Tensor) -> None:
    result = video_style(model, clip, styles, steps=2, compare=True)
    figure = result.figure()
    assert len(figure.axes) == 3 * 3 + 1
    assert figure.axes[-1].get_ylabel() == "flicker"
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["input", "each frame alone", "in the style"]
    assert result.lines()[0].startswith("flicker, input: 0.")
    assert len(video_style(model, clip, styles, steps=1).figure().axes) == 2 * 3 + 1


def test_videos_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.gif").write_text("no animation")
    (tmp_path / "notes.txt").write_text("no suffix")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "one.gif")
    (tmp_path / "sizes").mkdir()
    for n in (8, 9):
        Image.fromarray(np.zeros((n, 8, 3), np.uint8)).save(tmp_path / "sizes" / f"{n}.png")
    for name, message in (
        ("text.mp4", "cannot be read as a video"),
        ("text.gif", "cannot be read as an animation"),
        ("notes.txt", "is no video"),
        ("missing.mp4", "no video file or folder"),
        ("one.gif", "two frames or more"),
        ("sizes", "frames of a video have one size"),
    ):
        with pytest.raises(InputError, match=message):
            read_video(tmp_path / name)


def test_a_video_of_too_many_pixels_is_refused_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gif(list(draw_clip(4).frames), tmp_path / "film.gif")
    monkeypatch.setattr("phosphene.images.video._MOST_PIXELS", 3 * 64 * 64)
    with pytest.raises(InputError, match="in its first 4 frames: read it smaller or in parts"):
        read_video(tmp_path / "film.gif")
    assert read_video(tmp_path / "film.gif", frames=3).shape == (3, 3, 64, 64)
    assert read_video(tmp_path / "film.gif", size=32).shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("builtin:clip/1", InputError), ("builtin:clip/x", InputError), ("builtin:waves", UnknownName),
        ({"frames": 3}, InputError), ({"files": "builtin:clip", "speed": 2}, UnknownName),
        ({"files": "builtin:clip", "every": 0}, InputError),
        ({"files": "builtin:clip", "size": 32}, InputError),
        ({"files": torch.zeros(2, 3, 8, 8), "frames": 2}, InputError),
    ],
)  # fmt: skip
def test_invalid_videos_are_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ROLES["video"].read(value, InputContext())


def test_parts_of_a_bundled_clip_and_tensors_are_read() -> None:
    clip, role = draw_clip(6), ROLES["video"]
    part = role.read({"files": "builtin:clip/6", "start": 1, "every": 2, "frames": 2}, InputContext())
    assert torch.equal(part, clip.frames[[1, 3]])
    assert role.read(clip.frames[:2], InputContext()).shape == (2, 3, 64, 64)
    for count in (1, 17):
        with pytest.raises(ValueError, match="2 to 16 frames"):
            draw_clip(count)
    last = draw_clip(16)
    assert last.masks.flatten(1).any(1).all() and last.flows.shape == (15, 2, 64, 64)
