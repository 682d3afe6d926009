"""Total Sobol indices of a function of K factors, by the estimator of Jansen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sobol_designs(factors: int, designs: int, seed: int) -> Tensor:
    """Designs (designs * (factors + 2), factors) in [0, 1]: A, B, and for each k A with column k of B."""
    from scipy.stats.qmc import Sobol

    draws = torch.from_numpy(Sobol(2 * factors, scramble=True, rng=seed).random(designs))
    first, second = draws[:, :factors], draws[:, factors:]
    mixed = first.repeat(factors, 1, 1)
    for k in range(factors):
        mixed[k, :, k] = second[:, k]
    return torch.cat([first, second, mixed.flatten(0, 1)])


def total_indices(values: Tensor, factors: int) -> Tensor:
    """The total indices (factors,) from the function's values of ``sobol_designs``; zeros of a constant.

    S_k = sum_j (f(A_j) - f(A_j with x_k of B_j))^2 / (2 n Var f), the share of the variance that factor k has
    a part in. Source: Jansen 1999, equation 8; Saltelli et al. 2010, table 2 (f).
    """
    values = values.double().view(factors + 2, -1)
    variance = values[:2].var(correction=0)
    shares = (values[0] - values[2:]).square().mean(1) / 2
    return torch.where(variance > 0, shares / variance.clamp(min=1e-300), 0)


def sobol_indices(function: Callable[[Tensor], Tensor], factors: int, designs: int, seed: int) -> Tensor:
    """The total indices (factors,) of a function of points (n, factors), uniform in [0, 1]^factors."""
    return total_indices(function(sobol_designs(factors, designs, seed)), factors)
