"""NDV, the share of the foreground that a field folds, as the LUMIR evaluation defines it.

Source: Liu et al., On finite difference Jacobian computation, IJCV 2024.
"""

import torch

from sitreg_lumir.deform.ops import ndv_map
from sitreg_lumir.deform.sums import exact_sum
from sitreg_lumir.metrics.labels import Volume, as_field, as_volume

_SLAB = 16  # planes of which the determinants are held at once


def ndv(disp: Volume, mask: Volume | None = None) -> float:
    """Folded volume in percent of the foreground.

    Args:
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        mask: ``(X, Y, Z)``, where the fixed image is above 0 (the 2025 evaluation); None: everywhere. The
            outermost voxels never count.

    Returns:
        percent; nan if the mask is empty.
    """
    field = torch.as_tensor(disp)
    as_field(disp)
    inner = (slice(1, -1),) * 3
    weight = torch.ones(()) if mask is None else torch.as_tensor(as_volume(mask)[inner] > 0)
    weight = weight.to(field.device).expand([size - 2 for size in field.shape[1:]])
    volume = 0.0
    for start in range(0, weight.shape[0], _SLAB):
        slab = field[None, :, start : start + _SLAB + 2].double()
        volume += float(exact_sum(ndv_map(slab)[0, 0] * weight[start : start + _SLAB]))
    voxels = float(exact_sum(weight))
    return 100 * volume / voxels if voxels else float("nan")
