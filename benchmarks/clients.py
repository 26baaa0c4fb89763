"""How close other software's use of a registration's transforms comes to the exact map, mm, at points of the brain.

    sitreg-lumir register --fixed EXAMPLE-T1 --moving EXAMPLE-T2 --save default,fields -o registration
    python benchmarks/clients.py points registration      # where this package is installed: registration.points.npz
    python benchmarks/clients.py compare registration     # anywhere; uses what is installed of SimpleITK, itk, ants,
                                                          # nitransforms, picsl_greedy

The points lie anywhere in the brain, not at voxel centres. EXAMPLE-T2 is oblique with 2 mm slices.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Points = np.ndarray[Any, Any]
Maps = Iterator[tuple[str, Callable[[Path, Points], Points]]]
LPS = np.array([-1.0, -1.0, 1.0])
NAMES = {"fixed": "from-moving_to-fixed_xfm", "moving": "from-fixed_to-moving_xfm"}


def write_points(folder: Path, count: int = 3000) -> None:
    """Random points of both brains, RAS, mm, and where the exact map brings them."""
    from sitreg_lumir.geometry.transforms import map_points, transform_by
    from sitreg_lumir.io.maps import read_map

    forward = read_map(folder).forward
    random = np.random.default_rng(0)
    values = {}
    for role, exact in (("fixed", forward), ("moving", forward.inverse)):
        voxels = np.argwhere(exact.brain)
        voxels = voxels[random.choice(len(voxels), count, replace=False)] + random.uniform(-0.5, 0.5, (count, 3))
        values[role] = transform_by(np.linalg.inv(exact.to_voxels), voxels.T).T
        values[f"{role}_mapped"] = map_points(exact, values[role])
    np.savez(folder.with_name(folder.name + ".points.npz"), **values)


def compare(folder: Path) -> None:
    """Prints a line for each client, direction and kind of file."""
    points = np.load(folder.with_name(folder.name + ".points.npz"))
    for role, name in NAMES.items():
        for suffix, clients in ((".h5", composites), (".nii.gz", fields)):
            if not (folder / (name + suffix)).is_file():
                continue
            for client, mapped_by in clients():
                try:
                    mapped = mapped_by(folder / (name + suffix), points[role])
                except Exception as error:
                    print(f"{client:<14}{name}{suffix:<8} {type(error).__name__}: {str(error)[:100]}")
                    continue
                off = np.linalg.norm(mapped - points[f"{role}_mapped"], axis=1)
                median, p99, worst = np.median(off), np.percentile(off, 99), off.max()
                print(f"{client:<14}{name}{suffix:<8} median {median:.4f}, p99 {p99:.4f}, largest {worst:.4f} mm")


def composites() -> Maps:
    """Clients that read the composite transform."""
    if sitk := _installed("SimpleITK"):
        yield "SimpleITK", lambda path, points: _point_by_point(sitk.ReadTransform(str(path)).TransformPoint, points)
    if itk := _installed("itk"):
        yield "itk", lambda path, points: _point_by_point(itk.transformread(str(path))[0].TransformPoint, points)
    if ants := _installed("ants"):
        yield "ants", lambda path, points: _by_ants(ants, path, points)
    if _installed("nitransforms"):
        from nitransforms.manip import TransformChain

        yield "nitransforms", lambda path, points: np.asarray(TransformChain.from_filename(path, fmt="itk").map(points))


def fields() -> Maps:
    """Clients that read the dense field."""
    if sitk := _installed("SimpleITK"):

        def by_sitk(path: Path, points: Points) -> Points:
            transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
            return _point_by_point(transform.TransformPoint, points)

        yield "SimpleITK", by_sitk
    if ants := _installed("ants"):
        yield "ants", lambda path, points: _by_ants(ants, path, points)
    if _installed("nitransforms"):
        from nitransforms.nonlinear import DenseFieldTransform

        yield "nitransforms", lambda path, points: DenseFieldTransform.from_filename(path, fmt="itk").map(points)
    if _installed("picsl_greedy"):
        yield "greedy", _by_greedy


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _point_by_point(transform: Callable[[list[float]], Any], points: Points) -> Points:
    return np.array([list(transform(point)) for point in (points * LPS).tolist()]) * LPS


def _by_ants(ants: Any, path: Path, points: Points) -> Points:
    import pandas

    table = pandas.DataFrame(points * LPS, columns=["x", "y", "z"])
    mapped: Points = ants.apply_transforms_to_points(3, table, [str(path)])[["x", "y", "z"]].to_numpy()
    return mapped * LPS


def _by_greedy(path: Path, points: Points) -> Points:
    """Greedy moves images alone: three images whose values are the world's coordinates, sampled on the field's grid.

    So the points are taken to the nearest voxel centres and back by what the map does between: a coarse check.
    """
    import nibabel
    from picsl_greedy import Greedy3D

    field = nibabel.load(path)
    shape, affine = field.shape[:3], field.affine
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = np.stack(np.meshgrid(*(np.arange(-40, size + 40) for size in shape), indexing="ij"))
        wide = affine.copy()
        wide[:3, 3] = affine[:3, :3] @ np.full(3, -40.0) + affine[:3, 3]
        nibabel.Nifti1Image(np.zeros(shape, np.float32), affine).to_filename(folder / "reference.nii.gz")
        moved = []
        for axis in range(3):
            world = np.tensordot(affine[axis, :3], grid, 1) + affine[axis, 3]
            nibabel.Nifti1Image(world.astype(np.float32), wide).to_filename(folder / "world.nii.gz")
            Greedy3D().execute(
                f"-d 3 -rf {folder}/reference.nii.gz -rm {folder}/world.nii.gz {folder}/out.nii.gz -r {path}"
            )
            moved.append(np.asarray(nibabel.load(folder / "out.nii.gz").dataobj))
    where = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    from scipy.ndimage import map_coordinates

    return np.stack([map_coordinates(values, where.T, order=1) for values in moved], axis=1)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("points", "compare"):
        sys.exit(__doc__)
    {"points": write_points, "compare": compare}[sys.argv[1]](Path(sys.argv[2]).absolute())
