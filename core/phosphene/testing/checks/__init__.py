"""The checks of the conformance kit, one small function for each promise."""

# Importing a module registers its checks, in this order: the oracle's first run is the watched one.
from . import work, declaration, oracle_examination, single_run, repeated_runs, refusals  # isort: skip
from . import arithmetic, attacks, training, relations  # isort: skip
from .base import ARITHMETIC_UNTESTED, CHECKS, Check
from .declared import checks_of

__all__ = [
    "ARITHMETIC_UNTESTED",
    "CHECKS",
    "Check",
    "arithmetic",
    "attacks",
    "checks_of",
    "declaration",
    "oracle_examination",
    "refusals",
    "relations",
    "repeated_runs",
    "single_run",
    "training",
    "work",
]
