"""The demo's brains: the MNI152 template as tissues and structures, random smooth maps, rendered images."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Array = NDArray[np.float32]
Labels = NDArray[np.uint8]
Affine = NDArray[np.float64]  # (4, 4)
Points = NDArray[np.float64]  # (L, 3)

# Mean intensity of CSF, grey and white matter (0..255) by modality; standard deviation between images.
CONTRAST = {"0000": (55.0, 135.0, 205.0), "0001": (225.0, 140.0, 85.0)}
CONTRAST_JITTER = 8.0

_SIDED = (
    "frontal grey matter",
    "posterior grey matter",
    "inferior grey matter",
    "anterior white matter",
    "posterior white matter",
    "cerebellum",
    "lateral ventricle",
    "thalamus",
    "striatum",
)
STRUCTURES = {
    **{key: f"left {name}" for key, name in enumerate(_SIDED, start=1)},
    10: "brainstem",
    **{key: f"right {name}" for key, name in enumerate(_SIDED, start=21)},
}
"""Label ids and names; the right structure has the left one's id plus 20."""


@dataclass(frozen=True)
class TissueTemplate:
    """The MNI152 template as tissue fractions and structures.

    Attributes:
        tissues: ``(3, X, Y, Z)``, fractions of CSF, grey and white matter; 0 outside the brain.
        labels: ``(X, Y, Z)``, ids of ``STRUCTURES``, 0 elsewhere.
        landmarks: ``(L, 3)``, MNI mm, RAS.
        affine: ``(4, 4)``, voxel to MNI mm, RAS.
    """

    tissues: Array
    labels: Labels
    landmarks: Points
    affine: Affine


def load_tissue_template(voxel_size: float) -> TissueTemplate:
    """The MNI152 tissue maps that nilearn bundles, smoothed for sampling at ``voxel_size`` mm."""
    from nilearn import datasets  # slow to import, and only the demo needs it

    mask_image = datasets.load_mni152_brain_mask(resolution=1)
    brain = np.asarray(mask_image.dataobj, np.float32)
    grey = np.asarray(datasets.load_mni152_gm_template(resolution=1).dataobj, np.float32) * brain
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, np.float32) * brain
    total = np.maximum(grey + white, 1)  # the two maps overlap a little
    grey, white = grey / total, white / total
    tissues = np.stack([brain - grey - white, grey, white])
    affine = np.asarray(mask_image.affine, np.float64)
    labels = _structures(tissues, affine)
    ids = [key for key in STRUCTURES if key % 20 > 3]  # the cortex's centroids mark no landmark
    centroids = np.array(ndimage.center_of_mass(labels > 0, labels, ids))
    landmarks = centroids @ affine[:3, :3].T + affine[:3, 3]
    # half a voxel's width: a coarse voxel shows about the mean over its volume
    sigma = 0.4 * voxel_size / affine[0, 0]
    smooth = np.stack([ndimage.gaussian_filter(tissue, sigma) for tissue in tissues])
    return TissueTemplate(smooth, labels, landmarks, affine)


def _structures(tissues: Array, affine: Affine) -> Labels:
    """Cuts the tissue classes into structures by MNI coordinates (mm): coarse, yet at real tissue borders."""
    x, y, z = (
        step * np.arange(size) + start
        for step, size, start in zip(affine.diagonal(), tissues.shape[1:], affine[:3, 3], strict=False)
    )
    x, y = x[:, None, None], y[:, None]
    brain = tissues.sum(0) > 0.5
    largest = np.where(brain, tissues.argmax(0), -1)
    csf, grey, white = (largest == k for k in range(3))
    stem = (abs(x) < 17) & (y > -46) & (y < -12) & (z < -8) & ~((z > -16) & (y > -16))
    cerebellum = (y < -34) & (z < -12 + 0.35 * (-34 - y).clip(0, 40)) & ~stem
    thalamus = (grey | white & (abs(x) < 12)) & (abs(x) < 22) & (y > -32) & (y < -4) & (z > -2) & (z < 16)
    deep = (z > -6) & (z < 20) & (abs(x) < 34)
    inner = ndimage.binary_erosion(ndimage.binary_fill_holes(brain), iterations=22)
    labels = np.zeros(brain.shape, np.uint8)
    for key, region in (
        (1, grey & (y > -10) & (z > -4)),
        (2, grey & (y <= -10) & (z > -4)),
        (3, grey & (z <= -4)),
        (4, white & (y > -18)),
        (5, white & (y <= -18)),
        (6, (grey | white) & cerebellum),
        (7, csf & inner & (z > -2) & (y > -50) & (abs(x) < 40)),
        (8, thalamus),
        (9, grey & deep & (abs(x) > 4) & (y > -12) & (y < 26)),
    ):
        labels[region & (x < 0)] = key
        labels[region & (x >= 0)] = key + 20
    labels[(grey | white) & stem] = 10
    return labels


