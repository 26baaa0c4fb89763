"""`preprocess` makes a LUMIR-like volume of a raw head scan, or says in one line why not and writes nothing."""

import argparse
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from prepare_samples import Array, Sample, apart, brain, head, quick_alignment, turn

from sitreg_lumir.cli.register import add_preprocess
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.io.itk import load_affine
from sitreg_lumir.io.read import read_image, read_volume
from sitreg_lumir.preprocessing import place
from sitreg_lumir.preprocessing import preprocess as module
from sitreg_lumir.preprocessing.align import Alignment
from sitreg_lumir.preprocessing.preprocess import MASK, RAW_MASK, TRANSFORM, preprocess
from sitreg_lumir.preprocessing.template import LUMIR_SHAPE, load_template, lumir_grid

TRUTH = turn((10, -7, 15), (5, -12, 8), (1.06, 0.95, 1.02))
FILES = ("t1.nii.gz", "t1" + MASK, "t1" + TRANSFORM, "t1" + RAW_MASK)


def save(path: Path, values: Array, affine: Array) -> Path:
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_alignment():
        yield


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the alignment where something else is looked at."""
    known = Alignment(TRUTH, 0.1, 1.0, 0.5, 0.97, 20.0, 30.0)
    monkeypatch.setattr(place, "align_to_template", lambda *_: known)


@pytest.fixture(scope="module")
def sample() -> Sample:
    return head(TRUTH, (2, 2.5, 2))


@pytest.fixture(scope="module")
def folder(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head with a strong bias field, axes LAS, and its brain's mask on a grid half as fine."""
    path = tmp_path_factory.mktemp("raw")
    place = [np.linspace(-1, 1, size) for size in sample.image.shape]
    bias = np.exp(0.4 * place[0][:, None, None] + 0.3 * place[2] ** 2 - 0.3 * place[1][:, None])
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = sample.image.shape[0] - 1
    save(path / "head.nii.gz", (sample.image * bias)[::-1].astype(np.int16), sample.affine @ flip)
    save(path / "mask.nii.gz", sample.mask[::2, ::2, ::2].astype(np.uint8), sample.affine @ np.diag([2.0, 2, 2, 1]))
    return path


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    out = folder / "made" / "t1.nii.gz"
    preprocess(folder / "head.nii.gz", out, mask=folder / "mask.nii.gz")
    return out


@cache
def template() -> tuple[Array, Array]:
    """The template and its brain on LUMIR's grid."""
    template = load_template()
    image, share = (
        resample(volume, template.affine, np.eye(4), LUMIR_SHAPE, lumir_grid()[1])
        for volume in (template.image, template.mask.astype(np.float32))
    )
    return image, share >= 0.5


def dice(first: Array, second: Array) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def test_the_volume_is_as_lumirs_are(made: Path) -> None:
    assert sorted(path.name for path in made.parent.iterdir()) == sorted(FILES)
    values, affine = read_volume(made, shape=LUMIR_SHAPE)
    np.testing.assert_array_equal(affine, lumir_grid()[1])
    assert values.dtype == np.uint8 and values.max() == 255
    mask = nibabel.load(made.with_name(FILES[1]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(mask.affine, affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), values > 0)
    assert mask.header["sform_code"] == mask.header["qform_code"] == 1
    raw, head = (read_image(path) for path in (made.with_name(FILES[3]), made.parent.parent / "head.nii.gz"))
    np.testing.assert_allclose(raw.affine, head.affine, atol=1e-4)
    brain_mask = read_image(made.parent.parent / "mask.nii.gz")
    expected = (
        resample(brain_mask.data.astype(np.float32), brain_mask.affine, np.eye(4), head.shape, head.affine) >= 0.5
    )
    np.testing.assert_array_equal(raw.data, expected)


def test_the_brain_lies_on_the_template_and_looks_like_it(made: Path) -> None:
    values, _ = read_volume(made)
    image, mask = template()
    assert dice(values > 0, mask) > 0.95
    both = mask & (values > 0)
    assert np.corrcoef(values[both], image[both])[0, 1] > 0.85


@pytest.mark.usefixtures("aligned")
def test_the_bias_field_is_removed(folder: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "t1.nii.gz"
    preprocess(folder / "head.nii.gz", out, mask=folder / "mask.nii.gz", bias_correction=False)
    image, mask = template()
    white = mask & (image > 0.8 * image.max())
    spread = []
    for path in (out, made):
        values, _ = read_volume(path)
        tissue = values[white & (values > 0)].astype(float)
        spread.append(tissue.std() / tissue.mean())
    assert spread[1] < 0.6 * spread[0]


def test_the_affine_maps_points_of_the_raw_scan_to_the_template(made: Path, sample: Sample, folder: Path) -> None:
    transform = sitk.ReadTransform(str(made.with_name(FILES[2])))
    for voxel in np.argwhere(sample.mask)[::5000]:
        point = sample.affine[:3, :3] @ voxel + sample.affine[:3, 3]
        x, y, z = transform.TransformPoint([-point[0], -point[1], point[2]])  # LPS
        expected = TRUTH[:3, :3] @ point + TRUTH[:3, 3]
        assert np.linalg.norm(np.array([-x, -y, z]) - expected) < 3
    assert apart(load_affine(made.with_name(FILES[2])), TRUTH, sample) < 3
    raw, volume = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (folder / "head.nii.gz", made))
    moved = sitk.GetArrayFromImage(sitk.Resample(raw, volume, transform.GetInverse()))  # ITK asks where to look
    values = sitk.GetArrayFromImage(volume)
    assert np.corrcoef(moved[values > 0], values[values > 0])[0, 1] > 0.6  # the one has the bias field


def test_another_contrast_without_skull_needs_no_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = brain(TRUTH, (3, 3, 3), inverted=True)
    out = tmp_path / "new" / "t2.nii"
    raw = save(tmp_path / "t2_raw.nii", sample.image - 100, sample.affine)  # background of another value
    parser = argparse.ArgumentParser()
    add_preprocess(parser.add_subparsers())
    options = parser.parse_args(["preprocess", str(raw), "-o", str(out), "--strip", "none", "--no-bias-correction"])
    options.run(options, [])
    values, _ = read_volume(out, shape=LUMIR_SHAPE)
    image, mask = template()
    assert dice(values > 0, mask) > 0.95
    both = mask & (values > 0)
    assert np.corrcoef(values[both], image[both])[0, 1] < -0.7
    printed = capsys.readouterr().out
    assert "its foreground" in printed and "bias field kept" in printed
    assert f"register --fixed MNI152 --moving {out} -o" in printed and "warning" not in printed


def test_the_templates_mask_comes_with_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(folder / "head.nii.gz", tmp_path / "t1.nii.gz", strip="template")
    values, _ = read_volume(tmp_path / "t1.nii.gz")
    assert dice(values > 0, template()[1]) > 0.95
    assert "warning: the template's mask fits" in capsys.readouterr().out


def test_without_deepbet_the_line_that_installs_it_is_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepbet", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install 'sitreg-lumir\[strip\]'.*`mask`"):
        preprocess(folder / "head.nii.gz", tmp_path / "t1.nii.gz")
    assert not list(tmp_path.iterdir())


