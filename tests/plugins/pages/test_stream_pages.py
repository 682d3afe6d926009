"""The pages of a stream: 50 images on each, links between them, and no file of others replaced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from phosphene import InputError, TensorDataset, load_result, run
from phosphene.cli.main import main
from phosphene.results import ResultStream
from phosphene_plugins.pages import _stream_pages
from phosphene_plugins.pages._stream_pages import write_pages


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> ResultStream:
    images = torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    out = tmp_path_factory.mktemp("stream") / "fgsm"
    run("fgsm", images=TensorDataset(images), out=out, batch_size=4, progress=False)
    result = load_result(out)
    assert isinstance(result, ResultStream)
    return result


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stream_pages, "PAGE_IMAGES", 3)


@pytest.mark.usefixtures("small_pages")
def test_pages_hold_every_image_once(stream: ResultStream, tmp_path: Path) -> None:
    first = write_pages(stream, tmp_path, "fgsm")
    assert first == tmp_path / "index.html"
    pages = ["index.html", "page-02.html", "page-03.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == pages
    texts = [(tmp_path / name).read_text() for name in pages]
    numbers = [re.findall(r'id="image-(\d+)"', text) for text in texts]
    assert numbers == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert all(
        text.count('src="data:image/png;base64,') == 3 * len(n)
        for text, n in zip(texts, numbers, strict=True)
    )
    frame = stream.to_pandas()
    for text, rows in zip(texts, (range(3), range(3, 6), range(6, 7)), strict=True):
        for row in rows:
            assert f"<dd>{frame.prediction[row]}, {100 * frame.confidence[row]:.0f} %</dd>" in text
    assert 'rel="next" href="page-02.html"' in texts[0]
    assert 'rel="prev"' not in texts[0]
    assert 'rel="prev" href="index.html"' in texts[1]
    assert 'rel="next"' not in texts[2]


@pytest.mark.usefixtures("small_pages")
def test_pages_of_a_longer_stream_are_deleted(
    stream: ResultStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pages(stream, tmp_path, "fgsm")
    monkeypatch.setattr(_stream_pages, "PAGE_IMAGES", 50)
    (tmp_path / "notes.html").write_text("mine")
    write_pages(stream, tmp_path, "fgsm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "notes.html"]


def test_files_of_others_are_not_replaced(stream: ResultStream, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match="was not written by Phosphene"):
        write_pages(stream, tmp_path, "fgsm")
    assert (tmp_path / "index.html").read_text() == "<p>mine</p>"


def test_command(stream: ResultStream, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (
        (["pages", str(stream.folder), "--out", str(tmp_path / "pages")], 0),
        (["pages", str(saved_result(tmp_path)), "--out", str(tmp_path / "none")], 2),
    ):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == code
    printed = capsys.readouterr()
    assert printed.out.startswith("file://")
    assert "pages are written of a stream" in printed.err
    assert (tmp_path / "pages" / "index.html").is_file()


def saved_result(folder: Path) -> Path:
    run("jpeg", images="builtin:scenes/1", out=folder / "jpeg", progress=False)
    return folder / "jpeg"
