"""The command line: start-up time, error messages, options, plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from phosphene import load_result, method, methods
from phosphene.builtin.networks import load_network
from phosphene.cli.main import main
from phosphene.errors import UnknownName
from phosphene.images import write_png
from phosphene.results import Attribution
from phosphene.roles import Images, Model
from phosphene.runs import run as running

THIRD_PARTY = '''
"""A method with a parameter of every kind, and a command."""
import sys
from typing import Annotated, Literal
from pydantic import Field
from phosphene import hookimpl, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Seed, Target

@method(family="tests")
def kinds(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    scale: Annotated[float, Field(gt=0, le=10, description="a factor [of sorts]")] = 1.0,
    names: list[str] = ["a"],
    sizes: list[int] | None = None,
    mode: Literal["plain", "fancy"] = "plain",
    fast: bool = True,
    weights: dict[str, float] = {},
    limit: int | None = 3,
    quiet: str = "",
    seed: Seed = None,
) -> Attribution:
    """Show the red channel of an image."""
    return Attribution(images=images, maps=scale * images[:, 0], targets=target.names(model, len(images)))

@hookimpl
def phosphene_methods():
    return [kinds]
'''
COMMANDS = '''
from phosphene.registry import hookimpl

@hookimpl
def phosphene_commands(app):
    @app.command()
    def shout(word: str) -> None:
        """Say it loudly."""
        print(word.upper())
'''
ENTRY_POINTS = """
[phosphene.methods.v1]
tests.kinds = stranger_kinds
tests.gone = stranger_gone
tests.torn = stranger_torn
[phosphene.methods.v2]
tests.later = stranger_later
[phosphene.extensions.v1]
commands = stranger_commands
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which another distribution is installed."""
    folder = tmp_path_factory.mktemp("stranger")
    info = folder / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "stranger_kinds.py").write_text(THIRD_PARTY)
    (folder / "stranger_commands.py").write_text(COMMANDS)
    (folder / "stranger_torn.py").write_text("def (")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "TERM": "dumb", "COLUMNS": "160"}


def shell(
    *words: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter; the last line of its output lists slow imports.

    (Typer itself imports pydantic to read options; the modules that are listed take seconds to import.)
    """
    code = (
        "import sys\nfrom phosphene.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print([m for m in ('torch', 'numpy', 'phosphene.spec') if m in sys.modules])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def phosphene(*words: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["list"], ["list", "--json"], ["run", "--help"]]
)
def test_help_and_list_import_no_torch_and_build_no_spec(words: list[str]) -> None:
    done = shell(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    if "--version" not in words:
        assert "pgd" in done.stdout or "list" in done.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("phosphene sho", ["show"]),
        ("phosphene show sal", ["saliency", "saliency_segmentation"]),
        ("phosphene run sal", ["saliency", "saliency_segmentation"]),
        ("phosphene run pgd --st", ["--step-size", "--steps", "--stream"]),
        ("phosphene run pgd --im", ["--image", "--image-size"]),
    ],
)
def test_completion_offers_names_and_options_without_torch(line: str, offered: list[str]) -> None:
    words = line.split()
    completing = {
        "_PHOSPHENE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = shell(env={**os.environ, **completing})
    *completions, imported = done.stdout.split("\n")[: len(done.stdout.splitlines())]
    assert imported == "[]"
    assert sorted(completions) == sorted(offered)


def test_show_completion_imports_no_torch() -> None:
    quiet = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = shell("--show-completion", "bash", env={**os.environ, **quiet})
    assert done.returncode == 0
    assert "_PHOSPHENE_COMPLETE" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_list_names_every_method_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert phosphene("list", "--json") == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(methods)
    assert rows["attribution.saliency"]["summary"] == methods["saliency"].spec.summary
    assert phosphene("list") == 0
    text = capsys.readouterr().out
    assert all(method.spec.short_name in text and method.spec.summary in text for method in methods.values())
    assert text.index("Attribution") < text.index("saliency") < text.index("Attacks") < text.index("pgd")


def test_show_prints_the_spec(capsys: pytest.CaptureFixture[str]) -> None:
    spec = methods["pgd"].spec
    assert phosphene("show", "pgd", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(spec.model_dump(mode="json")))
    assert phosphene("show", "pgd") == 0
    output = capsys.readouterr().out
    for word in ("step_size", "0.03137", "> 0", "linf|l2", "within ball", spec.references[0].url, "--labels"):
        assert word in output


def test_help_of_a_method_follows_its_schema(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # so that no default is broken into two lines
    assert phosphene("run", "pgd", "--help") == 0
    output = " ".join(capsys.readouterr().out.split())
    for word in ("--eps", "--no-random-start", "linf|l2", "default 0.03137", "--weights", "--image", "FLOAT"):
        assert word in output


def test_run_is_saved_printed_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result"
    words = ["run", "pgd", "--eps", "8/255", "--steps", "2", "--seed", "3", "--no-random-start"]
    assert phosphene(*words, "--image", "builtin:scenes/2", "--labels", "star,square", "--out", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines[:-1]] == ["000", "001"]
    assert "->" in lines[0]
    assert str(out) in lines[-1]
    result = load_result(out)
    assert result.provenance is not None
    params = {"eps": 8 / 255, "steps": 2, "seed": 3, "random_start": False, "norm": "linf"}
    assert params.items() <= result.provenance.params.items()
    assert result.labels.tolist() == [6, 5]  # type: ignore[attr-defined]
    assert phosphene("replay", str(out)) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_image_target_and_quiet_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_png(torch.rand(3, 80, 90), tmp_path / f"{name}.png")
    words = ["--image", "a.png", "--image", "b.png", "--target", "heart", "--batch-size", "1", "--quiet"]
    assert phosphene("run", "saliency", *words) == 0
    assert capsys.readouterr() == ("", "")
    result = load_result(tmp_path / "phosphene-out" / "saliency")
    assert result.targets == ("heart", "heart")  # type: ignore[attr-defined]
    assert result.provenance is not None
    assert result.provenance.batch_size == 1
    assert phosphene("run", "saliency", "--image", ".", "--out", "folder", "--quiet") == 0
    # The folder's two images, and the image files of the result inside the folder.
    assert len(load_result("folder").images) > 2  # type: ignore[attr-defined]


def test_model_options_reach_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "other.safetensors"
    save_file(load_network("shapes-vgg").state_dict(), weights)
    words = ["run", "saliency", "--model", "builtin:shapes-vgg", "--weights", str(weights), "--pretrained"]
    assert phosphene(*words, "--image", "builtin:scenes/1", "--out", str(tmp_path / "s")) == 0
    result = load_result(tmp_path / "s")
    assert result.provenance is not None
    assert result.provenance.model is not None
    asked = {"uri": "builtin:shapes-vgg", "weights": str(weights), "pretrained": True}
    assert result.provenance.model["source"] == asked
    capsys.readouterr()
    assert phosphene("run", "saliency", "--pretrained") == 2
    assert "--model" in capsys.readouterr().err
    assert phosphene("run", "saliency", "--model", "timm:resnet18", "--model", "timm:resnet34") == 2
    assert capsys.readouterr().err.startswith("phosphene: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "pdg"], "did you mean 'pgd'"),
        (["show", "pdg"], "did you mean 'pgd'"),
        (["run", "pgd", "--eps", "5000"], "eps"),
        (["run", "pgd", "--steps", "many"], "steps='many'"),
        (["run", "pgd", "--labels", "cat"], "no class 'cat'"),
        (["run", "saliency", "--target", "layer9[3]"], "layer9"),
        (["run", "saliency", "--image", "nowhere.png"], "nowhere.png"),
        (["run", "saliency", "--model", "builtin:nothing"], "nothing"),
        (["models", "no-such-model"], "no-such-model"),
        (["layers", "shapes"], "scheme:name"),
        (["replay", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert phosphene(*words) == 2
    output = capsys.readouterr().err
    assert output.startswith("phosphene: ")
    assert output.count("\n") == 1
    assert message in output


def test_debug_raises_the_error() -> None:
    with pytest.raises(UnknownName, match="pdg"):
        main(["run", "pdg", "--debug"])


def test_folder_with_other_files_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diary.txt").write_text("my diary")
    monkeypatch.setattr(running, "execute", lambda *_: pytest.fail("the work was begun"))
    assert phosphene("run", "saliency", "--out", str(tmp_path)) == 2
    assert "files other than a result" in capsys.readouterr().err


def test_full_disk_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running, "run", full)
    assert phosphene("run", "saliency") == 2
    assert capsys.readouterr().err == "phosphene: [Errno 28] No space left on device\n"


def test_interrupt_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run", interrupted)
    assert phosphene("run", "saliency") == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_models_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert phosphene("models", "builtin:*") == 0
    assert "builtin:shapes-vgg" in capsys.readouterr().out.split()
    assert phosphene("models", "mobilenet_v2") == 0
    assert "torchvision:mobilenet_v2" in capsys.readouterr().out.split()
    assert phosphene("layers", "builtin:shapes-vgg") == 0
    output = capsys.readouterr().out
    for word in ("features.10", "Conv2d", "96x16x16", "last map", "CAM weights"):
        assert word in output


def test_every_kind_of_parameter_is_parsed(stranger: dict[str, str], tmp_path: Path) -> None:
    words = [
        "--scale",
        "1e-1",
        "--names",
        "x,y",
        "--names",
        "z",
        "--sizes",
        "1,2",
        "--mode",
        "fancy",
        "--no-fast",
    ]
    words += ["--kinds-weights", "a=1,b=2.5", "--limit", "none", "--kinds-quiet", "text", "--seed", "5"]
    done = shell("run", "kinds", *words, "--out", "here", env=stranger, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "here" / "result.json").read_text())["provenance"]["params"] == {
        "scale": 0.1, "names": ["x", "y", "z"], "sizes": [1, 2], "mode": "fancy", "fast": False,
        "weights": {"a": 1.0, "b": 2.5}, "limit": None, "quiet": "text", "seed": 5,
    }  # fmt: skip


def test_third_party_method_and_command_are_listed(stranger: dict[str, str]) -> None:
    listed = shell("list", env=stranger)
    assert "kinds" in listed.stdout
    assert "Show the red channel of an image." in listed.stdout
    assert listed.stdout.count("its module cannot be read") == 2
    assert listed.stdout.splitlines()[-1] == "[]"
    helped = shell("run", "kinds", "--help", env=stranger)
    for word in ("--kinds-quiet", "--kinds-weights", "a factor [of sorts]", "plain|fancy"):
        assert word in helped.stdout
    shouted = shell("shout", "hello", env=stranger)
    assert shouted.stdout.splitlines() == ["HELLO", "[]"]
    assert "shout" in shell("--help", env=stranger).stdout


def test_plugins_command_reports_broken_and_incompatible_plugins(stranger: dict[str, str]) -> None:
    done = shell("plugins", "--debug", env=stranger)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert lines["attribution.saliency"].rstrip().endswith("ok")
    assert lines["tests.kinds"].rstrip().endswith("ok")
    assert "broken: ModuleNotFoundError" in lines["tests.gone"]
    assert "broken: SyntaxError" in lines["tests.torn"]
    assert "written for phosphene.methods.v2" in lines["tests.later"]
    assert "Traceback (most recent call last)" in done.stdout


def test_a_method_with_a_parameter_called_method_runs(tmp_path: Path) -> None:
    out = tmp_path / "game"
    assert (
        phosphene("run", "pointing_game", "--method", "saliency", "--max-images", "2", "--out", str(out)) == 0
    )
    assert load_result(out).provenance.params["method"] == "saliency"


def test_parameter_cannot_be_named_like_an_argument_of_run() -> None:
    with pytest.raises(TypeError, match="'out' means something to run"):

        @method(family="tests")
        def greedy(model: Model, images: Images, *, out: str = "") -> Attribution:
            """Use a reserved parameter name."""
