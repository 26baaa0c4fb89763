"""`apply` moves images, labels and points as SimpleITK does, each kind its way, or says in one line why not."""

import csv
import re
import resource
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from transform_samples import Array, bumps, by_sitk, case, distance, grid_points, matrix, sitk_field

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import composite_field, map_points
from sitreg_lumir.io.itk import save_affine_tfm, save_itk_field
from sitreg_lumir.io.write import save_disp, save_volume
from sitreg_lumir.registration import apply as apply_module
from sitreg_lumir.registration.apply import apply
from sitreg_lumir.registration.outputs import IMAGES_TO

FIXED, MOVING = (14, 12, 10), (13, 15, 11)
FIXED_AFFINE = matrix("RAS", (1, 1.2, 1.1), (5, -8, 10), FIXED, (1, -17, 19))
MOVING_AFFINE = matrix("LPI", (1.1, 0.9, 1.3), (0, 7, -6), MOVING, (6, -19, 16))
FIXED_TO_MOVING = matrix(degrees=(8, -5, 12), centre=(5, -2, -3))  # about the world's origin
FIXED_TO_MOVING[:3, 3] += (6, -19, 16) - (FIXED_TO_MOVING @ (1, -17, 19, 1))[:3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registration's folder: rigid, so that each field is the other's inverse wherever both are."""
    path = tmp_path / "registration"
    for name, transform, grid in (
        (IMAGES_TO["fixed"], FIXED_TO_MOVING, (FIXED, FIXED_AFFINE)),
        (IMAGES_TO["moving"], np.linalg.inv(FIXED_TO_MOVING), (MOVING, MOVING_AFFINE)),
    ):
        save_itk_field(path / name, composite_field(transform, *grid), grid[1])
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A field on the fixed grid and an affine that comes after it; together they lead into the moving image."""
    field, affine = tmp_path / "1Warp.nii.gz", tmp_path / "0GenericAffine.tfm"
    save_itk_field(field, bumps(FIXED, 2, 2, 7), FIXED_AFFINE)
    save_affine_tfm(affine, FIXED_TO_MOVING)
    return field, affine


def save(path: Path, values: Array, affine: Array, intent: int = 0) -> Path:
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_intent(intent)
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)
    return path


def load(path: Path) -> tuple[Array, Any]:
    image = nibabel.load(path)  # type: ignore[attr-defined]
    return np.asarray(image.dataobj), image.header


def texture(shape: tuple[int, ...] = MOVING, affine: Array = MOVING_AFFINE) -> Array:
    world = grid_points(shape, affine).reshape(*shape, 3)
    return 100 + (20 * np.sin(world / 3)).sum(axis=-1).astype(np.float32)


def regions() -> Array:
    """Compact labels 0, 3, 17 and 2035."""
    noise = bumps(MOVING, 2, 1, 5)
    return np.array([3, 17, 2035, 0], np.int16)[np.argmax([*noise, np.full(MOVING, 0.1)], axis=0)]


def by_itk(image: Path, reference: Path, transforms: list[Path], kind: int, outside: float = 0.0) -> Array:
    """The image as SimpleITK resamples it, ``transforms`` in the order of antsApplyTransforms."""
    together = sitk.CompositeTransform(3)
    for path in reversed(transforms):  # what is added last is applied first
        together.AddTransform(sitk_field(path) if path.name.endswith(".nii.gz") else sitk.ReadTransform(str(path)))
    moving = sitk.ReadImage(str(image), sitk.sitkFloat32)
    moved = sitk.Resample(moving, sitk.ReadImage(str(reference)), together, kind, outside)
    return np.asarray(sitk.GetArrayFromImage(moved).T)


def write_points(path: Path, points: Array) -> Path:
    path.write_text("x,y,z\n" + "".join(",".join(map(repr, point)) + "\n" for point in points.tolist()))
    return path


