"""Which first-party method implements the published technique that a method names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..registry.lookup import methods, normalize_title
from ..registry.plugins import FIRST_PARTY
from ..spec.relations import Agrees

if TYPE_CHECKING:
    from ..registry.method import Method
    from ..spec.spec import Reference

    AnyMethod = Method[..., Any]

#: Words of a title or a summary that make a technique a variant of it.
_VARIANT = re.compile(
    r"without|\bno\b|\bnon-|unrectif|unnormali|smooth|variant|varying|modif|instead|inspired|[- ]like\b"
    r"|generali|extend|improv|simplif|approximat|stochastic|random|nois|several|multi|many|ensemble|expected|signed|absolute"
    r"|squar|counter|guided|mask|sparse|adaptive|nesterov|diverse|input diversity|translation|look-?ahead"
    r"|variance|contrast|difference|own\b|custom|toy\b|naive"
)
#: Sentences of a description that set a method apart from its source.
_DEVIATION = re.compile(
    r"instead of|in place of|rather than|unlike|in contrast to|differs? from|\bvariants?\b|deviat"
    r"|modifi(ed|cation)"
    r"|(the|their|this|original) (paper|authors?) (use|divide|take|clip|multiply|weight|normali)"
)
#: Where the name of a technique ends in a summary.
_END_OF_NAME = re.compile(
    r"[:;,.(]|\s(?:of|for|by|along|at|in|inside|on|from|over|as|to|under|with|and|is|that)\s"
)


@dataclass(frozen=True)
class Twin:
    """A first-party method of the same technique, and the parameters that its name stands for."""

    method: AnyMethod
    #: Parameters of the first-party method: of "MI-FGSM", {"momentum": None}, a value that the twin names.
    named: tuple[str, ...]
    #: What identifies it, as in a sentence.
    evidence: str


def first_party_twins(method: AnyMethod) -> list[Twin]:
    """The first-party methods whose technique a method names and whose source it cites.

    Of the same technique are methods with the same paper and the same name: title, function or the name at
    the beginning of the summary, abbreviations in parentheses included. Without one of that name, those are
    of which all words of the name are in the method's title or summary, in any order. A method whose title or
    summary has a word for a variant ("smooth", "without") is none, unless the first-party summary has it.
    """
    spec = method.spec
    candidates = [
        (plugin, methods.outline(plugin))
        for plugin in methods.plugins.values()
        if plugin.distribution == FIRST_PARTY and plugin.id != spec.name
    ]
    own = _names(spec.short_name, spec.title, spec.summary, ())
    declared = {
        relation.reference
        for relation in spec.relations
        if isinstance(relation, Agrees)
        and isinstance(relation.reference, str)
        and not (relation.where or relation.other or relation.networks or relation.rectified or relation.when)
    }
    twins: list[tuple[bool, Twin]] = []
    for plugin, outline in candidates:
        arguments = outline.arguments
        names = _names(plugin.id.rpartition(".")[2], outline.title, outline.summary, arguments)
        same = own.keys() & names.keys()
        agrees = bool(declared & {plugin.id, plugin.id.rpartition(".")[2]})
        usual = (outline.title, plugin.id.rpartition(".")[2].replace("_", " "))
        if not same and not agrees and not any(_has_words(f"{spec.title} {spec.summary}", n) for n in usual):
            continue
        library = methods[plugin.id]
        paper = _same_paper(spec.references, library.spec.references)
        if paper is None and not agrees:
            continue
        if not agrees and _is_variant(method, library):
            continue
        if not _same_result(method, library):
            continue
        named = next((names[name] for name in sorted(same)), ())
        evidence = f"both cite {paper}" if paper else f"it declares Agrees({plugin.id!r})"
        twins.append((bool(same or agrees), Twin(library, named, evidence)))
    named_twins = [twin for exact, twin in twins if exact]
    return named_twins or [twin for _, twin in twins]


def _has_words(text: str, name: str) -> bool:
    """Whether a text has all words of a name of two words or more, in any order and inflection."""
    stems = [word[:6] for word in re.findall(r"[a-z]{4,}", name.lower())]
    words = re.findall(r"[a-z]+", text.lower())
    return len(stems) > 1 and all(any(word.startswith(stem) for word in words) for stem in stems)


def _names(short_name: str, title: str, summary: str, arguments: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Normalized names of a technique, each with the parameters that it stands for.

    "Basic iterative method (BIM, I-FGSM; with momentum MI-FGSM): ..." has four, the last with a parameter.
    """
    head = summary.partition(":")[0] if ":" in summary else summary
    inside = " ; ".join(re.findall(r"\(([^)]*)\)", head))
    outside = re.sub(r"\([^)]*\)", " ", head).strip() + " "
    end = _END_OF_NAME.search(outside)
    texts = [short_name, title, outside]
    if end and not outside[end.start() :].startswith(" with"):
        texts.append(outside[: end.start()])
    names: dict[str, tuple[str, ...]] = {}
    for part in re.split(r"[,;]", inside):
        with_parameter = re.fullmatch(r"\s*with (\w+) (\S+)\s*", part)
        if with_parameter and with_parameter[1] in arguments:
            names[normalize_title(with_parameter[2])] = (with_parameter[1],)
        elif re.fullmatch(r"\s*\S*[A-Z]\S*\s*", part):  # an abbreviation, no explanation
            texts.append(part)
    names |= {normalize_title(re.sub(r"^(the|an?) ", "", text.strip().lower())): () for text in texts}
    return {name: parameters for name, parameters in names.items() if len(name) > 2}


