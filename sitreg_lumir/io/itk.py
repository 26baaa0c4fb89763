"""Transforms on disk that ANTs, ITK and 3D Slicer read: displacement fields and affines.

ITK's world is LPS, this package's RAS: x and y change their sign on the way. Both directions of the files are ITK's: a
transform tells each point of the fixed world where it lies in the moving world.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.geometry.transforms import DisplacementField, Matrix, Transform, checked_disp, checked_matrix
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.foreign_affines import Grid, checked_affine, read_foreign_affine
from sitreg_lumir.io.itk_parts import TransformPart, as_text, read_parts
from sitreg_lumir.io.other_formats import IMAGE_SUFFIXES
from sitreg_lumir.io.read import read_vectors
from sitreg_lumir.io.volume_files import has_suffix
from sitreg_lumir.io.write import FIELD_LEVEL, plain_header, write_array

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS
_DISPLACEMENTS, VECTOR_INTENTS = 1006, 1007  # NIfTI intents: ITK reads the first as RAS, the second as its own LPS
itk: Any = SimpleITK  # has no type information
_LARGEST_SPACING = 1.0  # mm, of the fields written: the model's own, finer samples than that of coarse scans


def field_grid(
    shape: Sequence[int], affine: Matrix, padding_mm: float = 0.0
) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """The grid on which a field for an image is written: the image's own, but at most 1 mm apart, and padded.

    ITK leaves points outside a field where they are, so what lies beyond the image needs the padding: without it, a
    point just outside jumps by the whole displacement.

    Args:
        shape: ``(X, Y, Z)`` of the image.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        padding_mm: width of the border added on every side at least, mm.

    Returns:
        ``(X, Y, Z)`` and the ``(4, 4)`` voxel-to-world matrix, RAS, mm; the image's axes and middle, all of its volume.
    """
    if not 0 <= padding_mm < math.inf:
        raise ValueError(f"padding_mm must be 0 or more, got {padding_mm}")
    matrix = checked_matrix(affine, "affine")
    spacing = spacing_of(matrix)
    fine = np.where(spacing <= _LARGEST_SPACING + 1e-3, spacing, _LARGEST_SPACING)  # 1.0000001 mm is 1 mm
    size = np.array(shape)
    rounding = 1e-4  # voxels
    border = np.ceil(padding_mm / fine - rounding)
    count = np.ceil(size * spacing / fine - rounding) + 2 * border
    step = np.eye(4)  # voxels of the field -> voxels of the image
    step[:3, :3] = np.diag(fine / spacing)
    step[:3, 3] = (size - 1) / 2 - (count - 1) / 2 * fine / spacing
    x, y, z = (int(n) for n in count)
    return (x, y, z), matrix @ step


def save_itk_field(path: Path, disp: NDArray[Any], affine: Matrix, *, compresslevel: int = FIELD_LEVEL) -> None:
    """Writes a field as ITK, ANTs and 3D Slicer read it; equal input gives equal bytes.

    On disk: ``(X, Y, Z, 1, 3)`` float32, mm, LPS, intent VECTOR, sform = qform with code 1.

    Args:
        path: ends in ``.nii.gz`` or ``.nii``; replaced if it exists, and only by a whole file.
        disp: ``(3, X, Y, Z)``, mm, RAS.
        affine: ``(4, 4)`` voxel-to-world matrix of its grid, RAS, mm, axes orthogonal.
        compresslevel: of gzip, 0..9.

    Raises:
        ValueError: ``disp`` or ``affine`` has another form or holds NaN.
        InputError: the file cannot be written.
    """
    matrix = checked_matrix(affine, "affine")
    signs = np.array([-1, -1, 1], np.float32)
    vectors = np.moveaxis(checked_disp(disp), 0, -1)[:, :, :, None] * signs
    with writing(path) as temporary:
        header = plain_header(vectors.shape, matrix, np.float32, intent=VECTOR_INTENTS)
        write_array(temporary, vectors, header, compresslevel)


def load_itk_field(path: Path, header: str | None = None) -> DisplacementField:
    """Reads a displacement field of ITK, ANTs (``*Warp.nii.gz``), 3D Slicer or :func:`save_itk_field`.

    Args:
        path: NIfTI file ``(X, Y, Z, 1, 3)``, mm: LPS with the intent VECTOR, RAS with DISPVECT, as ITK >= 5.4 does;
            or vectors in ``.mha`` or ``.nrrd``, LPS.
        header: ``sform`` or ``qform``: the one to use, whatever the other says.

    Raises:
        InputError: the file is missing or broken, or holds something else.
    """
    vectors, affine, intent = read_vectors(path, header)
    if vectors.shape[-1] != 3 or intent not in (_DISPLACEMENTS, VECTOR_INTENTS):
        raise InputError(
            f"{path}: {vectors.shape[-1]} components and intent {intent}, an ITK displacement field has 3 and the "
            "intent 1007 (VECTOR); write it with ITK"
        )
    disp = np.ascontiguousarray(np.moveaxis(vectors[:, :, :, 0], -1, 0))
    if intent == VECTOR_INTENTS:
        disp[:2] *= -1
    return DisplacementField(disp, affine)


def save_affine_tfm(path: Path, matrix: Matrix) -> None:
    """Writes an affine as ITK's text file, ``.tfm`` or ``.txt``, with all digits.

    Args:
        path: replaced if it exists, and only by a whole file.
        matrix: ``(4, 4)``, fixed world -> moving world, RAS, mm.

    Raises:
        ValueError: ``matrix`` is no invertible affine.
        InputError: the file cannot be written.
    """
    lps = LPS @ checked_matrix(matrix, "matrix") @ LPS
    numbers = " ".join(repr(float(value) + 0.0) for value in (*lps[:3, :3].flat, *lps[:3, 3]))  # no "-0.0"
    with writing(path) as temporary:
        temporary.write_text(
            "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
            f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
        )


def load_affine(path: Path, grids: tuple[Grid, Grid] | None = None) -> NDArray[np.float64]:
    """Reads an ITK affine: ``.tfm``, ``.txt``, ``.mat`` (ANTs) or ``.h5``; rigid and composite ones, too.

    Also an LTA of FreeSurfer, or a matrix of FLIRT if the grids are known.

    Args:
        path: of the file.
        grids: of the fixed and of the moving scan, to which a matrix of FLIRT belongs.

    Returns:
        ``(4, 4)``, fixed world -> moving world, RAS, mm.

    Raises:
        InputError: the file is missing or no ITK transform, or it is not affine, not 3-D or cannot be inverted.
    """
    foreign = read_foreign_affine(path, grids)
    return matrix_of_parts(read_parts(path), path) if foreign is None else foreign


def matrix_of_parts(parts: Sequence[TransformPart], path: Path) -> NDArray[np.float64]:
    """The ``(4, 4)`` matrix, RAS, mm, of transforms of a file, the last one applied first.

    Raises:
        InputError: a part is not linear, not 3-D or cannot be inverted; ``path`` is named.
    """
    unfit = next((part for part in parts if not (part.is_linear and part.dimensions == 3)), None)
    if unfit is not None:
        remedy = "give one of the volumes" if unfit.dimensions != 3 else "give fields as NIfTI files"
        raise InputError(f"{path}: a 3-D affine is needed, this is a {unfit.kind}; {remedy}")
    with tempfile.TemporaryDirectory() as folder:  # ITK knows what the parameters of its kinds mean
        name = str(Path(folder) / "parts.tfm")
        Path(name).write_text(as_text(parts))
        try:
            transform = itk.ReadTransform(name)
        except (RuntimeError, KeyError, TypeError) as error:
            _, _, reason = str(error).partition("ITK ERROR: ")
            reason = " ".join(reason.partition("\n")[0].split())[:160] or "unknown format"
            raise InputError(
                f"{path}: not a readable ITK transform ({reason}); give a .tfm, .txt or .mat of ITK"
            ) from None
    lps = np.eye(4)
    lps[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    lps[:3, :3] = np.transpose([transform.TransformPoint(axis) for axis in np.eye(3).tolist()]) - lps[:3, 3:]
    return checked_affine(np.asarray(LPS @ lps @ LPS, dtype=np.float64), path)


def load_transform(path: Path, header: str | None = None, grids: tuple[Grid, Grid] | None = None) -> Transform:
    """A field if the file is a volume by its name, else an affine: see :func:`load_itk_field`, :func:`load_affine`."""
    if has_suffix(path.name, *IMAGE_SUFFIXES):
        return load_itk_field(path, header)
    return load_affine(path, grids)
