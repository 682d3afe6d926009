"""The hook of the role ``autoencoder``, in a module of its own that does not import torch."""

from __future__ import annotations

from phosphene import hookimpl


@hookimpl
def phosphene_roles():
    from ._autoencoder_role import AUTOENCODER

    return [AUTOENCODER]
