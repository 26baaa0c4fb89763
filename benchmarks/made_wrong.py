"""Scans of training subjects made wrong, and good ones made unlike the training data; `verdict.py` registers them.

Each maker takes intensities ``(X, Y, Z)``, their affine and a generator, and gives both as a wrong or another file
would hold them, and the matrix ``(4, 4)`` that takes true world positions to where the header now says that they are;
None where nothing of the brain is left that could be registered.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

Array = NDArray[Any]
Made: TypeAlias = tuple[Array, Array, Array | None]
Maker: TypeAlias = Callable[[Array, Array, np.random.Generator], Made]


def _moved(linear: Callable[[np.random.Generator], Array], farthest: tuple[float, float] = (0, 15)) -> Maker:
    """A header that turns, mirrors or scales the world about the brain's middle, and shifts it by these mm."""

    def make(values: Array, affine: Array, rng: np.random.Generator) -> Made:
        middle = affine[:3, :3] @ ndimage.center_of_mass(values > 0) + affine[:3, 3]
        direction = rng.normal(size=3)
        matrix = np.eye(4)
        matrix[:3, :3] = linear(rng)
        shift = rng.uniform(*farthest) * direction / np.linalg.norm(direction)
        matrix[:3, 3] = middle - matrix[:3, :3] @ middle + shift
        return values, matrix @ affine, matrix

    return make


def _turned(axis: str, degrees: float) -> Maker:
    return _moved(lambda _: Rotation.from_euler(axis, degrees, degrees=True).as_matrix())


def _order(axes: tuple[int, int, int], signs: tuple[int, int, int] = (1, 1, 1)) -> Maker:
    return _moved(lambda _: np.eye(3)[list(axes)] * np.array(signs))


def _any_turn(least: float, most: float) -> Maker:
    def linear(rng: np.random.Generator) -> Array:
        axis = rng.normal(size=3)
        return Rotation.from_rotvec(np.deg2rad(rng.uniform(least, most)) * axis / np.linalg.norm(axis)).as_matrix()

    return _moved(linear)


def _stretched(rng: np.random.Generator) -> Array:
    scales = np.ones(3)
    scales[rng.integers(3)] = rng.choice((0.6, 1.6))
    return np.diag(scales)


HEADERS: dict[str, Maker] = {
    **{f"half turn about {axis}": _turned(axis, 180) for axis in "xyz"},
    **{f"quarter turn about {axis}": _turned(axis, 90) for axis in "xyz"},
    **{f"quarter turn back about {axis}": _turned(axis, -90) for axis in "xyz"},
    "mirrored front to back": _order((0, 1, 2), (1, -1, 1)),
    "mirrored top to bottom": _order((0, 1, 2), (1, 1, -1)),
    "axes x and y exchanged": _order((1, 0, 2)),
    "axes y and z exchanged": _order((0, 2, 1)),
    "axes x and z exchanged": _order((2, 1, 0)),
    "axes in turn": _order((1, 2, 0)),
    "axes in turn, back": _order((2, 0, 1)),
    "shifted by 60 to 90 mm": _moved(lambda _: np.eye(3), (60, 90)),
}
"""Wrong headers that alignment can put right; without alignment nothing can."""

UNALIGNED: dict[str, Maker] = {
    "turned by 30 to 60 degrees": _any_turn(30, 60),
    "shifted by 30 to 50 mm": _moved(lambda _: np.eye(3), (30, 50)),
    "as small as a monkey's": _moved(lambda rng: np.eye(3) * rng.uniform(0.4, 0.65)),
    "voxels twice as large": _moved(lambda rng: np.eye(3) * rng.uniform(1.5, 2.0)),
    "one voxel size wrong": _moved(_stretched),
}

MIRRORED: dict[str, Maker] = {"left and right exchanged": _order((0, 1, 2), (-1, 1, 1))}


def _kept(chosen: Callable[[Array, Array], Array], header: Maker | None = None) -> Maker:
    """Only a part of the brain: ``chosen`` by position within its box (0..1 along each axis) and the box's size, mm."""

    def make(values: Array, affine: Array, rng: np.random.Generator) -> Made:
        where = np.argwhere(values > 0)
        low, size = where.min(axis=0), np.ptp(where, axis=0)
        share = (np.indices(values.shape) - low[:, None, None, None]) / size[:, None, None, None]
        part = np.where(chosen(share, size * np.abs(affine.diagonal()[:3])), values, 0).astype(np.float32)
        return (part, affine, np.eye(4)) if header is None else header(part, affine, rng)

    return make


_PARTS: dict[str, Callable[[Array, Array], Array]] = {
    "left half": lambda share, size: share[0] < 0.5,
    "right half": lambda share, size: share[0] >= 0.5,
    "front half": lambda share, size: share[1] >= 0.5,
    "upper half": lambda share, size: share[2] >= 0.5,
    "lower half": lambda share, size: share[2] < 0.5,
    "slab of 50 mm": lambda share, size: np.abs(share[2] - 0.5) * size[2] < 25,
    "top 30 mm cut off": lambda share, size: (1 - share[2]) * size[2] > 30,
}
PARTS: dict[str, Maker] = {name: _kept(chosen) for name, chosen in _PARTS.items()}
"""Parts of a brain, set to zero elsewhere; the headers are right."""
MOVED_PARTS: dict[str, Maker] = {
    f"{name}, shifted": _kept(chosen, _moved(lambda _: np.eye(3), (30, 60))) for name, chosen in _PARTS.items()
} | {f"{name}, half turn": _kept(_PARTS[name], _turned("x", 180)) for name in ("left half", "upper half")}


