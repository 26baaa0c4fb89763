"""Affines of FreeSurfer (LTA) and FSL (FLIRT) as maps from the fixed to the moving world.

Both programs store how the moving scan's points get to the fixed scan, so the inverse of ITK's affine. An LTA file
holds both grids; a FLIRT matrix belongs to two grids that it does not name.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.geometry.transforms import Matrix
from sitreg_lumir.io.bounded import check_regular, read_bytes

Grid: TypeAlias = tuple[tuple[int, int, int], Matrix]
"""``(X, Y, Z)`` and the ``(4, 4)`` voxel-to-world matrix, RAS, mm."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_VOXELS, _WORLD = 0, 1  # types of LTA
_LONGEST = 1 << 20  # bytes of a file of text
_LONGEST_NUMBER = 100  # letters


def read_foreign_affine(path: Path, grids: tuple[Grid, Grid] | None) -> NDArray[np.float64] | None:
    """The affine of a file of FreeSurfer or FLIRT; None for another file.

    Args:
        path: of the file.
        grids: of the fixed and of the moving scan, to which a FLIRT matrix belongs (``-ref`` and ``-in``).

    Returns:
        ``(4, 4)``, fixed world -> moving world, RAS, mm.

    Raises:
        InputError: it is a FLIRT matrix and the grids are unknown, or an LTA that does not say them or is of another
            kind; or it cannot be inverted.
    """
    try:
        if check_regular(path) > _LONGEST:
            return None
        text = read_bytes(path, _LONGEST, "an affine").decode("latin-1")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    if re.search(r"^type\s*=", text, re.M) and "src volume info" in text:
        try:
            with np.errstate(all="ignore"):
                matrix = _lta(path, text)
        except InputError:
            raise
        except (ValueError, OverflowError):  # a grid that cannot be inverted, numbers that none can be
            raise InputError(f"{path}: the affine cannot be inverted; align the images again") from None
    else:
        flirt = _matrix(text.splitlines())
        if flirt is None or not np.array_equal(flirt[3], (0, 0, 0, 1)):
            return None
        if grids is None:
            raise InputError(
                f"{path}: a FLIRT matrix (four rows of numbers) belongs to the grids of two images that it does not "
                "name; give it as --initial-transform of `register`, alone to `apply` with --image and --reference, or "
                "convert it by c3d_affine_tool -fsl2ras -oitk"
            )
        fixed, moving = (_fsl_to_world(*grid) for grid in grids)
        with np.errstate(all="ignore"):
            matrix = fixed @ flirt @ np.linalg.inv(moving)
    return np.asarray(np.linalg.inv(checked_affine(matrix, path)), dtype=np.float64)


def checked_affine(matrix: Matrix, path: Path) -> NDArray[np.float64]:
    """An affine of a file, if it can be inverted and leads to where scans can be; else InputError, which names it."""
    with np.errstate(all="ignore"):
        usable = np.isfinite(matrix).all() and np.abs(matrix).max() < 1e9 and abs(np.linalg.det(matrix)) > 1e-9
    if not usable:
        raise InputError(f"{path}: the affine cannot be inverted; align the images again")
    return matrix


def _fsl_to_world(shape: tuple[int, int, int], affine: Matrix) -> Matrix:
    """FSL's coordinates (mm from the first voxel, x always to the left) -> world, RAS, mm."""
    scaled = np.diag([*spacing_of(affine), 1.0])  # voxels -> FSL's coordinates
    if np.linalg.det(affine[:3, :3]) > 0:
        scaled[0, 3] = (shape[0] - 1) * scaled[0, 0]
        scaled[0, 0] *= -1
    return np.asarray(affine @ np.linalg.inv(scaled), dtype=np.float64)


def _lta(path: Path, text: str) -> Matrix:
    """Moving world -> fixed world."""
    kind = re.search(r"^type\s*=\s*(\d+)", text, re.M)
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    matrix = _matrix(lines[lines.index("1 4 4") + 1 :][:4]) if "1 4 4" in lines else None
    if kind is None or int(kind[1]) not in (_VOXELS, _WORLD) or matrix is None:
        raise InputError(
            f"{path}: an LTA of another kind than voxels to voxels or world to world; convert it by "
            "lta_convert --outitk"
        )
    if not np.array_equal(matrix[3], (0, 0, 0, 1)):
        raise InputError(
            f"{path}: the last row of its matrix is not 0 0 0 1, so it is no affine; align the images again"
        )
    if int(kind[1]) == _WORLD:
        return matrix
    moving, fixed = (_lta_grid(path, text, name) for name in ("src", "dst"))
    return np.asarray(fixed @ matrix @ np.linalg.inv(moving), dtype=np.float64)


def _matrix(lines: Sequence[str]) -> NDArray[np.float64] | None:
    """The ``(4, 4)`` matrix that lines of text hold, empty ones apart; None if they hold anything else."""
    rows = [line.split() for line in lines if line.strip()]
    numbers = [number for row in rows for number in row]
    if [len(row) for row in rows] != [4] * 4:
        return None
    if not all(len(number) <= _LONGEST_NUMBER and re.fullmatch(_NUMBER, number) for number in numbers):
        return None
    return np.reshape([float(number) for number in numbers], (4, 4))


def _lta_grid(path: Path, text: str, name: str) -> Matrix:
    """The voxel-to-world matrix of an LTA's ``src`` or ``dst`` volume."""
    block = text.partition(f"{name} volume info")[2].partition("volume info\n")[0]
    values = {
        key: [float(number) for number in numbers.split()]
        for key, numbers in re.findall(rf"^(\w+)\s*=\s*((?:{_NUMBER}[ \t]*)+)", block, re.M)
    }
    try:
        if values["valid"] != [1.0]:
            raise KeyError("valid")
        axes = np.array([values["xras"], values["yras"], values["zras"]]).T * values["voxelsize"]
        affine = np.eye(4)
        affine[:3, :3] = axes
        affine[:3, 3] = np.array(values["cras"]) - axes @ (np.array(values["volume"]) / 2)
    except (KeyError, ValueError):
        raise InputError(
            f"{path}: does not say the grid of its {name} volume; make it with both images, or convert it by "
            "lta_convert --outitk"
        ) from None
    return affine