def _generator(seed: int, subject: str, purpose: str) -> np.random.Generator:
    """The random numbers of one purpose for one subject or image; other draws do not change them."""
    words = (seed, zlib.crc32(subject.encode()), zlib.crc32(purpose.encode()))
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    """White noise blurred by a periodic Gaussian of ``sigma`` voxels, scaled to a standard deviation of 1."""
    spectrum = fft.rfftn(rng.standard_normal(shape, np.float32))
    noise = fft.irfftn(ndimage.fourier_gaussian(spectrum, sigma, n=shape[-1]), s=shape)
    return np.asarray(noise / noise.std(), np.float32)


def velocity(shape: tuple[int, ...], voxel_size: float, seed: int, subject: str) -> Array:
    """A random smooth velocity, ``(3, X, Y, Z)``, voxels per unit time; 8 to 10 mm at its peak."""
    rng = _generator(seed, subject, "field")
    wide, narrow = (np.stack([_smooth_noise(rng, shape, sigma / voxel_size) for _ in range(3)]) for sigma in (26, 12))
    flow = wide + np.float32(0.6) * narrow
    for axis, size in enumerate(shape, start=1):  # to 0 at the border, so that the grid maps onto itself
        inside = np.minimum(np.arange(size), np.arange(size)[::-1]) * voxel_size / 20
        ramp = np.sin(np.pi / 2 * inside.clip(0, 1)).astype(np.float32)
        flow *= ramp.reshape([-1 if axis == k else 1 for k in range(4)])
    peak = rng.uniform(8, 10) / voxel_size
    return flow * np.float32(peak / np.sqrt((flow**2).sum(0)).max())


def exponential(velocity: Array, steps: int = 5) -> Array:
    """Flow along a stationary velocity for unit time, by scaling and squaring.

    Source: Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006.
    """
    disp = velocity / np.float32(2**steps)
    for _ in range(steps):
        disp = disp + sample_field(disp, disp)
    return disp


def sample_field(field: Array, disp: Array) -> Array:
    """``field(x + disp(x))``, linearly; both ``(3, X, Y, Z)``, voxels; beyond the grid: its border."""
    points = np.indices(disp.shape[1:], np.float32) + disp
    return np.stack([ndimage.map_coordinates(part, points, order=1, mode="nearest") for part in field])


def sample(volume: Array | Labels, disp: Array, affine: Affine, volume_affine: Affine, *, order: int) -> Any:
    """``volume`` on the grid of ``affine`` displaced by ``disp`` (voxels of that grid); 0 outside."""
    to_volume = np.linalg.inv(volume_affine) @ affine
    points = np.indices(disp.shape[1:], np.float32) + disp
    points = np.tensordot(to_volume[:3, :3], points, 1) + to_volume[:3, 3].reshape(3, 1, 1, 1)
    return ndimage.map_coordinates(volume, points, order=order)


def render(tissues: Array, contrast: tuple[float, ...], voxel_size: float, seed: int, image: str) -> Labels:
    """One image, uint8, of tissue fractions ``(3, X, Y, Z)``: background exactly 0, brain 1..255."""
    rng = _generator(seed, image, "render")
    shape = tissues.shape[1:]
    means = np.array(contrast) + rng.normal(0, CONTRAST_JITTER, 3)
    amount = tissues.sum(0)
    value = np.zeros(shape)
    for mean, tissue in zip(means, tissues, strict=True):
        texture = 1 + 0.03 * _smooth_noise(rng, shape, 5 / voxel_size)
        value += mean * tissue * texture
    value /= np.maximum(amount, 1e-3)
    value *= np.exp(0.07 * _smooth_noise(rng, shape, 45 / voxel_size))  # bias field
    noise = rng.normal(0, 4, (2, *shape))
    value = np.hypot(value + noise[0], noise[1])  # Rician
    brain = amount > 0.5
    value *= 255 / np.percentile(value[brain], 99.8)
    return np.where(brain, value.round().clip(1, 255), 0).astype(np.uint8)


def landmark_balls(points: Points, disp_inv: Array, affine: Affine, voxel_size: float) -> Labels:
    """Balls with ids 1.. around the template's points (MNI mm), moved to the subject by the true field."""
    voxels = (points - affine[:3, 3]) / voxel_size
    voxels += np.stack([ndimage.map_coordinates(part, voxels.T, order=1) for part in disp_inv], axis=-1)
    radius = max(3.2 / voxel_size, 1.6)  # voxels; 3.2 mm as in miniLUMIR, but never lost in nearest warping
    grid = np.moveaxis(np.indices(disp_inv.shape[1:], np.float32), 0, -1)
    distance = np.stack([np.linalg.norm(grid - voxel, axis=-1) for voxel in voxels])
    return np.where(distance.min(0) <= radius, distance.argmin(0) + 1, 0).astype(np.uint8)
