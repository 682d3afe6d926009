"""Families of methods: their order and headings."""

from __future__ import annotations

FAMILIES: dict[str, str] = {
    "filters": "Filters: the weights of convolutions as images",
    "activations": "Activations: feature maps, their statistics and the images that maximize them",
    "embeddings": "Embeddings: features of images, their neighbors and projections",
    "attribution": "Attribution: the pixels that a score depends on",
    "concepts": "Concepts: directions of a layer that stand for something with a name",
    "comparison": "Comparison: what the representations of models, or of layers, have in common",
    "influence": "Influence: the training images that a prediction depends on",
    "interventions": "Interventions: what a score or the accuracy is with activations replaced",
    "attention": "Attention: what the tokens of a transformer attend to, and what that does to a score",
    "vision_language": "Vision and language: the pixels of the words of an answer or a prompt",
    "scores": "Scores: quality measures of attribution maps",
    "attacks": "Attacks: small perturbations that change the prediction",
    "defenses": "Defenses: input transformations, robust training and certificates",
    "robustness": "Robustness: evaluation against ensembles of attacks",
    "synthesis": "Synthesis: images optimized for a class, a neuron or features",
    "textures": "Textures: synthesis from a sample",
    "style": "Style: the content of one image in the style of another",
}


def family_title(family: str) -> str:
    """A family's heading; for a family that only plugins use, its name."""
    return FAMILIES.get(family, family.replace("_", " ").capitalize())


def family_rank(family: str) -> tuple[int, str]:
    """A sort key: the families above in their order, then others by name."""
    names = list(FAMILIES)
    return (names.index(family) if family in names else len(names), family)
