"""``run``, ``prepare`` and ``replay``: inputs, observers, executors, batches, saving."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import phosphene.models.model
import phosphene.results.base
import phosphene.roles.images
from phosphene import (
    InputError,
    Method,
    Model,
    PhospheneError,
    PluginError,
    UnknownName,
    batch_size,
    hookimpl,
    load_model,
    load_result,
    max_batch,
    method,
    methods,
    prepare,
    progress_bar,
    replay,
    report_progress,
    run,
)
from phosphene.builtin.scenes import CLASSES, draw_scenes
from phosphene.cli.argument_rows import argument_rows
from phosphene.cli.main import main
from phosphene.images import read_image, write_png
from phosphene.registry.extensions import extensions
from phosphene.results import AdversarialExamples, Attribution
from phosphene.roles import Images
from phosphene.roles import Model as ModelInput


@pytest.fixture(scope="module")
def scenes() -> Any:
    return draw_scenes(3, seed=5, split="test")


@pytest.fixture
def folder(scenes: Any, tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for number, image in enumerate(scenes.images):
        write_png(image, path / f"{number}.png")
    return path


@pytest.fixture
def toy() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return load_model(module, input_size=(3, 8, 8))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# --- inputs as paths, names and URIs --------------------------------------------------------------


def test_defaults_come_from_the_bundled_world() -> None:
    result = run("saliency", progress=False)
    assert result.images.shape == (4, 3, 64, 64)
    assert result.provenance.model["name"] == "builtin:shapes-vgg"
    assert set(result.targets) <= set(CLASSES)


def test_methods_have_defaults_of_their_own_where_those_of_the_roles_do_not_suit() -> None:
    """The model and the data set that a method needs are declared by it, documented, and overridden."""
    prepared = prepare("part_importance")
    assert prepared.inputs["model"].name == "builtin:parts-resnet"
    assert len(prepared.inputs["dataset"]) == 12 and prepared.inputs["dataset"].parts([0])
    assert prepare("part_importance", dataset="builtin:part-scenes/3").inputs["dataset"].parts([0])
    assert prepare("attention_maps").inputs["model"].name == "builtin:shapes-vit"
    assert prepare("deep_inversion").inputs["model"].name == "builtin:parts-resnet"
    assert prepare("deep_inversion", model="builtin:shapes-resnet").inputs["model"].name.endswith("resnet")
    help_of = {name: text for name, *_, text in argument_rows(methods["part_importance"].spec)}
    assert help_of["model"].endswith("(default: builtin:parts-resnet)")
    assert help_of["dataset"].count("default:") == 1
    with pytest.raises(UnknownName, match="input"):
        method(family="scores", defaults={"images": "builtin:scenes/1"})(needs_a_model)


def needs_a_model(model: ModelInput) -> Attribution:
    """A method of one input."""
    raise NotImplementedError


def test_path_list_and_folder_read_the_same_images(folder: Path) -> None:
    complete = run("saliency", images=folder)
    listed = run("saliency", images=[folder / f"{n}.png" for n in range(3)])
    one = run("saliency", images=str(folder / "1.png"))
    assert torch.equal(complete.images, listed.images)
    assert torch.equal(complete.images[1], read_image(folder / "1.png"))
    assert torch.equal(one.images, complete.images[1:2])
    torch.testing.assert_close(one.maps, complete.maps[1:2])


def test_images_are_resized_to_the_models_input_size(tmp_path: Path) -> None:
    write_png(torch.rand(3, 100, 80), tmp_path / "a.png")
    write_png(torch.rand(3, 30, 50), tmp_path / "b.png")
    assert run("saliency", images=tmp_path).images.shape == (2, 3, 64, 64)


def test_missing_image_file_raises(tmp_path: Path) -> None:
    with pytest.raises(PhospheneError, match=r"nothing\.png"):
        run("saliency", images=tmp_path / "nothing.png")
    with pytest.raises(PhospheneError):
        run("saliency", images=tmp_path)


@pytest.mark.parametrize("labels", [["circle", "star", "circle"], [0, "star", "0"], torch.tensor([0, 2, 0])])
def test_labels_are_names_or_indices(scenes: Any, labels: Any) -> None:
    named = {"circle": CLASSES.index("circle"), "star": CLASSES.index("star")}
    expected = [named.get(v, v) if isinstance(v, str) and not v.isdecimal() else int(v) for v in labels]
    result = run("pgd", images=scenes.images, labels=labels, steps=1, seed=0)
    assert result.labels.tolist() == expected


def test_default_labels_are_the_predicted_classes(scenes: Any) -> None:
    result = run("pgd", images=scenes.images, steps=1, seed=0)
    assert torch.equal(result.labels, result.before)


@pytest.mark.parametrize("target", ["star", "class:star", CLASSES.index("star"), str(CLASSES.index("star"))])
def test_target_is_a_class_by_name_or_number(scenes: Any, target: Any) -> None:
    assert run("saliency", images=scenes.images, target=target).targets == ("star",) * 3


@pytest.mark.parametrize("value", [3, [], {}, b"picture", [{"a": torch.zeros(3, 2, 2)}]], ids=repr)
@pytest.mark.parametrize(
    ("name", "role"),
    [("saliency", "images"), ("saliency", "model"), ("gram_texture", "sample"), ("top_patches", "dataset"),
     ("fast_style_fit", "styles"), ("fast_style", "stylizer"), ("pgd", "labels")],
)  # fmt: skip
def test_values_of_a_wrong_type_are_refused(name: str, role: str, value: Any) -> None:
    with pytest.raises(PhospheneError):
        prepare(name, **{role: value})


def test_unknown_device_is_refused(toy: Model, images: Tensor) -> None:
    with pytest.raises(InputError, match="nowhere"):
        run("saliency", model=toy, images=images, device="nowhere")


@pytest.mark.parametrize("name", ["efros_leung", "fast_style"])
def test_unknown_device_is_refused_without_a_model(name: str) -> None:
    with pytest.raises(InputError, match="nowhere"):
        run(name, device="nowhere")


def test_texture_is_read_at_its_own_size(tmp_path: Path) -> None:
    texture = torch.rand(3, 20, 300)
    write_png(texture, tmp_path / "strip.png")
    result = run("efros_leung", sample=tmp_path / "strip.png", size=8, window=3, order="ring", seed=0)
    assert torch.equal(result.sources[0], (texture * 255).round() / 255)


def test_provenance_without_a_model_has_device_and_dtype() -> None:
    result = methods["efros_leung"](torch.rand(1, 1, 8, 8, dtype=torch.float64), size=8, window=3, seed=0)
    provenance = result.provenance
    assert provenance is not None
    assert (provenance.model, provenance.device, provenance.dtype) == (None, "cpu", "float64")


def test_input_passed_twice_is_refused(toy: Model, images: Tensor) -> None:
    with pytest.raises(InputError, match="images twice"):
        methods["saliency"](toy, images, images=images)


def test_wrong_return_type_raises_plugin_error(toy: Model, images: Tensor) -> None:
    @method(family="tests")
    def forgetful(model: ModelInput, images: Images) -> Attribution:
        """Return nothing."""

    for most in (1, 100):
        with max_batch(most), pytest.raises(PluginError, match="returned a NoneType, not Attribution"):
            forgetful(toy, images)


def test_result_does_not_share_memory_with_inputs(toy: Model, images: Tensor) -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    result = methods["pgd"](toy, images, labels, steps=1, seed=0)
    before = images.clone()
    images.zero_()
    labels.fill_(1)
    assert torch.equal(result.images, before)
    assert torch.equal(result.inputs["images"], before)
    assert not result.labels.any()


@pytest.mark.parametrize("name", ["saliency", "pgd", "cam", "class_visualization", "nearest_neighbors"])
def test_inference_mode_does_not_change_results(name: str) -> None:
    quick = methods[name].spec.quick | ({"seed": 0} if methods[name].seed else {})
    usual = run(name, **quick)
    with torch.inference_mode():
        # Images, labels and the network are created in inference mode, too.
        tensors = {n: v.clone() for n, v in usual.inputs.items() if isinstance(v, Tensor)}
        assert all(v.is_inference() for v in tensors.values())
        inside = run(name, model=load_model("builtin:shapes-vgg"), **tensors, **quick)
    for field, value in usual.fields():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(inside, field), value)
            assert not getattr(inside, field).is_inference()


def test_unknown_names_are_refused_before_any_work(toy: Model, images: Tensor) -> None:
    passes: list[int] = []
    toy.module.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(UnknownName, match="did you mean 'saliency'"):
        run("salency", model=toy, images=images)
    with pytest.raises(UnknownName, match="did you mean 'steps'"):
        run("pgd", model=toy, images=images, step=3)
    with pytest.raises(InputError, match="steps"):
        run("pgd", model=toy, images=images, steps=0)
    with pytest.raises(UnknownName, match="executor"):
        run("saliency", model=toy, images=images, executor="nowhere")
    assert not passes


# --- observers, executors, progress, batches --------------------------------------------------


class Observer:
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    @hookimpl
    def phosphene_before_run(self, run: Any) -> None:
        self.events.append(("before", run.method))

    @hookimpl
    def phosphene_after_run(self, run: Any, result: Any, error: BaseException | None) -> None:
        self.events.append(("after", error if error is not None else type(result).__name__))


class Clumsy:
    @hookimpl
    def phosphene_before_run(self) -> None:
        raise RuntimeError("the tracker is down")


class Cluster:
    def __init__(self) -> None:
        self.requests: list[Any] = []

    @hookimpl
    def phosphene_executors(self) -> dict[str, Any]:
        def far_away(request: Any) -> Any:
            self.requests.append(request)
            return methods[request.method](**request.inputs, **request.params)

        return {"cluster": far_away}


@pytest.fixture
def register_plugins() -> Iterator[Any]:
    added: list[Any] = []

    def add(plugin: Any) -> Any:
        extensions.manager.register(plugin, name=type(plugin).__name__)
        added.append(plugin)
        return plugin

    yield add
    for plugin in added:
        extensions.manager.unregister(plugin)


def test_observers_are_called_at_start_and_end(register_plugins: Any, toy: Model, images: Tensor) -> None:
    observer = register_plugins(Observer())
    run("saliency", model=toy, images=images)
    assert observer.events == [("before", "saliency"), ("after", "Attribution")]


def test_observers_receive_the_error_which_is_raised(
    register_plugins: Any, toy: Model, images: Tensor
) -> None:
    observer = register_plugins(Observer())
    broken = RuntimeError("a layer broke")

    def burn(*_: Any) -> None:
        raise broken

    toy.structure  # noqa: B018
    toy.module[1].register_forward_hook(burn)
    with pytest.raises(RuntimeError, match="a layer broke"):
        run("saliency", model=toy, images=images)
    assert observer.events == [("before", "saliency"), ("after", broken)]


def test_failing_observer_is_only_a_warning(register_plugins: Any, toy: Model, images: Tensor) -> None:
    register_plugins(Clumsy())
    observer = register_plugins(Observer())
    with pytest.warns(UserWarning, match=r"Clumsy failed in phosphene_before_run.*the tracker is down"):
        run("saliency", model=toy, images=images)
    assert len(observer.events) == 2


def test_executor_receives_the_prepared_run(register_plugins: Any, toy: Model, images: Tensor) -> None:
    cluster = register_plugins(Cluster())
    result = run("pgd", model=toy, images=images, steps=2, seed=1, executor="cluster", batch_size=2)
    (request,) = cluster.requests
    assert request.method == "pgd"
    assert request.params == {"steps": 2, "seed": 1}
    assert request.batch_size == 2
    assert torch.equal(request.inputs["images"], images)
    assert torch.equal(result.adversarial, run("pgd", model=toy, images=images, steps=2, seed=1).adversarial)


def test_progress_goes_to_a_callable(capsys: pytest.CaptureFixture[str]) -> None:
    with report_progress(False):
        assert list(progress_bar(range(3), "counting")) == [0, 1, 2]
    events: list[Any] = []
    run("occlusion", images="builtin:scenes/1", window=32, stride=32, batch_size=1, progress=events.append)
    assert [e.done for e in events] == list(range(1, len(events) + 1))
    assert events
    assert events[-1].done == events[-1].total
    assert capsys.readouterr() == ("", "")
    outer: list[Any] = []
    with report_progress(outer.append):
        run("occlusion", images="builtin:scenes/1", window=32, stride=32, batch_size=1)
    assert outer == events


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_batch_size_is_respected_and_does_not_change_results(toy: Model, images: Tensor, most: int) -> None:
    complete = run("pgd", model=toy, images=images, steps=2, seed=0)
    rows: list[int] = []
    handle = toy.module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    # Without labels the model predicts them, also in batches.
    cut = run("pgd", model=toy, images=images, steps=2, seed=0, batch_size=most)
    handle.remove()
    assert max(rows) == min(most, 3)
    torch.testing.assert_close(cut.adversarial, complete.adversarial, rtol=0, atol=1e-6)
    assert cut.provenance.batch_size == most


def test_batch_size_is_positive_and_restored(toy: Model, images: Tensor) -> None:
    usual = batch_size(toy)
    with pytest.raises(InputError, match="at least 1"):
        run("saliency", model=toy, images=images, batch_size=0)
    run("saliency", model=toy, images=images, batch_size=1)
    assert batch_size(toy) == usual


# --- saving and running again -----------------------------------------------------------------


def test_output_folder_has_figure_arrays_and_json(scenes: Any, tmp_path: Path) -> None:
    result = run("pgd", images=scenes.images, steps=1, seed=3, out=tmp_path / "new" / "attack")
    saved = tmp_path / "new" / "attack"
    written = sorted(p.name for p in saved.iterdir())
    assert written == ["arrays.safetensors", "picture.png", "pictures", "result.json"]
    assert sorted(p.name for p in (saved / "pictures").iterdir()) == ["000.png", "001.png", "002.png"]
    document = json.loads((saved / "result.json").read_text())
    assert document["provenance"]["method"] == "attacks.pgd"
    assert document["provenance"]["params"]["steps"] == 1
    assert document["provenance"]["seed"] == 3
    assert torch.equal(load_result(saved).adversarial, result.adversarial)


def test_replay_of_a_bundled_model_is_bit_identical(scenes: Any, tmp_path: Path) -> None:
    run("pgd", images=scenes.images, steps=2, out=tmp_path / "a")
    again = replay(tmp_path / "a")
    assert again.same
    assert str(again) == "the same, bit for bit"
    assert again.result.provenance.seed == again.saved.provenance.seed


def test_replay_needs_a_users_model_and_reports_changed_weights(
    toy: Model, images: Tensor, tmp_path: Path
) -> None:
    run("saliency", model=toy, images=images, out=tmp_path / "a")
    with pytest.raises(InputError, match="model="):
        replay(tmp_path / "a")
    assert replay(tmp_path / "a", model=toy).same
    with torch.no_grad():
        toy.module[0].weight += 0.1
    again = replay(tmp_path / "a", model=toy)
    assert not again.same
    assert again.differences["maps"] > 0
    assert "maps" in str(again)
    assert "the model's weights" in str(again)


def test_replay_works_from_another_working_directory(
    tmp_path: Path, scenes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hier").mkdir()
    (tmp_path / "dort").mkdir()
    monkeypatch.chdir(tmp_path / "hier")
    (Path.cwd() / "bilder ü").mkdir()
    write_png(scenes.images[0], "bilder ü/a.png")
    state = load_model("builtin:shapes-vgg").module.state_dict()
    save_file({name: value * 1.01 for name, value in state.items()}, "gewichte ü.safetensors")
    model = load_model("builtin:shapes-vgg", weights="gewichte ü.safetensors")
    run("top_patches", model=model, dataset="bilder ü", k=1, out="patches")
    quick = methods["fast_style_fit"].spec.quick
    run("fast_style_fit", model=model, dataset="bilder ü", out="network", **quick)
    run("fast_style", images="bilder ü/a.png", stylizer="network", out="painted")
    monkeypatch.chdir(tmp_path / "dort")
    for name in ("patches", "network", "painted"):
        assert replay(Path("../hier", name)).same, name


def test_bundled_stylizer_is_recorded_by_name(tmp_path: Path) -> None:
    result = run("fast_style", images="builtin:scenes/1", out=tmp_path / "a")
    assert result.inputs["stylizer"] == "builtin:shapes-styles"
    assert replay(tmp_path / "a").same


def test_replay_refuses_a_callable_target(toy: Model, images: Tensor, tmp_path: Path) -> None:
    run("saliency", model=toy, images=images, target=lambda logits: logits[:, 0], out=tmp_path / "a")
    with pytest.raises(InputError):
        replay(tmp_path / "a", model=toy)


def test_existing_result_is_replaced(toy: Model, images: Tensor, tmp_path: Path) -> None:
    run("pgd", model=toy, images=images, steps=1, out=tmp_path / "a")
    run("saliency", model=toy, images=images[:1], out=tmp_path / "a")
    assert type(load_result(tmp_path / "a")).__name__ == "Attribution"
    assert [p.name for p in (tmp_path / "a" / "pictures").iterdir()] == ["000.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folder_with_other_files_is_refused_and_unchanged(toy: Model, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run("saliency", model=toy, images=images, out=tmp_path / "empty")
    assert load_result(tmp_path / "empty").provenance is not None
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="files other than a result"):
        run("saliency", model=toy, images=images, out=tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    with pytest.raises(InputError, match="is a file"):
        run("saliency", model=toy, images=images, out=tmp_path / "home" / "letter.txt")


def test_invalid_output_folders_are_refused_before_any_work(
    toy: Model, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    passes: list[int] = []
    toy.module.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(InputError, match="working directory"):
        run("saliency", model=toy, images=images, out=".")
    Path("letter").write_text("dear")
    with pytest.raises(InputError, match="letter is a file"):
        run("saliency", model=toy, images=images, out="letter/below/it")
    assert not passes


def test_symbolic_link_is_preserved(toy: Model, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        run("saliency", model=toy, images=images, out=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    assert load_result(tmp_path / "real").provenance is not None


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("broken", ["save_tensors", "write_png"])
def test_interrupted_saving_leaves_no_partial_result(
    toy: Model,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    before: bool,
    broken: str,
) -> None:
    out = tmp_path / "a"
    if before:
        run("saliency", model=toy, images=images, out=out)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(phosphene.results.base, broken, fail)
        # A failed system call is one sentence, an interruption stays what it is.
        with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
            run("pgd", model=toy, images=images, steps=1, out=out)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if before else [])
    if before:
        assert replay(out, model=toy).same
    run("pgd", model=toy, images=images, steps=1, out=out)
    assert type(load_result(out)).__name__ == "AdversarialExamples"


@pytest.mark.parametrize("damage", ["truncate", "json", "tensor", "type", "format"])
def test_damaged_folder_is_refused(toy: Model, images: Tensor, tmp_path: Path, damage: str) -> None:
    run("saliency", model=toy, images=images, out=tmp_path / "a")
    arrays, words = tmp_path / "a" / "arrays.safetensors", tmp_path / "a" / "result.json"
    document = json.loads(words.read_text())
    match damage:
        case "truncate":
            arrays.write_bytes(arrays.read_bytes()[:100])
        case "json":
            words.write_text(words.read_text()[:50])
        case "tensor":
            document["fields"]["maps"] = {"$tensor": "elsewhere"}
            words.write_text(json.dumps(document))
        case "type":
            document["type"] = "Attributions"
            words.write_text(json.dumps(document))
        case "format":
            document["format"] = 99
            words.write_text(json.dumps(document))
    with pytest.raises(PhospheneError) as refusal:
        load_result(tmp_path / "a")
    assert len(str(refusal.value)) > 20


def test_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no saved result"):
        replay(tmp_path)


# --- prepared once ----------------------------------------------------------------------------


class Counter:
    """Counts the calls of functions by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {}
        self._monkeypatch = monkeypatch

    def watch(self, owner: Any, *names: str) -> None:
        for name in names:
            self.calls[name] = 0
            self._monkeypatch.setattr(owner, name, self._counting(name, getattr(owner, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            self.calls[name] += 1
            return function(*arguments, **more)

        return call


def test_command_line_run_checks_validates_and_looks_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    counter.watch(type(methods), "__getitem__")
    counter.watch(Method, "validate", "add_checked", "resolve_layers", "record_inputs", "execute")
    counter.watch(phosphene.roles.images, "check_images")
    counter.watch(phosphene.models.model, "state_checksums")
    counter.watch(AdversarialExamples, "distance")  # once for each time that the panels are computed
    with pytest.raises(SystemExit) as end:
        main(["run", "pgd", "--image", "builtin:scenes/1", "--steps", "2", "--out", str(tmp_path / "out")])
    assert not end.value.code
    assert counter.calls == {
        "__getitem__": 1,
        "validate": 1,
        "add_checked": 3,  # the model, the images, the labels
        "resolve_layers": 1,
        "record_inputs": 1,
        "execute": 1,
        "check_images": 1,
        "state_checksums": 1,  # once for each digest of the model
        "distance": 1,
    }


def test_calling_a_method_checks_its_inputs_once(
    toy: Model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    counter.watch(Method, "validate", "check_inputs", "execute")
    counter.watch(phosphene.roles.images, "check_images")
    methods["saliency"](toy, images)
    assert counter.calls == {"validate": 1, "check_inputs": 1, "execute": 1, "check_images": 1}


def test_number_of_python_calls_up_to_the_first_attack_step(tmp_path: Path) -> None:
    """About 1,750 with the first step: at most a third of the 6,123 of the first version."""
    program = f"""
import sys

calls = 0

def count(frame, event, argument):
    global calls
    if event == "call" and "phosphene" in frame.f_code.co_filename:
        calls += 1

def stop(event):
    sys.setprofile(None)
    print("CALLS", calls)
    raise KeyboardInterrupt

import torch
from phosphene.cli import main
from phosphene.progress import report_progress
words = ["run", "pgd", "--image", "builtin:scenes/1", "--steps", "1", "--out", {str(tmp_path / "out")!r}]
with report_progress(stop):
    sys.setprofile(count)
    main(words)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    calls = int(done.stdout.rpartition("CALLS ")[2])
    assert 500 < calls <= 2_041, done.stderr


def test_prepared_run_can_be_pickled(scenes: Any) -> None:
    prepared = prepare("pgd", images=scenes.images, steps=2, seed=1)
    again = pickle.loads(pickle.dumps(prepared))
    assert again.implementation is methods["pgd"]
    assert torch.equal(again.execute_locally().adversarial, prepared.execute_locally().adversarial)


def test_run_accepts_a_method_object(toy: Model, images: Tensor) -> None:
    by_name = run("saliency", model=toy, images=images)
    assert torch.equal(run(methods["saliency"], model=toy, images=images).maps, by_name.maps)
