"""The hook of this family's role, in a module of its own that imports no torch."""

from __future__ import annotations

from phosphene import hookimpl


@hookimpl
def phosphene_roles():
    from ._image_adapter_role import IMAGE_ADAPTER_ROLE

    return [IMAGE_ADAPTER_ROLE]
