"""``phosphene batch``: a plan is checked before anything runs, executed, resumed and reported on one page."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import InputError, load_result, run
from phosphene.cli.main import main
from phosphene.images import write_png
from phosphene.results import AdversarialExamples, Result
from phosphene_plugins.batch import _execute_plan as work
from phosphene_plugins.batch._execute_plan import Batch, open_batch
from phosphene_plugins.batch._plan import Plan, folder_name, read_plan
from phosphene_plugins.batch._report import Report

ROOT = Path(__file__).parents[3]
PLAN = """
title: A <small> plan
out: out
models:
  - builtin:shapes-vgg
  - {uri: builtin:shapes-resnet, name: resnet}
images:
  - builtin:scenes/2
  - {name: a star, images: builtin:scenes/1, target: star}
methods:
  - saliency
  - {method: grad_cam, name: early, models: [shapes-vgg], params: {layer: features.5}}
  - method: pgd
    params: {steps: 1}
    grid: {eps: [2/255, 8/255]}
  - first_layer_filters
  - {method: fast_style, params: {style: waves}}
"""
FOLDERS = {
    *(f"saliency/{m}/{i}" for m in ("shapes-vgg", "resnet") for i in ("scenes-2", "a-star")),
    *(f"pgd-eps=2-255/{m}/{i}" for m in ("shapes-vgg", "resnet") for i in ("scenes-2", "a-star")),
    *(f"pgd-eps=8-255/{m}/{i}" for m in ("shapes-vgg", "resnet") for i in ("scenes-2", "a-star")),
    *(f"early/shapes-vgg/{i}" for i in ("scenes-2", "a-star")),
    *(f"first_layer_filters/{m}" for m in ("shapes-vgg", "resnet")),
    *(f"fast_style/{i}" for i in ("scenes-2", "a-star")),
}  # fmt: skip
SMALL = "out: out\nimages: [builtin:scenes/1]\nmethods: [saliency, grad_cam, activation_maps]\n"


def write_plan(text: str, file: str = "plan.yaml") -> str:
    Path(file).write_text(text)
    return file


def batch(*words: str) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main(["batch", *words])
    return int(end.value.code or 0)


def report() -> Any:
    """The last report, parsed from JSON."""
    return json.loads(Path("out/report.json").read_text())


def states() -> dict[str, str]:
    """The state of each run, by its folder."""
    return {entry["folder"].removeprefix("results/"): entry["state"] for entry in report()["runs"]}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that run while the fixture is active."""
    names: list[str] = []

    def record(name: str, **arguments: Any) -> Result:
        names.append(name)
        return run(name, **arguments)

    monkeypatch.setattr(work, "run", record)
    return names


# --- a complete plan --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert batch(write_plan(PLAN)) == 0
    return folder / "out"


def test_every_combination_has_a_folder(done: Path) -> None:
    folders = {path.parent.relative_to(done / "results").as_posix() for path in done.rglob("result.json")}
    assert folders == FOLDERS
    assert {path.name for path in done.iterdir()} == {"results", "report.html", "report.json"}


def test_results_equal_single_runs(done: Path) -> None:
    attacked = load_result(done / "results" / "pgd-eps=8-255" / "resnet" / "a-star")
    assert isinstance(attacked, AdversarialExamples)
    how = attacked.provenance
    assert how is not None
    assert how.params | {"eps": 8 / 255, "steps": 1, "seed": 0} == how.params
    assert how.model is not None
    assert how.model["source"]["uri"] == "builtin:shapes-resnet"
    single = run(
        "pgd", model="builtin:shapes-resnet", images="builtin:scenes/1", eps=8 / 255, steps=1, seed=0
    )
    assert isinstance(single, AdversarialExamples)
    assert torch.equal(attacked.adversarial, single.adversarial)
    output = load_result(done / "results" / "saliency" / "resnet" / "a-star")
    assert output.targets == ("star",)  # type: ignore[attr-defined]


