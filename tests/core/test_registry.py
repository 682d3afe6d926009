"""The registry with installed distributions, in a new interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

METHODS, EXTENSIONS = "phosphene.methods.v1", "phosphene.extensions.v1"

METHOD = '''
"""A module about {name}."""
from phosphene import hookimpl, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target

@method(family="{family}", tags=["third-party"], needs={needs})
def {name}(model: Model, images: Images, target: Target = None) -> Attribution:
    """{summary}"""
    return Attribution(images=images, maps=images.mean(1), targets=("{summary}",) * len(images))

@hookimpl
def phosphene_methods():
    return [{name}]
'''

EXTENSION = '''
from typing import Literal

import torch
from phosphene import hookimpl
from phosphene.spec import Invariant

class ToyLoader:
    def load(self, name, *, weights, pretrained, **options):
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        return module, {"input_size": (3, 2, 2)}
    def names(self):
        return ["net"]

class Dark(Invariant):
    """Maps stay below a half."""
    kind: Literal["dark"] = "dark"
    def check(self, inputs, params, result):
        assert result.maps.max() < 0.5

events = []

@hookimpl
def phosphene_model_loaders():
    return {"toy": ToyLoader(), "timm": ToyLoader()}

@hookimpl
def phosphene_invariants():
    return [Dark]

@hookimpl
def phosphene_before_run(run):
    events.append(["before", run.method])

@hookimpl
def phosphene_after_run(run, result, error):
    events.append(["after", type(result).__name__, type(error).__name__])

@hookimpl
def phosphene_executors():
    def elsewhere(run):
        events.append(["executed", run.method, sorted(run.inputs)])
        return run.execute_locally()
    return {"elsewhere": elsewhere}
'''

CLUMSY_OBSERVER = """
from phosphene import hookimpl

@hookimpl
def phosphene_before_run(run):
    raise RuntimeError("the tracker is down")

@hookimpl
def phosphene_after_run(error):
    raise OSError("the disk is full")
"""


def method_source(family: str, name: str, summary: str = "Show something.", needs: str = "()") -> str:
    return METHOD.format(family=family, name=name, summary=summary, needs=needs)


def install(
    site: Path, name: str, entries: dict[str, dict[str, str]], modules: dict[str, str], version: str = "1.0"
) -> None:
    """Write what an installer writes: the modules and their metadata."""
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for group, e in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid and broken distributions."""
    site = tmp_path_factory.mktemp("site")
    install(
        site,
        "good-lab",
        {METHODS: {"attacks.nudge": "good_lab"}},
        {"good_lab": method_source("attacks", "nudge", "Nudge the image.", '["gradients"]')},
    )
    install(
        site,
        "shadow-lab",
        {METHODS: {"attribution.saliency": "shadow_lab"}},
        {"shadow_lab": method_source("attribution", "saliency", "Another saliency.")},
    )
    install(
        site,
        "namesake-lab",
        {METHODS: {"filters.pgd": "namesake_lab"}},
        {"namesake_lab": method_source("filters", "pgd", "Not the attack.")},
    )
    for twin in ("one", "two"):
        install(
            site,
            f"twin-{twin}",
            {METHODS: {"style.twin": f"twin_{twin}"}},
            {f"twin_{twin}": method_source("style", "twin", f"Twin {twin}.")},
        )
    install(
        site,
        "broken-lab",
        {METHODS: {"filters.broken": "broken_lab"}},
        {"broken_lab": '"""Broken."""\nimport a_library_nobody_has\n'},
    )
    install(
        site,
        "quitter-lab",
        {METHODS: {"filters.quitter": "quitter_lab"}},
        {"quitter_lab": '"""Quits."""\nimport sys\nsys.exit("no licence")\n'},
    )
    install(site, "absent-lab", {METHODS: {"filters.absent": "absent_lab"}}, {})
    install(
        site,
        "typo-lab",
        {METHODS: {"filters.typo": "typo_lab"}},
        {"typo_lab": method_source("filters", "typo").replace("phosphene_methods", "phosphene_metods")},
    )
    install(
        site,
        "hookless-lab",
        {METHODS: {"filters.hookless": "hookless_lab"}},
        {"hookless_lab": method_source("filters", "hookless").replace("@hookimpl\n", "")},
    )
    install(
        site,
        "misnamed-lab",
        {METHODS: {"filters.right": "misnamed_lab"}},
        {"misnamed_lab": method_source("filters", "wrong")},
    )
    install(
        site,
        "future-lab",
        {"phosphene.methods.v2": {"filters.future": "future_lab"}},
        {"future_lab": 'raise SystemExit("a plugin of another major version was imported")\n'},
    )
    return site  # fmt: skip


