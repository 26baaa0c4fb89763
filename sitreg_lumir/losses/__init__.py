"""What training minimises; each quantity in a file of its own name.

Images are ``(B, 1, X, Y, Z)`` in [0, 1], fields ``(B, 3, X, Y, Z)`` in voxels. All sums are in float32 or
float64, outside autocast.
"""

from sitreg_lumir.losses.diffusion import diffusion
from sitreg_lumir.losses.group_consistency import cycle_mask, group_consistency
from sitreg_lumir.losses.lncc import lncc, warped_lncc
from sitreg_lumir.losses.ndv_sum import ndv_sum

__all__ = ["cycle_mask", "diffusion", "group_consistency", "lncc", "ndv_sum", "warped_lncc"]