def _smooth_noise(shape: tuple[int, ...], rng: np.random.Generator, sigma: float) -> Array:
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return noise / noise.std()


def _inside(mask: Array, values: Array) -> Array:
    return np.where(mask, np.clip(values, 1, 255), 0).astype(np.float32)


def _ellipsoid(shape: tuple[int, ...], affine: Array, rng: np.random.Generator) -> Array:
    """Distance from the middle of an ellipsoid of a brain's size, 1 on its surface."""
    index = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3] - (0, -17, 5)
    return np.sqrt(np.square(index / (np.array([68, 86, 66]) * rng.uniform(0.8, 1.05, 3))).sum(axis=-1))


def _brain_of_noise(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    return _inside(values > 0, 128 + 45 * _smooth_noise(values.shape, rng, rng.uniform(0.7, 4))), affine, None


def _ramp(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    depth = ndimage.distance_transform_edt(values > 0) * abs(affine[0, 0])
    return _inside(values > 0, 40 + rng.uniform(3, 6) * depth + rng.normal(0, 4, values.shape)), affine, None


def _blobs(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    radius = _ellipsoid(values.shape, affine, rng)
    return _inside(radius < 1, 128 + 60 * _smooth_noise(values.shape, rng, rng.uniform(2, 6))), affine, None


def _shells(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    radius = _ellipsoid(values.shape, affine, rng)
    waves = 120 + 100 * np.sin(rng.uniform(4, 16) * radius) + rng.normal(0, 3, radius.shape)
    return _inside(radius < 1, waves), affine, None


def _organs(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    """A body with some bright and dark balls in it."""
    body = _ellipsoid(values.shape, affine, rng) < 1
    content = np.full(values.shape, 90.0)
    middles = np.argwhere(body)
    index = np.moveaxis(np.indices(values.shape), 0, -1)
    for middle in middles[rng.integers(len(middles), size=8)]:
        ball = np.linalg.norm((index - middle) * abs(affine[0, 0]), axis=-1) < rng.uniform(8, 28)
        content[ball] = rng.uniform(20, 250)
    return _inside(body, content + rng.normal(0, 4, values.shape)), affine, None


def _shuffled(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    """The brain's tissue in blocks of 16 mm, exchanged at random within the brain's outline."""
    size = round(16 / abs(affine[0, 0]))
    grid = [count // size for count in values.shape]
    blocks = [tuple(slice(size * at, size * (at + 1)) for at in place) for place in np.ndindex(*grid)]
    blocks = [block for block in blocks if (values[block] > 0).mean() > 0.6]
    out = values.astype(np.float32)
    for to, source in zip(blocks, rng.permutation(len(blocks)), strict=True):
        out[to] = values[blocks[source]]
    filled = np.where((values > 0) & (out == 0), np.median(values[values > 0]), out)
    return _inside(values > 0, filled), affine, None


def _drowned(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    """Noise of several times the tissues' contrast, which hides them."""
    return _inside(values > 0, 128 + 0.02 * values + rng.normal(0, 60, values.shape)), affine, None


NO_BRAINS: dict[str, Maker] = {
    "a brain's outline full of noise": _brain_of_noise,
    "a brain's outline with a ramp": _ramp,
    "ellipsoid with blobs": _blobs,
    "ellipsoid with shells": _shells,
    "body with balls": _organs,
    "tissue in shuffled blocks": _shuffled,
    "tissue drowned in noise": _drowned,
}


def _same(change: Callable[[Array, np.random.Generator], Array]) -> Maker:
    def make(values: Array, affine: Array, rng: np.random.Generator) -> Made:
        return _inside(values > 0, change(values.astype(np.float64), rng)), affine, np.eye(4)

    return make


def _thick(values: Array, affine: Array, rng: np.random.Generator) -> Made:
    """Slices three times as thick along an axis."""
    axis = int(rng.integers(3))
    factor = np.ones(3)
    factor[axis] = 3
    smooth = ndimage.uniform_filter1d(values.astype(np.float32), 3, axis=axis)
    part = tuple(slice(1 if at == axis else 0, None, int(factor[at])) for at in range(3))
    matrix = affine @ np.diag([*factor, 1])
    matrix[:3, 3] = (affine @ np.array([*(np.arange(3) == axis), 1.0]))[:3]
    mask = values[part] > 0
    return _inside(mask, smooth[part]), matrix, np.eye(4)


GOOD: dict[str, Maker] = {
    "as it is": lambda values, affine, rng: (values, affine, np.eye(4)),
    "bias field": _same(lambda values, rng: values * np.exp(0.35 * _smooth_noise(values.shape, rng, 25).clip(-2, 2))),
    "noise": _same(lambda values, rng: values + rng.normal(0, rng.uniform(10, 25), values.shape)),
    "gamma": _same(lambda values, rng: 255 * (values / 255) ** rng.choice((0.5, 0.7, 1.5, 2.0))),
    "dark and bright exchanged": _same(lambda values, rng: 256 - values),
    "thick slices": _thick,
}
"""Good scans, unlike those of the training; the headers are right."""

ALIGNED_GOOD: dict[str, Maker] = {
    "turned by 5 to 20 degrees": _any_turn(5, 20),
    "shifted by 20 to 60 mm": _moved(lambda _: np.eye(3), (20, 60)),
    "a child's size": _moved(lambda rng: np.eye(3) * rng.uniform(0.8, 0.95)),
}
"""Headers off by what scanners leave, for alignment."""