def ask(code: str, *path: Path, **environment: str) -> Any:
    """The value that ``code`` assigns to ``answer`` in a fresh interpreter with these folders on its path."""
    program = f"import json\n{code}\nprint('ANSWER' + json.dumps(answer))"
    env = {k: v for k, v in os.environ.items() if k != "PHOSPHENE_PLUGINS"}
    inherited = [folder for folder in [os.environ.get("PYTHONPATH")] if folder]
    env |= {"PYTHONPATH": os.pathsep.join([*map(str, path), *inherited]), "PYTHONWARNINGS": "ignore"}
    env |= environment
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("ANSWER")[2])


LOOKING_UP = """
import sys
from phosphene import methods
from phosphene.registry.plugins import incompatible_plugins

def describe(name):
    try:
        method = methods[name]
    except Exception as error:
        return [type(error).__name__, str(error)]
    return [method.distribution, method.spec.summary]

answer = {"nudge": describe("nudge"), "modules": [m for m in sys.modules if m.endswith("_lab")]}
answer |= {
    "names": list(methods), "count": len(methods),
    "described": {n: describe(n) for n in QUESTIONS},
    "in": {n: n in methods for n in ("nudge", "style.twin", "twin-two:style.twin", "nothing", 3)},
    "working": list(methods.load_all()),
    "broken": {b.plugin.qualified: [b.reason, b.traceback] for b in methods.broken()},
    "shadowed": {p.qualified: [o.qualified for o in others] for p, others in methods.shadowed().items()},
    "other": [p.qualified for p in incompatible_plugins()],
    "matches": {
        "tags": [m.name for m in methods.find(tags="third-party")],
        "both": [m.name for m in methods.find(family="attacks", needs="gradients")],
        "accepts": [m.name for m in methods.find(accepts="labels")],
        "returns": [m.name for m in methods.find(returns="AdversarialExamples")],
    },
    "future": "future_lab" in sys.modules,
}
"""
QUESTIONS = [
    "nudge", "attacks.nudge", "good-lab:attacks.nudge", "saliency", "attribution.saliency",
    "phosphene:attribution.saliency", "shadow-lab:attribution.saliency", "pgd", "filters.pgd",
    "twin", "style.twin", "twin-one:style.twin", "twin-two:style.twin", "nudg", "good-lab:attacks.nudg",
    "broken", "filters.right", "wrong", "future",
]  # fmt: skip


@pytest.fixture(scope="module")
def lookups(site: Path) -> dict[str, Any]:
    answer: dict[str, Any] = ask(f"QUESTIONS = {QUESTIONS!r}\n{LOOKING_UP}", site)
    return answer


def test_lookup_imports_only_that_methods_module(lookups: dict[str, Any]) -> None:
    assert lookups["nudge"] == ["good-lab 1.0", "Nudge the image."]
    assert lookups["modules"] == ["good_lab"]


def test_iteration_has_every_plugin_once_with_distribution_for_shared_ids(lookups: dict[str, Any]) -> None:
    names = lookups["names"]
    assert len(names) == len(set(names)) == lookups["count"]
    assert {"attacks.nudge", "attacks.pgd", "filters.pgd", "filters.broken"} <= set(names)
    assert names.count("attribution.saliency") == 1
    assert "style.twin" not in names
    assert {"twin-one:style.twin", "twin-two:style.twin"} <= set(names)
    assert not any("future" in n for n in names)


def test_short_name_id_and_qualified_name_mean_the_same_method(lookups: dict[str, Any]) -> None:
    for name in ("nudge", "attacks.nudge", "good-lab:attacks.nudge"):
        assert lookups["described"][name] == ["good-lab 1.0", "Nudge the image."]


