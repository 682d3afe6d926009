"""docs/examples: the plugins are built, installed together in a new environment, and used."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

#: The tests share one environment and its answers.
pytestmark = pytest.mark.xdist_group("examples")
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FOLDERS = ("observer", "loader", "executor", "command", "method", "role")
#: Scripts that are not plugins and run without installation.
SCRIPTS = {"self_supervised": "style_views.py"}
PHOSPHENE = "import sys; from phosphene.cli import main; main(sys.argv[1:])"
#: One process runs everything that needs torch, because importing torch is slow.
USE = """
import io, json, os, sys
from contextlib import redirect_stdout
from dataclasses import replace

import torch
from phosphene import PhospheneError, load_model, load_result, methods, replay, run
from phosphene.cli import main
from phosphene.roles import ROLES, InputContext
from phosphene.testing import Case

def command_line(*words):
    out, code = io.StringIO(), 0
    with redirect_stdout(out):
        try:
            main(words)
        except SystemExit as left:
            code = left.code or 0
    return [code, out.getvalue()]

class Stopped(Exception):
    pass

def stop(event):
    raise Stopped("after one step")

answer = {}

def refusal(call, *arguments, **more):
    try:
        call(*arguments, **more)
    except PhospheneError as error:
        return [type(error).__name__, str(error)]

# The observer.
torch.set_num_threads(1)
here = run("saliency", images="builtin:scenes/2", out="results/here/saliency")
try:
    run("pgd", images="builtin:scenes/1", steps=3, seed=0, progress=stop)
except Stopped:
    answer["log"] = [json.loads(line) for line in open(os.environ["PHOSPHENE_RUN_LOG"])]

# The loader.
model = load_model("toy:stripes")
across = torch.zeros(1, 3, 32, 32)
across[:, :, ::8] = across[:, :, 1::8] = 1
both = torch.cat([across, across.transpose(2, 3)])
answer["stripes"] = [model.class_name(i) for i in model(both).argmax(1).tolist()]
answer["cam"] = list(run("cam", model="toy:stripes", images=both).maps.shape)
answer["unknown"] = refusal(load_model, "toy:stripe")
answer["weights"] = refusal(load_model, "toy:stripes", weights="DEFAULT")

# The executor, in another process with the same number of threads.
torch.set_num_threads(2)
here_by_two = run("pgd", images="builtin:scenes/2", steps=2, seed=3)
remote = run("pgd", images="builtin:scenes/2", steps=2, seed=3, executor="own-process", progress=print)
pairs = [(value, dict(remote.fields())[name]) for name, value in here_by_two.fields()]
answer["equal"] = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs]
times = {"started": "", "seconds": 0}
answer["provenance"] = (
    here_by_two.provenance.model_copy(update=times) == remote.provenance.model_copy(update=times)
)
elsewhere = {"images": "builtin:scenes/1", "executor": "own-process"}
answer["lambda"] = refusal(run, "saliency", target=lambda logits: logits[:, 0], **elsewhere)
answer["executor error"] = refusal(run, "occlusion", window=4, stride=8, **elsewhere)
torch.set_num_threads(1)

# The result and its promise.
run("top_classes", model="toy:stripes", images=both, k=2, out="results/top_classes")
answer["replayed"] = replay("results/top_classes").same
loaded = load_result("results/top_classes")
answer["type"], answer["names"] = type(loaded).__module__, loaded.names
answer["lines"] = loaded.lines()
(descending, *_) = methods["top_classes"].spec.invariants
try:
    descending.check({}, {}, replace(loaded, probabilities=loaded.probabilities.flip(1)))
except AssertionError as error:
    answer["broken"] = str(error)

# The role.
two = {"images": "builtin:scenes/2", "captions": ["a star", "a square"]}
named = run("caption_saliency", **two, out="captioned")
answer["captioned"] = [list(named.maps.shape), named.targets, named.inputs["captions"]]
answer["recaptioned"] = replay("captioned").same
answer["caption refused"] = [
    refusal(run, "caption_saliency", **two | {"captions": words})
    for words in (["a star"], ["a star", " "], ["a star", "a dog"])
]
answer["caption help"] = command_line("run", "caption_saliency", "--help")
by_command = ["--image", "builtin:scenes/1", "--captions", "a star", "--out", "by-command"]
answer["caption command"] = command_line("run", "caption_saliency", *by_command)
answer["caption check"] = command_line("check", "caption_saliency", "--profile", "quick")
good = ROLES["captions"].sample(Case(count=3).request(Case().model()))
context = InputContext(inputs={"images": torch.rand(3, 3, 8, 8)})
answer["bad captions"] = [
    [reason, *refusal(ROLES["captions"].check, value, context)]
    for reason, value in ROLES["captions"].bad_values(good, context)
]
answer["roles"] = list(ROLES)

