"""Folders, plans and requests of strangers: one sentence each; nothing is executed, allocated or written."""

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from phosphene import (
    InputError,
    PhospheneError,
    Result,
    UnknownName,
    load_model,
    load_result,
    methods,
    prepare,
    replay,
    run,
)
from phosphene.models import limit_parameters, saved_options
from phosphene.training import TrainedModel

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "core" / "phosphene" / "builtin" / "weights"

#: What a test changes in result.json.
Edit = Callable[[dict[str, Any]], Any]


class Payload:
    """A pickle that writes the file ``executed`` into the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def edit(folder: Path, change: Edit) -> None:
    """Change the document of a saved result."""
    document = json.loads((folder / "result.json").read_text())
    change(document)
    (folder / "result.json").write_text(json.dumps(document))


def edit_arrays(folder: Path, change: Edit) -> None:
    """Change the tensors of a saved result."""
    tensors = load_file(folder / "arrays.safetensors")
    change(tensors)
    save_file(tensors, folder / "arrays.safetensors")


def is_one_sentence(error: pytest.ExceptionInfo[PhospheneError]) -> bool:
    """Whether an error is a single line of readable length."""
    return 20 < len(str(error.value)) < 900 and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved result of several types."""
    out = tmp_path_factory.mktemp("saved")
    images = {"images": "builtin:scenes/2"}
    run("grad_cam", **images, out=out / "attribution", progress=False)
    run("pgd", **images, steps=1, out=out / "attack", progress=False)
    run("pca", dataset="builtin:scenes/6", out=out / "embedding", progress=False)
    quick = methods["adversarial_training"].spec.quick
    run("adversarial_training", dataset="builtin:scenes/8", **quick, out=out / "trained", progress=False)
    shutil.copytree(BUNDLED / "shapes-styles", out / "stylizer")
    shutil.copytree(BUNDLED / "shapes-adaptive", out / "adaptive")
    return {path.name: path for path in out.iterdir()}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of a saved result that may be changed; the working directory is the temporary folder."""
    monkeypatch.chdir(tmp_path)
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / name))


# --- damaged folders --------------------------------------------------------------------------------


DAMAGE: dict[str, Edit] = {
    "field removed": lambda d: d["fields"].pop("maps"),
    "field added": lambda d: d["fields"].update(more_maps=1),
    "another type": lambda d: d.update(type="Embedding"),
    "a type that is a list": lambda d: d.update(type=["Attribution"]),
    "fields that are a list": lambda d: d.update(fields=[1, 2]),
    "inputs that are a list": lambda d: d.update(inputs=[1, 2]),
    "no inputs": lambda d: d.pop("inputs"),
    "a tensor replaced by a word": lambda d: d["fields"].update(maps="map"),
    "a tensor that does not exist": lambda d: d["fields"].update(maps={"$tensor": "elsewhere"}),
    "a reference that is a list": lambda d: d["fields"].update(maps={"$tensor": []}),
    "a name that is a number": lambda d: d["fields"].update(targets=[1, 2]),
    "too few names": lambda d: d["fields"]["targets"].pop(),
    "an unknown layout": lambda d: d["fields"].update(layout="sideways"),
    "provenance of another kind": lambda d: d.update(provenance={"x": 1}),
    "provenance that is a list": lambda d: d.update(provenance=[1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_document_is_refused_in_one_sentence(copy: Callable[[str], Path], damage: str) -> None:
    folder = copy("attribution")
    edit(folder, DAMAGE[damage])
    with pytest.raises(PhospheneError) as error:
        load_result(folder)
    assert is_one_sentence(error)


def test_damage_names_the_field(copy: Callable[[str], Path]) -> None:
    folder = copy("attribution")
    edit(folder, lambda d: d["fields"].update(maps="map"))
    with pytest.raises(InputError, match="field 'maps' is a str, not of type Tensor"):
        load_result(folder)


ARRAYS: dict[str, tuple[Edit, str]] = {
    "maps of another rank": (lambda t: t.update(maps=t["maps"][0]), "'maps' has shape"),
    "maps of more images": (lambda t: t.update(maps=torch.cat([t["maps"]] * 2)), "'maps' has shape"),
    "NaN": (lambda t: t["maps"].fill_(math.nan), "'maps' contains NaN"),
    "infinity": (lambda t: t["maps"].fill_(math.inf), "'maps' contains NaN or infinity"),
    "a tensor removed": (lambda t: t.pop("maps"), "no tensor 'maps'"),
}


@pytest.mark.parametrize("damage", ARRAYS)
def test_damaged_arrays_are_refused_in_one_sentence(copy: Callable[[str], Path], damage: str) -> None:
    folder = copy("attribution")
    change, message = ARRAYS[damage]
    edit_arrays(folder, change)
    with pytest.raises(InputError, match=message) as error:
        load_result(folder)
    assert is_one_sentence(error)


def test_missing_arrays_and_other_kinds_of_files_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("attribution")
    (folder / "arrays.safetensors").unlink()
    os.mkfifo(folder / "arrays.safetensors")  # reading it would wait for ever
    with pytest.raises(InputError, match=r"no arrays\.safetensors"):
        load_result(folder)


def test_fields_that_do_not_match_are_refused_when_they_are_drawn(copy: Callable[[str], Path]) -> None:
    folder = copy("embedding")
    edit_arrays(folder, lambda t: t.update(points=t["points"][:, :0].contiguous()))
    result = load_result(folder)
    for draw in (result.png, result.figure, result._repr_html_):
        with pytest.raises(PhospheneError) as error:
            draw()
        assert is_one_sentence(error)
    assert "points" in repr(result)


#: Values that replace others in a saved document.
VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=8)),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just({"$tensor": "images"}), st.just({"$network": "network"}),
)  # fmt: skip


def positions(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from positions(item, (*path, key))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_changes_of_a_document_load_or_are_refused(
    saved: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(saved)))
    document = json.loads((saved[name] / "result.json").read_text())
    path = data.draw(st.sampled_from(sorted(positions(document), key=str)))
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    if data.draw(st.booleans()):
        del owner[path[-1]]
    else:
        owner[path[-1]] = data.draw(VALUES)
    folder = tmp_path / "changed"
    folder.mkdir(exist_ok=True)
    (folder / "arrays.safetensors").unlink(missing_ok=True)
    (folder / "arrays.safetensors").hardlink_to(saved[name] / "arrays.safetensors")
    (folder / "result.json").write_text(json.dumps(document))
    result, error = attempt(lambda: load_result(folder))
    if result is not None:
        assert isinstance(result, Result) and repr(result)
        _, error = attempt(result.png)
    assert error is None or (20 < len(error) < 900 and "\n" not in error)


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call returns, and the message of its PhospheneError; any other exception is passed on."""
    try:
        return call(), None
    except PhospheneError as error:
        return None, str(error)


