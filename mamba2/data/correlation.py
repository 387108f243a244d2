"""How far tokens depend on those before: the autocorrelation of windows, and the largest eigenvalue of its matrix.

Liu & Li 2024, arXiv:2411.19455, tie an SSM's timescale to λ, the largest eigenvalue of E[x xᵀ] over windows x of L
inputs. The variance of Σ_k K_k x_k is at most λ |K|², and a kernel that hardly decays has |K|² = L dt², so that dt must
not be above 1/√(L λ). λ is 1 for independent inputs, and L for constant ones.
"""

import numpy as np

from mamba2.data.tokens import Tokens

SAMPLED = 2**18  # tokens


def autocorrelation(windows: np.ndarray) -> np.ndarray:
    """R(k) = E[x_t x_{t+k}] / E[x²] for lags k = 0..l-1: (l,) float64.

    `windows` is (rows, l). Integers are ids: for embeddings drawn at random, R(k) is the share of tokens that are equal
    to the one k places before.
    """
    length = windows.shape[1]
    if np.issubdtype(windows.dtype, np.integer):
        return np.array([(windows[:, k:] == windows[:, : length - k]).mean() for k in range(length)])
    x = windows.astype(np.float64)
    products = np.array([(x[:, k:] * x[:, : length - k]).mean() for k in range(length)])
    return products / products[0]


def largest_eigenvalue(correlation: np.ndarray) -> float:
    """Of the symmetric matrix R(|i - j|), (l, l). Its product with a vector is made by FFT, so that l may be large."""
    from scipy.linalg import matmul_toeplitz
    from scipy.sparse.linalg import LinearOperator, eigsh

    length = len(correlation)
    if length == 1:
        return float(correlation[0])
    matrix = LinearOperator((length, length), matvec=lambda v: matmul_toeplitz(correlation, v), dtype=np.float64)
    return float(eigsh(matrix, 1, which="LA", v0=np.ones(length), return_eigenvectors=False)[0])


def measure_eigenvalue(tokens: Tokens, length: int) -> float:
    """λ of windows of `length` tokens, at most SAMPLED tokens of them, spread evenly over the data.

    Raises ValueError when there is not one whole window.
    """
    whole = len(tokens.ids) // length
    if whole == 0:
        raise ValueError(f"the data has {len(tokens.ids)} tokens, and a window {length}")
    rows = min(whole, max(1, SAMPLED // length))
    windows = np.stack(
        [tokens.ids[start : start + length] for start in (i * whole // rows * length for i in range(rows))]
    )
    return largest_eigenvalue(autocorrelation(windows))
