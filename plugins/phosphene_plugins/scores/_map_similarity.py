"""Similarity of two attribution maps: Spearman's rank correlation and structural similarity (SSIM)."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor

from phosphene.images import gaussian_blur, min_max


def map_similarity(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Rank correlation of raw maps (n, H, W), and SSIM of both scaled to [0, 1]: (n,) each."""
    return rank_correlation(maps, others), structural_similarity(min_max(maps), min_max(others))


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's rank correlation of maps (n, H, W): (n,), ties by their mean rank.

    It is 1 for two constant maps, and 0 where only one is constant.
    """
    values = (m.flatten(1).cpu().double().numpy() for m in (maps, others))
    ranks = [torch.from_numpy(rankdata(v, axis=1)) for v in values]
    a, b = (t - t.mean(1, keepdim=True) for t in ranks)
    norms = a.norm(dim=1) * b.norm(dim=1)
    both_constant = ((a == 0).all(1) & (b == 0).all(1)).double()
    return torch.where(norms > 0, (a * b).sum(1) / norms, both_constant).to(maps)


def structural_similarity(maps: Tensor, others: Tensor) -> Tensor:
    """SSIM of maps (n, H, W) in [0, 1]: (n,).

    Source:
        Wang et al. 2004, Gaussian window with a standard deviation of 1.5 pixels.
    """
    a, b = maps[:, None], others[:, None]
    local_mean = lambda t: gaussian_blur(t, 1.5)
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return ssim.mean((1, 2, 3))
