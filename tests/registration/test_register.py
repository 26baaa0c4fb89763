"""`register`: both ways at once, whatever the headers, and one clear line for what cannot be result."""

import csv
import dataclasses
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

import sitreg_lumir
from sitreg_lumir.cli import command_line, main
from sitreg_lumir.cli.parsing import with_flags
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import map_points
from sitreg_lumir.io import itk as transforms
from sitreg_lumir.io.itk import load_affine, load_itk_field, save_affine_tfm
from sitreg_lumir.network.shipped import VARIABLE
from sitreg_lumir.network.sitreg import run_stages
from sitreg_lumir.registration.options import RegisterOptions
from sitreg_lumir.registration.outputs import DEFAULT, FILES, OUTPUTS
from sitreg_lumir.registration.pair import meet_half_way, pair_on_finer_grid, pair_on_grid
from sitreg_lumir.registration.pairs_table import read_pairs
from sitreg_lumir.registration.quality import brain_points
from sitreg_lumir.registration.register import register
from sitreg_lumir.registration.verdict import judge

Array = NDArray[Any]
SHAPE = (40, 56, 48)


@pytest.fixture(scope="module")
def result(t1: Path, t2: Path, members: Path) -> sitreg_lumir.Registration:
    return register(t1, t2, model=members, align="none", uncertainty=True)


@pytest.fixture(scope="module")
def folder(result: sitreg_lumir.Registration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("out") / "registration", save="all")


@pytest.fixture
def coarse_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transforms on the images' own 4 mm grid instead of 1 mm: 64 times fewer voxels to write."""
    monkeypatch.setattr(transforms, "_LARGEST_SPACING", 4.0)


def load(path: Path) -> tuple[Array, Array]:
    image: Any = nib.load(path)  # type: ignore[attr-defined]
    return np.asarray(image.dataobj), np.asarray(image.affine)


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


def test_the_api_is_the_packages() -> None:
    assert sitreg_lumir.register is register
    assert sitreg_lumir.apply.__module__ == "sitreg_lumir.registration.apply"
    with pytest.raises(AttributeError):
        _ = sitreg_lumir.nothing


SUMMARY: dict[str, Any] = {
    "fixed": {"alignment": None},
    "moving": {"alignment": {"turn": "", "part": False, "scales": [1.1, 1.05, 1.0]}},
    "template_match": {
        "fixed": {"correlation": 0.45, "by_chance": 0.15},
        "moving": {"correlation": 0.12, "by_chance": 0.05},
    },
    "similarity": {
        "aligned": {"mind": 0.4, "mind_by_chance": 0.45, "lncc": 0.2, "brain_overlap": 0.9},
        "registered": {"mind": 0.1, "mind_by_chance": 0.45, "lncc": 0.5, "brain_overlap": 0.98},
    },
    "ndv_percent": 0.0,
    "inverse_error_mm": {"median": 0.01, "p99": 0.001},
    "coverage_fixed": {"in_model_grid": 1.0, "seen_by_other": 1.0},
    "coverage_moving": {"in_model_grid": 1.0, "seen_by_other": 1.0},
}


