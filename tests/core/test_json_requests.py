"""Runs as JSON: requests, responses, events, predicted cost and recognized results."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import InputError, UnknownName, load_model, load_result, methods, prepare, read_images, run
from phosphene.cli.main import main
from phosphene.images import write_png
from phosphene.results import AdversarialExamples, Result
from phosphene.runs import run as running

ROOT = Path(__file__).parents[2]
REQUEST = {
    "inputs": {
        "images": "builtin:scenes/2",
        "labels": ["star", "square"],
        "model": {"uri": "builtin:shapes-vgg"},
    },
    "params": {"steps": 2, "eps": 0.02, "seed": 3},
    "batch_size": 1,
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    """Run the command line: its exit code, the JSON it prints, and its standard error."""
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    return int(end.value.code or 0), json.loads(captured.out), captured.err


def write_request(request: Any, file: str = "request.json") -> str:
    Path(file).write_text(request if isinstance(request, str) else json.dumps(request))
    return file


# --- requests and answers ---------------------------------------------------------------------


def test_request_is_run_and_the_response_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, _ = ask(capsys, "run", "pgd", "--json", write_request(REQUEST | {"out": "here"}))
    assert code == 0
    result = load_result("here")
    assert isinstance(result, AdversarialExamples)
    assert result.provenance is not None
    assert answer["provenance"] == result.provenance.model_dump(mode="json")
    assert answer["type"] == "AdversarialExamples"
    assert answer["folder"] == str(Path("here").resolve())
    assert set(answer["files"]) == {
        "arrays.safetensors", "picture.png", "pictures/000.png", "pictures/001.png", "result.json"
    }  # fmt: skip
    assert answer["lines"] == result.lines()
    assert answer["seconds"] >= result.provenance.seconds
    same = run("pgd", images="builtin:scenes/2", labels=["star", "square"], steps=2, eps=0.02, seed=3)
    assert isinstance(same, AdversarialExamples)
    assert torch.equal(result.adversarial, same.adversarial)
    assert result.provenance.batch_size == 1


def test_provenance_of_a_response_repeats_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    _, first, _ = ask(capsys, "run", "pgd", "--json", write_request(REQUEST | {"out": "first"}))
    how = first["provenance"]
    again = {"params": how["params"], "inputs": REQUEST["inputs"] | {"model": how["model"]["source"]}}
    _, second, _ = ask(capsys, "run", "pgd", "--json", write_request(again | {"out": "second"}))
    assert second["provenance"]["model"] == how["model"]
    one, other = load_result("first"), load_result("second")
    assert isinstance(one, AdversarialExamples) and isinstance(other, AdversarialExamples)
    assert torch.equal(one.adversarial, other.adversarial)


def test_empty_request_from_standard_input_uses_the_default_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    code, answer, _ = ask(capsys, "run", "saliency", "--json", "-")
    assert code == 0
    assert answer["folder"] == str(Path("phosphene-out", "saliency").resolve())


def test_options_extend_a_request_but_cannot_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    file = write_request(REQUEST)
    code, answer, _ = ask(capsys, "run", "pgd", "--json", file, "--norm", "l2", "--out", "here")
    assert code == 0
    assert answer["provenance"]["params"]["norm"] == "l2"
    assert answer["folder"].endswith("here")
    for option in ("--steps", "--image", "--batch-size"):
        code, answer, stderr = ask(capsys, "run", "pgd", "--json", file, option, "3")
        assert code == 2
        assert f"{option} is set in --json request.json, too" in answer["error"]["message"]
        assert answer["error"]["message"] in stderr


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"parms": {}}, r"request\.json: no key 'parms'; .* did you mean 'params'\?"),
        ({"params": {"epz": 1}}, r"no parameter 'epz'; .* did you mean 'eps'"),
        ({"params": {"model": "x"}}, "no parameter 'model'"),
        ({"params": {"eps": 5000}}, r"eps=5000 should be less than"),
        ({"params": {"steps": 2.5}}, r"steps=2\.5"),
        ({"params": [1]}, r"request\.json: params=\[1\] should be a mapping"),
        ({"inputs": {"image": "x"}}, r"no input 'image'; .* did you mean 'images'\?"),
        ({"inputs": {"images": 5}}, "5"),
        ({"inputs": {"images": {"a": 1}}}, "."),
        ({"inputs": {"labels": {"a": 1}}}, "labels must be classes"),
        ({"inputs": {"labels": ["starr"]}}, "did you mean 'star'"),
        ({"inputs": {"model": 5}}, "int"),
        ({"inputs": {"model": {"weights": "x"}}}, '"uri"'),
        ({"inputs": {"model": {"uri": "builtin:shapes-vgg", "weights": 5}}}, "weights"),
        ({"inputs": {"model": {"uri": "builtin:shapes-vgg", "wieghts": "x"}}}, "wieghts"),
        ({"batch_size": 0}, r"batch_size=0 should be greater"),
        ({"executor": "far-away"}, "no executor 'far-away'"),
        ({"device": "nowhere"}, "nowhere"),
        ({"out": "request.json"}, "is a file"),
        ([1], "should be a mapping"),
        ("[1", r"request\.json is not JSON"),
        ("", r"request\.json is not JSON"),
    ],
    ids=str,
)
def test_invalid_request_is_refused_before_any_work(
    request_: Any, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "execute", lambda *_: pytest.fail("it was run"))
    code, answer, stderr = ask(capsys, "run", "pgd", "--json", write_request(request_))
    assert code == 2
    assert list(answer) == ["error"]
    assert re.search(message, answer["error"]["message"])
    assert stderr == f"phosphene: {answer['error']['message']}\n"


def test_errors_of_other_commands_are_json_with_the_json_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["run", "pdg", "--json", "request.json"], ["show", "pdg", "--json"]):
        code, answer, _ = ask(capsys, *words)
        assert (code, answer["error"]["type"]) == (2, "UnknownName")
        assert "did you mean 'pgd'" in answer["error"]["message"]
    code, answer, _ = ask(capsys, "run", "pgd", "--json=nowhere.json")
    assert code == 2
    assert "nowhere.json cannot be read" in answer["error"]["message"]


def test_exception_is_reported_as_json_and_raised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> Result:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(running, "execute", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["run", "pgd", "--json", write_request(REQUEST)])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"type": "RuntimeError", "message": "out of memory"}


def test_printed_text_does_not_reach_the_response(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = running.execute

    def chatty(prepared: Any) -> Result:
        print("here I am")
        return execute(prepared)

    monkeypatch.setattr(running, "execute", chatty)
    code, answer, stderr = ask(capsys, "run", "pgd", "--json", write_request(REQUEST))
    assert code == 0
    assert answer["type"] == "AdversarialExamples"
    assert "here I am" in stderr


def test_events_are_lines_of_json_on_standard_error() -> None:
    code = "import sys; from phosphene.cli import main; main(sys.argv[1:])"
    words = ["run", "pgd", "--json", "-", "--events"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        input=json.dumps(REQUEST), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["type"] == "AdversarialExamples"
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    steps = {"event": "progress", "description": events[0]["description"], "total": 2, "note": ""}
    # One image at a time, two steps each.
    assert events == [steps | {"done": done} for done in (1, 2, 1, 2)]


def test_documented_requests_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "programs.md").read_text()
    request = json.loads(next(iter(re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL))))
    code, answer, _ = ask(capsys, "run", "pgd", "--json", write_request(request))
    assert code == 0
    assert answer["folder"].endswith(request["out"])
    assert all(f"`{key}`" in page for key in answer)


def test_typed_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "tests" / "typing" / "program.py"), run_name="__main__")
    assert "3.0 brightness" in capsys.readouterr().out


# --- predicted cost, recognized results --------------------------------------------------


def test_prepared_run_predicts_its_passes() -> None:
    request = prepare("pgd", images="builtin:scenes/3", steps=4, random_start=False)
    spec = methods["pgd"].spec
    assert spec.cost is not None
    assert request.passes() == spec.cost.evaluate({"steps": 4, "restarts": 1, "eot_samples": 1}, images=3)
    sample = prepare("nearest_neighbors", images="builtin:scenes/2", dataset="builtin:scenes/7", k=2)
    assert sample.passes() == (9, 0)


def test_prepared_run_recognizes_only_its_own_result() -> None:
    model = load_model("builtin:shapes-vgg")
    how: dict[str, Any] = {"model": model, "images": "builtin:scenes/2", "steps": 1}
    saved = run("pgd", **how, seed=5, out="saved") and load_result("saved")
    assert prepare("pgd", **how, seed=5).produced(saved)
    assert prepare("pgd", **how).produced(saved), "any seed will do where none is asked for"
    assert prepare("attacks.pgd", **how | {"model": "builtin:shapes-vgg"}, seed=5).produced(saved)
    for name, other in (
        ("pgd", {"seed": 6}),
        ("pgd", {"eps": 0.02}),
        ("pgd", {"images": "builtin:scenes/3"}),
        ("pgd", {"images": read_images("builtin:scenes/2").flip(0)}),
        ("pgd", {"labels": ["heart", "heart"]}),
        ("pgd", {"model": "builtin:shapes-resnet", "labels": ["star", "square"]}),
        ("saliency", {}),
    ):
        arguments = how | other if name == "pgd" else {"images": "builtin:scenes/2"}
        assert not prepare(name, **arguments).produced(saved), (name, other)
    with torch.no_grad():
        next(model.module.parameters()).add_(0.1)
    assert not prepare("pgd", **how, seed=5, labels=["star", "square"]).produced(saved)


def test_results_of_callables_are_never_recognized() -> None:
    def first(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0]

    images = "builtin:scenes/1"
    run("saliency", images=images, target=first, out="called")
    assert not prepare("saliency", images=images, target=first).produced(load_result("called"))
    assert not prepare("saliency", images=images).produced(load_result("called"))
    dataset = torch.rand(3, 3, 64, 64)
    run("nearest_neighbors", images=images, dataset=dataset, k=1, out="near")
    assert not prepare("nearest_neighbors", images=images, dataset=dataset, k=1).produced(load_result("near"))


def test_prepare_checks_everything_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods["saliency"], "function", lambda **_: pytest.fail("it was run"))
    assert prepare("saliency").passes() == (4, 4)
    with pytest.raises(UnknownName, match="no executor 'cluster'"):
        prepare("saliency", executor="cluster")
    with pytest.raises(UnknownName, match="no parameter"):
        prepare("saliency", steps=3)
    with pytest.raises(InputError, match="one class each"):
        prepare("saliency", images="builtin:scenes/3", target=["star", "heart"])
    with pytest.raises(UnknownName, match="layer9"):
        prepare("grad_cam", layer="layer9")


def test_read_images_reads_like_run() -> None:
    for name in ("a", "b"):
        write_png(torch.rand(3, 80, 90), Path(f"{name}.png"))
    model = load_model("builtin:shapes-vgg")
    assert read_images(["a.png", "b.png"]).shape == (2, 3, 80, 90)
    assert torch.equal(read_images(".", model), run("saliency", images=["a.png", "b.png"]).inputs["images"])
    assert torch.equal(read_images("builtin:scenes/2", model), read_images("builtin:scenes/2"))
    with pytest.raises(InputError, match="nowhere"):
        read_images("nowhere.png")