# --- options and files that a stranger chooses ----------------------------------------------------------


HOSTILE_OPTIONS: dict[str, Any] = {
    "checkpoint_path": "evil.pth",
    "pretrained_cfg": {"file": "evil.pth"},
    "pretrained_cfg_overlay": {"file": "evil.pth"},
    "cache_dir": "elsewhere",
    "file": "evil.pth",
    "num_classes": 10**9,
}


@pytest.mark.parametrize("option", HOSTILE_OPTIONS)
def test_trained_model_passes_no_path_and_no_bomb_to_the_loader(
    copy: Callable[[str], Path], option: str
) -> None:
    folder = copy("trained")
    Path("evil.pth").write_bytes(pickle.dumps(Payload()))
    source = {"uri": "timm:test_resnet", option: HOSTILE_OPTIONS[option]}
    edit(folder, lambda d: d["fields"]["config"].update(source=source))
    result = load_result(folder)
    assert isinstance(result, TrainedModel)
    with pytest.raises(PhospheneError, match=option):
        result.model()
    assert not Path("executed").exists()


@pytest.mark.parametrize("option", HOSTILE_OPTIONS)
def test_replay_passes_no_path_and_no_bomb_to_the_loader(copy: Callable[[str], Path], option: str) -> None:
    folder = copy("attribution")
    source = {"uri": "timm:test_resnet", option: HOSTILE_OPTIONS[option]}
    edit(folder, lambda d: d["provenance"]["model"].update(source=source))
    with pytest.raises(InputError, match=option) as error:
        replay(folder)
    assert is_one_sentence(error)


