"""The rounds of a template: all scans registered to the present mean, and averaged again in the mean of their shapes.

Everything happens in the model's world, where each scan lies by its own affine. With ``phi_i`` the map of the present
mean into scan ``i`` and ``m`` the map of mean control points, the next mean shows at ``y`` what scan ``i`` shows at
``phi_i(m^-1(y))``: its shape is the mean of the scans' shapes, whatever shape the present mean has.

Source: Guimond et al., Average brain models: a convergence study, Comput. Vis. Image Underst. 2000; Avants et al., The
optimal template effect in hippocampus studies of diseased populations, NeuroImage 2010.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.average.intensities import MeanImage, mean_image, sharpness
from sitreg_lumir.average.mean_shape import mean_updates
from sitreg_lumir.average.options import TemplateOptions
from sitreg_lumir.average.sampling import Grid, grid_points, region_of, sample_scan
from sitreg_lumir.average.subjects import Subject, Subjects
from sitreg_lumir.average.work import Arrays, WorkFolder, digest_of
from sitreg_lumir.deform.splines import ROLES, SplineUpdates
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import Transform, map_points
from sitreg_lumir.preprocessing.intensity import Mask, inverse, normalise
from sitreg_lumir.registration.model import Model, as_tensor
from sitreg_lumir.registration.pair import ModelPair
from sitreg_lumir.registration.register import optimise_pair

Progress: TypeAlias = Callable[[str, Subject], None]
"""Is told, before each step of a scan, what comes."""

_MOST_POINTS = 50_000  # of a brain, at which displacements are measured


@dataclass(frozen=True, eq=False)
class Reference:
    """What scans are registered to, on the model's grid: ``image`` ``(X, Y, Z)`` float32, 0..255, and its ``brain``."""

    image: NDArray[np.float32]
    brain: Mask


@dataclass(frozen=True, eq=False)
class Registered:
    """All scans registered to one reference; their maps stay on the disk (:meth:`Rounds.map_of`).

    Attributes:
        reference: on the model's grid.
        keys: of each scan, all that its map depends on.
        mean: the map of mean control points, the model's world -> itself.
    """

    reference: Reference
    keys: list[dict[str, Any]]
    mean: SplineMap


