"""Input roles: each is described, makes samples that it accepts, and refuses its bad values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phosphene import InputError, PhospheneError, UnknownName, hookimpl, methods
from phosphene.registry.extensions import extensions
from phosphene.roles import ROLES, InputContext, InputRole
from phosphene.roles.table import _CORE
from phosphene.testing import Case

#: The roles of this project's own plugins.
PLUGIN_ROLES = ("autoencoder", "text_model", "image_adapter", "answer_model", "text_denoiser")


@pytest.mark.parametrize("name", [*_CORE, *PLUGIN_ROLES])
def test_every_role_describes_itself(name: str) -> None:
    role = ROLES[name]
    assert role.name == name
    assert role.description
    assert role.metavar
    assert role.help
    assert (type(role).__doc__ or "").endswith(".")


@pytest.mark.parametrize("name", [*_CORE, *PLUGIN_ROLES])
def test_samples_are_accepted_and_bad_values_refused(name: str) -> None:
    case = Case(count=3)
    model, inputs = case.model(), {}
    inputs["images"] = ROLES["images"].sample(case.request(model))
    role = ROLES[name]
    good = role.sample(case.request(model, inputs))
    context = InputContext(model, inputs)
    checked = role.check(good, context)
    assert type(role.select(checked, range(1, 3))) is type(checked)
    refused = list(role.bad_values(good, context))
    assert refused
    for reason, value in refused:
        with pytest.raises(PhospheneError) as error:
            role.check(value, context)
        assert len(str(error.value)) > 15, reason


def test_every_role_of_a_method_is_in_the_table() -> None:
    used = {declared.role for each in methods.load_all().values() for declared in each.spec.inputs}
    assert used == set(ROLES)


class Captions(InputRole):
    name, value_type = "captions", tuple

    def read(self, value: Any, context: InputContext) -> Any:
        return tuple(value)

    def check(self, value: Any, context: InputContext) -> Any:
        return value


class Plugin:
    def __init__(self, *roles: InputRole) -> None:
        self.roles = roles

    @hookimpl
    def phosphene_roles(self) -> list[InputRole]:
        return list(self.roles)


@pytest.fixture
def captions() -> Any:
    role = Captions()
    plugin = Plugin(role)
    extensions.manager.register(plugin, name="captions")
    yield role
    extensions.manager.unregister(plugin)


def test_plugins_roles_are_looked_up_by_name(captions: InputRole) -> None:
    assert ROLES["captions"] is captions
    assert [*ROLES] == [*_CORE, *PLUGIN_ROLES, "captions"]
    assert len(ROLES) == len(_CORE) + len(PLUGIN_ROLES) + 1
    with pytest.raises(UnknownName, match="did you mean 'captions'"):
        ROLES["caption"]


def test_plugins_cannot_replace_a_role_of_the_core() -> None:
    class Images(Captions):
        name = "images"

    plugin = Plugin(Images())
    extensions.manager.register(plugin, name="images")
    try:
        assert ROLES["images"] is _CORE["images"]
    finally:
        extensions.manager.unregister(plugin)


def test_unknown_role_is_an_unknown_name() -> None:
    assert "no_such_role" not in ROLES
    with pytest.raises(UnknownName, match="no input role 'image'.*did you mean 'images'"):
        ROLES["image"]


def test_checking_alone_loads_no_saved_result() -> None:
    with pytest.raises(InputError, match="load_result"):
        ROLES["stylizer"].make("some/folder", InputContext())


def test_rows_of_images_are_selected_and_counted() -> None:
    images = torch.rand(5, 3, 8, 8)
    assert torch.equal(ROLES["images"].select(images, range(1, 3)), images[1:3])
    assert ROLES["images"].image_count(images) == 5
    assert ROLES["images"].cost_sizes(images) == {"images": 5, "height": 8, "width": 8}
    assert ROLES["styles"].cost_sizes(images)["styles"] == 5
    assert ROLES["styles"].select(images, range(1, 3)) is images
    assert ROLES["masks"].select(None, range(1, 3)) is None


@pytest.mark.parametrize(
    ("role", "value", "right"),
    [
        ("denoiser", "builtin:color-words", "builtin:shapes-diffusion"),
        ("text_denoiser", "builtin:shapes-diffusion", "builtin:color-words"),
    ],
)
def test_the_other_bundled_diffusion_model_is_refused_by_name(role: str, value: str, right: str) -> None:
    with pytest.raises(InputError, match=f"is {right}, not {value}"):
        ROLES[role].read(value, InputContext())
