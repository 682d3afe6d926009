"""Tree-structured vector quantization (TSVQ): approximate nearest neighbors with few comparisons."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

# The searches run one after another, each on few numbers, which is faster in numpy than in torch.
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Leaf(NamedTuple):
    """A few vectors (n, D) and their indices in the codebook."""

    vectors: Array
    indices: Array


class Fork(NamedTuple):
    """Two centroids, as the plane between them: vectors with normal . v > offset are closer to the first."""

    normal: Array
    offset: float
    near: Fork | Leaf
    far: Fork | Leaf


def build_codebook(vectors: Array, indices: Array, leaf_size: int | None) -> Fork | Leaf:
    """Split vectors (N, D) by 2-means, recursively, until a leaf holds at most ``leaf_size`` of them.

    None is a single leaf, for exhaustive search.
    """
    members = vectors[indices]
    if leaf_size is None or len(indices) <= leaf_size:
        return Leaf(members, indices)
    axis = members.var(0).argmax()
    is_near = members[:, axis] > members[:, axis].mean()
    for _ in range(20):
        if is_near.mean() in (0, 1):
            break
        near, far = members[is_near].mean(0), members[~is_near].mean(0)
        normal, offset = near - far, (near - far) @ (near + far) / 2
        previous, is_near = is_near, members @ normal > offset
        if (is_near == previous).all():
            break
    if is_near.mean() in (0, 1):
        return Leaf(members, indices)  # all vectors are equal
    return Fork(
        normal, offset, *(build_codebook(vectors, indices[part], leaf_size) for part in (is_near, ~is_near))
    )


def nearest_index(codebook: Fork | Leaf, vector: Array) -> int:
    """The index of the vector nearest to this one (D,), among those of its leaf."""
    while isinstance(codebook, Fork):
        codebook = codebook.near if codebook.normal @ vector > codebook.offset else codebook.far
    difference = codebook.vectors - vector
    return int(codebook.indices[np.einsum("nd,nd->n", difference, difference).argmin()])
