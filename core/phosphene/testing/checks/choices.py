"""Checks of parameters with named choices: no two of them mean the same."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch

from ..candidates import candidate_values
from ..cases import Case, properties_of
from ..networks import CLASSES
from ..observation import tensors_in, without_tensors
from .arithmetic import MOST_TRIALS, Trials, case_pairs
from .base import Check

if TYPE_CHECKING:
    from .base import AnyMethod

#: What the names of these checks start with.
CHOICES_DIFFER = "choices_differ("
#: Settings of the other parameters, networks and images under which choices are compared.
MOST_SETTINGS = 16


def choice_checks(method: AnyMethod) -> list[Check]:
    """A check ``choices_differ(NAME)`` for each parameter with at least two named choices."""
    schemas = {n: s for n, s in properties_of(method.spec.params_schema).items() if n != method.seed}
    return [
        Check(
            name=f"{CHOICES_DIFFER}{name})",
            promise=f"Any two choices of {name} have different results in some case.",
            hint="a choice that is spelled differently where it is compared, and falls through to another; "
            "where two choices mean the same, exempt= with the reason",
            on="method",
            function=partial(_assert_choices_differ, name=name, choices=choices),
            exemptible=True,
        )
        for name, schema in schemas.items()
        if len(choices := named_choices(schema)) > 1 and name not in method.layers
    ]


def named_choices(schema: Mapping[str, Any]) -> list[str]:
    """The strings of an enumeration that a parameter's JSON schema allows."""
    values = [
        value
        for branch in schema.get("anyOf", [schema])
        for value in ([branch["const"]] if "const" in branch else branch.get("enum", []))
    ]
    return [value for value in values if isinstance(value, str)]


def _assert_choices_differ(method: AnyMethod, name: str, choices: Sequence[str]) -> None:
    trials = Trials(method)
    schemas = {n: s for n, s in properties_of(method.spec.params_schema).items() if n != method.seed}
    equal, settings = dict.fromkeys(itertools.combinations(choices, 2), 0), 0
    for base in _settings(method, name, schemas):
        if not equal or len(trials.runs) >= MOST_TRIALS:
            break
        settings += 1
        usual = base.arguments(method).get(name, schemas[name].get("default"))
        valid = [usual, *candidate_values(method, name, schemas[name], base)]
        for pair in [p for p in equal if set(p) <= set(filter(_is_text, valid))]:
            cases = (replace(base, params={**base.params, name: choice}) for choice in pair)
            results = [run[0] for run in map(trials.run, cases) if run is not None]
            if len(results) < 2:
                continue
            if _same_numbers(results[0], results[1], choices):
                equal[pair] += 1
            else:
                del equal[pair]
    if all(count == 0 for count in equal.values()) and len(equal) == len(choices) * (len(choices) - 1) // 2:
        raise SkipTest("no two choices have a result in the same case")
    # Where most cases are refused, it depends on the inputs which choices are valid.
    same = [f"{a!r} and {b!r} ({count} cases)" for (a, b), count in equal.items() if 4 * count > settings]
    assert not same, f"{name}: the same results have {', '.join(same)}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _settings(method: AnyMethod, name: str, schemas: Mapping[str, Any]) -> Iterator[Case]:
    """Cases for the other parameters, the most informative first: those in which the parameter is varied."""
    bases = dict.fromkeys(one for one, _ in itertools.islice(case_pairs(method, name, schemas), MOST_TRIALS))
    # At least two images of each class.
    return (replace(base, dataset=2 * CLASSES) for base in itertools.islice(bases, MOST_SETTINGS))


def _same_numbers(first: Any, second: Any, choices: Sequence[str]) -> bool:
    """Whether two results are equal, bit for bit, except for the names of the choices in their texts."""
    names = "|".join(sorted(map(re.escape, choices), key=len, reverse=True))
    texts = [json.dumps(without_tensors(r), default=str, sort_keys=True) for r in (first, second)]
    if re.sub(names, "", texts[0]) != re.sub(names, "", texts[1]):
        return False
    ones, others = dict(tensors_in(first)), dict(tensors_in(second))
    return ones.keys() == others.keys() and all(torch.equal(t, others[n]) for n, t in ones.items())
