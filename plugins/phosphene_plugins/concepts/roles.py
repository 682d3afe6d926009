"""The hook of the roles ``autoencoder`` and ``text_model``, in a module of its own that imports no torch."""

from __future__ import annotations

from phosphene import hookimpl


@hookimpl
def phosphene_roles():
    from ._autoencoder_role import AUTOENCODER
    from ._text_model_role import TEXT_MODEL

    return [AUTOENCODER, TEXT_MODEL]