def read_xyz(path: Path) -> Array:
    with path.open(newline="") as stream:
        return np.array([[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(stream)])


def run(*arguments: Any) -> int:
    return main(["apply", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], arguments: list[Any], *words: str) -> None:
    """The command ends with 2 and one line that has these words."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("sitreg-lumir: error:"), error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
def test_images_move_as_in_itk_and_keep_integers(tmp_path: Path, files: tuple[Path, Path], dtype: Any) -> None:
    image = save(tmp_path / "moving.nii.gz", texture().astype(dtype), MOVING_AFFINE)
    shape, affine = (17, 9, 13), matrix("PIR", (0.7, 1.3, 0.8), (12, -20, 35), (17, 9, 13), (0, -17, 19))
    grid = save(tmp_path / "grid.nii.gz", np.zeros(shape, np.uint8), affine)
    out = tmp_path / "new" / "moved.nii.gz"
    assert run("-t", files[0], "-t", files[1], "--image", image, "--reference", grid, "-o", out, "--outside", 7) == 0
    moved, header = load(out)
    assert moved.dtype == dtype and moved.shape == shape and int(header["intent_code"]) == 0
    np.testing.assert_allclose(header.get_best_affine(), affine, atol=1e-6)
    theirs = by_itk(image, grid, list(files), sitk.sitkLinear, 7)
    both = (moved != 7) & (theirs != 7)
    assert both.mean() > 0.3 and ((moved == 7) == (theirs == 7)).mean() > 0.99
    assert np.abs(moved - theirs.astype(float))[both].max() < (0.01 if dtype == np.float32 else 0.501)


def test_the_order_is_that_of_ants(tmp_path: Path, files: tuple[Path, Path]) -> None:
    field, affine = files
    image = save(tmp_path / "moving.nii.gz", texture(), MOVING_AFFINE)
    near = tmp_path / "near.tfm"
    save_affine_tfm(near, np.linalg.inv(FIXED_TO_MOVING))  # from the moving to the fixed world, where the field is
    for order, grid_affine in (([field, affine], FIXED_AFFINE), ([near, field, affine], MOVING_AFFINE)):
        grid = save(tmp_path / "grid.nii.gz", np.zeros(FIXED, np.uint8), grid_affine)
        apply(order, tmp_path / "out.nii.gz", image=image, reference=grid)
        moved, theirs = load(tmp_path / "out.nii.gz")[0], by_itk(image, grid, order, sitk.sitkLinear)
        both = (moved > 0) & (theirs > 0)
        assert both.mean() > 0.3 and np.abs(moved - theirs)[both].max() < 0.01
    inverse = [field, f"[{near},1]"]
    apply(inverse, tmp_path / "again.nii.gz", image=image)
    apply([field, affine], tmp_path / "out.nii.gz", image=image)
    np.testing.assert_allclose(load(tmp_path / "again.nii.gz")[0], load(tmp_path / "out.nii.gz")[0], atol=1e-3)


@pytest.mark.parametrize("said", ["--labels", "LABEL"])
def test_labels_take_the_nearest_voxel_as_in_itk(tmp_path: Path, files: tuple[Path, Path], said: str) -> None:
    path = save(tmp_path / "labels.nii.gz", regions(), MOVING_AFFINE, 1002 if said == "LABEL" else 0)
    grid = save(tmp_path / "grid.nii.gz", np.zeros(FIXED, np.uint8), FIXED_AFFINE)
    kind = "--labels" if said == "--labels" else "--image"
    assert run("-t", files[0], "-t", files[1], kind, path, "--outside", -1, "-o", tmp_path / "out.nii.gz") == 0
    moved, header = load(tmp_path / "out.nii.gz")
    assert moved.dtype == np.int16 and int(header["intent_code"]) == 1002
    assert set(np.unique(moved)) == {-1, 0, 3, 17, 2035}
    theirs = by_itk(path, grid, list(files), sitk.sitkNearestNeighbor, -1)
    assert (moved == theirs).mean() > 0.99  # where two voxels are equally near, either


def test_linear_labels_are_the_largest_of_itk_s_interpolated_maps(tmp_path: Path, files: tuple[Path, Path]) -> None:
    labels = regions()
    path = save(tmp_path / "labels.nii.gz", labels, MOVING_AFFINE)
    grid = save(tmp_path / "grid.nii.gz", np.zeros(FIXED, np.uint8), FIXED_AFFINE)
    assert run("-t", files[0], "-t", files[1], "--labels", path, "--linear-labels", "-o", tmp_path / "out.nii") == 0
    moved, header = load(tmp_path / "out.nii")
    values, shares = np.unique(labels), []
    for value in values:
        indicator = save(tmp_path / "one.nii.gz", (labels == value).astype(np.float32), MOVING_AFFINE)
        shares.append(by_itk(indicator, grid, list(files), sitk.sitkLinear))
    ordered = np.sort(shares, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-3
    assert clear.mean() > 0.3 and moved.dtype == np.int16 and int(header["intent_code"]) == 1002
    np.testing.assert_array_equal(moved[clear], values[np.argmax(shares, axis=0)][clear])
    apply(files, tmp_path / "nearest.nii", labels=path)
    assert (load(tmp_path / "nearest.nii")[0] != moved).any()


@pytest.mark.parametrize("options", [["--image"], ["--labels"], ["--linear-labels", "--labels"]])
def test_every_frame_moves_alike_and_slabs_do_not_show(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    frames = np.stack([regions(), texture().astype(np.int16), regions()[::-1]], axis=-1)
    series = nibabel.Nifti1Image(frames, MOVING_AFFINE)
    series.header.set_xyzt_units("mm", "msec")
    series.header.set_zooms((1.1, 0.9, 1.3, 720.0))
    series.to_filename(tmp_path / "series.nii.gz")
    arguments = ["-t", files[0], "-t", files[1], *options]
    monkeypatch.setattr(apply_module, "_VALUES_AT_ONCE", FIXED[0] * FIXED[1] * 3 * 4)  # slabs of 4, 4 and 2 planes
    assert run(*arguments, tmp_path / "series.nii.gz", "-o", tmp_path / "moved.nii.gz") == 0
    monkeypatch.undo()
    moved, header = load(tmp_path / "moved.nii.gz")
    assert moved.shape == (*FIXED, 3) and moved.dtype == np.int16
    assert header.get_zooms()[3] == 720 and header.get_xyzt_units() == ("mm", "msec")
    for index in range(3):
        frame = save(tmp_path / "one.nii.gz", frames[..., index], MOVING_AFFINE)
        assert run(*arguments, frame, "-o", tmp_path / "alone.nii.gz") == 0
        np.testing.assert_array_equal(moved[..., index], load(tmp_path / "alone.nii.gz")[0])


def test_the_default_grid_is_the_field_s_and_a_larger_one_is_reported(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image = save(tmp_path / "moving.nii.gz", texture(), MOVING_AFFINE)
    assert run("-t", files[0], "-t", files[1], "--image", image, "-o", tmp_path / "own.nii.gz") == 0
    assert "note" not in capsys.readouterr().out
    own, header = load(tmp_path / "own.nii.gz")
    np.testing.assert_allclose(header.get_best_affine(), FIXED_AFFINE, atol=1e-6)
    fixed = save(tmp_path / "fixed.nii.gz", np.zeros(FIXED, np.uint8), FIXED_AFFINE)
    apply(files, tmp_path / "same.nii.gz", image=image, reference=fixed)
    np.testing.assert_allclose(load(tmp_path / "same.nii.gz")[0], own, atol=1e-3)
    capsys.readouterr()
    grown = tuple(size + 8 for size in FIXED)
    larger = save(tmp_path / "larger.nii.gz", np.zeros(grown, np.uint8), FIXED_AFFINE @ matrix(centre=(-4, -4, -4)))
    apply(files, tmp_path / "more.nii.gz", image=image, reference=larger)
    share = re.search(r"about (\d+)% of larger.nii.gz is led beyond a field", capsys.readouterr().out)
    assert share and abs(int(share[1]) - 100 * (1 - np.prod(FIXED) / np.prod(grown))) < 4
    np.testing.assert_allclose(load(tmp_path / "more.nii.gz")[0][4:-4, 4:-4, 4:-4], own, atol=1e-3)


@pytest.mark.parametrize("lps", [False, True])
def test_points_move_as_in_itk_and_all_else_in_the_table_stays(
    tmp_path: Path, files: tuple[Path, Path], lps: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    points = grid_points(tuple(np.array(FIXED) - 2), FIXED_AFFINE @ matrix(centre=(1, 1, 1)))[::97]
    points[2] += 500
    signs = np.array([-1, -1, 1]) if lps else np.ones(3)
    rows = [[f'tip, "{i}"', z, f" {i:03d}", x, y, ""] for i, (x, y, z) in enumerate((points * signs).tolist())]
    with (tmp_path / "points.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([["name", "z", "X", "x", " y", "empty"], *rows])
    table, out = tmp_path / "points.csv", tmp_path / "out.csv"
    assert run("-t", files[0], "-t", files[1], "--points", table, "-o", out, *["--lps"] * lps) == 0
    assert f"1 of {len(points)} points lie outside" in capsys.readouterr().out
    with out.open(newline="", encoding="utf-8") as stream:
        header, *moved = list(csv.reader(stream))
    assert header == ["name", "z", "X", "x", " y", "empty"]
    assert [(row[0], row[2], row[5]) for row in moved] == [(row[0], row[2], row[5]) for row in rows]
    assert moved[2][1] == moved[2][3] == moved[2][4] == "NaN"
    place = np.array([[float(row[3]), float(row[4]), float(row[1])] for row in moved]) * signs
    expected = by_sitk(sitk.ReadTransform(str(files[1])), by_sitk(sitk_field(files[0]), points))
    kept = np.arange(len(points)) != 2
    assert len(points) > 5 and distance(place, expected)[kept].max() < 1e-4
    assert distance(expected, points)[kept].min() > 1


def test_points_without_a_place_stay_so_and_a_wrong_world_is_suspected(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    points = np.array([FIXED_AFFINE[:3, 3] + 3, (np.nan, 1, 2), (900, 0, 0)])
    table = write_points(tmp_path / "points.csv", points)
    apply(files[:1], tmp_path / "out.csv", points=table)
    text = capsys.readouterr().out
    assert "1 of 3 points lie outside" in text and "1 of 3 points are NaN in points.csv already" in text
    assert "RAS" in text and "really" not in text
    np.testing.assert_array_equal(np.isnan(read_xyz(tmp_path / "out.csv")).all(axis=1), [False, True, True])
    apply(files[:1], tmp_path / "out.csv", points=table, lps=True)
    assert "really in LPS" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["fixed", "moving"])
def test_one_line_brings_all_kinds_to_the_same_side(tmp_path: Path, folder: Path, to: Any) -> None:
    """A landmark as a blob, as a label and as a point, from the other side to this one."""
    (shape, affine), forward = {
        "fixed": ((MOVING, MOVING_AFFINE), np.linalg.inv(FIXED_TO_MOVING)),
        "moving": ((FIXED, FIXED_AFFINE), FIXED_TO_MOVING),
    }[to]
    landmark = affine @ (5.5, 6.5, 4.5, 1)
    away = distance(grid_points(shape, affine), landmark[:3]).reshape(shape)
    image = save(tmp_path / "image.nii.gz", 1000 * np.exp(-((away / 2) ** 2)), affine)
    labels = save(tmp_path / "labels.nii.gz", (away < 2.5).astype(np.int16), affine)
    points = write_points(tmp_path / "points.csv", landmark[None, :3])
    assert run("-t", folder, "--to", to, "--image", image, "-o", tmp_path / "image_out.nii.gz") == 0
    assert run("-t", folder, "--to", to, "--labels", labels, "-o", tmp_path / "labels_out.nii.gz") == 0
    assert run("-t", folder, "--to", to, "--points", points, "-o", tmp_path / "out.csv") == 0
    expected = (forward @ landmark)[:3]
    assert distance(expected, landmark[:3]) > 4
    assert distance(read_xyz(tmp_path / "out.csv")[0], expected) < 0.001
    for kind, limit in (("image", 0.1), ("labels", 0.4)):
        moved, header = load(tmp_path / f"{kind}_out.nii.gz")
        assert moved.shape == (FIXED if to == "fixed" else MOVING)
        place = grid_points(moved.shape, header.get_best_affine())
        assert distance(np.average(place, axis=0, weights=moved.ravel()), expected) < limit


def test_with_a_folder_points_take_the_inverse_of_the_whole_list(tmp_path: Path, folder: Path) -> None:
    """fixed -> moving by the folder, moving -> scan and scan -> other scan by affines; points come back."""
    paths, matrices = [], [FIXED_TO_MOVING]
    for index, degrees in enumerate(((0, 10, 0), (20, 0, 5))):
        matrices.append(matrix(degrees=(float(degrees[0]), degrees[1], degrees[2]), centre=(3, index, 2)))
        paths.append(tmp_path / f"{index}.tfm")
        save_affine_tfm(paths[-1], matrices[-1])
    save_affine_tfm(paths[-1], np.linalg.inv(matrices[-1]))
    transforms = [folder, paths[0], f"[{paths[1]},1]"]
    start = grid_points((4, 4, 4), FIXED_AFFINE @ matrix(centre=(5, 4, 3)))
    mapped = map_points(matrices, start)
    apply(transforms, tmp_path / "out.csv", points=write_points(tmp_path / "points.csv", mapped), to="fixed")
    assert distance(read_xyz(tmp_path / "out.csv"), start).max() < 0.001
    scan_affine = matrices[2] @ matrices[1] @ MOVING_AFFINE  # the moving image as it lies in the last world
    image = save(tmp_path / "scan.nii.gz", texture(), scan_affine)
    apply(transforms, tmp_path / "image.nii.gz", image=image, to="fixed")
    save(tmp_path / "moving.nii.gz", texture(), MOVING_AFFINE)
    apply([folder], tmp_path / "straight.nii.gz", image=tmp_path / "moving.nii.gz", to="fixed")
    moved, expected = (load(tmp_path / f"{name}.nii.gz")[0] for name in ("image", "straight"))
    both = (moved > 0) & (expected > 0)
    assert both.mean() > 0.3
    np.testing.assert_allclose(moved[both], expected[both], atol=0.01)


def test_a_transform_s_own_field_moves_images_as_itk_does(tmp_path: Path) -> None:
    sample = case("anisotropic")
    save_itk_field(
        tmp_path / "xfm.nii.gz", composite_field(sample.composite, sample.fixed_shape, sample.fixed), sample.fixed
    )
    image = save(tmp_path / "moving.nii.gz", texture(sample.moving_shape, sample.moving), sample.moving)
    grid = save(tmp_path / "fixed.nii.gz", np.zeros(sample.fixed_shape, np.uint8), sample.fixed)
    apply([tmp_path / "xfm.nii.gz"], tmp_path / "out.nii.gz", image=image)
    moved = load(tmp_path / "out.nii.gz")[0]
    theirs = by_itk(image, grid, [tmp_path / "xfm.nii.gz"], sitk.sitkLinear)
    both = (moved > 0) & (theirs > 0)
    assert both.mean() > 0.3 and np.abs(moved - theirs)[both].max() < 0.05  # 20 * sqrt(3) / 3 a mm: 0.004 mm


def test_wide_and_scaled_values_are_kept_or_refused(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    identity, out = tmp_path / "identity.tfm", tmp_path / "out.nii.gz"
    save_affine_tfm(identity, np.eye(4))
    wide = regions().astype(np.int64) * 1_000_003
    path = save_wide(tmp_path / "wide.nii.gz", wide)
    assert run("-t", identity, "--reference", path, "--labels", path, "-o", out) == 0
    moved = load(out)[0]
    assert moved.dtype == np.int32
    np.testing.assert_array_equal(moved, wide)
    save_wide(path, wide * 4)
    refused(capsys, ["-t", identity, "--reference", path, "--labels", path, "-o", out], "wide.nii.gz", "beyond int32")
    scaled = nibabel.Nifti1Image(regions(), MOVING_AFFINE)
    scaled.header.set_slope_inter(0.5, 1)
    scaled.to_filename(path)
    assert run("-t", identity, "--reference", path, "--image", path, "-o", out, "--outside", "nan") == 0
    np.testing.assert_allclose(load(out)[0], load(path)[0], atol=1e-3)
    assert load(out)[1].get_data_dtype() == np.float32


def save_wide(path: Path, values: Array) -> Path:
    nibabel.Nifti1Image(values, MOVING_AFFINE, dtype=values.dtype).to_filename(path)
    return path


def test_wrong_input_ends_in_one_line(
    tmp_path: Path, folder: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    field, affine = files
    image = save(tmp_path / "moving.nii.gz", texture().astype(np.uint8), MOVING_AFFINE)
    far = save(tmp_path / "far.nii.gz", texture(), MOVING_AFFINE @ matrix(centre=(90, 0, 0)))
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(image.read_bytes()[:-20])
    voxels = tmp_path / "disp_0100_0101.nii.gz"
    save_disp(voxels, bumps(FIXED, 2, 3, 7), FIXED_AFFINE)
    save_volume(tmp_path / "empty.nii.gz", np.zeros(MOVING, np.uint8), MOVING_AFFINE)
    points = write_points(tmp_path / "points.csv", np.ones((2, 3)))
    tables = {
        "two": "x,y,z,x\n1,2,3,4\n",
        "short": "x,y,z,a\n\n1,2,3\n",
        "text": "x,y,z\n1,2,3\n1,two,3\n",
        "none": "x,y,z\n",
        "nothing": "",
        "inf": "x,y,z\n1,2,inf\n",
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    (tmp_path / "half").mkdir()
    (tmp_path / "file").write_text("no folder")
    out, table_out = tmp_path / "out.nii.gz", tmp_path / "out.csv"
    before = sorted(tmp_path.rglob("*"))
    to_image, to_points = ["--image", image, "-o", out], ["--points", points, "-o", table_out]
    refused(capsys, ["-t", tmp_path / "gone.nii.gz", *to_image], "gone.nii.gz", "no such file")
    refused(capsys, ["-t", tmp_path / "gone.tfm", *to_image], "gone.tfm", "no such file")
    refused(capsys, ["-t", voxels, *to_image], voxels.name, "ITK field is (X, Y, Z, 1, 3)")
    refused(capsys, ["-t", image, *to_image], image.name, "ITK field is")
    refused(capsys, ["-t", tmp_path / "file", *to_image], "file", "not a readable ITK transform")
    refused(capsys, ["-t", folder, *to_image], "registration", "--to fixed or --to moving")
    refused(capsys, ["-t", field, "--to", "fixed", *to_image], "--to fixed", "leave it out")
    refused(capsys, ["-t", tmp_path / "half", "--to", "fixed", *to_image], "half/" + IMAGES_TO["fixed"], "no such file")
    refused(capsys, ["-t", f"[{folder},1]", "--to", "fixed", *to_image], "registration", "give the folder alone")
    refused(capsys, ["-t", f"[{field},1]", *to_image], field.name, "cannot be inverted", "other direction")
    refused(capsys, ["-t", f"[{affine}]", *to_image], affine.name, "[FILE,1]")
    refused(capsys, ["-t", folder, "-t", field, "--to", "fixed", *to_points], field.name, "files that map the points")
    refused(capsys, ["-t", affine, *to_image], affine.name, "--reference")
    refused(capsys, ["-t", field, "--reference", field, *to_image], field.name, "give an image")
    refused(capsys, ["-t", field, "--image", far, "-o", out], "far.nii.gz", "lead past it")
    refused(capsys, ["-t", field, "--image", broken, "-o", out], "broken.nii.gz", "truncated")
    refused(capsys, ["-t", field, "--image", tmp_path / "empty.nii.gz", "-o", out], "empty.nii.gz", "nothing to see")
    refused(capsys, ["-t", field, *to_image, "--outside", 300], "--outside 300", "uint8")
    refused(capsys, ["-t", field, *to_image, "--outside", "nan"], "--outside nan", "uint8")
    refused(capsys, ["-t", field, *to_image, "--outside", 0.5], "--outside 0.5", "uint8")
    refused(capsys, ["-t", field, "--labels", image, "-o", out, "--linear-labels", "--outside", 1], "--outside 1")
    refused(capsys, ["-t", field, *to_image, "--linear-labels"], image.name, "--linear-labels", "--labels")
    refused(capsys, ["-t", field, *to_image, "--lps"], "--lps", "--points")
    refused(capsys, ["-t", field, *to_image, "--fast"], "--fast")
    refused(capsys, ["-t", field, "--image", image, "-o", tmp_path / "out.mha"], "out.mha", ".nii.gz")
    refused(capsys, ["-t", field, "--image", image, "-o", image], image.name, "is an input")
    refused(capsys, ["-t", folder, "--to", "fixed", "--image", image, "-o", folder / IMAGES_TO["fixed"]], "is an input")
    refused(
        capsys,
        ["-t", field, "-t", affine, "--image", image, "-o", tmp_path / "file" / "out.nii.gz"],
        "file/out.nii.gz",
        "cannot be written",
    )
    refused(capsys, ["-t", affine, "--points", points, "-o", out], "out.nii.gz", ".csv")
    refused(capsys, ["-t", affine, "--points", points, "-o", tmp_path / "file" / "out.csv"], "cannot be written")
    refused(capsys, ["-t", affine, "--points", image, "-o", table_out], image.name, "not a readable CSV")
    refused(capsys, ["-t", affine, "--points", tmp_path / "gone.csv", "-o", table_out], "gone.csv", "no such file")
    for option in (["--reference", image], ["--outside", 1], ["--linear-labels"], ["--assume-orientation", "RAS"]):
        refused(capsys, ["-t", affine, *to_points, *option], option[0], "--points")
    for name, words in {
        "two": ["once each", "x,y,z,x"],
        "short": ["line 3 has 3 cells, the header 4"],
        "text": ["line 3: y is 'two'"],
        "none": ["no points"],
        "nothing": ["it has nothing"],
        "inf": ["line 2: z is 'inf'"],
    }.items():
        refused(capsys, ["-t", affine, "--points", tmp_path / f"{name}.csv", "-o", table_out], f"{name}.csv", *words)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="one of --image"):
        apply([affine], table_out, points=points, image=image)


@pytest.mark.parametrize("kind", ["image", "points"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, files: tuple[Path, Path], kind: str) -> None:
    inputs: dict[str, Any] = {"image": save(tmp_path / "moving.nii.gz", texture(), MOVING_AFFINE)}
    if kind == "points":
        inputs = {"points": write_points(tmp_path / "points.csv", np.ones((2000, 3)))}
    out = tmp_path / "out" / ("moved.nii.gz" if kind == "image" else "moved.csv")
    out.parent.mkdir()
    out.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            apply(files, out, **inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == {out.name: b"before"}


def test_an_empty_label_map_is_no_mistake(tmp_path: Path, files: tuple[Path, Path]) -> None:
    path = save(tmp_path / "lesions.nii.gz", np.zeros(MOVING, np.uint8), MOVING_AFFINE)
    apply(files, tmp_path / "out.nii.gz", labels=path)
    assert not load(tmp_path / "out.nii.gz")[0].any()


def test_help_says_why_points_go_the_other_way(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["apply", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "example: sitreg-lumir apply" in text and "Points go the other way than images" in text
    assert "integers are rounded and keep their type" in text and "never guessed" in text
