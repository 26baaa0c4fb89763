"""Affines of FreeSurfer and FLIRT lead where nitransforms leads, or are refused by name."""

import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.foreign_affines import Grid
from sitreg_lumir.io.itk import load_affine, save_affine_tfm

FIXED_SHAPE, MOVING_SHAPE = (20, 24, 18), (16, 15, 22)


def placed(angles: tuple[float, float, float], spacing: tuple[float, ...], origin: tuple[float, ...]) -> NDArray[Any]:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    matrix[:3, 3] = origin
    return matrix


FIXED = placed((10, 5, -20), (1.1, 0.9, 1.3), (-10, 5, 3))
MOVING = placed((-5, 8, 12), (-1.4, 1.2, 1.0), (9, -6, 2))  # from left to right, so FSL turns only the other
TO_MOVING = placed((6, -4, 3), (1.05, 0.97, 1.0), (3, -2, 4))  # fixed world -> moving world
GRIDS: tuple[Grid, Grid] = ((FIXED_SHAPE, FIXED), (MOVING_SHAPE, MOVING))


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Fixed and moving image, the fixed one what the map makes of the moving one's."""
    rng = np.random.default_rng(0)
    for name, shape, affine in (("fixed", FIXED_SHAPE, FIXED), ("moving", MOVING_SHAPE, MOVING)):
        nibabel.Nifti1Image(rng.integers(1, 200, shape).astype(np.uint8), affine).to_filename(
            tmp_path / f"{name}.nii.gz"
        )
    return tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"


def write(path: Path, kind: str, images: tuple[Path, Path]) -> Path:
    """By nitransforms, which knows both formats."""
    linear = pytest.importorskip("nitransforms.linear")
    fixed, moving = map(nibabel.load, images)  # type: ignore[attr-defined]
    transform = linear.Affine(TO_MOVING, reference=fixed)
    transform.to_filename(path, fmt=kind, moving=moving)
    return path


def test_flirt_leads_where_nitransforms_leads(tmp_path: Path, images: tuple[Path, Path]) -> None:
    path = write(tmp_path / "flirt.mat", "fsl", images)
    np.testing.assert_allclose(load_affine(path, GRIDS), TO_MOVING, atol=1e-4)
    with pytest.raises(InputError, match=r"flirt\.mat: a FLIRT matrix .*--initial-transform.*c3d_affine_tool"):
        load_affine(path)


@pytest.mark.parametrize("kind", ["world", "voxels"])
def test_lta_leads_from_the_destination_to_the_source(kind: str, tmp_path: Path) -> None:
    world = np.linalg.inv(TO_MOVING)  # as mri_coreg stores it: from the moving volume's points to the fixed one's
    matrix = world if kind == "world" else np.linalg.inv(FIXED) @ world @ MOVING
    lines = [
        f"type      = {int(kind == 'world')} # of transform",
        "nxforms   = 1",
        "mean      = 0 0 0",
        "sigma     = 1.0",
    ]
    lines += ["1 4 4", *(" ".join(f"{value:.15e}" for value in row) for row in matrix)]
    for name, shape, affine in (("src", MOVING_SHAPE, MOVING), ("dst", FIXED_SHAPE, FIXED)):
        size = np.linalg.norm(affine[:3, :3], axis=0)
        centre = affine @ (*(np.array(shape) / 2), 1)
        lines += [f"{name} volume info", "valid = 1  # volume info valid", f"filename = {name}.mgz"]
        axes = zip(("xras", "yras", "zras"), (affine[:3, :3] / size).T, strict=True)
        fields = [("volume", shape), ("voxelsize", size), *axes, ("cras", centre[:3])]
        lines += [f"{key} = {' '.join(f'{value:.15e}' for value in values)}" for key, values in fields]
    path = tmp_path / "a.lta"
    path.write_text("\n".join([*lines, "subject x", "fscale 0.15"]) + "\n")
    np.testing.assert_allclose(load_affine(path), TO_MOVING, atol=1e-9)
    nitransforms = pytest.importorskip("nitransforms.io.lta")
    theirs = nitransforms.FSLinearTransform.from_string(path.read_text()).to_ras()
    np.testing.assert_allclose(load_affine(path), theirs, atol=1e-4)
    for wrong, line in (("type      = 14 #", "another kind"), ("valid = 0", "does not say the grid of its src")):
        changed = path.read_text().replace("valid = 1", wrong) if "valid" in wrong else wrong + path.read_text()[13:]
        (tmp_path / "b.lta").write_text(changed)
        if kind == "voxels" or "type" in wrong:
            with pytest.raises(InputError, match=f"b.lta: .*{line}"):
                load_affine(tmp_path / "b.lta")


def test_apply_takes_flirt_with_its_two_images(
    tmp_path: Path, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fixed, moving = images
    flirt = write(tmp_path / "flirt.mat", "fsl", images)
    save_affine_tfm(tmp_path / "itk.tfm", TO_MOVING)
    for image, reference, form in ((moving, fixed, "{}"), (fixed, moving, "[{},1]")):
        for transform in (flirt, tmp_path / "itk.tfm"):
            out = transform.with_name(f"{transform.stem}.nii.gz")
            files = ["--image", str(image), "--reference", str(reference), "-o", str(out)]
            assert main(["apply", "-t", form.format(transform), *files]) == 0
        first, second = (np.asarray(nibabel.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("flirt", "itk"))  # type: ignore[attr-defined]
        assert first.any() and np.abs(first.astype(int) - second).max() <= 1
    points = tmp_path / "points.csv"
    points.write_text("x,y,z\n1,2,3\n")
    assert main(["apply", "-t", str(flirt), "--points", str(points), "-o", str(tmp_path / "out.csv")]) == 2
    assert "flirt.mat: a FLIRT matrix" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [0, 1])
def test_a_projective_matrix_is_no_affine(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "affine.lta"
    path.write_text(f"type = {kind}\nsrc volume info\n1 4 4\n1 0 0 0\n0 1 0 0\n0 0 1 0\n-1 0 0 1\n")
    with pytest.raises(InputError, match=r"the last row of its matrix is not 0 0 0 1"):
        load_affine(path)


@pytest.mark.parametrize(
    "content",
    [
        b"type = 0\nsrc volume info\n1 4 4" + b"\n" * 1_000_000,
        b"type = 0\nsrc volume info\n1 4 4\n" + b"1 0 0 0\n\n" * 100_000,
        b"1 0 0 0\n0 1 0 0\n0 0 1 " + b"1" * 1_000_000 + b"x\n0 0 0 1\n",
        b"1" * 1_000_000,
    ],
)
def test_what_takes_a_pattern_hours_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "affine.lta"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(InputError, match=r"affine\.lta: "):
        load_affine(path, GRIDS)
    assert time.process_time() - start < 5
