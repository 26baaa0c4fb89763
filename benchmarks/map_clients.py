"""How near other software, reading the fields of a registration, comes to its exact map: at and between samples.

    sitreg-lumir register --fixed EXAMPLE-T1 --moving EXAMPLE-T2 -o registration
    python benchmarks/map_clients.py registration

Fields are written as `register` writes them, of a box in the middle of either brain, on grids of several spacings and
directions, and read by SimpleITK, nitransforms and, where it is installed (`pip install antspyx`), ANTs, beside `apply`
of this package. *At samples*: the largest distance of a client's points from the map's, mm, of voxel centres.
*Between*: median, 99th percentile and largest of random points of the box.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK
from nitransforms.nonlinear import DenseFieldTransform
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import Matrix, composite_field, map_points, transform_by
from sitreg_lumir.io.itk import load_itk_field, save_itk_field
from sitreg_lumir.io.maps import load_map

Points = NDArray[np.float64]
Client = Callable[[Path, Points], Points]
LPS = np.array([-1.0, -1.0, 1.0])  # signs, RAS <-> LPS
BOX = 60.0  # mm
COUNT = 5000
GRIDS = {  # spacing along the axes, mm; degrees of a turn; axes that point the other way
    "1 mm": ((1.0, 1.0, 1.0), (0, 0, 0), (1, 1, 1)),
    "1 mm, oblique": ((1.0, 1.0, 1.0), (15, -8, 20), (-1, 1, 1)),
    "0.7 x 1 x 1.2 mm, oblique": ((0.7, 1.0, 1.2), (-5, 12, 3), (1, -1, 1)),
    "0.5 mm": ((0.5, 0.5, 0.5), (0, 0, 0), (1, 1, 1)),
    "2 mm": ((2.0, 2.0, 2.0), (0, 0, 0), (1, 1, 1)),
}


def main() -> None:
    """Measures all grids, clients and directions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registration", type=Path, help="folder of a registration, or a map_<pair>.safetensors")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "map_clients.json")
    options = parser.parse_args()
    forward = load_map(options.registration)
    rows = []
    print(f"{'grid':28}{'direction':10}{'client':14}{'at samples':>11}   between: median, p99, largest")
    for name, (spacing, degrees, signs) in GRIDS.items():
        for direction, exact in (("forward", forward), ("backward", forward.inverse)):
            shape, affine = box(exact, spacing, degrees, signs)
            for client, (at_samples, between) in measure(exact, shape, affine).items():
                rows.append(
                    {"grid": name, "direction": direction, "client": client, "at": at_samples, "between": between}
                )
                print(
                    f"{name:28}{direction:10}{client:14}{at_samples:11.1e}   {', '.join(f'{x:.1e}' for x in between)}"
                )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1))


def box(
    exact: SplineMap, spacing: tuple[float, ...], degrees: tuple[int, ...], signs: tuple[int, ...]
) -> tuple[tuple[int, int, int], Matrix]:
    """``(X, Y, Z)`` and the voxel-to-world matrix of a grid around the middle of the brain, RAS, mm."""
    middle = np.linalg.inv(exact.to_voxels) @ np.append(np.argwhere(exact.brain).mean(axis=0), 1)
    x, y, z = (int(BOX / step) for step in spacing)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * (np.array(signs) * spacing)
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((np.array([x, y, z]) - 1) / 2)
    return (x, y, z), affine


def measure(
    exact: SplineMap, shape: tuple[int, int, int], affine: Matrix
) -> dict[str, tuple[float, tuple[float, float, float]]]:
    """Of each client the largest distance from the map at samples, and median, p99 and largest between them, mm."""
    random = np.random.default_rng(0)
    voxels = random.integers(1, np.array(shape) - 1, (COUNT, 3)).astype(np.float64)
    samples = transform_by(affine, voxels.T).T
    between = transform_by(affine, random.uniform(1, np.array(shape) - 2, (COUNT, 3)).T).T
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "xfm.nii.gz"
        save_itk_field(file, composite_field(exact.on_grids, shape, affine), affine)
        for name, client in clients().items():
            apart = [
                np.linalg.norm(client(file, points) - map_points(exact, points), axis=1)
                for points in (samples, between)
            ]
            quantiles = tuple(float(value) for value in np.quantile(apart[1], (0.5, 0.99, 1)))
            results[name] = float(apart[0].max()), (quantiles[0], quantiles[1], quantiles[2])
    return results


def clients() -> dict[str, Client]:
    """What maps points ``(N, 3)``, RAS, mm, by a field's file."""
    listed: dict[str, Client] = {
        "this package": lambda file, points: map_points(load_itk_field(file), points),
        "SimpleITK": by_simpleitk,
        "nitransforms": lambda file, points: DenseFieldTransform.from_filename(file, fmt="itk").map(points),
    }
    try:
        import ants  # noqa: F401 (only whether it is there)
    except ImportError:
        return listed
    return {**listed, "ANTs": by_ants}


def by_simpleitk(file: Path, points: Points) -> Points:
    """ITK's interpolation of the field."""
    field = SimpleITK.ReadImage(str(file), SimpleITK.sitkVectorFloat64)
    transform = SimpleITK.DisplacementFieldTransform(field)
    return np.array([transform.TransformPoint(point) for point in (points * LPS).tolist()]) * LPS


def by_ants(file: Path, points: Points) -> Points:
    """``antsApplyTransformsToPoints``, as ANTsPy calls it."""
    import ants
    import pandas

    table = pandas.DataFrame(points * LPS, columns=["x", "y", "z"])
    moved = ants.apply_transforms_to_points(3, table, [str(file)])
    return moved[["x", "y", "z"]].to_numpy() * LPS


if __name__ == "__main__":
    main()
