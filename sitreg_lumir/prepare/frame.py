"""The model's frame as an image: the MNI152 template, which scans are aligned to one by one; LUMIR's grid in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.data.demo import CENTRE
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import inside, transform_by
from sitreg_lumir.prepare.conform import inverse

TEMPLATE = "MNI152, ICBM 2009a nonlinear symmetric, T1, skull-stripped, 1 mm, as bundled with nilearn"
LUMIR_SHAPE = (160, 224, 192)
_COVERED = 0.99  # share of the template's brain that a model's field of view must hold; LUMIR's holds all of it


@dataclass(frozen=True, eq=False)
class Frame:
    """The template.

    Attributes:
        image: ``(X, Y, Z)`` float32, 0..255, T1, exactly 0 outside the brain.
        mask: bool, ``(X, Y, Z)``, the brain.
        affine: ``(4, 4)`` voxel-to-world matrix, MNI mm, RAS, 1 mm voxels along the world's axes.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64]


def lumir_affine() -> NDArray[np.float64]:
    """``(4, 4)`` voxel-to-world matrix of LUMIR's grid ``LUMIR_SHAPE``: 1 mm, RAS, in the template's world."""
    affine = np.eye(4)
    affine[:3, 3] = CENTRE - (np.array(LUMIR_SHAPE) - 1) / 2
    return affine


@lru_cache(maxsize=1)
def load_frame() -> Frame:
    """The MNI152 template as :data:`TEMPLATE` says, made once and not to be written to; nothing is downloaded."""
    from nilearn import datasets  # slow to import

    stored = datasets.load_mni152_template(resolution=1)
    brain = datasets.load_mni152_brain_mask(resolution=1)
    mask = np.asarray(brain.dataobj) > 0
    values = np.asarray(stored.dataobj, np.float32)
    scaled = np.clip(values * np.float32(255 / np.percentile(values[mask], 99.9)), 1, 255)
    frame = Frame(np.where(mask, scaled, np.float32(0)), mask, np.array(stored.affine, np.float64))
    for array in (frame.image, frame.mask, frame.affine):
        array.setflags(write=False)
    return frame


def check_frame(frame: Frame, shape: Sequence[int], model_affine: NDArray[np.float64], name: str) -> None:
    """Refuses a model whose world is not the template's.

    Args:
        frame: the template.
        shape: of the model's grid.
        model_affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        name: of the model, for the error.

    Raises:
        InputError: the model's field of view does not hold the template's brain.
    """
    world = transform_by(frame.affine, np.argwhere(frame.mask).T.astype(np.float64))
    covered = inside(transform_by(inverse(model_affine), world), shape).mean()
    if covered < _COVERED:
        raise InputError(
            f"{name}: its grid holds {covered:.0%} of the MNI152 brain, so its world is another; scans cannot be "
            "aligned to it, use --align none with images already in its frame"
        )