@pytest.mark.parametrize(
    ("place", "value", "verdict", "reason"),
    [
        ("ndv_percent", 0.0, "ok", ""),
        ("similarity/registered/mind", 0.45, "failed", "match less than before"),
        ("similarity/registered/mind_by_chance", 0.09, "failed", "hardly match"),
        ("similarity/registered/mind_by_chance", 0.113, "check", "hardly match"),
        ("similarity/registered/mind", None, "failed", "do not overlap"),
        ("similarity/registered/brain_overlap", 0.5, "failed", "overlap by 0.50"),
        ("template_match/moving/correlation", 0.05, "failed", "moving brain hardly agrees with the template"),
        ("template_match/fixed/correlation", 0.25, "check", "fixed brain hardly agrees with the template"),
        ("template_match/fixed/by_chance", None, "failed", "fixed brain misses the template's"),
        ("moving/alignment/turn", "180 degrees about the left-right axis", "check", "left and right are exchanged"),
        ("moving/alignment/scales", [1.76, 1.1, 1.0], "check", "stretches the moving brain by 1.00 to 1.76"),
        ("moving/alignment/scales", [1.7, 1.65, 1.6], "check", "check its voxel size"),
        ("ndv_percent", 2.0, "check", "2.000 % of the brain folds"),
        ("inverse_error_mm/p99", 3.0, "check", "inverse to 3.00 mm"),
        ("coverage_moving/in_model_grid", 0.8, "check", "80% of the moving brain"),
        ("coverage_fixed/seen_by_other", 0.2, "failed", "20% of the fixed brain"),
    ],
)
def test_the_verdict_and_its_reasons(place: str, value: Any, verdict: str, reason: str) -> None:
    summary = json.loads(json.dumps(SUMMARY))
    *parents, key = place.split("/")
    inner = summary
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    judged, reasons = judge(summary)
    assert judged == verdict
    assert reason in "; ".join(reasons)


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_fields")
def test_a_failed_registration_ends_with_its_own_exit_code(
    t1: Path, t2: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, affine = load(t2)
    for file in (t1, t2):
        shutil.copy(file, tmp_path / file.name)
    nib.Nifti1Image(np.ascontiguousarray(values[:, :, ::-1]), affine).to_filename(tmp_path / "upside_down.nii.gz")
    table = tmp_path / "pairs.csv"
    table.write_text(f"name,fixed,moving\nwrong,{t1.name},upside_down.nii.gz\nright,{t1.name},{t2.name}\n")
    command = ["register", "--pairs", str(table), "-o", str(tmp_path / "out"), "--members", str(members)]
    assert main([*command, "--align", "none", "--no-report"]) == 3
    assert "2 pairs: 0 ok, 0 check, 2 failed, 0 error" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "wrong" / "summary.json").read_text())
    assert summary["verdict"] == "failed" and "moving brain hardly agrees" in "; ".join(summary["reasons"])
    assert (tmp_path / "out" / "wrong" / "warped_moving.nii.gz").is_file()  # nothing is lost