def test_deepbet_strips_a_head(folder: Path, tmp_path: Path, sample: Sample) -> None:
    pytest.importorskip("deepbet", reason="the extra [strip] is not installed")
    preprocess(folder / "head.nii.gz", tmp_path / "t1.nii.gz")
    values, _ = read_volume(tmp_path / "t1.nii.gz")
    assert dice(values > 0, template()[1]) > 0.9


def test_wrong_input_is_refused_before_the_work(folder: Path, tmp_path: Path, sample: Sample) -> None:
    raw, mask, out = folder / "head.nii.gz", folder / "mask.nii.gz", tmp_path / "t1.nii.gz"
    holed = sample.image.copy()
    holed[3, 4, 5] = np.nan
    save(tmp_path / "nan.nii.gz", holed, sample.affine)
    save(tmp_path / "far.nii.gz", sample.mask.astype(np.uint8), turn((0, 0, 0), (900, 0, 0)) @ sample.affine)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for line, options in {
        r"no\.nii: no such file": {"raw": tmp_path / "no.nii", "mask": mask},
        r"nan\.nii\.gz: 1 of \d+ voxels are NaN": {"raw": tmp_path / "nan.nii.gz", "mask": mask},
        r"no\.nii\.gz: no such file": {"mask": tmp_path / "no.nii.gz"},
        r"far\.nii\.gz: the mask is empty on the image's grid": {"mask": tmp_path / "far.nii.gz"},
        r"`strip` is none but `mask` says where the brain is": {"mask": mask, "strip": "none"},
        r"t1\.mgz: the name must end in": {"out": tmp_path / "t1.mgz", "mask": mask},
        r"head\.nii\.gz: is an input, too": {"out": raw, "mask": mask},
        r"mask\.nii\.gz: is an input, too": {"out": mask, "mask": mask},
        r"file.t1\.nii\.gz: cannot be written": {"out": tmp_path / "file" / "t1.nii.gz", "mask": mask},
        r"not a brain alone \(\d\.\d litres\); give a brain mask": {"strip": "none"},
        r"--header qfrom": {"mask": mask, "header": "qfrom"},
    }.items():
        with pytest.raises(InputError, match=line):
            preprocess(**{"raw": raw, "out": out, **options})  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="strip must be"):
        preprocess(raw, out, strip="hd-bet")  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_access_is_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="cannot be written"):
        preprocess(folder / "head.nii.gz", tmp_path / "t1.nii.gz", strip="none")


def test_a_mask_that_is_no_brains_is_refused(folder: Path, tmp_path: Path, sample: Sample) -> None:
    x, _, z = (index.max() for index in np.nonzero(sample.mask))
    for name, kept, line in (
        ("rod", np.s_[x - 40 : x - 30, :, z - 30 : z - 20], r"rod\.nii\.gz: 0\.\d+ litres are too few for a brain"),
        ("half", np.s_[: x - 32], r"half\.nii\.gz(: cuts through tissue of head\.nii\.gz| is not a brain alone)"),
    ):
        part = np.zeros(sample.image.shape, np.uint8)
        part[kept] = sample.mask[kept]
        mask = save(tmp_path / f"{name}.nii.gz", part, sample.affine)
        with pytest.raises(InputError, match=line):
            preprocess(folder / "head.nii.gz", tmp_path / "t1.nii.gz", mask=mask, bias_correction=False)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("aligned")
def test_if_one_file_cannot_be_written_none_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, matrix: Array) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_affine_tfm", full)
    with pytest.raises(InputError, match="No space left on device"):
        preprocess(folder / "head.nii.gz", tmp_path / "t1.nii.gz", mask=folder / "mask.nii.gz", bias_correction=False)
    assert not list(tmp_path.iterdir())
