"""Mutual information of the template and a scan, and the affine that maximises it.

All voxels are used, none is drawn at random, and one thread adds up the histogram, because the order of the sums would
change the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.geometry.transforms import transform_by
from sitreg_lumir.preprocessing.intensity import Mask, Matrix, inverse

UNIT_MM = 60.0  # a brain's radius as the unit of length makes shifts and matrix entries weigh alike
FACTORS = (3, 2, 1)  # levels, of the finest grid's spacing

_BORDER_MM = 6.0  # border of the field of view that is left out: its voxels may leave the scan during the optimisation
_BINS = 32
_DIGITS = 9  # to which results are rounded, below 1e-7 mm: ITK's last digits vary between runs
itk: Any = SimpleITK  # has no type information


@dataclass(frozen=True, eq=False)
class Level:
    """The template, or a scan, at one resolution.

    Attributes:
        values: ``(X, Y, Z)``.
        grid: ``(4, 4)`` voxels -> a frame in units of ``UNIT_MM``, no rotation.
        mask: where the template is compared; None for a scan.
    """

    values: NDArray[np.float32]
    grid: Matrix
    mask: Mask | None


def levels(values: NDArray[np.float32], grid: Matrix, mask: Mask | None) -> list[Level]:
    """A volume at all resolutions, coarse to fine: smoothed, then every third, every second and every voxel."""
    scales = []
    for factor in FACTORS:
        part = (slice(None, None, factor),) * 3
        smooth = values if factor == 1 else ndimage.gaussian_filter(values, factor / 2)
        coarse = grid @ np.diag([factor] * 3 + [1.0])
        scales.append(Level(smooth[part], coarse, None if mask is None else mask[part]))
    return scales


def optimise(target: Level, scan: Level, start: Matrix, *, even: bool, rigid: bool = False) -> tuple[Matrix, float]:
    """The best affine near ``start``, template -> scan, and its mutual information; 0 where the two do not overlap.

    ``even`` allows only turns, shifts and one scale for all directions; ``rigid`` no scale either.
    """
    transform = _rigid(start) if rigid else _even(start) if even else _as_itk(start)
    method = _registration_method(target, scan, [start])
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=0.05,  # 3 mm
        minStep=1e-5,
        numberOfIterations=300,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-8,
    )
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(_image(target.values, target.grid), _image(scan.values, scan.grid))
    except RuntimeError:  # all samples outside the scan
        return start, 0.0
    matrix = to_matrix(np.reshape(transform.GetMatrix(), (3, 3)), transform.GetTranslation())
    return np.round(matrix, _DIGITS), round(-method.GetMetricValue(), _DIGITS)


def mutual_information(target: Level, scan: Level, transform: Matrix, initial: Sequence[Matrix]) -> float:
    """Mutual information, nats, over what the scan shows under all the matrices; 0 where the two do not overlap."""
    method = _registration_method(target, scan, [transform, *initial])
    method.SetInitialTransform(_as_itk(transform))
    try:
        value = method.MetricEvaluate(_image(target.values, target.grid), _image(scan.values, scan.grid))
    except RuntimeError:
        return 0.0
    return round(-float(value), _DIGITS)


def _registration_method(target: Level, scan: Level, transforms: Sequence[Matrix]) -> Any:
    """An ITK method that compares those template voxels which lie well inside the scan under all ``transforms``.

    Otherwise the optimiser would gain by moving voxels out of a small field of view.
    """
    compared = np.array(target.mask)
    points = transform_by(target.grid, np.argwhere(compared).T.astype(np.float64))
    border = _BORDER_MM / UNIT_MM / scan.grid[0, 0]  # voxels
    last = np.array(scan.values.shape)[:, None] - 1 - border
    within = [transform_by(inverse(scan.grid) @ transform, points) for transform in transforms]
    compared[compared] = np.all([((at >= border) & (at <= last)).all(axis=0) for at in within], axis=0)
    method = itk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetMetricFixedMask(_image(compared.astype(np.uint8), target.grid))
    method.SetInterpolator(itk.sitkLinear)
    return method


def _image(volume: NDArray[Any], grid: Matrix) -> Any:
    image = itk.GetImageFromArray(np.ascontiguousarray(volume.T))
    image.SetSpacing(grid.diagonal()[:3].tolist())
    image.SetOrigin(grid[:3, 3].tolist())
    return image


def _as_itk(matrix: Matrix) -> Any:
    transform = itk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def _even(matrix: Matrix) -> Any:
    """The nearest transform that turns, shifts and scales evenly."""
    left, scales, right = np.linalg.svd(matrix[:3, :3])
    transform = itk.Similarity3DTransform()
    transform.SetMatrix((scales.prod() ** (1 / 3) * left @ right).ravel().tolist(), 1e-6)
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def _rigid(matrix: Matrix) -> Any:
    """The nearest transform that turns and shifts alone."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    transform = itk.VersorRigid3DTransform()
    transform.SetMatrix((left @ right).ravel().tolist(), 1e-6)
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def to_matrix(linear: Any, shift: Any = (0.0, 0.0, 0.0)) -> Matrix:
    """``(4, 4)`` from a ``(3, 3)`` matrix and a shift."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, shift
    return matrix
