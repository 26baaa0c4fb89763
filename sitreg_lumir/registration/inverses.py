"""Brings two predicted fields closer to being inverse to each other."""

from torch import Tensor

from sitreg_lumir.deform.ops import invert
from sitreg_lumir.losses import ndv_sum

_INVERSION_VOXELS = 1e-4  # stop threshold
_ROUNDS = 3
_FOLDED_SHARE = 1e-4  # of the volume, which may fold in return for a smaller inverse error


def improve_inverses(disp: Tensor, disp_inv: Tensor) -> tuple[Tensor, Tensor]:
    """Averages each field with the inverse of the other field, three times, which lowers the inverse error.

    Exchanging the fields exchanges the results. Where space is compressed to nearly nothing, the inversion does not
    converge: averages that fold for that reason are not used.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels.
        disp_inv: ``(B, 3, X, Y, Z)``, voxels: its inverse up to a fraction of a voxel.
    """
    allowed = max(_FOLDED_SHARE * disp[:, 0].numel(), _folded(disp, disp_inv))
    for _ in range(_ROUNDS):
        inverse, inverse_of_inverse = invert(disp, _INVERSION_VOXELS), invert(disp_inv, _INVERSION_VOXELS)
        averaged = (disp + inverse_of_inverse) / 2, (disp_inv + inverse) / 2
        if _folded(*averaged) > allowed:
            break
        disp, disp_inv = averaged
    return disp, disp_inv


def _folded(*fields: Tensor) -> float:
    """The larger of the folded volumes, voxels^3."""
    return max(float(ndv_sum(field)) for field in fields)
