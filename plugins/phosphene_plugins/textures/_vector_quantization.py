"""Tree-structured vector quantisation: the nearest of many vectors, nearly, by few comparisons."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# One search after another means very many small calls, which cost less in numpy than in torch.
Array = np.ndarray[Any, np.dtype[Any]]


class Leaf(NamedTuple):
    """A few vectors (n, D) and their places among all."""

    vectors: Array
    places: Array


class Fork(NamedTuple):
    """Two centroids, as the plane between them: what has normal . v > middle is on the near side."""

    normal: Array
    middle: float
    near: Fork | Leaf
    far: Fork | Leaf


def codebook(vectors: Array, places: Array, leaf_size: int | None) -> Fork | Leaf:
    """TSVQ: vectors (N, D) parted by 2-means, their parts again, until a leaf holds ``leaf_size`` at most."""
    members = vectors[places]
    if leaf_size is None or len(places) <= leaf_size:
        return Leaf(members, places)
    axis = members.var(0).argmax()
    side = members[:, axis] > members[:, axis].mean()
    for _ in range(20):
        if side.mean() in (0, 1):
            break
        near, far = members[side].mean(0), members[~side].mean(0)
        normal, middle = near - far, (near - far) @ (near + far) / 2
        before, side = side, members @ normal > middle
        if (side == before).all():
            break
    if side.mean() in (0, 1):
        return Leaf(members, places)  # all alike
    return Fork(normal, middle, *(codebook(vectors, places[part], leaf_size) for part in (side, ~side)))


def nearest(book: Fork | Leaf, vector: Array) -> int:
    """The place of the vector nearest to this one (D,), of those in its leaf."""
    while isinstance(book, Fork):
        book = book.near if book.normal @ vector > book.middle else book.far
    away = book.vectors - vector
    return int(book.places[np.einsum("nd,nd->n", away, away).argmin()])
