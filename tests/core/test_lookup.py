"""Lookups by title and by ``find``, and the metadata cache that answers them without imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_registry import METHODS, ask, install, method_source

from phosphene import InputError, MethodInfo, MethodSpec, PluginError, UnknownName, load_model, methods
from phosphene.cli.main import main
from phosphene.json_cache import cache_folder, read_cached, write_cached
from phosphene.registry.method_info import Metadata
from phosphene.registry.plugins import Plugin
from phosphene.spec.spec import Need

#: Counts what a program parses, imports and opens.
WATCH = """
import sys
events = []
def watch(event, arguments):
    if event == "compile" and arguments[1] == "<unknown>":  # ast.parse
        events.append("parsed")
    elif event == "import" and arguments[0].partition(".")[0] in ("torch", "numpy", "lab"):
        events.append(arguments[0])
    elif event == "open" and str(arguments[0]).endswith(".py"):
        events.append(str(arguments[0]))
"""


def titled(family: str, name: str, title: str) -> str:
    return method_source(family, name).replace(f'family="{family}"', f'family="{family}", title="{title}"')


def names(infos: Sequence[MethodInfo]) -> list[str]:
    return [info.plugin.short_name for info in infos]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution of 300 methods, a module each."""
    site = tmp_path_factory.mktemp("laboratory")
    (site / "lab").mkdir()
    (site / "lab" / "__init__.py").touch()
    modules = {f"lab/m{n}": method_source("filters", f"m{n}", f"Number {n}.") for n in range(300)}
    install(site, "lab", {METHODS: {f"filters.m{n}": f"lab.m{n}" for n in range(300)}}, modules)
    return site


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("PGD", "attacks.pgd"),
        ("Grad-CAM", "attribution.grad_cam"),
        ("grad cam", "attribution.grad_cam"),
        ("GradCAM", "attribution.grad_cam"),
        ("Grad-CAM++", "attribution.grad_cam_plus_plus"),
        ("Integrated gradients", "attribution.integrated_gradients"),
        ("integrated-gradients", "attribution.integrated_gradients"),
        ("t-SNE", "embeddings.tsne"),
        ("Facets of a unit", "synthesis.facets"),
    ],
)
def test_method_is_looked_up_by_title(title: str, name: str) -> None:
    assert methods[title].spec.name == name
    assert title in methods


@pytest.mark.parametrize("title", ["Grad", "CAM++", "gradients", "Integrated", "-", "", 3, None])
def test_part_of_a_title_is_no_name(title: Any) -> None:
    with pytest.raises(UnknownName):
        methods[title]
    assert title not in methods


def test_titles_read_from_the_source_are_those_of_the_specs() -> None:
    for name, method in methods.load_all().items():
        outline = methods.outline(methods.resolve(name))
        assert (outline.title, outline.summary) == (method.spec.title, method.spec.summary)
        assert methods[method.spec.title] is method


def test_installing_a_plugin_never_changes_the_meaning_of_a_title(tmp_path: Path) -> None:
    entries = {
        "filters.gradcam": "a_lab",
        "filters.other_pgd": "b_lab",
        "filters.one": "c_lab",
        "filters.two": "d_lab",
    }
    sources = {
        "a_lab": titled("filters", "gradcam", "A namesake"),
        "b_lab": titled("filters", "other_pgd", "P.G.D."),
        "c_lab": titled("filters", "one", "Twin filter"),
        "d_lab": titled("filters", "two", "twin-filter"),
    }
    install(tmp_path, "labs", {METHODS: entries}, sources)
    code = """
from phosphene import methods
names = ("gradcam", "GradCAM", "PGD", "filters.gradcam", "A Namesake", "one")
answer = [methods.resolve(name).id for name in names]
answer.append(methods.shortest_name(methods.resolve("filters.gradcam")))
try:
    methods["Twin filter"]
except Exception as error:
    answer += [type(error).__name__, str(error)]
"""
    *ids, kind, message = ask(code, tmp_path)
    expected = ["attribution.grad_cam"] * 2 + [
        "attacks.pgd",
        "filters.gradcam",
        "filters.gradcam",
        "filters.one",
    ]
    assert ids == [*expected, "filters.gradcam"]
    assert kind == "PluginError"
    assert "filters.one" in message
    assert "filters.two" in message


