"""The checks of the conformance kit, one small function for each promise."""

# Importing a module registers its checks, in this order. The runs that are watched come first: a process-wide
# switch that an earlier run has set would be the state before a later one.
from . import watched_oracle, single_run, declaration, oracle_examination, repeated_runs  # isort: skip
from . import refusals, work, arithmetic, attacks, training, synthesis, relations, maps  # isort: skip
from . import folds, features, claims, dataset_claims, dataset_order, images, resumption  # isort: skip
from . import diffusion, family_relations, known_numbers, random_draws, second_opinion  # isort: skip
from . import tested_arithmetic  # isort: skip
from .base import ARITHMETIC_UNTESTED, CHECKS, ORACLE_MISSING, Check, UntestedError
from .choices import CHOICES_DIFFER
from .declared import checks_of

__all__ = [
    "ARITHMETIC_UNTESTED",
    "CHECKS",
    "CHOICES_DIFFER",
    "ORACLE_MISSING",
    "Check",
    "UntestedError",
    "arithmetic",
    "attacks",
    "checks_of",
    "choices",
    "claims",
    "dataset_claims",
    "dataset_order",
    "declaration",
    "diffusion",
    "family_relations",
    "features",
    "folds",
    "images",
    "known_numbers",
    "maps",
    "oracle_examination",
    "random_draws",
    "refusals",
    "relations",
    "repeated_runs",
    "resumption",
    "second_opinion",
    "single_run",
    "synthesis",
    "tested_arithmetic",
    "training",
    "watched_oracle",
    "work",
]
