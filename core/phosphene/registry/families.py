"""The families that techniques are sorted into, and what each is about."""

from __future__ import annotations

FAMILIES: dict[str, str] = {
    "filters": "Filters: what the weights look like",
    "activations": "Activations: what fires, where, and on which pictures",
    "embeddings": "Embeddings: how a model arranges pictures",
    "attribution": "Attribution: which pixels a score depends on",
    "scores": "Scores: how far maps can be trusted",
    "attacks": "Attacks: small changes that change the answer",
    "defenses": "Defences: what an attack has to get past, and what no attack can",
    "robustness": "Robustness: what an attack proves, and what it does not",
    "synthesis": "Synthesis: pictures a model asks for",
    "textures": "Textures: statistics without arrangement",
    "style": "Style: one picture's content in another's manner",
}


def family_title(family: str) -> str:
    """A family's heading; a family that only plugins know is called what it is called."""
    return FAMILIES.get(family, family.replace("_", " ").capitalize())


def family_rank(family: str) -> tuple[int, str]:
    """A sort key: the known families in their order, others behind."""
    known = list(FAMILIES)
    return (known.index(family) if family in known else len(known), family)
