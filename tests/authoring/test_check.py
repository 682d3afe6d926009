"""phosphene check: arguments, output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phosphene.cli.main import main
from phosphene.testing.checks import ARITHMETIC_UNTESTED

METHOD = '''"""A user's method."""

import torch
from phosphene import Cost, Reference, hookimpl, method, scores
from phosphene.results import Attribution
from phosphene.spec import Nonnegative, size
from phosphene.roles import Images, Model, Target
from phosphene.testing import linear_model
{more}
SOURCE = Reference(key="k", title="T", authors="A", year=2020, url="https://example.org")


def equals_positive_weights() -> None:
    """For a linear model with positive weights the map is the largest of a pixel's weights."""
    weight = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    maps = {name}(linear_model(weight), images, 0).maps
    torch.testing.assert_close(maps[0], weight[0].amax(0))


@method(
    family="{family}", references=[SOURCE], invariants=[Nonnegative()], needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images), oracle=equals_positive_weights,
)
def {name}(model: Model, images: Images, target: Target = None) -> Attribution:
    """Show the size of the gradient."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scores(model, images, target).sum(), images)
    maps = {maps}
    return Attribution(images=images.detach(), maps=maps, targets=target.names(model, len(images)))


@hookimpl
def phosphene_methods():
    return [{name}]
'''
MISSPELLED = METHOD.format(name="typo", maps="0", more="", family="a").replace("_methods", "_metods")
RIGHT, WRONG = "gradient.abs().amax(1)", "gradient.amax(1)"
QUICK = ("--profile", "quick")


def write_method(file: Path, maps: str = RIGHT, *, more: str = "", family: str = "attribution") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    name = file.parent.name if file.stem == "__init__" else file.stem
    file.write_text(METHOD.format(name=name, maps=maps, more=more, family=family))
    return str(file)


def check(*arguments: str) -> int:
    """The exit code of ``phosphene check``."""
    try:
        main(["check", *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_passing_method_prints_a_table_and_exits_with_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    only = [
        word for name in ("finite", "seed_matters", "nonnegative(field='maps')") for word in ("--only", name)
    ]
    assert check("saliency", *QUICK, *only) == 0
    head, columns, *rows, _, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "attribution.saliency"
    assert head.endswith("profile quick")
    assert columns.split() == ["verdict", "check", "promise", "cases", "refused", "s"]
    verdicts = {row.split()[1]: row for row in rows}
    assert list(verdicts) == ["finite", "seed_matters", "nonnegative(field='maps')"]
    assert verdicts["finite"].startswith("passed")
    assert "Every number in a result is finite." in verdicts["finite"]
    assert verdicts["seed_matters"].startswith("skipped")
    assert "it has no seed" in verdicts["seed_matters"]
    assert last.startswith("attribution.saliency: 2 passed, 1 skipped in ")


def test_skipped_checks_are_counted_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from phosphene import testing

    def check_few(method: object, *, only: object, **rest: object) -> object:
        names = ["documented", "seed_matters", "labels_matter", "weights_matter"]
        return check_method(method, only=names, **rest)

    check_method = testing.check_method
    monkeypatch.setattr(testing, "check_method", check_few)
    assert check("saliency", *QUICK) == 0
    output = capsys.readouterr().out
    assert "\nskipped" not in output
    assert "\n2 checks do not apply to this method or cannot decide: --verbose lists the reasons\n" in output
    assert check("saliency", *QUICK, "--verbose") == 0
    output = capsys.readouterr().out
    assert output.count("\nskipped") == 2
    assert "it has no seed" in output
    assert "--verbose" not in output


@pytest.mark.parametrize("name", ["attribution.saliency", "phosphene:attribution.saliency"])
def test_method_is_selected_by_id_or_qualified_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(name, *QUICK, "--only", "documented") == 0
    assert "attribution.saliency: 1 passed" in capsys.readouterr().out


def test_failed_check_is_printed_with_code_that_reproduces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_method(tmp_path / "signed_gradient.py", WRONG)
    assert check(file, *QUICK) == 1
    output = capsys.readouterr().out
    table, _, failures = output.partition("FAILED")
    assert "\nfailed   nonnegative(field='maps')" in table
    assert "No value in ``field`` is below zero." in failures
    assert "maps goes down to -" in failures
    assert "signed_gradient.py, line" in failures
    assert "1 failed" in output.splitlines()[-1]
    # The printed example runs and fails with the same message.
    lines = failures.split("smallest failing case:\n")[1].split("  where to look")[0].splitlines()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match="maps goes down to -"):
        exec("\n".join(line.removeprefix("    ") for line in lines), {})


def test_reports_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_method(tmp_path / "signed_map.py", WRONG)
    assert check(file, *QUICK, "--json", "--only", "nonnegative(field='maps')", "--only", "documented") == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["method"] == "attribution.signed_map"
    assert report["profile"] == "quick"
    assert {o["check"]: o["verdict"] for o in report["outcomes"]} == {
        "documented": "passed",
        "nonnegative(field='maps')": "failed",
    }
    assert "Case(" in report["outcomes"][1]["example"]


def test_distribution_selects_all_its_methods_with_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("Phosphene", "--json", "--only", "linear_in('target')", *QUICK) == 0
    reports = json.loads(capsys.readouterr().out)
    names = [report["method"] for report in reports]
    assert {"attribution.integrated_gradients", "attribution.occlusion"} <= set(names)
    assert "attacks.pgd" not in names
    assert {report["distribution"].split()[0] for report in reports} == {"phosphene"}
    assert check("phosphene", "--only", "valid_defaults", *QUICK) == 0
    output = capsys.readouterr().out
    assert output.count("\npassed") > 10
    assert "methods: " in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["saliancy"], "did you mean 'saliency'"),
        (["phosfene"], "did you mean 'phosphene'"),
        (["saliency", "--profile", "quik"], "did you mean 'quick'"),
        (["saliency", "--only", "finit"], "did you mean 'finite'"),
        (["nowhere/method.py"], "there is no file"),
        (["."], "is a folder"),
    ],
)
def test_invalid_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_library_nobody_has\n", "a_library_nobody_has"),
        ("this is no Python\n", "SyntaxError"),
        ("raise SystemExit('no licence')\n", "no licence"),
        ("x = 1\n", "has no hook phosphene_methods"),
        (MISSPELLED, "phosphene_metods"),
    ],
)
def test_file_without_a_method_is_refused(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "somebodys.py").write_text(source)
    assert check(str(tmp_path / "somebodys.py")) == 2
    assert message in capsys.readouterr().err
    assert "somebodys" not in sys.modules


def test_file_is_unloaded_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "neighbor.py").write_text("HERE = 'one'\n")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "neighbor.py").write_text("HERE = 'two'\n")
    before = list(sys.path)
    for folder in ("one", "two"):
        more = f"from neighbor import HERE\nassert HERE == {folder!r}\n"
        assert check(write_method(tmp_path / folder / "leaning.py", more=more), "--only", "documented") == 0
    assert sys.path == before
    assert not {"leaning", "neighbor"} & sys.modules.keys()
    assert capsys.readouterr().out.count("1 passed") == 2


def test_untested_arithmetic_is_said_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(write_method(tmp_path / "size_of_gradient.py"))
    assert check(str(file), *QUICK, "--only", "documented") == 0
    assert "WARNING" not in capsys.readouterr().out
    file.write_text(file.read_text().replace(", oracle=equals_positive_weights", ""))
    assert check(str(file), *QUICK, "--only", "documented") == 0
    *_, warning, _, counts = capsys.readouterr().out.splitlines()
    assert warning == "WARNING attribution.size_of_gradient: " + ARITHMETIC_UNTESTED
    assert "1 passed" in counts


def test_file_in_a_package_is_imported_under_its_package_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_method(tmp_path / "somepackage" / "__init__.py", family="first")
    (tmp_path / "somepackage" / "beside.py").write_text("HERE = 1\n")
    more = "from .beside import HERE\nassert __name__ == 'somepackage.inner'\n"
    inner = write_method(tmp_path / "somepackage" / "inner.py", WRONG, more=more)
    assert check(inner, *QUICK, "--only", "nonnegative(field='maps')") == 1
    assert "from somepackage.inner import inner as method" in capsys.readouterr().out
    assert check(str(tmp_path / "somepackage" / "__init__.py"), "--only", "documented") == 0
    assert "first.somepackage: 1 passed" in capsys.readouterr().out
    assert not any(name.startswith("somepackage") for name in sys.modules)


def test_file_of_an_installed_method_is_the_installed_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import phosphene_plugins.attribution.saliency as installed

    assert check(installed.__file__, "--only", "documented") == 0
    assert sys.modules["phosphene_plugins.attribution.saliency"] is installed
    assert "attribution.saliency: 1 passed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["random", "sys", "__main__", "torch", "my-method"])
def test_file_with_an_invalid_module_name_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('it was imported')\n")
    assert check(str(tmp_path / f"{name}.py")) == 2
    output = capsys.readouterr().err
    assert "name" in output
    assert "it was imported" not in output


def run_in_new_interpreter(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_missing_optional_library_names_the_extra() -> None:
    for library in ("hypothesis", "pytest"):
        done = run_in_new_interpreter(
            f"import sys\nsys.modules[{library!r}] = None\n"
            "from phosphene.cli import main\nmain(['check', 'saliency', '--only', 'documented'])"
        )
        if library == "hypothesis":
            assert done.returncode == 2
            output = (
                "phosphene: phosphene check needs an optional library: pip install 'phosphene[testing]'\n"
            )
            assert done.stderr == output
        else:  # only a repository's own tests need it
            assert done.returncode == 0


def test_importing_the_commands_imports_no_slow_library() -> None:
    done = run_in_new_interpreter(
        "import sys\nfrom phosphene_plugins.authoring import command\n"
        "print([m for m in ('torch', 'pydantic', 'jinja2', 'hypothesis', 'pytest') if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr
