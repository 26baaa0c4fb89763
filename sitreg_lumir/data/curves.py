"""Random curves of intensity: contrasts between tissues that no T1 shows, of the same anatomy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KNOTS = 5  # between 0 and the largest intensity: more make stripes within one tissue
_ENTRIES = 1024  # of the table, between which the curve is a line
_FLAT = 0.1  # least height between neighbouring knots of a curve, so that tissues stay apart


def random_curve(seed: int, monotone: bool) -> NDArray[np.float64]:
    """A smooth random curve from [0, 1] into [0, 1] as a table.

    A monotone curve keeps the order of the tissues, rising or falling. Others change it, as FLAIR (grey matter
    brightest, fluid darkest), T2* and proton density do.

    Args:
        seed: decides all.
        monotone: whether the curve only rises or only falls.

    Returns:
        ``(1024,)``, values at equally spaced intensities.

    Source: Zhou et al., Models Genesis, MedIA 2021 (random curves of intensity); the interpolation without overshoot:
    Fritsch & Carlson, Monotone piecewise cubic interpolation, SIAM J. Numer. Anal. 1980.
    """
    from scipy.interpolate import PchipInterpolator

    generator = np.random.default_rng(seed)
    if monotone:
        steps = generator.random(_KNOTS - 1)
        steps = _FLAT + (1 - _FLAT * len(steps)) * steps / steps.sum()
        heights = np.concatenate([[0.0], np.cumsum(steps[:-1]), [1.0]])
        heights = heights if generator.random() < 0.5 else 1 - heights
    else:
        heights = generator.random(_KNOTS)
        for k in range(1, _KNOTS):  # neighbours that are too close: drawn again from what is far enough
            before = heights[k - 1]
            below, above = max(before - _FLAT, 0.0), max(1 - before - _FLAT, 0.0)
            place = heights[k] * (below + above)
            heights[k] = place if place < below else place - below + before + _FLAT
    values: NDArray[np.float64] = PchipInterpolator(np.linspace(0, 1, _KNOTS), heights)(np.linspace(0, 1, _ENTRIES))
    return values.clip(0, 1)  # rounding


def apply_curve(image: Tensor, curve: NDArray[np.float64]) -> Tensor:
    """The image with the curve applied to its intensities as shares of its largest one.

    Args:
        image: any shape, float, intensities from 0 on.
        curve: of :func:`random_curve`.

    Returns:
        values between 0 and the largest intensity, the same shape and type.
    """
    largest = image.amax().clamp(min=1e-6)
    table = torch.from_numpy(curve).to(image)
    place = (image / largest).clamp(0, 1) * (len(curve) - 1)
    below = place.floor().clamp(max=len(curve) - 2)
    index = below.long()
    return largest * torch.lerp(table[index], table[index + 1], place - below)
