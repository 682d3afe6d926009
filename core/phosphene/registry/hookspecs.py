"""The hooks a plugin may implement; mark yours with ``hookimpl``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from ..models.loading import Loader
    from ..results import Result
    from ..roles.base import InputRole
    from ..runs.prepared_run import PreparedRun
    from ..spec.invariants import Invariant
    from ..spec.relations import Relation
    from .method import Method


hookspec = pluggy.HookspecMarker("phosphene")


hookimpl = pluggy.HookimplMarker("phosphene")


#: The entry-point groups of this major version of the plugin interface.
API_VERSION = 1


METHODS_GROUP = f"phosphene.methods.v{API_VERSION}"


EXTENSIONS_GROUP = f"phosphene.extensions.v{API_VERSION}"


@hookspec
def phosphene_methods() -> list[Method[..., Any]]:  # type: ignore[empty-body]
    """The methods of this module; each has an entry point of its id in the group ``phosphene.methods.v1``."""


@hookspec
def phosphene_model_loaders() -> dict[str, Loader]:  # type: ignore[empty-body]
    """URI schemes for ``load_model``: ``{"timm": loader, ...}``."""


@hookspec
def phosphene_roles() -> list[InputRole]:  # type: ignore[empty-body]
    """Kinds of input that methods can declare: ``Annotated[T, Role(name)]``; see ``phosphene.roles``."""


@hookspec
def phosphene_invariants() -> list[type[Invariant] | type[Relation]]:  # type: ignore[empty-body]
    """New kinds of invariant and relation that a method can declare."""


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
    """Executors by name: ``{"my-cluster": function of a PreparedRun}``; "local" is built in."""
