"""`register`: both ways at once, whatever the headers, and one clear line for what cannot be result."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
import torch
from data_samples import load
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

import sitreg_lumir
from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import map_points
from sitreg_lumir.io.itk import load_affine, load_itk_field, save_affine_tfm
from sitreg_lumir.network.sitreg import run_stages
from sitreg_lumir.registration.outputs import DEFAULT, FILES, OUTPUTS
from sitreg_lumir.registration.pair import meet_half_way, pair_on_finer_grid, pair_on_grid
from sitreg_lumir.registration.quality import brain_points
from sitreg_lumir.registration.register import register

Array = NDArray[Any]
SHAPE = (40, 56, 48)


@pytest.fixture(scope="module")
def result(t1: Path, t2: Path, members: Path) -> sitreg_lumir.Registration:
    return register(t1, t2, model=members, align="none", uncertainty=True)


@pytest.fixture(scope="module")
def folder(result: sitreg_lumir.Registration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("out") / "registration", save="all")


def changed(path: Path, out: Path, axes: tuple[int, ...] = (0, 1, 2), flips: tuple[int, ...] = ()) -> Path:
    """The same voxels at the same places in the world, stored in another order."""
    values, affine = load(path)
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3)[:, list(axes)]
    values = values.transpose(axes)
    for axis in flips:
        values = np.flip(values, axis)
        turn[:3, 3] += turn[:3, axis] * (values.shape[axis] - 1)
        turn[:3, axis] *= -1
    nib.Nifti1Image(np.ascontiguousarray(values), affine @ turn).to_filename(out)
    return out


def in_brain(result: sitreg_lumir.Registration) -> Array:
    return brain_points(result.fixed.brain, result.fixed.affine)


def apart(first: Array, second: Array) -> Array:
    return np.linalg.norm(first - second, axis=1)


def test_the_maps_move_the_brain_and_are_inverse(result: sitreg_lumir.Registration) -> None:
    points = in_brain(result)
    mapped = result.transform_points(points, to="moving")
    assert 0.5 < np.median(apart(mapped, points)) < 20  # mm: something happened, and nothing wild
    back = apart(result.transform_points(mapped, to="fixed"), points)
    assert np.median(back) < 1e-4  # mm, of 4 mm voxels
    assert result.summary["inverse_error_mm"]["median"] == pytest.approx(np.median(back), rel=1e-3, abs=1e-7)
    assert result.summary["ndv_percent"] < 0.1


def test_exchanging_the_scans_exchanges_the_maps(
    result: sitreg_lumir.Registration, t1: Path, t2: Path, members: Path
) -> None:
    exchanged = register(t2, t1, model=members, align="none")
    points = in_brain(result)
    assert apart(map_points(result.forward, points), map_points(exchanged.backward, points)).max() < 0.05
    points = in_brain(exchanged)
    assert apart(map_points(result.backward, points), map_points(exchanged.forward, points)).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "flips"), [((0, 1, 2), (0, 1)), ((2, 0, 1), (2,))])
def test_the_order_of_the_voxels_does_not_matter(
    result: sitreg_lumir.Registration,
    t1: Path,
    t2: Path,
    members: Path,
    tmp_path: Path,
    axes: tuple[int, ...],
    flips: tuple[int, ...],
) -> None:
    reordered = register(
        changed(t1, tmp_path / "f.nii.gz", axes, flips),
        changed(t2, tmp_path / "m.nii.gz", (1, 2, 0), (0,)),
        model=members,
        align="none",
    )
    points = in_brain(result)
    assert apart(map_points(result.forward, points), map_points(reordered.forward, points)).max() < 0.05


@pytest.mark.slow
def test_the_folder_holds_what_the_help_says(folder: Path, result: sitreg_lumir.Registration) -> None:
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert not list(folder.parent.glob(".*"))  # no temporary folder stays
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["fixed"]["name"] == "LUMIRMRI_0100_0000.nii.gz" and len(summary["fixed"]["sha256"]) == 64
    assert str(folder.parents[1]) not in (folder / "summary.json").read_text()  # base names only
    assert summary["verdict"] in ("ok", "check", "failed")
    assert 0 < summary["uncertainty_mm"]["median"] < summary["uncertainty_mm"]["p95"]
    for name in ("warped_moving", "jac_det", "jac_det_deformation", "uncertainty"):
        values, affine = load(folder / f"{name}.nii.gz")
        assert values.shape == SHAPE and np.allclose(affine, result.fixed.affine)
    values, _ = load(folder / "warped_moving.nii.gz")
    assert values.dtype == np.uint8  # the type of the original
    report = (folder / "report.html").read_text()
    assert "LUMIRMRI_0101_0001.nii.gz" in report and len(report) < 25e6


def test_outputs_are_chosen_by_name(result: sitreg_lumir.Registration, tmp_path: Path) -> None:
    names = {path.name for path in result.save(tmp_path / "default").iterdir()}
    assert names == {"summary.json", "uncertainty.nii.gz", *(name for output in DEFAULT for name in OUTPUTS[output])}
    assert sum(path.stat().st_size for path in (tmp_path / "default").iterdir()) < 50e6
    names = {path.name for path in result.save(tmp_path / "few", save=["log-jacobian, masks", "map"]).iterdir()}
    assert names == {"summary.json", "map.safetensors", "map.json", *OUTPUTS["log-jacobian"], *OUTPUTS["masks"]}
    logarithm, determinant = load(tmp_path / "few" / "log_jac_det.nii.gz")[0], result.jacobian()
    known = np.isfinite(determinant) & (determinant > 0)
    np.testing.assert_allclose(logarithm[known], np.log(determinant[known]), atol=1e-6)
    assert np.isnan(logarithm[~known]).all()
    assert np.array_equal(load(tmp_path / "few" / "fixed_brain.nii.gz")[0], result.fixed.brain)
    result.save(tmp_path / "few", save="default,jacobian", overwrite=True)
    names = {path.name for path in (tmp_path / "few").iterdir()}
    assert {*OUTPUTS["jacobian"], *OUTPUTS["warped"]} <= names and not names & set(OUTPUTS["masks"])


def test_unknown_outputs_are_one_line(t1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for save, expected in (
        ("warped,jacobians", "--save jacobians: no such output; choose from warped"),
        (",", "names no"),
    ):
        out = tmp_path / "out"
        assert main(["register", "--fixed", str(t1), "--moving", str(t1), "-o", str(out), "--save", save]) == 2
        message = capsys.readouterr().err
        assert expected in message and message.count("\n") == 1 and not out.exists()


def test_apply_gives_the_warped_images_on_their_own_grids(folder: Path, t1: Path, t2: Path, tmp_path: Path) -> None:
    for to, image, name in (("fixed", t2, "warped_moving"), ("moving", t1, "warped_fixed")):
        out = tmp_path / f"{name}.nii.gz"
        assert main(["apply", "-t", str(folder), "--to", to, "--image", str(image), "-o", str(out)]) == 0
        for ours, theirs in zip(load(out), load(folder / out.name), strict=True):
            assert np.array_equal(ours, theirs)


def test_apply_takes_the_composite_where_there_is_no_map(
    result: sitreg_lumir.Registration, t1: Path, t2: Path, tmp_path: Path
) -> None:
    folder = result.save(tmp_path / "registration", save="transforms")
    to_fixed = ["-t", str(folder), "--to", "fixed"]
    samples = in_brain(result)[:50]
    (tmp_path / "moving.csv").write_text("x,y,z\n" + "\n".join(",".join(map(str, row)) for row in samples))
    out = tmp_path / "out.csv"
    assert main(["apply", *to_fixed, "--points", str(tmp_path / "moving.csv"), "-o", str(out)]) == 0
    moved = np.loadtxt(out, delimiter=",", skiprows=1)
    assert np.median(apart(moved, result.transform_points(samples, to="fixed"))) < 0.4  # mm, of samples 4 mm apart
    image = ["--image", str(t2), "-o", str(tmp_path / "out.nii.gz")]
    assert main(["apply", *to_fixed, *image]) == 2  # the composite has no grid of the scan
    assert main(["apply", *to_fixed, *image, "--reference", str(t1)]) == 0
    difference = np.abs(load(tmp_path / "out.nii.gz")[0].astype(float) - result.warped)
    assert difference[result.fixed.brain].mean() < 3  # of 255


@pytest.mark.slow
def test_itk_moves_images_as_the_registration_does(
    folder: Path, result: sitreg_lumir.Registration, t1: Path, t2: Path
) -> None:
    for name, fixed, moving, ours in (
        ("from-moving_to-fixed_xfm.nii.gz", t1, t2, result.warped),
        ("from-fixed_to-moving_xfm.nii.gz", t2, t1, result.warped_fixed),
    ):
        vectors = sitk.ReadImage(str(folder / name), sitk.sitkVectorFloat64)
        transform = sitk.DisplacementFieldTransform(vectors)
        source = sitk.ReadImage(str(moving), sitk.sitkFloat32)
        theirs = sitk.Resample(source, sitk.ReadImage(str(fixed)), transform, sitk.sitkLinear, 0.0)
        difference = np.abs(sitk.GetArrayFromImage(theirs).T - ours)
        assert difference[2:-2, 2:-2, 2:-2].mean() < 0.5  # of 255
        assert ours.max() > 100


def test_the_field_on_disk_is_the_transform(folder: Path, result: sitreg_lumir.Registration) -> None:
    field = load_itk_field(folder / "from-moving_to-fixed_xfm.nii.gz")
    samples = in_brain(result)
    error = apart(map_points(field, samples), map_points(result.forward, samples))
    assert np.percentile(error, 99) < 0.3  # mm, between samples that are 4 mm apart
    matrix, origin = field.affine[:3, :3], field.affine[:3, 3]
    voxels = np.rint((samples - origin) @ np.linalg.inv(matrix).T) @ matrix.T + origin
    np.testing.assert_allclose(map_points(field, voxels), map_points(result.forward, voxels), atol=1e-4)
    aligned = load_affine(folder / "fixed_to-MNI152.tfm"), load_affine(folder / "moving_to-MNI152.tfm")
    deformation = load_itk_field(folder / "deformation_xfm.nii.gz")
    parts = map_points([aligned[0], deformation, np.linalg.inv(aligned[1])], samples)
    assert np.percentile(apart(parts, map_points(result.forward, samples)), 99) < 0.3
    assert np.array_equal(map_points(sitreg_lumir.load_map(folder), samples), map_points(result.forward, samples))


def test_the_jacobian_is_that_of_the_map(result: sitreg_lumir.Registration) -> None:
    step = 1e-2
    points = in_brain(result)[::7]
    columns = [
        (map_points(result.forward, points + step * axis) - map_points(result.forward, points - step * axis)) / 2 / step
        for axis in np.eye(3)
    ]
    numeric = np.linalg.det(np.stack(columns, axis=-1))
    voxels = np.rint((points - result.fixed.affine[:3, 3]) @ np.linalg.inv(result.fixed.affine[:3, :3]).T).astype(int)
    stored = result.jacobian()[tuple(voxels.T)]
    np.testing.assert_allclose(stored, numeric, atol=0.02)


def test_the_volume_change_of_the_alignment_counts(t1: Path, t2: Path, members: Path, tmp_path: Path) -> None:
    larger = np.diag([1.1, 1.1, 1.1, 1])
    save_affine_tfm(tmp_path / "larger.tfm", larger)
    result = register(t1, t2, model=members, align="none", moving_to_template=tmp_path / "larger.tfm")
    whole, alone = result.jacobian(), result.jacobian(with_alignment=False)
    known = np.isfinite(alone)
    np.testing.assert_allclose(whole[known], alone[known] / 1.1**3, rtol=1e-5)


def test_a_given_affine_is_met_half_way() -> None:
    fixed, moving, initial = (np.eye(4) for _ in range(3))
    fixed[:3, :3] = Rotation.from_euler("xyz", (10, 5, -8), degrees=True).as_matrix() * 1.1
    moving[:3, 3] = (3, -8, 5)
    initial[:3, :3] = Rotation.from_euler("xyz", (12, 2, -3), degrees=True).as_matrix() * 1.05
    initial[:3, 3] = (1, 9, -4)
    met = meet_half_way(fixed, moving, initial)
    np.testing.assert_allclose(np.linalg.inv(met[1]) @ met[0], initial, atol=1e-9)
    exchanged = meet_half_way(moving, fixed, np.linalg.inv(initial))
    np.testing.assert_allclose(exchanged, met[::-1], atol=1e-9)
    with pytest.raises(InputError, match="`initial_transform`"):
        meet_half_way(np.eye(4), np.eye(4), np.diag([-1.0, 1, 1, 1]))


@pytest.mark.slow
def test_uncertainty_is_the_spread_of_the_members_own_fields(
    t1: Path, t2: Path, members: Path, result: sitreg_lumir.Registration, tmp_path: Path
) -> None:
    fields = []
    for flip in (False, True):
        for file in sorted(members.glob("*.safetensors")):
            model = sitreg_lumir.load_model(file, flip=flip, device="cpu")
            matrices = result.forward.fixed_to_model, result.forward.moving_to_model
            pair = pair_on_grid(model, result.fixed, result.moving, *matrices)
            network = model.ensemble.networks[-1]  # with flip, the mirrored one
            inputs = {"fixed": model.ensemble.inputs(pair.fixed), "moving": model.ensemble.inputs(pair.moving)}
            with torch.inference_mode():
                fields.append(run_stages([network], **inputs)[-1].disp[0])  # type: ignore[arg-type]
    stacked = torch.stack(fields)
    expected = (stacked - stacked.mean(dim=0)).square().sum(dim=1).mean(dim=0).sqrt()
    assert result.uncertainty_voxels is not None
    np.testing.assert_allclose(result.uncertainty_voxels, expected.numpy(), atol=1e-4)
    plain = register(t1, t2, tmp_path / "plain", model=members, align="none", report=False)
    assert plain.uncertainty() is None and plain.summary["uncertainty_mm"] is None
    assert not (tmp_path / "plain" / "uncertainty.nii.gz").exists()


@pytest.mark.parametrize("refine", [0, 3])
def test_the_maps_are_inverse_to_each_other(t1: Path, t2: Path, members: Path, refine: int) -> None:
    result = register(t1, t2, model=members, align="none", refine=refine)
    for error in (result.summary["inverse_error_mm"], result.summary["inverse_error_mm_moving"]):
        assert error["p99"] < 0.001 and error["largest"] < 0.01  # mm


@pytest.mark.slow
def test_refinement_is_recorded_symmetric_and_spares_lesions(t1: Path, t2: Path, members: Path, tmp_path: Path) -> None:
    values, affine = load(t2)
    lesion = np.zeros(values.shape, np.uint8)
    lesion[15:22, 25:32, 20:27] = 1
    nib.Nifti1Image(lesion, affine).to_filename(tmp_path / "lesion.nii.gz")
    options = {"model": members, "align": "none", "refine": 2}
    result = register(t1, t2, moving_lesion=tmp_path / "lesion.nii.gz", **options)  # type: ignore[arg-type]
    refined = result.summary["refined"]
    assert refined["steps"] == 2 and refined["best_step"] > 0 and refined["carried_over"] is (refined["of"] == "lncc")
    assert refined["similarity_after"] > refined["similarity_before"]
    exchanged = register(t2, t1, fixed_lesion=tmp_path / "lesion.nii.gz", **options)  # type: ignore[arg-type]
    points = in_brain(result)
    assert apart(map_points(result.forward, points), map_points(exchanged.backward, points)).max() < 0.05
    with pytest.raises(InputError, match="`refine=N`"):
        register(t1, t2, model=members, align="none", moving_lesion=tmp_path / "lesion.nii.gz")


def test_refinement_compares_at_a_finer_voxel_size_where_asked(t1: Path, t2: Path, members: Path) -> None:
    options: dict[str, Any] = {"model": members, "align": "none", "refine": 2}
    plain, finer = (register(t1, t2, refine_mm=size, **options) for size in (None, 2.0))
    assert plain.summary["refined"]["finer_mm"] is None and finer.summary["refined"]["finer_mm"] == 2
    assert 0 < apart(*(map_points(result.forward, in_brain(result)) for result in (plain, finer))).max() < 20
    for size in (1.5, 4.0, 0.5):
        with pytest.raises(InputError, match=r"`refine_mm` must divide the model's 4 mm: 2, 1.33, 1; got "):
            register(t1, t2, refine_mm=size, **options)
    with pytest.raises(InputError, match="`refine_mm` is a voxel size in mm, above 0, and needs `refine=N`"):
        register(t1, t2, model=members, align="none", refine_mm=2)


@pytest.mark.parametrize("factor", [2, 3])
def test_finer_voxels_divide_those_of_the_models_grid(result: sitreg_lumir.Registration, factor: int) -> None:
    """Of an image that is linear in space, a voxel shows the mean of those that divide it."""
    shape = result.fixed.data.shape
    ramp = np.einsum("i,ixyz->xyz", (1.0, 2.0, 3.0), np.indices(shape)).astype(np.float32)
    scan = dataclasses.replace(result.fixed, data=ramp, brain=np.ones(shape, bool))
    coarse = pair_on_grid(result.model, scan, scan, np.eye(4), np.eye(4))
    finer = pair_on_finer_grid(result.model, factor, scan, scan, np.eye(4), np.eye(4))
    means = torch.nn.functional.avg_pool3d(finer.fixed, factor)
    inside = (..., *[slice(8, -8)] * 3)
    torch.testing.assert_close(means[inside], coarse.fixed[inside], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_refining_is_as_smooth_as_the_members_training(t1: Path, t2: Path, members: Path, tmp_path: Path) -> None:
    shutil.copytree(members, tmp_path / "smooth")
    for card in (tmp_path / "smooth").glob("*.json"):
        card.write_text(json.dumps(json.loads(card.read_text()) | {"training": {"diffusion_weight": 300.0}}))

    def roughness(folder: Path) -> float:
        result = register(t1, t2, model=folder, align="none", refine=6)
        return float(sum(np.square(np.diff(result.forward.disp, axis=axis)).mean() for axis in (1, 2, 3)))

    assert roughness(tmp_path / "smooth") < 0.9 * roughness(members)


@pytest.mark.slow
def test_pictures_in_jupyter(result: sitreg_lumir.Registration) -> None:
    html = result._repr_html_()
    assert "data:image/png;base64," in html and "LUMIRMRI_0101_0001.nii.gz onto LUMIRMRI_0100_0000.nii.gz" in html


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_fields")
def test_an_earlier_result_is_kept_unless_asked(
    folder: Path, result: sitreg_lumir.Registration, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    with pytest.raises(InputError, match="`overwrite=True`"):
        result.save(kept)
    result.save(kept, report=False, overwrite=True)
    assert not (kept / "report.html").exists()  # it spoke of the earlier one
    (kept / "notes.txt").write_text("mine")
    (kept / ".DS_Store").touch()
    result.save(kept, overwrite=True)
    assert (kept / "notes.txt").read_text() == "mine" and (kept / "report.html").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".DS_Store").touch()
    result.save(tmp_path / "other", report=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"other files \(notes.txt\)"):
        result.save(tmp_path / "foreign")
    with pytest.raises(InputError, match="is a file"):
        result.save(kept / "notes.txt")


@pytest.mark.usefixtures("coarse_fields")
def test_a_full_disk_leaves_nothing(
    result: sitreg_lumir.Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sitreg_lumir.registration import save

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_volume", full)
    with pytest.raises(InputError, match="No space left on device"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
