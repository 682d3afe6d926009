"""The checks of the conformance kit, one small function for each promise."""

# Importing a module registers its checks, in this order: the oracle's first run is the watched one.
from . import work, declaration, single_run, repeated_runs, refusals, arithmetic, attacks, training  # isort: skip
from .base import CHECKS, Check, checks_of

__all__ = [
    "CHECKS",
    "Check",
    "arithmetic",
    "attacks",
    "checks_of",
    "declaration",
    "refusals",
    "repeated_runs",
    "single_run",
    "training",
    "work",
]
