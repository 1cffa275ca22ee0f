"""The principal components of rows that come batch by batch (Ross et al., 2008), with PEFT's numbers."""

import torch
from torch import Tensor

_SEED, _STEPS = 42, 4
"""PEFT's, of the randomised decomposition."""


class IncrementalPCA:
    """The first ``n`` components of all rows so far.

    After a first batch: ``components [n, K]``, ``singular_values [n]`` and ``explained [n]``, each one's
    share of the rows' variance.
    """

    components: Tensor
    singular_values: Tensor
    explained: Tensor

    def __init__(self, n: int) -> None:
        self.n = n
        self.rows = 0
        self._mean: Tensor
        self._squares: Tensor
        """``Σ (x − mean)²`` of each column, in float64 as the mean is."""

    def add(self, X: Tensor) -> None:
        """Takes the rows of ``X [M, K]`` in, in float32; M and K are at least n."""
        X = X.to(torch.float32)
        M = X.shape[0]
        sums = X.sum(dim=0, dtype=torch.float64)
        mean = sums / M
        squares = (X - mean).square().sum(dim=0, dtype=torch.float64)
        if self.rows == 0:
            stacked = (X - mean).to(X.dtype)
            self._mean, self._squares = mean, squares
        else:
            # What was there, as n rows of the same scatter; the rows; and the way between both means.
            own = X.mean(dim=0)
            total = self.rows + M
            way = (self.rows / total * M) ** 0.5 * (self._mean - own)
            known = self.singular_values.view(-1, 1) * self.components
            stacked = torch.vstack((known, X - own, way))
            self._squares = (
                self._squares + squares + self.rows * M / total * (self._mean - mean).square()
            )
            self._mean = (self._mean * self.rows + sums) / total
        self.rows += M
        S, Vh = _decomposed(stacked, 2 * self.n)
        self.components, self.singular_values = Vh[: self.n], S[: self.n]
        self.explained = (S**2 / self._squares.sum())[: self.n]


def _decomposed(X: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """``S [q]`` and ``Vh [q, K]``; the largest element of each row of Vh is positive."""
    devices = [X.device] if X.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        _, S, V = torch.svd_lowrank(X, q=min(q, *X.shape), niter=_STEPS)
    Vh = V.mH
    largest = Vh.abs().argmax(dim=1, keepdim=True)
    return S, Vh * Vh.gather(1, largest).sign()