@pytest.mark.parametrize("uri", ["timm:test_resnet", "defended:jpeg()|timm:test_resnet"])
def test_requests_and_plans_pass_no_path_to_the_loader(uri: str, tmp_path: Path) -> None:
    from phosphene_plugins.batch._execute_plan import open_batch
    from phosphene_plugins.batch._plan import read_plan

    with pytest.raises(InputError, match="'checkpoint_path'"):
        prepare("saliency", model={"uri": uri, "checkpoint_path": "evil.pth"})
    plan = tmp_path / "plan.yaml"
    model = {"uri": uri, "options": {"checkpoint_path": "evil.pth"}}
    plan.write_text(json.dumps({"models": [model], "methods": ["saliency"]}))
    with pytest.raises(InputError, match="'checkpoint_path'"):
        open_batch(read_plan(plan), tmp_path / "out")


def test_schemes_list_what_may_come_from_a_file() -> None:
    assert "num_classes" in saved_options("defended:jpeg()|defended:median()|timm:resnet18")
    assert "prompts" in saved_options("open_clip:ViT-B-32")
    assert saved_options("builtin:shapes-vgg") == ()
    options = {"num_classes": 5, "in_chans": 1}
    model = load_model("timm:test_resnet", **options)
    again = prepare("saliency", model={"uri": "timm:test_resnet", **options}, images=torch.rand(1, 1, 64, 64))
    assert again.inputs["model"].class_count == model.class_count == 5


def test_pickled_weights_of_a_saved_model_are_not_read(copy: Callable[[str], Path]) -> None:
    folder = copy("attribution")
    Path("evil.pth").write_bytes(pickle.dumps(Payload()))
    edit(folder, lambda d: d["provenance"]["model"]["source"].update(weights=str(Path("evil.pth").resolve())))
    with pytest.raises(InputError, match="no safetensors file: pass the model instead"):
        replay(folder)
    assert not Path("executed").exists()


RUN_ARGUMENTS: dict[str, Any] = {
    "out": "planted",
    "device": "meta",
    "executor": "elsewhere",
    "progress": True,
    "batch_size": 1,
    "name": "fgsm",
    "nonsense": 1,
}


@pytest.mark.parametrize("part", ["inputs", "params"])
@pytest.mark.parametrize("name", RUN_ARGUMENTS)
def test_replay_takes_declared_inputs_and_parameters_only(
    copy: Callable[[str], Path], part: str, name: str
) -> None:
    folder = copy("attribution")
    edit(
        folder,
        lambda d: (d if part == "inputs" else d["provenance"])[part].update({name: RUN_ARGUMENTS[name]}),
    )
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(InputError, match=f"invalid (input|parameter) '{name}'"):
        replay(folder)
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(dtype="load"),
        lambda p: p.update(device="nowhere"),
        lambda p: p["model"].update(source="timm:resnet18"),
        lambda p: p["model"].update(source={"uri": 5}),
        lambda p: p["model"]["source"].update(input_size=[3, 10**6, 10**6]),
        lambda p: p["model"]["source"].update(mean=["a"]),
        lambda p: p.update(method="attribution.unknown"),
        lambda p: p.update(batch_size=-3),
    ],
)
def test_replay_of_damaged_provenance_is_refused(copy: Callable[[str], Path], change: Edit) -> None:
    folder = copy("attribution")
    edit(folder, lambda d: change(d["provenance"]))
    with pytest.raises(PhospheneError) as error:
        replay(folder)
    assert is_one_sentence(error)


# --- sizes and recursion ------------------------------------------------------------------------------


CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "very many blocks": ("stylizer", {"blocks": 10**7}),
    "a very wide network": ("stylizer", {"width": 10**6}),
    "an unknown key": ("stylizer", {"nonsense": 1}),
    "another width": ("stylizer", {"width": 16}),
    "a negative width": ("stylizer", {"width": -1}),
    "a width that is a word": ("stylizer", {"width": "wide"}),
    "very many widths": ("adaptive", {"widths": [48] * 10**5}),
    "a very large stride": ("adaptive", {"halvings": 10**9}),
    "no encoder": ("adaptive", {"encoder": None}),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
def test_configuration_that_does_not_fit_the_weights_is_refused(
    copy: Callable[[str], Path], what: str
) -> None:
    name, change = CONFIGURATIONS[what]
    folder = copy(name)
    edit(folder, lambda d: d["fields"]["config"].update(change))
    with pytest.raises(PhospheneError) as error:
        load_result(folder)
    assert is_one_sentence(error)


def test_number_of_parameters_is_bounded_before_they_are_written() -> None:
    with limit_parameters(1000), pytest.raises(PhospheneError, match="more than 1,000 numbers"):
        torch.nn.Linear(10**5, 10**3)
    with limit_parameters(1000), pytest.raises(PhospheneError, match="modules"):
        torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.ReLU()) for _ in range(60_000)))
    assert torch.nn.Linear(100, 100).weight.shape == (100, 100)


@pytest.mark.parametrize("uri", ["trained:{0}", "ensemble:trained:{0} + trained:{0}"])
def test_trained_model_of_itself_is_refused(copy: Callable[[str], Path], uri: str) -> None:
    folder = copy("trained")
    edit(folder, lambda d: d["fields"]["config"].update(source={"uri": uri.format(folder)}))
    result = load_result(folder)
    assert isinstance(result, TrainedModel)
    with pytest.raises(PhospheneError, match="refers to itself"):
        result.model()
    with pytest.raises(PhospheneError, match="refers to itself") as error:
        load_model(f"trained:{folder}")
    assert is_one_sentence(error)


def test_long_chain_of_trained_models_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("trained")
    for number in range(12):
        following = Path(shutil.copytree(folder, folder.with_name(f"trained-{number}")))
        edit(folder, lambda d, uri=f"trained:{following}": d["fields"]["config"].update(source={"uri": uri}))
        folder = following
    with pytest.raises(PhospheneError, match="more than 8 folders"):
        load_model(f"trained:{folder.with_name('trained')}")


# --- what is legitimate still works -------------------------------------------------------------------


def test_saved_results_load_and_are_drawn(saved: dict[str, Path]) -> None:
    for folder in saved.values():
        result = load_result(folder)
        assert result.png() and repr(result)
    assert replay(saved["attack"]).same
    model = load_result(saved["trained"])
    assert isinstance(model, TrainedModel) and model.model().class_count == 10


def test_pinned_versions_satisfy_the_declared_bounds() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    optional = [r for extra in project["optional-dependencies"].values() for r in extra]
    bounds = [Requirement(text) for text in (*project["dependencies"], *optional)]
    for bound in bounds:
        pin = pins.get(bound.name.lower().replace("_", "-"), "999")
        assert bound.specifier.contains(pin), bound
    (timm,) = (bound for bound in bounds if bound.name == "timm")
    # 1.0.25 unpickles the file that checkpoint_path names; 1.0.26 reads weights only.
    assert not timm.specifier.contains("1.0.25") and timm.specifier.contains("1.0.26")


def test_checkpoint_of_the_users_own_call_is_read_as_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(PhospheneError):
        load_model("timm:test_resnet", checkpoint_path="evil.pth")
    assert not Path("executed").exists()


def test_unknown_result_type_lists_the_types(copy: Callable[[str], Path]) -> None:
    folder = copy("attribution")
    edit(folder, lambda d: d.update(type="Attributions"))
    with pytest.raises(UnknownName, match=re.escape("did you mean 'Attribution'")):
        load_result(folder)
