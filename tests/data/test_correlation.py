"""The autocorrelation of windows, on processes whose answer is known."""

import math

import numpy as np
import pytest
from scipy.linalg import toeplitz

from mamba2.data import Tokens
from mamba2.data.correlation import autocorrelation, largest_eigenvalue, measure_eigenvalue


def kac_murdock_szego(rho: float, length: int) -> float:
    """The largest eigenvalue of ρ^|i-j|: (1 - ρ²) / (1 - 2ρ cos θ + ρ²), θ the smallest root in (0, π / (length + 1))
    of sin((n+1)θ) - 2ρ sin(nθ) + ρ² sin((n-1)θ) (Grenander & Szegő 1958)."""
    low, high = 1e-9, math.pi / (length + 1)
    for _ in range(200):
        theta = (low + high) / 2
        n = length
        value = math.sin((n + 1) * theta) - 2 * rho * math.sin(n * theta) + rho**2 * math.sin((n - 1) * theta)
        low, high = (theta, high) if value > 0 else (low, theta)
    return (1 - rho**2) / (1 - 2 * rho * math.cos(theta) + rho**2)


def ar1(rho: float, rows: int, length: int) -> np.ndarray:
    """x_t = ρ x_{t-1} + √(1-ρ²) noise, stationary."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, length))
    for t in range(1, length):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * x[:, t]
    return x


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_of_an_ar1_process(rho):
    correlation = autocorrelation(ar1(rho, 4000, 64))
    np.testing.assert_allclose(correlation, rho ** np.arange(64), atol=0.05)
    exact = kac_murdock_szego(rho, 64) if rho else 1.0
    assert largest_eigenvalue(rho ** np.arange(64.0)) == pytest.approx(exact, rel=1e-6)
    assert largest_eigenvalue(correlation) == pytest.approx(exact, rel=0.05 if rho else 0.2)


def test_of_tokens_that_repeat():
    """A token is the one before with probability ρ, else one of V: it equals the one k before in ρ^k + (1-ρ^k)/V."""
    rho, vocabulary, length = 0.8, 50, 32
    rng = np.random.default_rng(1)
    ids = rng.integers(0, vocabulary, (8000, length)).astype(np.uint16)
    for t in range(1, length):
        ids[:, t] = np.where(rng.random(8000) < rho, ids[:, t - 1], ids[:, t])
    kept = rho ** np.arange(length)
    expected = kept + (1 - kept) / vocabulary
    np.testing.assert_allclose(autocorrelation(ids), expected, atol=0.005)
    tokens = Tokens(ids.reshape(-1), np.array([0]), 0, vocabulary - 1)
    wanted = np.linalg.eigvalsh(toeplitz(expected))[-1]
    assert measure_eigenvalue(tokens, length) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_the_bounds_are_independent_and_constant_tokens(length):
    same = np.full((2, length), 7)
    assert largest_eigenvalue(autocorrelation(same)) == pytest.approx(length)
    different = np.arange(2 * length).reshape(2, length)
    assert largest_eigenvalue(autocorrelation(different)) == pytest.approx(1)


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="the data has 9 tokens, and a window 10"):
        measure_eigenvalue(Tokens(np.arange(9, dtype=np.uint16), np.array([0]), 0, 8), 10)
