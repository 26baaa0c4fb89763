"""Whether the files of a data set lie on one grid, as their headers say."""

import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError, printable
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.io.read import read_stated_grid

_SAME_SPACING = 0.01  # relative: of one data set


def header_problems(images: Iterable[Sequence[Path]], shape: tuple[int, ...], *, check_headers: bool) -> list[str]:
    """What is wrong with the headers of images, their label maps and their landmarks.

    Args:
        images: of each image its file, and those of its label map and its landmarks, if it has them.
        shape: ``(X, Y, Z)`` of all.
        check_headers: whether files that are stored otherwise than the first one are a problem, or a warning.
    """
    problems: list[str] = []
    misplaced: list[str] = []
    first: tuple[Path, NDArray[np.float64]] | None = None
    for image, *others in images:
        own = None
        for path in (image, *others):
            try:
                stored, affine = read_stated_grid(path)
            except InputError as error:
                problems.append(str(error))
                continue
            if stored != shape:
                problems.append(f"{path}: the shape is {stored}, the JSON says {shape}")
            elif affine is not None:
                first = first or (path, affine)
                own = affine if path == image else own
                problem = _misplaced(affine, first[1], own, shape)
                if problem:
                    misplaced.append(f"{path}: {problem.format(first[0].name)}")
    if not check_headers:
        for problem in misplaced:
            print(f"warning: {printable(problem)}; its array is taken as it is", file=sys.stderr)
        return problems
    return problems + [f"{problem}; store it as that is, with its header" for problem in misplaced]


def _misplaced(
    affine: NDArray[np.float64], first: NDArray[np.float64], own: NDArray[np.float64] | None, shape: tuple[int, ...]
) -> str | None:
    """Why a file does not lie as the first image ``{}`` and its own image do; None if it does.

    Args:
        affine: ``(4, 4)`` voxel-to-world matrix of the file, RAS, mm.
        first: that of the first image.
        own: that of the image that a label map or landmarks belong to, if known.
        shape: ``(X, Y, Z)`` of all.
    """
    letters, wanted = ("".join(map(str, nibabel.aff2axcodes(matrix))) for matrix in (affine, first))
    if letters != wanted:
        return f"its axes point to {letters}, those of {{}} to {wanted}"
    if np.array_equal(affine, np.eye(4)):  # what arrays without a header are saved with
        return None
    sizes, usual = spacing_of(affine), spacing_of(first)
    if np.abs(sizes - usual).max() > _SAME_SPACING * usual.max():
        return f"its voxels are {_text(sizes)} mm large, those of {{}} {_text(usual)}"
    if own is not None and not np.array_equal(own, np.eye(4)):
        corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in shape))], dtype=float).T
        apart = float(np.linalg.norm(((affine - own) @ corners)[:3], axis=0).max())
        if apart > usual.max():
            return f"it lies up to {apart:.1f} mm from its image"
    return None


def _text(sizes: NDArray[np.float64]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)
