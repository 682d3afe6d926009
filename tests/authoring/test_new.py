"""phosphene new: the generated plugin runs unchanged; an invalid name writes nothing."""

from __future__ import annotations

import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from phosphene import InputError, UnknownName
from phosphene.cli.main import main
from phosphene_plugins.authoring import _project_template as project
from phosphene_plugins.authoring._find_methods import resolve_methods
from phosphene_plugins.authoring._project_template import MAX_NAME_LENGTH, METHOD_TEMPLATES, write_project


def phosphene(*arguments: str) -> int:
    """The exit code of a command."""
    try:
        main(arguments)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_project_has_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into, author = str(tmp_path / "plugins"), 'Ada "A." Lovelace'
    assert phosphene("new", "gradient_entropy", "--into", into, "--author", author) == 0
    folder = tmp_path / "plugins" / "phosphene-gradient-entropy"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        ".github/workflows/ci.yml",
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src/phosphene_gradient_entropy/__init__.py",
        "tests/test_gradient_entropy.py",
    }
    assert list(folder.parent.iterdir()) == [folder]
    output = capsys.readouterr().out
    for step in (f"cd {folder}", "pip install -e '.[test]'", "pytest", "phosphene run gradient_entropy"):
        assert f"\n  {step}" in output
    about = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert about["name"] == "phosphene-gradient-entropy"
    assert about["authors"] == [{"name": 'Ada "A." Lovelace'}]
    assert about["optional-dependencies"]["test"] == ["phosphene[testing]"]
    entries = about["entry-points"]["phosphene.methods.v1"]
    assert entries == {"attribution.gradient_entropy": "phosphene_gradient_entropy"}
    text = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert not any(mark in text.replace("${{ matrix.python }}", "") for mark in ("{{", "}}", "{%", "{#"))


def test_folder_has_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert stat.S_IMODE(write_project("gradient_entropy", into=tmp_path).stat().st_mode) == usual


@pytest.mark.parametrize(
    ("licence", "first_line", "spdx"),
    [
        ("apache-2.0", "Apache License", "Apache-2.0"),
        ("MIT", "MIT License", "MIT"),
        ("bsd-3-clause", "BSD 3-Clause License", "BSD-3-Clause"),
    ],
)
def test_license_choice(tmp_path: Path, licence: str, first_line: str, spdx: str) -> None:
    folder = write_project("gradient_entropy", licence=licence, author="Ada Lovelace", into=tmp_path)
    text = (folder / "LICENSE").read_text()
    assert text.strip().startswith(first_line)
    assert tomllib.loads((folder / "pyproject.toml").read_text())["project"]["license"] == spdx
    if spdx != "Apache-2.0":
        assert "Ada Lovelace" in text
        unsigned = write_project("gradient_entropy", licence=licence, into=tmp_path / "unsigned")
        assert "the phosphene-gradient-entropy authors" in (unsigned / "LICENSE").read_text()


