"""The plugin registry: hooks, entry points, families, and methods by name."""

from .families import FAMILIES, family_rank, family_title
from .hookspecs import (
    API_VERSION,
    EXTENSIONS_GROUP,
    METHODS_GROUP,
    hookimpl,
    hookspec,
    phosphene_after_run,
    phosphene_before_run,
    phosphene_commands,
    phosphene_executors,
    phosphene_invariants,
    phosphene_methods,
    phosphene_model_loaders,
    phosphene_roles,
)

__all__ = [
    "API_VERSION",
    "EXTENSIONS_GROUP",
    "FAMILIES",
    "METHODS_GROUP",
    "family_rank",
    "family_title",
    "hookimpl",
    "hookspec",
    "phosphene_after_run",
    "phosphene_before_run",
    "phosphene_commands",
    "phosphene_executors",
    "phosphene_invariants",
    "phosphene_methods",
    "phosphene_model_loaders",
    "phosphene_roles",
]
