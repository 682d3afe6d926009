"""Phosphene: visualization, attribution, attacks, defenses and image synthesis for vision models.

Importing it imports neither torch nor pydantic: the names in ``__init__.pyi`` are imported when first used.
"""

import lazy_loader

from .deprecation import moved

_fetch, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
#: Deprecated names and their replacements; see CONTRIBUTING.md.
__getattr__ = moved(__name__, {}, _fetch)