def test_counts_are_the_number_of_distinct_methods(capsys: pytest.CaptureFixture[str]) -> None:
    distinct = {method.spec.name for method in methods.load_all().values()}
    assert len(methods) == len(list(methods)) == len(distinct)
    assert repr(methods).startswith(f"{len(distinct)} methods\n")
    assert len(methods.find()) == len(distinct)
    for unknown in ("no_such_name", "attacks.no_such_name", "phosphene:attacks.no_such_name"):
        with pytest.raises(UnknownName) as error:
            methods[unknown]
        assert f"({len(distinct)} in all)" in str(error.value)
    with pytest.raises(SystemExit):
        main(["list", "--json"])
    assert len(json.loads(capsys.readouterr().out)) == len(distinct)


def test_info_is_what_the_loaded_method_declares() -> None:
    for name, method in methods.load_all().items():
        info = methods.info(name)
        assert info.document == json.loads(json.dumps(method.spec.model_dump(mode="json")))
        assert info.load() is method
        assert info.spec is method.spec
        assert repr(info) == repr(method)
        assert (info.seed, info.layers, info.distribution) == (
            method.seed,
            method.layers,
            method.distribution,
        )
        function = method.function
        assert (info.module, info.line) == (function.__module__, function.__code__.co_firstlineno)
    assert methods.info("Grad-CAM").passes == [1, 1]
    assert methods.info("higher_layer_filters").passes == [0, 0]
    assert methods.info("score_cam").passes == [2049, 0]


def test_call_of_a_found_method_loads_it() -> None:
    (info,) = methods.find("deconvnet", returns="Attribution")
    model = load_model("builtin:shapes-vgg")
    assert type(info(model, torch.rand(1, 3, 64, 64), "star")).__name__ == "Attribution"


