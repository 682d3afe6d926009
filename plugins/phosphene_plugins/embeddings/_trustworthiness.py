"""Trustworthiness of a two-dimensional map: how many neighbors on the map are neighbors in feature space."""

from __future__ import annotations

from torch import Tensor

#: Largest number of points that are measured: N points have N x N distances.
MAX_POINTS = 2000


def trustworthiness(features: Tensor, points: Tensor) -> Tensor:
    """Trustworthiness in [0, 1] of a map (N, 2) of features (N, D), by the 5 nearest neighbors of each point.

    1 if all neighbors on the map are neighbors in feature space; each false neighbor is penalized by its rank
    there. Of more than ``MAX_POINTS`` points, an evenly spaced subset is measured.

    Source: Venna and Kaski 2001.
    """
    from sklearn.manifold import trustworthiness as sklearn_trustworthiness  # slow to import

    step = -(-len(points) // MAX_POINTS)
    # equivalent mutants: scikit-learn converts tensors to arrays
    features_subset, points_subset = (t[::step].cpu().double().numpy() for t in (features, points))
    neighbors = min(5, (len(points_subset) - 1) // 2)
    return features.new_tensor(sklearn_trustworthiness(features_subset, points_subset, n_neighbors=neighbors))
