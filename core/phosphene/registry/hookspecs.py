"""The hooks a plugin may implement; mark yours with ``hookimpl``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from ..models.loading import Loader
    from ..results import Result
    from ..runs.prepared_run import PreparedRun
    from ..spec.invariants import Invariant
    from .method import Method


hookspec = pluggy.HookspecMarker("phosphene")


hookimpl = pluggy.HookimplMarker("phosphene")


#: The entry-point groups of this major version of the plugin interface.
API_VERSION = 1


METHODS_GROUP = f"phosphene.methods.v{API_VERSION}"


EXTENSIONS_GROUP = f"phosphene.extensions.v{API_VERSION}"


@hookspec
def phosphene_methods() -> list[Method[..., Any]]:  # type: ignore[empty-body]
    """The methods of this module; each stands under its id in the group ``phosphene.methods.v1``."""


@hookspec
def phosphene_model_loaders() -> dict[str, Loader]:  # type: ignore[empty-body]
    """URI schemes for ``load_model``: ``{"timm": loader, ...}``."""


@hookspec
def phosphene_invariants() -> list[type[Invariant]]:  # type: ignore[empty-body]
    """New kinds of promise that a spec can declare."""


@hookspec
def phosphene_before_run(run: PreparedRun) -> None:
    """Called when a run starts. A failure here is reported, never raised."""


@hookspec
def phosphene_after_run(run: PreparedRun, result: Result | None, error: BaseException | None) -> None:
    """Called when a run ends, with its result or its error. A failure here is reported, never raised."""


@hookspec
def phosphene_commands(app: Any) -> None:
    """Add commands to the command line: ``app`` is its ``typer.Typer``."""


@hookspec
def phosphene_executors() -> dict[str, Callable[[PreparedRun], Result]]:  # type: ignore[empty-body]
    """Where runs can be carried out: ``{"my-cluster": function of a Run}``; "local" is built in."""
