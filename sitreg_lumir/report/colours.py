"""Colours for numbers: the Jacobian determinant around 1, millimetres from 0; and pictures as data URIs."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_JACOBIAN_LIMITS = (0.5, 1.0, 2.0, 3.0)  # of the colours, in powers of two
_MM_LIMITS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_LEVELS = 31  # colours from the middle of a scale to its end
_CLEAR, _FOLD = 0, 2 * _LEVELS + 2  # indices in a palette: nothing to show, determinant <= 0


@dataclass(frozen=True, eq=False)
class Coloured:
    """A volume as indices into a palette, with its legend.

    Attributes:
        indices: ``(X, Y, Z)``.
        palette: ``(N, 4)``, RGBA.
        bar: all colours in a row, a data URI.
        ticks: numbers under the bar, evenly spread from end to end.
    """

    indices: Bytes
    palette: Bytes
    bar: str
    ticks: tuple[str, ...]


def colour_jacobian(jac_det: Array, mask: Mask) -> Coloured:
    """Colours by the logarithm, so that half and double look alike; folds have a colour of their own.

    Args:
        jac_det: ``(X, Y, Z)``, no unit; NaN where it is not known.
        mask: ``(X, Y, Z)``; nothing is shown outside.
    """
    determinant = np.asarray(jac_det, dtype=np.float32)
    power = np.log2(determinant, out=np.full_like(determinant, np.nan), where=determinant > 0)
    limit = _limit(np.abs(power[mask]), _JACOBIAN_LIMITS)
    indices = _indices(power, mask, limit)
    indices[mask & (determinant <= 0)] = _FOLD
    ticks = tuple(f"{2**exponent:.2g}" for exponent in (-limit, -limit / 2, 0, limit / 2, limit))
    return Coloured(indices, _diverging(), png(np.arange(1, _FOLD)[None], _diverging()), ticks)


def colour_mm(distance: Array, mask: Mask) -> Coloured:
    """Colours of distances.

    Args:
        distance: ``(X, Y, Z)``, mm, not negative.
        mask: ``(X, Y, Z)``; nothing is shown outside.
    """
    values = np.asarray(distance, dtype=np.float32)
    limit = _limit(values[mask], _MM_LIMITS)
    bar = png(np.arange(_LEVELS + 1, _FOLD)[None], _sequential())
    return Coloured(
        _indices(values, mask, limit), _sequential(), bar, tuple(f"{part * limit:g}" for part in (0, 0.5, 1))
    )


def _limit(values: Array, choices: tuple[float, ...]) -> float:
    """The smallest choice that leaves out at most half a percent of the values, so that scales are comparable."""
    values = values[np.isfinite(values)]
    needed = float(np.percentile(values, 99.5)) if values.size else 0.0
    return next((choice for choice in choices if choice >= needed), choices[-1])


def _indices(values: NDArray[np.float32], mask: Mask, limit: float) -> Bytes:
    """Indices into a palette: 1 for ``-limit`` to ``2 * _LEVELS + 1`` for ``limit``, 0 outside the mask."""
    known = mask & ~np.isnan(values)
    level = np.rint(np.clip(np.where(known, values, 0) / limit, -1, 1) * _LEVELS)
    return np.where(known, level + _LEVELS + 1, _CLEAR).astype(np.uint8)


def _palette(colour: Callable[[float], tuple[Array, float]]) -> Bytes:
    """``(indices, 4)`` RGBA of ``colour(t)``, t from -1 to 1, between the clear place and that of folds."""
    palette = np.zeros((_FOLD + 1, 4))
    for level in range(-_LEVELS, _LEVELS + 1):
        rgb, alpha = colour(level / _LEVELS)
        palette[level + _LEVELS + 1] = (*rgb, 255 * alpha)
    palette[_FOLD] = (255, 0, 255, 255)
    return np.rint(palette).astype(np.uint8)


def _between(amount: float, *anchors: tuple[int, int, int]) -> Array:
    indices = np.linspace(0, 1, len(anchors))
    return np.array([np.interp(amount, indices, channel) for channel in zip(*anchors, strict=True)])


def _diverging() -> Bytes:
    """Blue below the middle, orange above; clear in the middle, so that the anatomy shows where nothing happens."""

    def colour(t: float) -> tuple[Array, float]:
        cool, warm = ((38, 99, 235), (64, 156, 255), (186, 236, 255)), ((225, 65, 20), (255, 140, 40), (255, 232, 170))
        return _between(abs(t), *(warm if t > 0 else cool)), 0.92 * min(1.0, 1.5 * abs(t))

    return _palette(colour)


def _sequential() -> Bytes:
    """Violet to yellow, clear at 0."""

    def colour(t: float) -> tuple[Array, float]:
        anchors = ((92, 36, 160), (190, 50, 150), (250, 110, 90), (255, 235, 140))
        return _between(max(t, 0.0), *anchors), 0.92 * min(1.0, 1.5 * max(t, 0.0))

    return _palette(colour)


def lines(covered: Array, rgb: tuple[int, int, int]) -> str:
    """A picture of lines in one colour, clear elsewhere."""
    steps = 3  # four colours with the clear one, so two bits a pixel
    palette = np.array([(*rgb, 255 * step / steps) for step in range(steps + 1)])
    return png(np.rint(covered * steps).astype(np.uint8), np.rint(palette).astype(np.uint8))


def png(indices: Array, palette: Bytes) -> str:
    """A picture of indices ``(rows, columns)`` in an RGBA palette, losslessly."""
    picture = Image.fromarray(np.ascontiguousarray(indices, dtype=np.uint8))
    picture.putpalette(palette[:, :3].tobytes())
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True, transparency=palette[:, 3].tobytes())
    return _uri("png", stream)


def jpeg(picture: Array) -> str:
    """A grey picture ``(rows, columns)``, 0 black to 1 white."""
    stream = io.BytesIO()
    quantised = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(quantised).save(stream, "JPEG", quality=90, optimize=True)
    return _uri("jpeg", stream)


def _uri(kind: str, stream: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