def test_installing_a_plugin_never_changes_the_meaning_of_a_first_party_name(lookups: dict[str, Any]) -> None:
    for name in ("saliency", "attribution.saliency", "phosphene:attribution.saliency", "pgd"):
        distribution, summary = lookups["described"][name]
        assert distribution.startswith("phosphene "), name
        assert summary not in ("Another saliency.", "Not the attack.")
    assert lookups["described"]["shadow-lab:attribution.saliency"] == ["shadow-lab 1.0", "Another saliency."]
    assert lookups["described"]["filters.pgd"] == ["namesake-lab 1.0", "Not the attack."]
    assert lookups["shadowed"]["phosphene:attribution.saliency"] == ["shadow-lab:attribution.saliency"]
    assert lookups["shadowed"]["shadow-lab:attribution.saliency"] == ["phosphene:attribution.saliency"]


def test_shared_third_party_id_is_ambiguous(lookups: dict[str, Any]) -> None:
    for name in ("twin", "style.twin"):
        kind, message = lookups["described"][name]
        assert kind == "PluginError"
        assert "twin-one:style.twin" in message
        assert "twin-two:style.twin" in message
    assert lookups["described"]["twin-one:style.twin"] == ["twin-one 1.0", "Twin one."]
    assert lookups["described"]["twin-two:style.twin"] == ["twin-two 1.0", "Twin two."]
    assert lookups["shadowed"]["twin-one:style.twin"] == ["twin-two:style.twin"]
    registered = {name for name, is_in in lookups["in"].items() if is_in}
    assert registered == {"nudge", "twin-two:style.twin"}


def test_near_misses_are_suggested(lookups: dict[str, Any]) -> None:
    kind, message = lookups["described"]["nudg"]
    assert kind == "UnknownName"
    assert "did you mean 'nudge'" in message
    assert "nudge" in lookups["described"]["good-lab:attacks.nudg"][1]


def test_broken_plugins_are_reported_and_isolated(lookups: dict[str, Any]) -> None:
    reasons = {
        "broken-lab:filters.broken": "a_library_nobody_has",
        "quitter-lab:filters.quitter": "no licence",
        "absent-lab:filters.absent": "absent_lab",
        "typo-lab:filters.typo": "phosphene_metods",
        "hookless-lab:filters.hookless": "hookimpl",
        "misnamed-lab:filters.right": "filters.wrong",
    }
    broken = {name: entry for name, entry in lookups["broken"].items() if not name.startswith("phosphene:")}
    assert broken.keys() == reasons.keys()
    for name, words in reasons.items():
        reason, traceback = broken[name]
        assert words in reason
        assert "Traceback" in traceback
        assert name.partition(":")[2] not in lookups["working"]
    assert {"attacks.nudge", "attacks.pgd", "twin-one:style.twin"} <= set(lookups["working"])
    kind, message = lookups["described"]["broken"]
    assert kind == "PluginError"
    assert "broken-lab:filters.broken" in message
    assert "a_library_nobody_has" in message
    assert lookups["described"]["filters.right"][0] == "PluginError"
    assert lookups["described"]["wrong"][0] == "UnknownName"


def test_plugins_of_another_major_version_are_not_loaded(lookups: dict[str, Any]) -> None:
    assert lookups["other"] == ["future-lab:filters.future"]
    assert lookups["described"]["future"][0] == "UnknownName"
    assert not lookups["future"]


def test_find_filters_methods(lookups: dict[str, Any]) -> None:
    matches = lookups["matches"]
    assert sorted(matches["tags"]) == ["attacks.nudge", "filters.pgd", "style.twin", "style.twin"]
    assert {"attacks.nudge", "attacks.pgd"} <= set(matches["both"])
    assert "attacks.pgd" in matches["accepts"]
    assert "attacks.nudge" not in matches["accepts"]
    assert "attacks.pgd" in matches["returns"]
    assert "attacks.nudge" not in matches["returns"]


def test_environment_variable_restricts_distributions(site: Path) -> None:
    code = "from phosphene import methods\nanswer = [p.distribution for p in methods.plugins.values()]"
    two = ask(code, site, PHOSPHENE_PLUGINS="good-lab, twin-one")
    assert set(two) == {"phosphene", "good-lab", "twin-one"}
    assert set(ask(code, site, PHOSPHENE_PLUGINS="")) == {"phosphene"}
    assert {"shadow-lab", "broken-lab"} <= set(ask(code, site))