class Rounds:
    """Registers and averages the scans of a template.

    Args:
        scans: in an order that their content decides.
        subjects: that read them.
        model: that registers them.
        options: of the template.
        work: where intermediate results are kept.
        progress: is told what comes.
    """

    def __init__(
        self,
        scans: Sequence[Subject],
        subjects: Subjects,
        model: Model,
        options: TemplateOptions,
        work: WorkFolder,
        progress: Progress,
    ) -> None:
        self.scans, self.subjects, self.model = scans, subjects, model
        self.options, self.work, self.progress = options, work, progress
        self.grid = Grid(model.shape, model.affine, np.eye(4))

    def affine_mean(self, grid: Grid) -> MeanImage:
        """The mean of the scans by their affines alone."""
        anywhere = np.zeros(self.model.shape, np.bool_)
        for scan in self.scans:
            anywhere |= self.subjects.image(scan).brain
        region = region_of(anywhere, self.model.affine, grid)
        keys: list[dict[str, Any]] = [{} for _ in self.scans]

        def transforms(number: int) -> list[Transform]:
            return [inverse(self.scans[number].prealign)]

        return self._mean(self._sampled("affine mean", transforms, keys, grid, region), region, grid)

    def register(self, reference: Reference, label: str) -> Registered:
        """Registers all scans to a reference.

        Args:
            reference: on the model's grid.
            label: of the step, for progress.
        """
        digest = digest_of(reference.image, reference.brain)
        keys: list[dict[str, Any]] = []
        for scan in self.scans:
            self.progress(label, scan)
            key = {
                "scan": scan.key,
                "reference": digest,
                "members": [entry["sha256"] for entry in self.model.checksums],
                "precision": self.model.precision,
                "flip": self.model.flip,
                "refine": self.options.refine,
            }
            self._updates(reference, scan, key)
            keys.append(key)
        pairs = zip(self.scans, keys, strict=True)
        mean = mean_updates(self._updates(reference, scan, key) for scan, key in pairs)
        of_mean = SplineMap(np.eye(4), np.eye(4), self.model.affine, mean, reference.brain, reference.brain)
        return Registered(reference, keys, of_mean)

    def map_of(self, registered: Registered, number: int) -> SplineMap:
        """A registered scan's map, the model's world -> the scan's world."""
        scan, reference = self.scans[number], registered.reference
        updates = self._updates(reference, scan, registered.keys[number])
        brain = self.subjects.image(scan).brain
        return SplineMap(np.eye(4), scan.prealign, self.model.affine, updates, reference.brain, brain)

    def average(self, registered: Registered, grid: Grid, label: str) -> tuple[MeanImage, dict[str, Any]]:
        """The mean of registered scans in the mean of their shapes.

        Args:
            registered: to the last mean.
            grid: of the new one.
            label: of the step, for progress.

        Returns:
            the mean; and each scan's correlation with it, its mean displacement, and what is left of the mean
            displacement, mm.
        """
        region = region_of(registered.mean.brain, self.model.affine, grid)
        to_last = registered.mean.inverse

        def transforms(number: int) -> list[Transform]:
            return [to_last, self.map_of(registered, number)]

        mean_digest = digest_of(*(points.numpy() for pair in to_last.updates.updates for points in pair))
        keys = [{"map": key, "mean": mean_digest} for key in registered.keys]
        sampled = self._sampled(label, transforms, keys, grid, region)
        mean = self._mean(sampled, region, grid)
        in_brain = mean.brain[region]
        moved_in_brain = in_brain[:: _stride(len(in_brain))]
        moved = [arrays["moved"][moved_in_brain] for arrays in sampled]
        total = sum((part.astype(np.float64) for part in moved), np.zeros((int(moved_in_brain.sum()), 3)))
        shown = mean.unsharpened[mean.brain]
        return mean, {
            "correlation": [_correlation(arrays["values"][in_brain], shown) for arrays in sampled],
            "displacement_mm": [float(np.linalg.norm(part, axis=1).mean()) for part in moved],
            "left_mm": float(np.linalg.norm(total / len(moved), axis=1).mean()),
        }

    def shift_of(self, registered: Registered) -> dict[str, float]:
        """How far the mean map moves the reference's brain, mm: ``mean``, ``p95`` and ``largest``."""
        points = self._points(registered)
        distance = np.linalg.norm(map_points(registered.mean, points) - points, axis=1)
        return {
            "mean": float(distance.mean()),
            "p95": float(np.percentile(distance, 95)),
            "largest": float(distance.max()),
        }

    def change_of(self, registered: Registered, before: Registered) -> float:
        """How far two rounds' mean maps lie apart, mm, mean over the later reference's brain: 0 if the mean settled."""
        points = self._points(registered)
        moved = [map_points(mean, points) for mean in (registered.mean, before.mean)]
        return float(np.linalg.norm(moved[0] - moved[1], axis=1).mean())

    def _points(self, registered: Registered) -> NDArray[np.float64]:
        """Points of the reference's brain, ``(N, 3)``, RAS, mm, of the model's world."""
        points = grid_points(self.grid, registered.mean.brain)
        return points[:: _stride(len(points))]

    def _updates(self, reference: Reference, scan: Subject, key: dict[str, Any]) -> SplineUpdates:
        """A scan's control points, from the disk if it was registered before."""
        arrays = self.work.kept("map", key, lambda: self._register(reference, scan))
        integers = {name: torch.from_numpy(values) for name, values in arrays.items()}
        return SplineUpdates.of_integers(integers, len(integers) // len(ROLES), self.model.shape)

    def _register(self, reference: Reference, scan: Subject) -> Arrays:
        """Control points of one scan, rounded as files keep them."""
        placed = self.subjects.image(scan)
        images = as_tensor(normalise(reference.image, reference.brain)), as_tensor(placed.image)
        brains = (torch.from_numpy(brain)[None, None] for brain in (reference.brain, placed.brain))
        pair = ModelPair(images[0], next(brains), images[1], next(brains))
        updates = self.model.control_points(fixed=pair.fixed, moving=pair.moving)
        if self.options.refine:
            updates = list(optimise_pair(self.model, pair, updates, self.options.refine, "lncc").control_points)
        rounded = SplineUpdates.rounded(updates, self.model.shape)
        return {name: integers.numpy() for name, integers in rounded.integers().items()}

    def _sampled(
        self,
        label: str,
        transforms: Callable[[int], list[Transform]],
        keys: Sequence[dict[str, Any]],
        grid: Grid,
        region: Mask,
    ) -> list[Arrays]:
        """Each scan's ``values`` in a region of a grid, and how far some of the region's points are ``moved``, mm."""
        points = grid_points(grid, region)
        where = {"shape": list(grid.shape), "affine": grid.affine.tolist(), "to_model": grid.to_model.tolist()}
        where["region"] = digest_of(region)
        results = []
        for number, (scan, key) in enumerate(zip(self.scans, keys, strict=True)):
            self.progress(label, scan)

            def make(scan: Subject = scan, number: int = number) -> Arrays:
                original, brain = self.subjects.original(scan)
                values, places = sample_scan(original, brain, scan.prealign, transforms(number), grid, points)
                stride = _stride(len(points))
                return {"values": values, "moved": (places - points)[::stride].astype(np.float32)}

            results.append(self.work.kept("sample", {"scan": scan.key, **key, "grid": where}, make))
        return results

    def _mean(self, sampled: Sequence[Arrays], region: Mask, grid: Grid) -> MeanImage:
        values = [arrays["values"] for arrays in sampled]
        return mean_image(values, region, self.options.average, self.options.sharpen, grid.spacing)


def measures(mean: MeanImage, grid: Grid) -> dict[str, Any]:
    """How sharp a mean is, before and after sharpening."""
    return {
        "averaged": sharpness(mean.unsharpened, mean.deviation, mean.brain, grid.spacing),
        "sharpened": sharpness(mean.image, mean.deviation, mean.brain, grid.spacing),
    }


def _stride(count: int) -> int:
    return max(1, count // _MOST_POINTS)


def _correlation(values: NDArray[np.float32], mean: NDArray[np.float32]) -> float:
    known = ~np.isnan(values)
    return float(np.corrcoef(values[known].astype(np.float64), mean[known].astype(np.float64))[0, 1])
