"""The hook of this family's roles, in a module of its own that imports no torch."""

from __future__ import annotations

from phosphene import hookimpl


@hookimpl
def phosphene_roles():
    from ._answer_role import ANSWER_MODEL
    from ._text_denoiser_role import TEXT_DENOISER

    return [ANSWER_MODEL, TEXT_DENOISER]