def test_json_report_has_every_run(done: Path) -> None:
    document = json.loads((done / "report.json").read_text())
    assert document["counts"] == {"completed": len(FOLDERS)}
    assert {entry["folder"].removeprefix("results/") for entry in document["runs"]} == FOLDERS
    assert document["models"]["resnet"]["source"]["uri"] == "builtin:shapes-resnet"
    for entry in document["runs"]:
        saved = load_result(done / entry["folder"])
        assert saved.provenance is not None
        assert entry["provenance"] == saved.provenance.model_dump(mode="json")
        assert entry["lines"] == saved.lines()
        assert entry["error"] is None
    saliency = next(
        entry for entry in document["runs"] if entry["folder"] == "results/saliency/resnet/scenes-2"
    )
    assert (saliency["forward"], saliency["backward"]) == (2, 2)
    assert (saliency["method"], saliency["model"], saliency["images"]) == ("saliency", "resnet", "scenes/2")


def test_page_is_one_file_with_a_table_per_set_of_images(done: Path) -> None:
    page = (done / "report.html").read_text()
    assert "A &lt;small&gt; plan" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) > len(FOLDERS)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["scenes/2", "a star", "Without images"]
    assert re.findall(r"<th>([^<]+)</th>", page) == ["shapes-vgg", "resnet"] * 3
    rows = ["saliency", "early", "pgd eps=2/255", "pgd eps=8/255", "fast_style"]
    headings = [heading.replace("<wbr>", "") for heading in re.findall(r"<h3>(.*?)</h3>", page)]
    assert headings == [*rows, *rows, "first_layer_filters"]
    links = [html.unescape(link) for link in re.findall(r'href="(results/[^"]*)"', page)]
    assert {Path(link).parent.as_posix().removeprefix("results/") for link in links} == {
        folder.replace("=", "%3D") for folder in FOLDERS
    }
    assert all((done / link.replace("%3D", "=")).is_file() for link in links)


def test_large_and_many_images_are_reduced() -> None:
    write_png(torch.rand(3, 700, 900), Path("large.png"))
    plan = "images: [large.png, builtin:scenes/14]\nmethods: [fast_style]\nout: out\n"
    assert batch(write_plan(plan)) == 0
    merged = Report(open_batch(read_plan("plan.yaml"), Path("out")))
    for outcome in merged.batch.outcomes():
        merged.add(outcome)
    large, many = (next(iter(section.rows.values()))[None] for section in list(merged.sections.values())[:2])
    assert max(large.rows[0][0].image.shape) == 640
    assert large.more == 0
    assert (sum(map(len, many.rows)), many.more) == (12, 2)
    assert "and 2 more" in Path("out/report.html").read_text()


def test_models_are_loaded_and_images_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, read = [], []
    load, read_images = work.load_model, work.read_images
    monkeypatch.setattr(work, "load_model", lambda uri, **options: loaded.append(uri) or load(uri, **options))
    monkeypatch.setattr(work, "read_images", lambda *args: read.append(args) or read_images(*args))
    assert batch(write_plan(SMALL)) == 0
    assert loaded == ["builtin:shapes-vgg"]
    assert len(read) == 1


# --- resuming ---------------------------------------------------------------------------------


def test_saved_results_are_reused_and_missing_ones_computed(runs: list[str]) -> None:
    plan = write_plan(SMALL)
    assert batch(plan) == 0
    assert batch(plan) == 0
    assert runs == ["saliency", "grad_cam", "activation_maps"]
    assert set(states().values()) == {"reused"}
    runs.clear()
    results = Path("out/results")
    shutil.rmtree(results / "saliency")
    arrays = results / "grad_cam" / "shapes-vgg" / "scenes-1" / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:100])
    assert batch(plan) == 0
    assert runs == ["saliency", "grad_cam"]
    assert [*states().values()] == ["completed", "completed", "reused"]
    assert load_result(arrays.parent).provenance is not None


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        (
            "result.json",
            lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 99')),
        ),
        ("picture.png", Path.unlink),
        ("arrays.safetensors", Path.unlink),
    ],
)
def test_damaged_result_is_computed_again(file: str, spoil: Callable[[Path], Any], runs: list[str]) -> None:
    plan = write_plan("out: out\nimages: [builtin:scenes/1]\nmethods: [saliency]\n")
    assert batch(plan) == 0
    spoil(Path("out/results/saliency/shapes-vgg/scenes-1", file))
    assert batch(plan) == 0
    assert runs == ["saliency", "saliency"]
    assert batch(plan) == 0
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("steps: 1", "steps: 2"),
        ("seed: 0", "seed: 1"),
        ("builtin:scenes/1", "picture.png"),
        ("builtin:shapes-vgg", "builtin:shapes-resnet"),
        ("labels: heart", "labels: star"),
    ],
)
def test_changed_parameter_seed_image_model_or_label_is_computed_again(
    old: str, new: str, runs: list[str]
) -> None:
    write_png(torch.rand(3, 64, 64), Path("picture.png"))
    plan = (
        "out: out\nseed: 0\nmodels: [{name: it, uri: builtin:shapes-vgg}]\n"
        "images: [{name: them, images: builtin:scenes/1, labels: heart}]\n"
        "methods: [{method: pgd, params: {steps: 1}}]\n"
    )
    assert batch(write_plan(plan)) == 0
    assert batch(write_plan(plan.replace(old, new))) == 0
    assert runs == ["pgd", "pgd"]
    assert states() == {"pgd/it/them": "completed"}