@pytest.mark.parametrize(
    ("keyword", "word", "nearest"),
    [
        ("family", "atacks", "attacks"),
        ("tags", "whitebox", "white-box"),
        ("needs", "gradient", "gradients"),
        ("accepts", "lables", "labels"),
        ("returns", "AdversarialExample", "AdversarialExamples"),
        ("without", "datasets", "dataset"),
        ("need", "gradients", "needs"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_find_refuses_unknown_words_with_the_nearest(
    keyword: str, word: str, nearest: str, several: bool
) -> None:
    with pytest.raises(UnknownName, match=f"did you mean '{nearest}'"):
        methods.find(**{keyword: [word] if several else word})  # type: ignore[arg-type]


def test_every_need_is_a_word_of_find() -> None:
    assert all(methods.find(needs=need) for need in get_args(Need))


@pytest.mark.parametrize(
    "bounds", [{"year": "2017"}, {"year": (2017,)}, {"max_forward": -1}, {"max_backward": 0.5}]
)
def test_find_refuses_malformed_numbers(bounds: Any) -> None:
    with pytest.raises(InputError, match=next(iter(bounds))):
        methods.find(**bounds)


def test_find_combines_conditions() -> None:
    specs = [method.spec for method in methods.load_all().values()]

    def assert_finds(selects: Callable[[MethodSpec], object], **conditions: Any) -> None:
        expected = {spec.name for spec in specs if selects(spec)}
        assert expected
        assert {info.name for info in methods.find(**conditions)} == expected

    def by_year(*years: int) -> Callable[[MethodSpec], bool]:
        return lambda s: any(r.year in years for r in s.references)

    assert_finds(lambda s: {"gradients", "dataset"} <= {*s.needs}, needs=["gradients", "dataset"])
    assert_finds(
        lambda s: "gradients" in s.needs and "dataset" not in s.needs and not s.input("dataset"),
        needs=["gradients"],
        without=["dataset"],
    )
    assert_finds(
        lambda s: s.family != "attacks" and s.returns != "Attribution", without=["attacks", "Attribution"]
    )
    assert_finds(lambda s: s.family in ("attacks", "robustness"), family=["attacks", "robustness"])
    assert_finds(lambda s: s.input("images") and s.input("labels"), accepts=["images", "labels"])
    assert_finds(by_year(2017), year=2017)
    assert_finds(by_year(2013, 2014), year=(2013, 2014))
    assert_finds(lambda s: s.cost and (methods.info(s.name).passes or [9])[0] <= 2, max_forward=2)


def test_find_by_reference_and_cost() -> None:
    assert "pgd" in names(methods.find(reference="madry 2018"))
    assert methods.find(reference="Madry", year=2017) == []  # one reference has both
    assert names(methods.find(family="attacks", max_backward=0)) == ["boundary", "hop_skip_jump", "square"]
    assert "mask_iou" not in names(methods.find(max_forward=10**9))  # declares no cost


def test_find_searches_text_and_ranks_titles_first() -> None:
    assert names(methods.find("Grad-CAM"))[0] == "grad_cam"
    assert {"grad_cam", "guided_grad_cam", "grad_cam_plus_plus"} <= {*names(methods.find("gradcam"))} | {
        *names(methods.find("grad cam"))
    }
    assert names(methods.find("projected gradient descent"))[0] == "pgd"
    assert "pgd" in names(methods.find("Resistant to Adversarial"))  # a reference's title
    assert methods.find("qwertyuiop") == []
    assert {*names(methods.find("", family="style"))} == {*names(methods.find(family="style"))}


@pytest.mark.parametrize("words", ["list", "list --json", "find number", "show m7", "show pgd"])
def test_warm_cache_imports_and_parses_nothing(laboratory: Path, shared_cache: Path, words: str) -> None:
    listing = "from phosphene.cli import main\ntry:\n    "
    listing += f"main({words.split()!r})\nexcept SystemExit as end:\n    code = end.code\n"
    ask(f"{listing}answer = code", laboratory, PHOSPHENE_CACHE=str(shared_cache))
    watched = f"{WATCH}import phosphene.cli.main, phosphene.cli.argument_rows\nsys.addaudithook(watch)\n"
    watched += f"{listing}events = [e for e in events if 'site-packages' not in e]\n"
    watched += "answer = [code, events, 'phosphene.spec' in sys.modules]"  # (typer imports pydantic)
    assert ask(watched, laboratory, PHOSPHENE_CACHE=str(shared_cache)) == [0, [], False]


def test_warm_find_imports_neither_torch_nor_pydantic(laboratory: Path, shared_cache: Path) -> None:
    code = "import sys\nfrom phosphene import methods\nmatching = methods.find('number', family='filters')\n"
    code += "heavy = [m for m in ('torch', 'pydantic', 'numpy', 'lab') if m in sys.modules]\n"
    code += "answer = [len(matching), heavy]"
    ask(code, laboratory, PHOSPHENE_CACHE=str(shared_cache))
    assert ask(code, laboratory, PHOSPHENE_CACHE=str(shared_cache)) == [300, []]


def test_cold_listing_reads_each_source_once(laboratory: Path, tmp_path: Path) -> None:
    code = f"{WATCH}from phosphene import methods\nsys.addaudithook(watch)\n"
    code += "count = sum(map(len, methods.by_family().values()))\nrepr(methods)\n"
    code += "answer = [count, len(methods), sum(e.startswith('/') and '/lab/' in e for e in events)]"
    count, length, opened = ask(code, laboratory, PHOSPHENE_CACHE=str(tmp_path))
    assert count == length == len(methods) + 300
    assert opened == 300


def metadata(site: Path, monkeypatch: pytest.MonkeyPatch, module: str = "cached_lab") -> Metadata:
    """The metadata of an installed distribution with one module, as another process would read it."""
    from importlib.metadata import EntryPoint

    monkeypatch.syspath_prepend(str(site))
    plugin = Plugin("filters.cached", "cached", "1.0", EntryPoint("filters.cached", module, METHODS))
    return Metadata((plugin,))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHOSPHENE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cached_lab.py").write_text(method_source("filters", "cached", "First."))
    return tmp_path / "site"


def test_changed_source_and_version_are_read_again(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert metadata(site, monkeypatch).outlines["filters.cached"].summary == "First."
    (site / "cached_lab.py").write_text(method_source("filters", "cached", "Second one."))
    assert metadata(site, monkeypatch).outlines["filters.cached"].summary == "Second one."
    assert len(list(cache_folder().iterdir())) == 1  # the old document is replaced


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed", "binary", "folder", "fifo", "foreign"])
def test_damaged_cache_is_ignored_and_rewritten(
    site: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    before = metadata(site, monkeypatch).outlines
    (file,) = cache_folder().iterdir()
    content = file.read_bytes()
    file.unlink()
    damages = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "changed": content.replace(b"First.", b"Worst."),
        "binary": b"\x80\x04\x00\xff\n\x00",
        "foreign": b'{"methods": []}\n{}',
    }
    if damage == "folder":
        file.mkdir()
    elif damage == "fifo":
        os.mkfifo(file)
    else:
        file.write_bytes(damages[damage])
    assert metadata(site, monkeypatch).outlines == before
    if damage != "folder":
        assert file.read_bytes() == content
    assert [path.name for path in cache_folder().iterdir()] == [file.name]


def test_unwritable_cache_folder_is_no_error(
    site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PHOSPHENE_CACHE", str(tmp_path / "file" / "cache"))
    assert metadata(site, monkeypatch).outlines["filters.cached"].summary == "First."
    assert (tmp_path / "file").read_text() == "not a folder"


def test_failed_write_leaves_no_partial_file(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    write_cached("name", "fingerprint", {"a": 1})
    assert list(cache_folder().iterdir()) == []
    assert read_cached("name", "fingerprint") is None


def test_broken_method_is_not_stored(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "torn_lab.py").write_text("import a_library_nobody_has\n")
    answer = metadata(site, monkeypatch, "torn_lab").infos(["filters.cached"])["filters.cached"]
    assert not isinstance(answer, MethodInfo)
    assert "a_library_nobody_has" in answer.reason
    assert not cache_folder().exists()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_processes_share_an_empty_cache(count: int, laboratory: Path, tmp_path: Path) -> None:
    code = "from phosphene import methods\n"
    code += "answer = [[i.name, i.summary] for i in methods.find(family='filters')]"
    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(ask, code, laboratory, PHOSPHENE_CACHE=str(tmp_path)) for _ in range(count)]
        first, *others = [job.result() for job in jobs]
    assert others == [first] * (count - 1)
    assert len(first) == 302
    assert ask(code, laboratory, PHOSPHENE_CACHE=str(tmp_path)) == first
    assert not list(tmp_path.glob("*.part"))


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHOSPHENE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / "phosphene"
    monkeypatch.setenv("PHOSPHENE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_find_command(capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["find", *words])
        return int(end.value.code or 0), *capsys.readouterr()

    code, output, _ = command(
        "cam", "--needs", "gradients", "--without", "relu,dataset", "--year", "2014-2017", "--json"
    )
    expected = methods.find("cam", needs=["gradients"], without=["relu", "dataset"], year=(2014, 2017))
    assert code == 0
    assert [document["name"] for document in json.loads(output)] == [info.name for info in expected]
    assert "attribution.grad_cam" in [info.name for info in expected]
    code, output, _ = command("--family", "attacks", "--max-backward", "0")
    assert code == 0
    first_words = [line.split()[0] for line in output.splitlines() if line.strip()]
    assert first_words == ["method", "boundary", "hop_skip_jump", "square"]
    assert command("qwertyuiop")[0] == 1
    code, output, error = command("--needs", "gradiants")
    assert (code, output) == (2, "")
    assert "did you mean 'gradients'" in error
    assert command("--year", "long ago")[0] == 2


def test_plugins_command_reports_slow_imports_and_shadowed_distributions(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    busy = "import time\nstart = time.process_time()\nwhile time.process_time() < start + 0.6:\n    pass\n"
    for version, site in (("1.0", first), ("2.0", second)):
        site.mkdir()
        source = {
            "slow_lab": busy + "import quick_library\n" + method_source("filters", "slow"),
            "quick_library": "",
        }
        install(site, "slow-lab", {METHODS: {"filters.slow": "slow_lab"}}, source, version)
    path = os.pathsep.join(filter(None, [str(first), str(second), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "400"}
    command = [sys.executable, "-c", "from phosphene.cli import main; main(['plugins'])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "slow import" in lines["filters.slow"]
    assert "quick_library" in lines["filters.slow"]
    assert lines["attribution.saliency"].rstrip().endswith("ok")
    assert f"slow-lab 2.0 in {second}, shadowed by slow-lab 1.0 in {first}" in done.stdout


def test_broken_plugin_is_reported_by_info(tmp_path: Path) -> None:
    install(tmp_path, "torn", {METHODS: {"filters.torn": "torn"}}, {"torn": "import a_library_nobody_has"})
    code = """
from phosphene import methods
try:
    methods.info("torn")
except Exception as error:
    answer = [type(error).__name__, str(error)]
"""
    kind, message = ask(code, tmp_path)
    assert kind == PluginError.__name__
    assert "a_library_nobody_has" in message