def test_listing_and_summaries_import_neither_torch_nor_pydantic(site: Path) -> None:
    code = """
import sys
import phosphene
from phosphene import methods
names = list(methods)
summaries = {p.qualified: p.summary() for p in methods.plugins.values()}
heavy = [m for m in ("torch", "pydantic", "numpy", "timm", "matplotlib", "good_lab") if m in sys.modules]
answer = [names, summaries, heavy]
"""
    names, summaries, heavy = ask(code, site)
    assert heavy == []
    assert "attacks.nudge" in names
    assert summaries["good-lab:attacks.nudge"] == "Nudge the image."
    assert summaries["broken-lab:filters.broken"] == "Broken."
    assert summaries["absent-lab:filters.absent"] == ""
    assert summaries["phosphene:attribution.saliency"].startswith("Saliency map")


def test_distribution_built_as_a_wheel_is_registered(tmp_path: Path) -> None:
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel, and is not installed")
    project, site = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    (project / "wheel_lab.py").write_text(method_source("textures", "wheeled", "Came in a wheel."))
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "wheel-lab"\nversion = "2.5"\n'
        f'[project.entry-points."{METHODS}"]\n"textures.wheeled" = "wheel_lab"\n'
        '[tool.hatch.build.targets.wheel]\nonly-include = ["wheel_lab.py"]\n'
    )
    here = Path.cwd()
    os.chdir(project)  # a build backend works in the project's folder
    try:
        wheel = build.build_wheel(str(tmp_path))
    finally:
        os.chdir(here)
    zipfile.ZipFile(tmp_path / wheel).extractall(site)
    code = "from phosphene import methods\nm = methods['wheeled']\nanswer = [m.distribution, m.spec.name]"
    assert ask(code, site) == ["wheel-lab 2.5", "textures.wheeled"]


def test_extensions_of_every_kind_work(tmp_path: Path) -> None:
    install(tmp_path, "toy-lab", {EXTENSIONS: {"toys": "toy_lab"}}, {"toy_lab": EXTENSION})
    install(tmp_path, "clumsy-lab", {EXTENSIONS: {"tracker": "clumsy_lab"}}, {"clumsy_lab": CLUMSY_OBSERVER})
    install(tmp_path, "ruined-lab", {EXTENSIONS: {"ruin": "ruined_lab"}}, {"ruined_lab": "1 / 0\n"})
    install(tmp_path, "typo-lab", {EXTENSIONS: {"typo": "typo_lab"}},
            {"typo_lab": CLUMSY_OBSERVER.replace("before_run", "befor_run")})  # fmt: skip
    code = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from phosphene import PhospheneError, load_model, methods, run
    from phosphene.models.loading import loaders
    from phosphene.spec import Invariant
    model = load_model("toy:net")
    import toy_lab
    images = torch.rand(2, 3, 2, 2)
    result = run("saliency", model=model, images=images, executor="elsewhere")
    first = list(toy_lab.events)
    toy_lab.events.clear()
    try:
        run("saliency", model=model, images=images, target="no such class")  # never begins
    except PhospheneError as error:
        refused = [type(error).__name__, *toy_lab.events]
    try:
        run("cam", model=model, images=images)
    except PhospheneError as error:
        failed = type(error).__name__
    try:
        run("saliency", model=model, images=images, executor="nowhere")
    except PhospheneError as error:
        unknown = str(error)
answer = {
    "model": model.name, "maps": list(result.maps.shape), "first": first, "refused": refused,
    "failed": failed,
    "second": toy_lab.events, "unknown": unknown, "kinds": sorted(Invariant.kinds),
    "timm": type(loaders()["timm"]).__module__,
    "warnings": [str(w.message) for w in caught],
    "broken": {b.plugin.qualified: b.reason for b in methods.broken() if "lab" in b.plugin.distribution},
}
"""
    answer = ask(code, tmp_path)
    assert answer["model"] == "toy:net"
    assert answer["maps"] == [2, 2, 2]
    assert answer["first"] == [
        ["before", "saliency"],
        ["executed", "saliency", ["images", "model", "target"]],
        ["after", "Attribution", "NoneType"],
    ]
    assert answer["refused"] == ["InputError"]
    assert answer["failed"] == "ModelError"
    assert answer["second"] == [["before", "cam"], ["after", "NoneType", "ModelError"]]
    assert "elsewhere" in answer["unknown"]
    assert "dark" in answer["kinds"]
    # A failing observer is a warning and does not stop the run.
    assert any("the tracker is down" in t for t in answer["warnings"])
    assert any("the disk is full" in t for t in answer["warnings"])
    # The first-party loader keeps its scheme, and the conflict is a warning.
    assert answer["timm"].startswith("phosphene_plugins.")
    assert any("'timm'" in t for t in answer["warnings"])
    assert answer["broken"].keys() == {"ruined-lab:ruin", "typo-lab:typo"}
    assert "ZeroDivisionError" in answer["broken"]["ruined-lab:ruin"]
    assert "phosphene_befor_run" in answer["broken"]["typo-lab:typo"]


def test_spec_from_json_loads_invariants_of_extensions(tmp_path: Path) -> None:
    install(tmp_path, "toy-lab", {EXTENSIONS: {"toys": "toy_lab"}}, {"toy_lab": EXTENSION})
    code = """
