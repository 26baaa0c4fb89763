"""Means of shapes: of the scans' affine sizes, and of their deformations, which no scan and no atlas leads."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.transforms import Matrix
from sitreg_lumir.preprocessing.intensity import inverse

_MOST_STEPS = 100
_CONVERGED = 1e-13  # of the mean logarithm


def mean_size(prealigns: Sequence[Matrix]) -> Matrix:
    """Where a brain of the scans' mean size lies in the model's world: template world -> model world.

    The alignments bring every brain to the size of MNI152, and with them their mean. What a scan's linear part
    ``L = R S`` stretches, ``S = sqrt(C)`` with ``C = L^T L``, is taken from its inverse alignment (model world -> scan
    world). The result is ``B = K^-1/2``, where ``K`` is the mean of all ``C`` in the affine-invariant metric, so that
    the mean logarithm of what is left, ``B^T C B``, is zero. Had another brain than MNI152 been the common target, the
    template would be the same up to a turn. Turns and shifts, which depend on how heads lay in scanners, are MNI152's.

    Args:
        prealigns: ``(4, 4)`` each, scan world -> model world, RAS, mm; the order does not change the result beyond the
            last digits.

    Returns:
        ``(4, 4)``, symmetric, without translation.

    Source: Moakher, A differential geometric approach to the geometric mean of symmetric positive-definite matrices,
    SIAM J. Matrix Anal. Appl. 2005; Pennec et al., A Riemannian framework for tensor computing, IJCV 2006.
    """
    tensors = [inverse(matrix)[:3, :3] for matrix in prealigns]
    tensors = [linear.T @ linear for linear in tensors]
    mean = _of_symmetric(np.exp, _average([_of_symmetric(np.log, tensor) for tensor in tensors]))
    for _ in range(_MOST_STEPS):
        root = _of_symmetric(np.sqrt, mean)
        whitening = np.linalg.inv(root)
        step = _average([_of_symmetric(np.log, whitening @ tensor @ whitening) for tensor in tensors])
        mean = root @ _of_symmetric(np.exp, step) @ root
        if np.abs(step).max() < _CONVERGED:
            break
    result = np.eye(4)
    result[:3, :3] = np.round(np.linalg.inv(_of_symmetric(np.sqrt, mean)), 12)
    return result


def mean_updates(of_scans: Iterable[SplineUpdates]) -> SplineUpdates:
    """The map whose control points are the mean over all scans, at each stage and on both sides.

    A mean of values within a bound lies within it, so the mean map is invertible, as each map is. To first order in the
    displacements it is the mean of the maps. Exchanging all images exchanges both sides, so the mean of maps and of
    their inverses are inverse to each other, and maps that come with their inverses have the identity as their mean.

    Args:
        of_scans: with rounded control points, all from the same fixed image.

    Returns:
        rounded control points; sums are those of integers, so their order changes nothing.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    for updates in of_scans:
        integers = {name: points.long() for name, points in updates.integers().items()}
        totals = {name: points + totals.get(name, 0) for name, points in integers.items()}
        count += 1
    if not count:
        raise ValueError("no maps to average")
    means = {name: (total.double() / count).round().to(torch.int16) for name, total in totals.items()}
    return SplineUpdates.of_integers(means, len(updates.updates), updates.shape)


def _of_symmetric(function: Callable[[NDArray[np.float64]], NDArray[np.float64]], matrix: Matrix) -> Matrix:
    """A function of a symmetric matrix, by its eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * function(values)) @ vectors.T, np.float64)


def _average(matrices: Sequence[Matrix]) -> Matrix:
    return np.asarray(np.mean(np.stack(matrices), axis=0), np.float64)
