"""The Frechet distance between two sets of features: the formula of FID and FVD, for features of any network."""

import numpy as np
from numpy.typing import ArrayLike

from ..errors import VideoLDMError


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """The squared Frechet distance |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features a (n, d), b (m, d).

    tr (C_a C_b)^(1/2) is computed as the sum of the singular values of C_a^(1/2) C_b^(1/2). The square roots come from
    symmetric eigen-decompositions. So the result is real and not negative, even for covariances without full rank.
    Raises VideoLDMError for features of the wrong shape, or with NaN or infinity.
    """
    a, b = (np.asarray(features, np.float64) for features in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise VideoLDMError(f"The Frechet distance needs two sets of at least 2 features of one width, not "
                            f"{a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise VideoLDMError("The Frechet distance needs finite features: one of the clips is broken.")
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b)]
    overlap = np.linalg.svd(root(covariances[0]) @ root(covariances[1]), compute_uv=False).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * overlap, 0.0))


def root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance. Eigenvalues below zero come from rounding and count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
