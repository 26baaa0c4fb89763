"""Both scans of a pair together: on the model's grid, and aligned by an affine that is known for the pair."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import Matrix
from sitreg_lumir.preprocessing.intensity import conform, mask_on_grid
from sitreg_lumir.registration.model import Model, as_tensor
from sitreg_lumir.registration.objective import ImagePair
from sitreg_lumir.registration.scan import PlacedScan

FINER = (2, 3, 4)
"""Voxels that may divide a voxel of the model's grid along each axis."""


@dataclass(frozen=True, eq=False)
class ModelPair:
    """Both scans on the model's grid, normalised as the network's input: ``(1, 1, X, Y, Z)`` each.

    Attributes:
        fixed: intensity in [0, 1].
        fixed_brain: bool.
        moving: intensity in [0, 1], aligned.
        moving_brain: bool.
        as_placed: the moving image and brain by the fixed scan's alignment, as the headers place the two scans; None
            if they miss the grid.
        fixed_lesion: bool, or None.
        moving_lesion: bool, or None.
    """

    fixed: Tensor
    fixed_brain: Tensor
    moving: Tensor
    moving_brain: Tensor
    as_placed: tuple[Tensor, Tensor] | None = None
    fixed_lesion: Tensor | None = None
    moving_lesion: Tensor | None = None


def pair_on_grid(
    model: Model, fixed: PlacedScan, moving: PlacedScan, fixed_to_model: Matrix, moving_to_model: Matrix
) -> ModelPair:
    """Samples both scans on the model's grid.

    Args:
        model: that registers them.
        fixed: the fixed scan.
        moving: the moving scan.
        fixed_to_model: ``(4, 4)``, fixed world -> model world, RAS, mm.
        moving_to_model: ``(4, 4)``, moving world -> model world, RAS, mm.

    Raises:
        InputError: a scan is constant in its brain, or has no brain or no lesion in the model's grid.
    """
    grid = model.shape, model.affine
    try:
        as_placed = _image(moving, fixed_to_model, *grid)
    except InputError:  # the headers place the scans apart
        as_placed = None
    return ModelPair(
        *_image(fixed, fixed_to_model, *grid),
        *_image(moving, moving_to_model, *grid),
        as_placed,
        _lesion(fixed, fixed_to_model, *grid),
        _lesion(moving, moving_to_model, *grid),
    )


def finer_factor(model: Model, voxel_size: float) -> int:
    """How many voxels of a size divide a voxel of the model's grid along each axis.

    Args:
        model: that registers a pair.
        voxel_size: mm.

    Raises:
        InputError: no whole number between 2 and 4.
    """
    factor = round(model.spacing / voxel_size)
    if factor not in FINER or abs(factor * voxel_size - model.spacing) > 1e-2 * voxel_size:
        sizes = ", ".join(f"{model.spacing / factor:.3g}" for factor in FINER)
        raise InputError(f"`refine_mm` must divide the model's {model.spacing:g} mm: {sizes}; got {voxel_size:g}")
    return factor


def pair_on_finer_grid(
    model: Model, factor: int, fixed: PlacedScan, moving: PlacedScan, fixed_to_model: Matrix, moving_to_model: Matrix
) -> ImagePair:
    """Samples both scans on a grid that divides the voxels of the model's grid.

    Args:
        model: that registers them.
        factor: voxels of the grid along each axis of the model's voxels.
        fixed: the fixed scan.
        moving: the moving scan.
        fixed_to_model: ``(4, 4)``, fixed world -> model world, RAS, mm.
        moving_to_model: ``(4, 4)``, moving world -> model world, RAS, mm.

    Raises:
        InputError: a scan is constant in its brain, or has no brain or no lesion in the grid.
    """
    x, y, z = (factor * size for size in model.shape)
    finer_to_model = np.diag([1 / factor] * 3 + [1.0])
    finer_to_model[:3, 3] = (1 / factor - 1) / 2
    grid = (x, y, z), model.affine @ finer_to_model
    fixed_image, fixed_brain = _image(fixed, fixed_to_model, *grid)
    moving_image, moving_brain = _image(moving, moving_to_model, *grid)
    lesions = _lesion(fixed, fixed_to_model, *grid), _lesion(moving, moving_to_model, *grid)
    return ImagePair(fixed_image, moving_image, fixed_brain, moving_brain, *lesions)


def _image(scan: PlacedScan, prealign: Matrix, shape: tuple[int, int, int], affine: Matrix) -> tuple[Tensor, Tensor]:
    values, brain = conform(scan.data, scan.affine, scan.brain, prealign, shape, affine, str(scan.path))
    return as_tensor(values), torch.from_numpy(brain)[None, None]


def _lesion(scan: PlacedScan, prealign: Matrix, shape: tuple[int, int, int], affine: Matrix) -> Tensor | None:
    if scan.lesion is None:
        return None
    name = f"the lesion mask of {scan.name}"
    return torch.from_numpy(mask_on_grid(scan.lesion, prealign @ scan.affine, shape, affine, name))[None, None]


def meet_half_way(fixed: Matrix, moving: Matrix, initial: Matrix) -> tuple[Matrix, Matrix]:
    """Alignments that agree with a known affine between the two scans, each changed by half of the difference.

    Exchanging the scans, and inverting the affine, exchanges the results: that keeps a registration symmetric.

    Args:
        fixed: ``(4, 4)``, fixed world -> model world, RAS, mm.
        moving: ``(4, 4)``, moving world -> model world, RAS, mm.
        initial: ``(4, 4)``, fixed world -> moving world, RAS, mm.

    Returns:
        both alignments, with ``inv(moving) @ fixed = initial``.

    Raises:
        InputError: the affine mirrors the scan or turns it half round, so that it has no half.
    """
    difference = moving @ initial @ np.linalg.inv(fixed)  # model world -> model world, the identity if they agree
    half = square_root(difference)
    return half @ fixed, np.linalg.inv(half) @ moving


def square_root(matrix: Matrix) -> Matrix:
    """The principal square root of an affine, by the Denman-Beavers iteration.

    Source: Denman & Beavers, The matrix sign function and computations in systems, 1976.
    """
    root, inverse = matrix.copy(), np.eye(4)
    with suppress(np.linalg.LinAlgError):
        for _ in range(50):
            root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
            if np.abs(root @ root - matrix).max() < 1e-12 * np.abs(matrix).max():
                break
    if not np.abs(root @ root - matrix).max() < 1e-6 or np.linalg.det(root[:3, :3]) <= 0:
        raise InputError(
            "`initial_transform` is too far from the alignment of each scan (mirrored, or turned half round); check "
            "its direction (fixed to moving, as ANTs writes it), or use `align=none`"
        )
    return root