answer["plugins"] = command_line("plugins")
answer["models"] = command_line("models", "toy:")
answer["show"] = command_line("show", "top_classes")
# All other checks are run by the method's own test.
descends = ("--only", "descending(field='probabilities')")
answer["check"] = command_line("check", "phosphene-top-classes", "--profile", "quick", *descends)
run("saliency", images="builtin:scenes/2", out="results/again/saliency")
print("ANSWER" + json.dumps(answer))
"""


class Environment:
    """A new virtual environment that has Phosphene, without network access."""

    def __init__(self, home: Path) -> None:
        venv.create(home / "venv", symlinks=True)
        (site,) = (home / "venv").glob("lib/*/site-packages")
        # Libraries come from the tests' environment; installations go into the fresh one.
        borrowed = sysconfig.get_path("purelib")
        (site / "borrowed.pth").write_text(f"import site; site.addsitedir({borrowed!r})\n")
        self.python = home / "venv" / "bin" / "python"
        self.folder = home / "work"
        self.folder.mkdir()
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHON", "PHOSPHENE_"))}
        self.variables = mine | {
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # no isolation: pip reads build_isolation=0
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PHOSPHENE_RUN_LOG": "runs.jsonl",
        }

    def run(self, *arguments: str, fails: int = 0) -> str:
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == fails, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    home = tmp_path_factory.mktemp("home")
    environment = Environment(home)
    for folder in FOLDERS:  # a copy: building writes into the folder
        shutil.copytree(EXAMPLES / folder, environment.folder / folder)
    output = environment.run("-m", "pip", "install", *(f"./{folder}" for folder in FOLDERS))
    assert "Successfully installed" in output
    return environment


@pytest.fixture(scope="module")
def answers(environment: Environment) -> Any:
    return json.loads(environment.run("-c", USE).rpartition("ANSWER")[2])


def test_every_example_folder_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {*FOLDERS, *SCRIPTS}
    for folder in (*FOLDERS, *SCRIPTS):
        assert (EXAMPLES / folder / "README.md").is_file()


def test_all_plugins_are_listed_as_ok(answers: Any) -> None:
    code, output = answers["plugins"]
    rows = dict(line.split(maxsplit=1) for line in output.splitlines() if line.strip())
    ids = ("run-log", "toy-models", "own-process", "digest", "descending", "predictions.top_classes")
    ids += ("captions", "captions.caption_saliency")
    assert code == 0
    for name in ids:
        distribution, version, state = rows[name].split(maxsplit=2)
        assert (distribution.partition("-")[0], version, state.strip()) == ("phosphene", "1.0", "ok")


def test_observer_logs_success_and_failure(answers: Any) -> None:
    success, failure = answers["log"]
    assert (success["method"], success["outcome"], success["type"]) == ("saliency", "ok", "Attribution")
    assert success["model"] == failure["model"] == "builtin:shapes-vgg"
    assert failure["method"] == "pgd"
    assert failure["outcome"] == "Stopped: after one step"
    assert failure["type"] is None
    assert failure["params"] == {"steps": 3, "seed": 0}
    assert success["seconds"] > 0
    assert failure["seconds"] > 0


def test_loader_lists_and_loads_models(answers: Any) -> None:
    assert answers["models"] == [0, "toy:stripes\n"]
    assert answers["stripes"] == ["across", "upright"]
    assert answers["cam"] == [2, 30, 30]
    output = "no toy model 'stripe'; there is stripes - did you mean 'stripes'?"
    assert answers["unknown"] == ["UnknownName", output]
    assert answers["weights"][0] == "InputError"


def test_executor_result_is_bit_identical(answers: Any) -> None:
    assert len(answers["equal"]) > 8
    assert all(answers["equal"])
    assert answers["provenance"]


def test_executor_raises_the_runs_error(answers: Any) -> None:
    assert answers["executor error"][0] == "InputError"
    assert "stride=8 would skip pixels" in answers["executor error"][1]
    assert "cannot be sent to another process" in answers["lambda"][1]


def test_command_works_from_the_command_line(environment: Environment, answers: Any) -> None:
    output = environment.run("-c", PHOSPHENE, "digest", "results").splitlines()
    (again, here, top) = (line.split("  ") for line in output)
    assert again[0] == here[0] != top[0]
    assert [path for _, _, path in (again, here, top)] == ["again/saliency", "here/saliency", "top_classes"]
    assert top[1] == "predictions.top_classes"
    assert "digest" in environment.run("-c", PHOSPHENE, "--help")
    refused = environment.run("-c", PHOSPHENE, "digest", "observer", fails=2)
    assert refused == "phosphene: there is no saved result in observer\n"


def test_new_result_type_is_saved_loaded_and_replayed(answers: Any) -> None:
    assert answers["replayed"]
    assert answers["type"] == "phosphene_top_classes"
    assert answers["names"] == [["across", "upright"], ["upright", "across"]]
    assert [re.sub(r"\d+%", "", line) for line in answers["lines"]] == [
        "across , upright ",
        "upright , across ",
    ]


def test_new_invariant_is_listed_and_tested(answers: Any) -> None:
    assert re.search("invariant +descending, field probabilities", answers["show"][1])
    assert "probabilities increases by" in answers["broken"]
    code, output = answers["check"]
    assert code == 0
    assert "descending(field='probabilities')" in output


def test_new_role_is_read_recorded_and_replayed(answers: Any) -> None:
    assert answers["roles"][-1] == "captions"
    assert answers["captioned"] == [[2, 64, 64], ["a star", "a square"], ["a star", "a square"]]
    assert answers["recaptioned"]
    few, empty, unnamed = answers["caption refused"]
    assert few == ["InputError", "2 images need one caption each, not 1"]
    assert empty[0] == unnamed[0] == "InputError"
    assert "names no class" in unnamed[1]


def test_new_role_has_an_option_with_help(answers: Any) -> None:
    code, text = answers["caption help"]
    assert code == 0
    assert "--captions" in text
    assert "TEXT|FILE" in text
    assert answers["caption command"][0] == 0


def test_conformance_kit_uses_the_roles_samples_and_bad_values(answers: Any) -> None:
    code, text = answers["caption check"]
    assert code == 0, text
    for check in ("refuses_bad_input", "batch_equals_single", "saves_and_replays", "oracle"):
        assert re.search(rf"passed +\S*{check}", text), text
    phrases = [reason for reason, *_ in answers["bad captions"]]
    assert phrases == [
        *("too few captions", "one text instead of a tuple", "an empty caption", "numbers", "nothing")
    ]
    assert all(kind == "InputError" for _, kind, _ in answers["bad captions"])


def test_methods_own_test_passes(environment: Environment) -> None:
    output = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "method")
    assert " passed" in output


def test_extensions_load_without_torch(environment: Environment) -> None:
    modules = "phosphene_run_log, phosphene_toy_models, phosphene_own_process, phosphene_digest"
    modules += ", phosphene_captions_hook"
    environment.run("-c", f"import sys, phosphene_descending, {modules}; assert 'torch' not in sys.modules")


def test_style_views_make_a_table() -> None:
    tiny = ["--scenes", "16", "--labeled", "16", "--steps", "2", "--batch", "4", "--seeds", "2"]
    script = EXAMPLES / "self_supervised" / SCRIPTS["self_supervised"]
    output = subprocess.run([sys.executable, script, *tiny], capture_output=True, text=True, timeout=240)
    assert output.returncode == 0, output.stderr
    cells = r" ([\d.]+)% ± [\d.]+% \|" * 4
    rows = re.findall(rf"^\| (.+?) \|{cells}$", output.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["no training", "crop, flip, color", "crop, flip, color, style"]
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[1:])


def test_info_nce_closed_form() -> None:
    """InfoNCE in closed form: n pairs of equal views, all pairs orthogonal, T the temperature."""
    namespace = runpy.run_path(str(EXAMPLES / "self_supervised" / SCRIPTS["self_supervised"]))
    torch = sys.modules["torch"]
    views, n, temperature = 3 * torch.eye(4), 4, namespace["TEMPERATURE"]
    loss = float(namespace["info_nce"](views, views))
    assert loss == pytest.approx(math.log(1 + (2 * n - 2) * math.exp(-1 / temperature)), rel=1e-5)
    labels = torch.arange(4)
    assert namespace["linear_probe"](views.repeat(3, 1), labels.repeat(3), views, labels) == 1.0
    assert namespace["knn_accuracy"](views.repeat(10, 1), labels.repeat(10), views, labels) == 1.0