def _is_variant(method: AnyMethod, library: AnyMethod) -> bool:
    spec = method.spec
    usual = f"{library.spec.title} {library.spec.summary} {library.spec.description}".lower()
    own = f"{spec.title} {spec.short_name.replace('_', ' ')} {spec.summary}".lower()
    words = {match.group().strip() for match in _VARIANT.finditer(own)}
    return any(word not in usual for word in words) or _DEVIATION.search(spec.description.lower()) is not None


def _identifiers(reference: Reference) -> set[str]:
    """What identifies a source: its arXiv number, DOI or address, and its title."""
    url = re.sub(r"^https?://(www\.)?|/$", "", reference.url.strip().lower())
    arxiv = re.search(r"arxiv[^\d]*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", url)
    doi = re.search(r"10\.\d{4,9}/\S+", url)
    address = f"arxiv:{arxiv[1]}" if arxiv else f"doi:{doi[0]}" if doi else url
    return {address, normalize_title(reference.title)} - {""}


def _same_paper(first: Iterable[Reference], second: Iterable[Reference]) -> str | None:
    """The title of a source that both cite."""
    identifiers: set[str] = set().union(*map(_identifiers, second)) if second else set()
    return next((repr(reference.title) for reference in first if _identifiers(reference) & identifiers), None)


def _same_result(method: AnyMethod, library: AnyMethod) -> bool:
    """Whether both have a result of the same kind and read inputs of the same roles."""
    from ..results import AdversarialExamples, Attribution

    for kind in (AdversarialExamples, Attribution):
        if issubclass(method.result, kind) != issubclass(library.result, kind):
            return False
    required = [i.role for i in library.spec.inputs if i.required and i.role not in ("target", "labels")]
    roles = {i.role for i in method.spec.inputs}
    return all(role in roles for role in required)


#: Names of parameters that mean the same.
_MEANINGS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            ("eps", "epsilon", "radius", "max_eps"),
            ("step_size", "alpha", "stepsize", "step_length"),
            (
                "steps",
                "n_steps",
                "num_steps",
                "iterations",
                "n_iter",
                "num_iter",
                "iters",
                "max_iter",
                "points",
            ),
            ("momentum", "decay", "mu", "decay_factor", "momentum_decay"),
            ("baseline", "reference", "baseline_value"),
            ("layer", "layer_name", "target_layer"),
            ("random_start", "random_init", "start_random"),
            ("components", "n_components"),
            ("k", "n_neighbors", "neighbors"),
        ),
    )
)


def same_meaning(name: str, names: Mapping[str, Any] | Iterable[str]) -> str | None:
    """The parameter among ``names`` that means the same as ``name``."""
    names = list(names)
    if name in names:
        return name
    group = next((group for group in _MEANINGS if name in group), frozenset[str]())
    return next((other for other in names if other in group), None)