import pydantic
from phosphene import UnknownName, spec_from_json
spec = {
    "name": "tests.a", "family": "tests", "title": "A", "summary": "A.", "description": "", "inputs": [],
    "params": pydantic.create_model("params"), "returns": "Attribution",
}
(promise,) = spec_from_json({**spec, "invariants": [{"kind": "dark"}]}).invariants
try:
    spec_from_json({**spec, "invariants": [{"kind": "drak"}]})
except UnknownName as error:
    answer = [type(promise).__module__, str(error)]
"""
    module, message = ask(code, tmp_path)
    assert module == "toy_lab"
    assert "no invariant kind 'drak'" in message
    assert "did you mean 'dark'" in message


OWN_RESULT = """
from dataclasses import dataclass
from torch import Tensor
from phosphene import hookimpl, method
from phosphene.results import Attribution, Result
from phosphene.roles import Images, Model

@dataclass(frozen=True, eq=False, kw_only=True)
class Blank(Result):
    images: Tensor
    blank: bool

    def panels(self):
        from phosphene.results import Panel
        return [] if self.blank else [[Panel(i) for i in self.images]]

@method(family="blanks")
def blank(model: Model, images: Images, *, blank: bool = True) -> Blank:
    \"\"\"Show nothing.\"\"\"
    return Blank(images=images, blank=blank)

@method(family="attribution")
def flat(model: Model, images: Images) -> Attribution:
    \"\"\"Return maps without positions.\"\"\"
    return Attribution(images=images, maps=images.mean((1, 2, 3)), targets=("x",) * len(images))

@hookimpl
def phosphene_methods():
    return [blank, flat]
"""


def test_third_party_results_are_loaded_and_replayed(tmp_path: Path) -> None:
    install(
        tmp_path, "blank-lab", {METHODS: {"blanks.blank": "blank_lab"}}, {"blank_lab": OWN_RESULT}
    )  # fmt: skip
    install(
        tmp_path,
        "shadow-lab",
        {METHODS: {"attribution.saliency": "shadow_lab"}},
        {"shadow_lab": method_source("attribution", "saliency")},
    )
    own, shadowed = str(tmp_path / "own"), str(tmp_path / "shadowed")
    running = f"""
from phosphene import run
run("blank", blank=False, images="builtin:scenes/1", out={own!r})
run("shadow-lab:attribution.saliency", images="builtin:scenes/1", out={shadowed!r})
answer = None
"""
    ask(running, tmp_path)
    replaying = f"from phosphene import replay\nanswer = [replay(f).same for f in ({own!r}, {shadowed!r})]"
    assert ask(replaying, tmp_path) == [True, True]


def test_gallery_reports_third_party_methods_without_panels(tmp_path: Path) -> None:
    entries = {METHODS: {"blanks.blank": "blank_lab", "attribution.flat": "blank_lab"}}
    install(tmp_path, "blank-lab", entries, {"blank_lab": OWN_RESULT})
    code = f"""
from phosphene_plugins.gallery import _gallery_page as gallery
gallery._SCENES = 2
page = gallery.make_gallery({str(tmp_path / "page")!r}, only=["blank", "flat", "saliency"])
answer = [{{e.call: e.failure for e in page.exhibits}}, list(page.scores), page.page.is_file()]
"""
    failures, scores, written = ask(code, tmp_path)
    assert "no images to show" in failures["blank"]
    assert failures["flat"]
    assert not failures["saliency"]
    assert scores == ["saliency"]
    assert written