@pytest.mark.usefixtures("coarse_fields")
def test_pairs_go_on_after_a_bad_one(
    t1: Path, t2: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(t1, tmp_path / "a.nii.gz")
    shutil.copy(t2, tmp_path / "b.nii.gz")
    values, affine = load(t1)
    nib.Nifti1Image(values[..., None].repeat(3, -1), affine).to_filename(tmp_path / "frames.nii.gz")
    table = tmp_path / "pairs.csv"
    table.write_text("name,fixed,moving\n,a.nii.gz,b.nii.gz\nbad,a.nii.gz,frames.nii.gz\nback,b.nii.gz,a.nii.gz\n")
    command = ["register", "--pairs", str(table), "-o", str(tmp_path / "out"), "--members", str(members)]
    assert main([*command, "--align", "none", "--no-report"]) == 2
    assert "1 of 3 pairs failed" in capsys.readouterr().err
    with (tmp_path / "out" / "pairs.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert [*rows] == ["a_b", "bad", "back"]
    assert rows["bad"]["verdict"] == "error" and "4-D" in rows["bad"]["reasons"]
    assert float(rows["a_b"]["mind_registered"]) > 0 and not (tmp_path / "out" / "bad").exists()
    made = (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns
    table.write_text("name,fixed,moving\n,a.nii.gz,b.nii.gz\n")
    assert main([*command, "--align", "none"]) == 3
    assert (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns == made  # skipped
    capsys.readouterr()
    values, affine = load(tmp_path / "b.nii.gz")
    for change, expected in (
        (
            lambda: nib.Nifti1Image(np.maximum(values, 1) - 1, affine).to_filename(tmp_path / "b.nii.gz"),
            "files.moving.sha256",
        ),
        (lambda: command.extend(["--padding", "5"]), "options.padding_mm is 0.0 there, 5.0 now"),
    ):
        change()
        assert main([*command, "--align", "none", "--no-report"]) == 2
        message = capsys.readouterr().err
        assert "a_b: was registered otherwise" in message and expected in message and message.count("\n") == 1
        assert (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns == made
        assert main([*command, "--align", "none", "--no-report", "--overwrite"]) == 3
        again = (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns
        assert again > made
        made = again


def test_tables_of_spreadsheets(t1: Path, tmp_path: Path) -> None:
    """Semicolons, tabs, quotes, blanks, empty rows and columns, byte order marks, UTF-16, other letters."""
    names = ["a b.nii.gz", "c (1) [2].nii.gz", "M\udcfcller;x.nii.gz", "Ä.nii.gz"]
    for name in names:
        shutil.copy(t1, tmp_path / name)
    lines = {
        "utf-8": 'Fixed , moving\n\n a b.nii.gz , "c (1) [2].nii.gz"\n,\n',
        "utf-8-sig": "fixed;moving;name;;\r\na b.nii.gz;c (1) [2].nii.gz;;;\r\n;;;;\r\n",
        "utf-16": 'moving\tfixed\n"c (1) [2].nii.gz"\ta b.nii.gz\n',
        "latin-1": "sep=;\nfixed;moving\na b.nii.gz;c (1) [2].nii.gz",
    }
    for encoding, text in lines.items():
        (tmp_path / "pairs.csv").write_bytes(text.encode(encoding))
        (pair,) = read_pairs(tmp_path / "pairs.csv")
        assert pair.name == "a b_c (1) [2]"
        assert pair.files == {"fixed": str(tmp_path / names[0]), "moving": str(tmp_path / names[1])}
    for content in ('fixed;moving\n"Müller;x.nii.gz";Ä.nii.gz\n'.encode("latin-1"),):
        (tmp_path / "pairs.csv").write_bytes(content)
        (pair,) = read_pairs(tmp_path / "pairs.csv")
        assert pair.files == {"fixed": str(tmp_path / names[2]), "moving": str(tmp_path / names[3])}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no columns fixed and moving"),
        ("fixed,moving\n", "holds no pair"),
        ("fixed,moving,colour\na,b,c\n", "unknown column 'colour'"),
        ("fixed,moving\na.nii.gz\n", "line 2"),
        ("fixed,moving\na.nii.gz,gone.nii.gz\n", "no such file"),
        ("fixed,moving,name\na.nii.gz,a.nii.gz,../x\n", "no folder's"),
        ("fixed,moving,Fixed\na.nii.gz,a.nii.gz,a.nii.gz\n", "two columns fixed"),
        ("fixed,moving\na.nii.gz,a.nii.gz,a.nii.gz\n", "line 2: more values"),
        ("fixed,moving\na.nii.gz,a.nii.gz\na.nii.gz,a.nii.gz\n", "a second pair called a_a"),
    ],
)
def test_tables_that_are_none(
    text: str, expected: str, t1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(t1, tmp_path / "a.nii.gz")
    (tmp_path / "pairs.csv").write_text(text)
    assert main(["register", "--pairs", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def degrade(kind: str, t1: Path, folder: Path) -> Path:
    """A file that cannot be result."""
    path = folder / f"{kind}.nii.gz"
    values, affine = load(t1)
    values = values.astype(np.float32)
    if kind == "missing":
        return path
    if kind == "text":
        path.write_text("not an image")
        return path
    if kind == "truncated":
        path.write_bytes(t1.read_bytes()[:2000])
        return path
    if kind == "nan":
        values[20, 20, 20] = np.nan
    elif kind == "empty":
        values[:] = 0
    elif kind == "flat":
        values = values[:, :, 20]
    elif kind == "frames":
        values = values[..., None].repeat(2, -1)
    elif kind == "complex":
        values = values.astype(np.complex64)
    elif kind == "rgb":
        image = nib.Nifti1Image(np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), affine)
        image.to_filename(path)
        return path
    elif kind == "shear":
        affine = affine @ np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    elif kind == "far":
        affine = affine.copy()
        affine[:3, 3] += 1000
    image = nib.Nifti1Image(values, affine)
    if kind == "shear":
        image.header.set_sform(affine, code=1)
        image.header.set_qform(None, code=0)
    image.to_filename(path)
    if kind == "spacing":
        import gzip

        content = bytearray(gzip.decompress(path.read_bytes()))
        content[80:84] = bytes(4)  # pixdim[1]
        content[254:256] = bytes(2)  # no sform
        content[252:254] = (1).to_bytes(2, "little")
        path.write_bytes(gzip.compress(bytes(content)))
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "no such file"),
        ("text", "no NIfTI"),
        ("truncated", "truncated"),
        ("nan", "NaN"),
        ("empty", "all voxels are 0"),
        ("flat", "single slice"),
        ("frames", "4-D"),
        ("complex", "complex"),
        ("rgb", "RGB"),
        ("shear", "not orthogonal"),
        ("spacing", "voxel size"),
        ("far", "no brain in the model's field of view"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    kind: str, expected: str, t1: Path, t2: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = degrade(kind, t1, tmp_path)
    out = tmp_path / "out"
    command = ["register", "--fixed", str(t2), "--moving", str(wrong), "-o", str(out), "--members", str(members)]
    assert main([*command, "--align", "none"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("sitreg-lumir: error: ") and message.count("\n") == 1
    assert expected in message and wrong.name in message
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--moving", "T2"], "name --fixed and --moving"),
        (["--fixed", "MNI152", "--moving", "T2", "--fixed-mask", "T1"], "leave the options for it out"),
        (["--fixed", "T1", "--moving", "T2", "--refine", "-1"], "--refine must be 0 or more steps, got -1"),
        (["--fixed", "T1", "--moving", "T2", "--fixed-lesion", "T1"], "--refine N"),
        (
            ["--fixed", "T1", "--moving", "T2", "--padding", "-3"],
            "--padding must be 0 or more and below 1000 mm, got -3",
        ),
        (["--fixed", "T1", "--moving", "T2", "--initial-transform", "T1"], "not a readable ITK transform"),
        (["--fixed", "T1", "--moving", "T2", "--members", "gone"], "gone: no such file"),
        (["--fixed", "T1", "--moving", "T2", "--device", "tpu"], "no such device"),
        (["--fixed", "T1", "--moving", "T2", "--header", "qform"], "no qform is set"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str],
    expected: str,
    t1: Path,
    t2: Path,
    members: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, str(members))
    only_sform = tmp_path / "only_sform.nii.gz"
    values, affine = load(t1)
    image = nib.Nifti1Image(values, affine)
    image.header.set_qform(None, code=0)
    image.to_filename(only_sform)
    arguments = [{"T1": str(only_sform), "T2": str(t2)}.get(option, option) for option in options]
    assert main(["register", *arguments, "-o", str(tmp_path / "out"), "--align", "none"]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


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


def test_a_folder_that_cannot_be_written(t1: Path, t2: Path, members: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written"):
        register(t1, t2, "/proc/registration", model=members, align="none")


def test_the_command_line_says_options_where_the_library_says_arguments(t1: Path) -> None:
    options = command_line().parse_args(["register", "--fixed", str(t1), "--moving", str(t1), "-o", "out"])
    message = "add `overwrite=True` or `align=none`, `padding_mm` or `out`; see `sitreg-lumir register` and `name`"
    assert with_flags(message, options) == (
        "add --overwrite or --align none, --padding or -o; see `sitreg-lumir register` and `name`"
    )


def test_the_options_are_those_of_register() -> None:
    """And checked when they are made, before a model is loaded."""
    arguments = inspect.signature(register).parameters
    fields = {field.name: field.default for field in dataclasses.fields(RegisterOptions)}
    assert [*arguments] == ["fixed", "moving", "out", "model", *fields]
    assert {name: arguments[name].default for name in fields} == fields
    for wrong, message in (
        ({"align": "both"}, "`align` must be auto, each or none, got both"),
        ({"refine_similarity": "ssd"}, "`refine_similarity` must be lncc or mind"),
        ({"padding_mm": float("nan")}, "`padding_mm` must be"),
    ):
        with pytest.raises(InputError, match=message):
            RegisterOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`moving` is MNI152"):
        RegisterOptions(moving_mask="mask.nii.gz").scan_files("moving", "MNI152")