@pytest.mark.parametrize("name", ["tv", "gradient_entropy", "a_name_of_just_so_many_letters_as_allowed"])
@pytest.mark.parametrize("template", METHOD_TEMPLATES)
def test_generated_code_passes_ruff(tmp_path: Path, name: str, template: str) -> None:
    folder = write_project(name[:MAX_NAME_LENGTH], template=template, into=tmp_path)
    for command in (["check", "--select", "B,E,F,I,PT,SIM,UP,W"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("attribution", "attribution"),
        ("attacks", "attacks"),
        ("attacks", "objective_attack"),
        ("embeddings", "dataset"),
        ("defenses", "training"),
        ("an_own_family", "attribution"),
    ],
)
def test_every_template_passes_the_checks(
    tmp_path: Path, family: str, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_project("gradient_entropy", family=family, template=template, into=tmp_path)
    file = folder / "src" / "phosphene_gradient_entropy" / "__init__.py"
    status = phosphene("check", str(file), "--profile", "quick")
    output = capsys.readouterr().out
    assert status == 0, output[-2000:]
    assert output.startswith(f"{family}.gradient_entropy")
    relations = ("equivariant", "invariant_to", "monotone")
    assert template == "training" or any(relation in output for relation in relations)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(name, marks=[] if name == "attribution" else pytest.mark.nightly)
        for name in METHOD_TEMPLATES
    ],
)
def test_no_change_of_a_template_is_unnoticed(
    tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_project("gradient_entropy", template=template, into=tmp_path)
    file = folder / "src" / "phosphene_gradient_entropy" / "__init__.py"
    assert phosphene("check", str(file), "--mutate") == 0
    output = capsys.readouterr().out
    assert " 0 survive" in output, output


@pytest.mark.parametrize(
    ("family", "template"),
    [("embeddings", "dataset"), ("defenses", "training"), ("attacks", "attacks"), ("style", "attribution")],
)
def test_family_selects_the_template(tmp_path: Path, family: str, template: str) -> None:
    folders = [
        write_project("trial", family=family, into=tmp_path / "by_family"),
        write_project("trial", family=family, template=template, into=tmp_path / "named"),
    ]
    first, second = ((f / "src" / "phosphene_trial" / "__init__.py").read_text() for f in folders)
    assert first == second


#: Wrong arithmetic that each template's oracle must refuse: what is replaced in the generated method.
WRONG = [
    ("attribution", "gradient.abs(), smooth).amax(1)", "gradient.abs(), smooth).amax(1).flip(2)"),
    ("attribution", "gradient.abs(), smooth).amax(1)", "gradient.abs(), smooth).amax(1).flip(1)"),
    ("attribution", "gradient.abs(), smooth).amax(1)", "gradient.mT.abs(), smooth).amax(1).mT.flip(1)"),
    (
        "attribution",
        "gradient.abs(), smooth).amax(1)",
        "(model.normalize(images) * gradient).abs(), 0).amax(1)",
    ),
    ("attribution", "gradient.abs(), smooth).amax(1)", "gradient.abs(), smooth).amin(1)"),
    ("attribution", "gradient.abs(), smooth).amax(1)", "gradient.clamp(min=0), smooth).amax(1)"),
    ("attribution", "(gradient.abs()", "(gradient.abs() * model.std.view(3, 1, 1)"),
    ("attacks", "eps * gradient.sign()", "-eps * gradient.sign()"),
    ("attacks", "eps * gradient.sign()", "eps * gradient.sign().flip(3)"),
    ("attacks", "eps * gradient.sign()", "eps * gradient.sign() / 2"),
    ("attacks", "eps * gradient.sign()", "eps * gradient / gradient.abs().max()"),
    ("objective_attack", "- step_size * steepest", "+ step_size * steepest"),
    ("objective_attack", "steepest(gradient, norm)", 'steepest(gradient, "linf")'),
    ("objective_attack", "steepest(gradient, norm)", "steepest(gradient, norm).flip(2)"),
    ("objective_attack", "range(steps)", "range(steps - 1)"),
    ("dataset", "/ len(dataset) - mean.square()", "/ len(dataset)"),
    ("dataset", 'sums["sum"] / len(dataset)', 'sums["sum"] / batch_size(model)'),
    ("dataset", '{"sum": maps.sum(0)', '{"sum": maps.sum(0).flip(1)'),
    ("dataset", "features(images, self.layer)", "features(images.flip(3), self.layer)"),
    ("training", "trained(noisy)", "trained(noisy.flip(3))"),
    ("training", "trained(noisy)", "-trained(noisy)"),
    ("training", "trained(noisy)", "trained(noisy.mean((2, 3), keepdim=True).expand_as(noisy))"),
    ("training", "trainable_copy(model)", "model"),
]


@pytest.mark.parametrize(("template", "right", "wrong"), WRONG)
def test_oracle_of_a_template_refuses_wrong_arithmetic(
    tmp_path: Path, template: str, right: str, wrong: str
) -> None:
    folder = write_project("trial", template=template, into=tmp_path)
    file = folder / "src" / "phosphene_trial" / "__init__.py"
    source = file.read_text()
    assert source.count(right) == 1
    file.write_text(source.replace(right, wrong))
    with resolve_methods(str(file)) as (method,):
        assert method.spec.oracle is not None
        with pytest.raises((AssertionError, RuntimeError)):
            method.spec.oracle()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GradientEntropy", "'gradient_entropy'"),
        ("gradient-entropy", "'gradient_entropy'"),
        ("2nd_gradient", "'nd_gradient'"),
        ("HTMLMap2", "'html_map_2'"),
        ("lambda", "'lambda_method'"),
        ("_hidden", "'hidden'"),
        ("two__words", "'two_words'"),
        ("../elsewhere", "'elsewhere'"),
        ("", "'gradient_entropy'"),
        ("é", "'gradient_entropy'"),
        ("x" * 41, "at most 40"),
        ("saliency", "attribution.saliency already, from phosphene "),
        ("pgd", "attacks.pgd already, from phosphene "),
        ("plugins", "module phosphene_plugins already"),
        ("torch", "means something else"),
        ("images", "means something else"),
        ("maps", "means something else"),
    ],
)
def test_invalid_name_is_refused_before_writing(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        write_project(name, into=tmp_path / "new")
    assert message in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_invalid_family_license_author_and_folder_are_refused_before_writing(tmp_path: Path) -> None:
    new = tmp_path / "new"
    with pytest.raises(InputError, match="name of a family"):
        write_project("gradient_entropy", family="My Family", into=new)
    with pytest.raises(UnknownName, match="did you mean 'training'"):
        write_project("gradient_entropy", template="trainings", into=new)
    with pytest.raises(UnknownName, match="did you mean 'apache-2.0'"):
        write_project("gradient_entropy", licence="apache2", into=new)
    with pytest.raises(InputError, match="one line"):
        write_project("gradient_entropy", author="Ada\nLovelace", into=new)
    assert not new.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        write_project("gradient_entropy", into=tmp_path / "file")


def test_existing_folder_is_left_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "phosphene-gradient-entropy"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert phosphene("new", "gradient_entropy", "--into", str(tmp_path)) == 2
    output = capsys.readouterr().err
    assert "exists already" in output
    assert output.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == [folder.name, "mine.txt"]


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write, written = Path.write_text, []

    def interrupted_write(path: Path, *args: object, **more: object) -> None:
        if len(written) == 4:
            raise error
        written.append(path)
        write(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", interrupted_write)
    with pytest.raises(type(error)):
        write_project("gradient_entropy", into=tmp_path)
    assert len(written) == 4
    assert not list(tmp_path.iterdir())


def test_wheel_contains_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel, and is not installed")
    monkeypatch.chdir(Path(__file__).parents[2])
    names = zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))).namelist()
    home = "phosphene_plugins/authoring/template/"
    packed = {name.removeprefix(home) for name in names if name.startswith(home)}
    here = {p.relative_to(project.TEMPLATE).as_posix() for p in project.TEMPLATE.rglob("*") if p.is_file()}
    assert packed == here
    assert len(here) > 10
