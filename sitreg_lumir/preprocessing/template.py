"""The MNI152 template, to which each scan is aligned independently, and LUMIR's grid in its world."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import inside, transform_by
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.preprocessing.intensity import inverse

TEMPLATE = "MNI152, ICBM 2009a nonlinear symmetric, T1, skull-stripped, 1 mm, as bundled with nilearn"
TEMPLATE_FILE = Path(__file__).resolve().parents[1] / "template" / "mni152_t1.nii.gz"
LUMIR_SHAPE = (160, 224, 192)
SPACINGS = (1.0, 2.0, 4.0)
"""Voxel sizes, mm, that divide LUMIR's field of view as the networks need it."""
# of LUMIR's field of view, mm, RAS, in the template's world
LUMIR_CENTRE = np.array([0.0, -17.0, 5.0])
_BRAIN = 0.2  # of the template's largest value: darker is no brain, as nilearn's mask has it
_COVERED = 0.99  # share of the template's brain that a model's field of view must hold; LUMIR's holds all of it


_Result = TypeVar("_Result")


def computed_once(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Keeps a function's last two results; of threads that ask for the same, one computes and the others wait."""
    cached, lock = lru_cache(maxsize=2)(function), Lock()

    @wraps(function)
    def locked(*arguments: Any) -> _Result:
        with lock:
            return cached(*arguments)

    locked.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return locked


@dataclass(frozen=True, eq=False)
class Template:
    """The MNI152 template, which defines the model's world.

    Attributes:
        image: ``(X, Y, Z)`` float32, 0..255, T1, exactly 0 outside the brain.
        mask: bool, ``(X, Y, Z)``, the brain.
        affine: ``(4, 4)`` voxel-to-world matrix, MNI mm, RAS, 1 mm voxels along the world's axes.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64]


def lumir_grid(spacing: float = 1.0) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """LUMIR's field of view in voxels of another size: ``(X, Y, Z)`` and the ``(4, 4)`` voxel-to-world matrix, RAS, mm.

    Args:
        spacing: voxel size, mm; one of :data:`SPACINGS`.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {SPACINGS}, got {spacing}")
    x, y, z = (int(size // spacing) for size in LUMIR_SHAPE)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = LUMIR_CENTRE - (np.array((x, y, z)) - 1) / 2 * spacing
    return (x, y, z), affine


@computed_once
def load_template() -> Template:
    """Loads the MNI152 template that :data:`TEMPLATE` describes, once, read-only, from the package's own file."""
    stored, affine = read_volume(TEMPLATE_FILE)
    values = np.asfortranarray(stored, np.float32)  # the file's order: sums over voxels depend on it in the last digit
    values /= values.max()
    mask = values > _BRAIN
    scaled = np.clip(values * np.float32(255 / np.percentile(values[mask], 99.9)), 1, 255)
    template = Template(np.where(mask, scaled, np.float32(0)), mask, affine.astype(np.float64))
    for array in (template.image, template.mask, template.affine):
        array.setflags(write=False)
    return template


def check_model_world(template: Template, shape: Sequence[int], model_affine: NDArray[np.float64], name: str) -> None:
    """Refuses a model whose grid does not lie in the template's world.

    Args:
        template: the MNI152 template.
        shape: ``(X, Y, Z)`` of the model's grid.
        model_affine: ``(4, 4)`` voxel-to-world matrix of the model's grid, RAS, mm.
        name: of the model, for the error.

    Raises:
        InputError: the model's field of view does not hold the template's brain.
    """
    world = transform_by(template.affine, np.argwhere(template.mask).T.astype(np.float64))
    covered = inside(transform_by(inverse(model_affine), world), shape).mean()
    if covered < _COVERED:
        raise InputError(
            f"{name}: its grid holds {covered:.0%} of the MNI152 brain, so its world is another; scans cannot be "
            "aligned to it, use `align=none` with images that lie in its world already"
        )