def test_changed_image_file_is_computed_again(runs: list[str]) -> None:
    write_png(torch.rand(3, 64, 64), Path("picture.png"))
    plan = write_plan("out: out\nimages: [picture.png]\nmethods: [saliency]\n")
    assert batch(plan) == 0
    write_png(torch.rand(3, 64, 64), Path("picture.png"))
    assert batch(plan) == 0
    assert len(runs) == 2


def test_extended_plan_computes_only_the_new_runs(runs: list[str]) -> None:
    assert batch(write_plan(SMALL)) == 0
    runs.clear()
    assert batch(write_plan(SMALL.replace("[saliency", "[cam, saliency"))) == 0
    assert runs == ["cam"]


def test_interrupted_plan_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(logits: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    def interrupted(name: str, **arguments: Any) -> Result:
        return run(name, **arguments | ({"target": stop} if name == "grad_cam" else {}))

    plan = write_plan(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(work, "run", interrupted)
        assert batch(plan) == 130
    assert "1 of 3 runs are saved" in capsys.readouterr().err
    left = {path.relative_to("out").parts[:2] for path in Path("out").rglob("*") if path.is_file()}
    assert left == {("results", "saliency")}
    assert batch(plan) == 0
    assert [*states().values()] == ["reused", "completed", "completed"]


def test_failure_is_reported_and_retried_and_stops_no_other_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, **arguments: Any) -> Result:
        if name == "grad_cam":
            raise RuntimeError("out of <memory>")
        return run(name, **arguments)

    plan = write_plan(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(work, "run", refuse)
        assert batch(plan) == 1
    assert [*states().values()] == ["completed", "failed", "completed"]
    assert report()["runs"][1]["error"] == "RuntimeError: out of <memory>"
    page = Path("out/report.html").read_text()
    assert "grad_cam, shapes-vgg, scenes/1: RuntimeError: out of &lt;memory&gt;" in page
    output = capsys.readouterr().out
    assert "RuntimeError: out of <memory>" in output
    assert "3 runs: 2 completed, 1 failed" in output
    assert batch(plan) == 0
    assert [*states().values()] == ["reused", "completed", "reused"]


# --- validation and dry run -------------------------------------------------------------------


def test_dry_run_lists_runs_and_cost(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = "out: out\nimages: [builtin:scenes/3]\nmethods: [saliency, {method: pgd, params: {steps: 5}}]\n"
    assert batch(write_plan(plan), "--dry-run") == 0
    output = capsys.readouterr().out
    assert "2 of 2 runs to do: 24 images forward, 18 backward" in output
    assert not Path("out").exists()
    assert not runs
    assert batch(write_plan(plan.replace("saliency, ", "saliency, first_layer_filters, "))) == 0
    shutil.rmtree("out/results/saliency")
    before = Path("out/report.json").read_text()
    capsys.readouterr()
    assert batch(write_plan(plan), "--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["counts"] == {"pending": 1, "reused": 1}
    assert Path("out/report.json").read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"plan\.yaml is empty"),
        ("methods: [a\n", r"plan\.yaml, line 2: invalid YAML"),
        ("- a\n", "should be a mapping"),
        ("methods: []\n", r"line 1: methods=\[\]"),
        ("models: [builtin:shapes-vgg]\n", "'methods' is missing"),
        (
            "methods: [saliency]\nseed: 1\nmethods: [cam]\n",
            r"plan\.yaml, line 3: 'methods' is in line 1 already",
        ),
        ("methods: [saliency]\n\nmodles: [x]\n", r"line 3: no key 'modles'; .* did you mean 'models'"),
        ("methods:\n  - method: pgd\n    parms: {}\n", r"line 3: no key 'parms'; .* did you mean 'params'"),
        ("methods:\n  - saliency\n  - pdg\n", r"line 3: no method 'pdg'; .* did you mean 'pgd'"),
        ("methods:\n- method: pgd\n  params:\n    epz: 1\n", r"line 4: no parameter 'epz'; .* mean 'eps'"),
        ("methods:\n- method: pgd\n  grid: {epz: [1]}\n", r"line 3: no parameter 'epz'"),
        (
            "methods:\n- method: pgd\n  grid: {eps: 1}\n",
            r"line 3: methods\.0\.grid\.eps=1 should be a valid list",
        ),
        ("methods:\n- method: pgd\n  grid: {eps: []}\n", r"line 3: .*eps=\[\]"),
        (
            "methods:\n- method: pgd\n  params: {eps: 1}\n  grid: {eps: [1]}\n",
            "line 4: 'eps' is in 'params'",
        ),
        ("methods:\n- {method: pgd, params: {eps: 5000}}\n", r"line 2: pgd: eps=5000 should be less"),
        ("methods:\n- {method: pgd, grid: {steps: [1, many]}}\n", "line 2: pgd: steps='many'"),
        ("methods:\n- {method: pgd, target: star}\n", "line 2: pgd takes no target"),
        ("methods:\n- {method: pgd, inputs: {lables: [1]}}\n", "line 2: no input 'lables'; .* 'labels'"),
        (
            "methods:\n- {method: pgd, inputs: {model: x}}\n",
            "line 2: .* is set by the plan's models and images",
        ),
        ("methods:\n- {method: pgd, models: [vgg]}\n", "line 2: no model 'vgg'; the plan has shapes-vgg"),
        ("methods:\n- {method: fast_style, models: [shapes-vgg]}\n", "line 2: fast_style takes no model"),
        ("methods:\n- saliency\n- saliency\n", "line 3: 'saliency' would share its folder .* 'name'"),
        ("methods:\n- saliency\n- {method: cam, name: Saliency}\n", "line 3: 'Saliency' would share"),
        ("methods:\n- {method: grad_cam, params: {layer: layer9}}\n", "line 2: no layer 'layer9'"),
        ("methods:\n- {method: saliency, target: starr}\n", "line 2: no class or layer 'starr'; .* 'star'"),
        ("methods: [saliency]\nimages:\n- builtin:scenes/1\n- nowhere.png\n", r"line 4: .*nowhere\.png"),
        ("methods: [saliency]\nimages:\n- {images: [], name: x}\n", "line 3: "),
        ("methods: [saliency]\nimages:\n- {images: builtin:scenes/1, labels: {}}\n", "line 3: "),
        (
            "methods: [saliency]\nmodels:\n- builtin:shapes-vgg\n- builtin:shapes-vg\n",
            "line 4: .*'shapes-vgg'",
        ),
        ("methods: [saliency]\nmodels:\n- resnet18\n", "line 3: 'resnet18' is not a model"),
        ("methods: [saliency]\nmodels:\n- {uri: builtin:shapes-vgg, wieghts: x}\n", "line 3: .*'weights'"),
        ("methods: [saliency]\nexecutor: far-away\n", "no executor 'far-away'"),
        ("methods: [saliency]\ndevice: nowhere\n", "nowhere"),
        ("methods: [saliency]\nbatch_size: 0\n", "line 2: batch_size=0"),
        ("methods: [saliency]\nout: plan.yaml\n", r"line 2: .*plan\.yaml is a file"),
        ("methods: &a [*a]\n", "."),
    ],
    ids=lambda text: None,
)
def test_invalid_plan_is_refused_before_any_run(
    text: str, message: str, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(write_plan(text)) == 2
    output = capsys.readouterr().err
    assert re.search(message, output), output
    assert output.count("\n") == 1
    assert output.startswith("phosphene: plan.yaml")
    assert not runs
    assert not Path("phosphene-out").exists()


def test_all_faults_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    plan = (
        "models: [builtin:shapes-vgg, builtin:none]\nimages:\n- nowhere.png\n- builtin:scenes/1\n"
        "methods:\n- pdg\n- {method: pgd, params: {epz: 1}}\n- {method: grad_cam, params: {layer: nil}}\n"
    )
    assert batch(write_plan(plan)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(int(line.partition("line ")[2].partition(":")[0]) for line in lines) == [1, 3, 6, 7, 8]


def test_folder_with_other_files_is_left_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("out/results/saliency/shapes-vgg/scenes-1")
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("all of it")
    assert batch(write_plan(SMALL)) == 2
    assert "contains files other than a result" in capsys.readouterr().err
    assert (folder / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.html", "<!doctype html><p>mine", "was not written by Phosphene"),
        ("report.json", '{"mine": 1}', "was not written by Phosphene"),
        ("report.json", "mine", "was not written by Phosphene"),
        ("results/saliency/shapes-vgg/scenes-1/result.json", "{", "is no saved result of Phosphene"),
    ],
)
def test_other_files_under_the_names_of_a_batch_are_refused_and_unchanged(
    capsys: pytest.CaptureFixture[str], runs: list[str], name: str, text: str, message: str
) -> None:
    file = Path("out", name)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert batch(write_plan(SMALL)) == 2
    assert message in capsys.readouterr().err
    assert file.read_text() == text
    assert not runs


def test_long_labels_have_folder_names_that_file_systems_accept() -> None:
    assert len(folder_name("漢" * 300).encode()) <= 200
    assert folder_name("漢" * 300).strip("漢") == ""


def test_missing_plan_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("nowhere.yaml") == 2
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err
    assert batch("nowhere.yaml", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "InputError"


# --- JSON -------------------------------------------------------------------------------------


def test_report_and_progress_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(write_plan(SMALL), "--json", "--events", "--out", "elsewhere") == 0
    captured = capsys.readouterr()
    printed, saved = json.loads(captured.out), json.loads(Path("elsewhere/report.json").read_text())
    assert printed["runs"] == saved["runs"]
    events = [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]
    ours = [event for event in events if event["description"] == "plan.yaml"]
    assert [(event["done"], event["total"]) for event in ours] == [(1, 3), (2, 3), (3, 3)]
    assert ours[-1]["note"] == "3 runs: 3 completed"


def test_plan_in_the_documentation_is_valid() -> None:
    page = (ROOT / "docs" / "programs.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    plan = read_plan(write_plan(text))
    ready = open_batch(plan, Path(plan.out or ""))
    assert len(ready.combinations) == 2 * 2 * 3 + 2
    assert {combination.method for combination in ready.combinations} == {
        "saliency", "early grad_cam", "pgd eps=2/255", "pgd eps=8/255"
    }  # fmt: skip
    keys = {*Plan.model_fields}
    assert all(f"`{key}`" in page for key in keys)


def test_values_are_parsed_as_on_the_command_line() -> None:
    plan = write_plan("methods:\n- {method: pgd, params: {eps: 1/4, step_size: 1e-3, random_start: no}}\n")
    ready: Batch = open_batch(read_plan(plan), Path("out"))
    assert ready.combinations[0].arguments == {
        "eps": 0.25,
        "step_size": 0.001,
        "random_start": False,
        "seed": 0,
    }


def test_plan_from_python_needs_no_file() -> None:
    plan = Plan.model_validate({"methods": ["saliency"], "images": ["builtin:scenes/1"]})
    assert [outcome.state for outcome in open_batch(plan, Path("out")).outcomes()] == ["completed"]
    with pytest.raises(InputError, match="line 1"):
        open_batch(Plan.model_validate({"methods": ["salency"]}), Path("out"))
