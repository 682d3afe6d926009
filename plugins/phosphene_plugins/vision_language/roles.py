"""The hook of the role ``answer_model``, in a module of its own that imports no torch."""

from __future__ import annotations

from phosphene import hookimpl


@hookimpl
def phosphene_roles():
    from ._answer_role import ANSWER_MODEL

    return [ANSWER_MODEL]
