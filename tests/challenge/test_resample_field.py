"""A resampled field is the same map of the world on another grid, in pieces of any size, or one line on why not."""

import gzip
import json
import re
import resource
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from transform_samples import Array, bumps, by_sitk, distance, grid_points, matrix, sitk_field, truth

from sitreg_lumir.challenge.resample_field import resample_field
from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry import transforms
from sitreg_lumir.geometry.resampling import resample, resample_labels
from sitreg_lumir.geometry.transforms import CompositeTransform
from sitreg_lumir.io import nifti_stream as streams
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.io.itk import load_itk_field, save_itk_field
from sitreg_lumir.io.nifti_stream import writing_planes
from sitreg_lumir.io.read import load_disp
from sitreg_lumir.io.write import plain_header, save_disp, save_volume

SHAPE, AFFINE = (14, 12, 10), matrix("RAS", (1, 1, 1), (0, 0, 0), (14, 12, 10), (3, -17, 19))
GRIDS: dict[str, tuple[tuple[int, int, int], Array]] = {
    "finer": ((27, 23, 19), matrix("RAS", (0.51, 0.51, 0.51), (0, 0, 0), (27, 23, 19), (3, -17, 19))),
    "oblique": ((15, 22, 17), matrix("PIR", (0.6, 0.5, 0.8), (12, -20, 35), (15, 22, 17), (4, -16, 18))),
    "coarser and larger": ((9, 10, 8), matrix("LAS", (2, 2.5, 3), (5, 0, 0), (9, 10, 8), (3, -17, 19))),
}


@pytest.fixture
def field(tmp_path: Path) -> Path:
    """A 3 mm deformation on a 1 mm grid that has an origin of its own."""
    path = tmp_path / "disp_0100_0101.nii.gz"
    save_disp(path, bumps(SHAPE, 2, 3, 7), AFFINE)
    return path


def to_grid(tmp_path: Path, shape: tuple[int, ...], affine: Array, name: str = "grid.nii.gz") -> Path:
    save_volume(tmp_path / name, np.zeros(shape, np.uint8), affine)
    return tmp_path / name


def moving_image(shape: tuple[int, ...], affine: Array) -> Array:
    world = grid_points(shape, affine).reshape(*shape, 3)
    return 100 + (10 * np.sin(world / 3)).sum(axis=-1).astype(np.float32)


def transform_of(field: Path) -> CompositeTransform:
    disp, affine = load_disp(field)
    return CompositeTransform(np.eye(4), np.eye(4), affine, disp)


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def refused(capsys: pytest.CaptureFixture[str], arguments: list[Any], *words: str) -> None:
    """The command ends with 2 and one line that has these words."""
    capsys.readouterr()
    assert main(["carry", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("sitreg-lumir: error:"), error
    for word in words:
        assert word in error, error


def test_on_its_own_grid_a_field_stays_what_it_is(tmp_path: Path, field: Path) -> None:
    out = tmp_path / "same.nii.gz"
    assert main(["carry", str(field), "--to", str(to_grid(tmp_path, SHAPE, AFFINE)), "-o", str(out)]) == 0
    (resampled, affine), (stored, _) = load_disp(out), load_disp(field)
    np.testing.assert_allclose(resampled, stored, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(affine, AFFINE)
    assert content(out)[:352] == content(field)[:352]


@pytest.mark.parametrize("name", GRIDS)
def test_on_another_grid_it_is_the_same_map_of_the_world(tmp_path: Path, field: Path, name: str) -> None:
    shape, affine = GRIDS[name]
    out, itk = tmp_path / "out" / "voxels.nii.gz", tmp_path / "out" / "itk.nii"
    grid = to_grid(tmp_path, shape, affine)
    resample_field(field, grid, out)
    resample_field(field, grid, itk, itk=True)
    points = grid_points(shape, affine)
    expected = truth(transform_of(field), points)
    assert np.median(distance(expected, points)) > 0.1  # it does something
    stored = nibabel.load(out)  # type: ignore[attr-defined]
    assert stored.shape == (*shape, 3) and stored.get_data_dtype() == np.float32
    np.testing.assert_allclose(stored.affine, affine, atol=1e-6)
    index = grid_points(shape, np.eye(4)) + np.asarray(stored.dataobj).reshape(-1, 3)
    assert distance(index @ affine[:3, :3].T + affine[:3, 3], expected).max() < 1e-4
    resample_field(field, grid, itk.with_suffix(".nii.gz"), itk=True)
    assert content(itk.with_suffix(".nii.gz")) == itk.read_bytes()
    inner = grid_points(tuple(np.array(shape) - 2), affine @ matrix(centre=(1, 1, 1)))
    assert distance(by_sitk(sitk_field(itk), inner), truth(transform_of(field), inner)).max() < 1e-4


def test_itk_form_is_that_of_the_other_writer_byte_for_byte(tmp_path: Path, field: Path) -> None:
    shape, affine = GRIDS["oblique"]
    resample_field(field, to_grid(tmp_path, shape, affine), tmp_path / "out.nii.gz", itk=True)
    read = load_itk_field(tmp_path / "out.nii.gz")
    save_itk_field(tmp_path / "again.nii.gz", read.disp, affine)
    assert content(tmp_path / "out.nii.gz") == content(tmp_path / "again.nii.gz")


def test_beyond_its_grid_the_displacement_of_the_border_holds(
    tmp_path: Path, field: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = tuple(size + 8 for size in SHAPE)
    grid = to_grid(tmp_path, padded, AFFINE @ matrix(centre=(-4, -4, -4)))
    assert main(["carry", str(field), "--to", str(grid), "-o", str(tmp_path / "out.nii.gz")]) == 0
    share = re.search(r"about (\d+)% of it lies in", capsys.readouterr().out)
    assert share and abs(int(share[1]) - 100 * np.prod(SHAPE) / np.prod(padded)) < 2
    expected = np.pad(load_disp(field)[0], ((0, 0), (4, 4), (4, 4), (4, 4)), mode="edge")
    np.testing.assert_allclose(load_disp(tmp_path / "out.nii.gz")[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["float", "int16", "labels", "nearest"])
def test_the_moved_image_is_that_of_resampling_at_once(tmp_path: Path, field: Path, name: str, kind: str) -> None:
    shape, affine = GRIDS[name]
    moving_affine = matrix("ASL", (0.8, 0.9, 0.7), (9, 3, -4), (16, 14, 15), (3, -17, 19))
    values = moving_image((16, 14, 15), moving_affine)
    if kind != "float":
        values = values.astype(np.int16)
    image = nibabel.Nifti1Image(values, moving_affine)
    if kind == "labels":
        image.header.set_intent(1002)
    image.to_filename(tmp_path / "moving.nii")
    options = ["--nearest"] if kind == "nearest" else []
    options += ["--image", str(tmp_path / "moving.nii"), "--warped", str(tmp_path / "warped.nii.gz")]
    grid = to_grid(tmp_path, shape, affine)
    assert main(["carry", str(field), "--to", str(grid), "-o", str(tmp_path / "out.nii"), *options]) == 0
    warped = nibabel.load(tmp_path / "warped.nii.gz")  # type: ignore[attr-defined]
    stored = np.asarray(warped.dataobj)
    moving = (np.asarray(image.dataobj), image.affine, transform_of(field), shape, affine)
    if kind in ("labels", "nearest"):
        expected = resample_labels(*moving)
        assert (stored == expected).mean() > 0.999  # halfway between two voxels, rounding decides
        assert stored.dtype == np.int16 and int(warped.header["intent_code"]) == (1002 if kind == "labels" else 0)
    else:
        expected = resample(*moving)
        assert stored.dtype == np.float32 and ((stored > 0) == (expected > 0)).mean() > 0.999
        both = (stored > 0) & (expected > 0)
        np.testing.assert_allclose(stored[both], expected[both], atol=1e-3)
    assert (stored > 0).mean() > 0.1
    assert load_disp(tmp_path / "out.nii")[0].shape == (3, *shape)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_slabs_and_threads_do_not_show(
    tmp_path: Path, field: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    shape, affine = GRIDS["oblique"]
    grid = to_grid(tmp_path, shape, affine)
    save_volume(tmp_path / "moving.nii.gz", moving_image(SHAPE, AFFINE), AFFINE)
    monkeypatch.setattr(streams, "_BLOCK", 4000)  # several blocks in a tiny file
    written = []
    threads = torch.get_num_threads()
    for points, threads_now in ((1 << 19, 2), (1, 1), (shape[0] * shape[1] * 2, 1), (shape[0] * shape[1] * 5, 3)):
        monkeypatch.setattr(transforms, "_POINTS_AT_ONCE", points)
        torch.set_num_threads(threads_now)
        out, warped = tmp_path / f"out{suffix}", tmp_path / f"warped{suffix}"
        resample_field(field, grid, out, image=tmp_path / "moving.nii.gz", warped=warped)
        written.append((out.read_bytes(), warped.read_bytes()))
    torch.set_num_threads(threads)
    assert all(pair == written[0] for pair in written[1:])


def test_planes_make_the_file_that_whole_arrays_make(tmp_path: Path) -> None:
    disp = np.random.default_rng(0).normal(size=(3, 5, 6, 7)).astype(np.float32)
    affine = matrix("PIR", (0.7, 1, 0.9), (10, 5, 3), (5, 6, 7))
    save_disp(tmp_path / "whole.nii.gz", disp, affine)
    planes = disp.transpose(0, 3, 2, 1)
    header = plain_header((5, 6, 7, 3), affine, np.float32)
    path = tmp_path / "planes.nii.gz"
    with writing(path) as temporary, writing_planes(temporary, header, path) as put:
        put(4, planes[:, 4:])
        put(0, planes[:, :4])
    assert content(path) == content(tmp_path / "whole.nii.gz")
    for first, part, message in ((0, planes[:, :6], "6 of 7"), (1, planes, "do not fit"), (0, planes[:1], "do not")):
        with pytest.raises(ValueError, match=message), writing_planes(path, header, path) as put:
            put(first, part)


def test_provenance_is_kept(tmp_path: Path, field: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape, affine = GRIDS["finer"]
    out, grid = tmp_path / "fine" / field.name, to_grid(tmp_path, shape, affine)
    image = {"name": "a.nii.gz", "sha256": "0" * 64}
    made = {"format": 1, "pair": "0100_0101", "fixed": image, "moving": image, "members": [], "version": "0"}
    beside = field.with_name("disp_0100_0101.json")
    beside.write_text(json.dumps({**made, "field": {"name": field.name, "sha256": sha256_file(field)}}))
    resample_field(field, grid, out)
    stored = json.loads((out.parent / beside.name).read_text())
    assert stored.pop("field") == {"name": out.name, "sha256": sha256_file(out)}
    origin = stored.pop("carried")
    assert stored == made
    assert origin["field"] == {"name": field.name, "sha256": sha256_file(field)}
    assert origin["grid"]["name"] == "grid.nii.gz" and origin["grid"]["shape"] == list(shape)
    np.testing.assert_allclose(origin["grid"]["affine"], affine, atol=1e-6)
    beside.write_text(json.dumps({**made, "field": {"name": field.name, "sha256": "1" * 64}}))
    refused(capsys, [field, "--to", grid, "-o", out], "disp_0100_0101.json")
    beside.unlink()
    resample_field(field, grid, out)
    assert not (out.parent / beside.name).exists()  # it described the field before
    sidecar = tmp_path / "scan.json"
    sidecar.write_text('{"EchoTime": 1}')
    resample_field(field, grid, tmp_path / "scan.nii.gz")
    assert sidecar.read_text() == '{"EchoTime": 1}'


def test_wrong_input_ends_in_one_line(tmp_path: Path, field: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = to_grid(tmp_path, *GRIDS["finer"]), tmp_path / "out.nii.gz"
    far = to_grid(tmp_path, SHAPE, AFFINE @ matrix(centre=(40, 0, 0)), "far.nii.gz")
    save_volume(
        tmp_path / "moving.nii.gz",
        moving_image(SHAPE, AFFINE @ matrix(centre=(0, 40, 0))),
        AFFINE @ matrix(centre=(0, 40, 0)),
    )
    save_itk_field(tmp_path / "itk.nii.gz", bumps(SHAPE, 2, 3, 7), AFFINE)
    nameless = tmp_path / "nameless.nii.gz"
    image = nibabel.Nifti1Image(np.zeros((*SHAPE, 3), np.float32), None)
    image.header.set_sform(None, 0)
    image.to_filename(nameless)
    (tmp_path / "file").write_text("no folder")
    before = sorted(tmp_path.iterdir())
    refused(capsys, [tmp_path / "gone.nii.gz", "--to", grid, "-o", out], "gone.nii.gz", "no such file")
    refused(capsys, [field, "--to", tmp_path / "gone.nii.gz", "-o", out], "gone.nii.gz", "no such file")
    refused(capsys, [grid, "--to", grid, "-o", out], "grid.nii.gz", "(X, Y, Z, 3)")
    refused(capsys, [tmp_path / "itk.nii.gz", "--to", grid, "-o", out], "itk.nii.gz", "(X, Y, Z, 3)")
    refused(capsys, [nameless, "--to", grid, "-o", out], "nameless.nii.gz", "no sform", "--assume-orientation")
    refused(capsys, [field, "--to", tmp_path / "itk.nii.gz", "-o", out], "itk.nii.gz", "give an image")
    refused(capsys, [field, "--to", far, "-o", out], "far.nii.gz", field.name, "same world")
    refused(capsys, [field, "--to", grid, "-o", tmp_path / "out.mha"], "out.mha", ".nii.gz")
    refused(capsys, [field, "--to", grid, "-o", field], field.name, "named twice")
    refused(
        capsys, [field, "--to", grid, "-o", tmp_path / "file" / "out.nii.gz"], "file/out.nii.gz", "cannot be written"
    )
    refused(capsys, [field, "--to", grid, "-o", out, "--fast"], "--fast")
    refused(capsys, [field, "--to", grid, "-o", out, "--warped", tmp_path / "warped.nii.gz"], "--image and --warped")
    warped = ["--image", tmp_path / "moving.nii.gz", "--warped", tmp_path / "file" / "warped.nii.gz"]
    refused(capsys, [field, "--to", grid, "-o", out, *warped], "moving.nii.gz", "same world")
    warped[1] = field
    refused(capsys, [field, "--to", grid, "-o", out, *warped], field.name, "4-D")
    warped[1] = grid
    refused(capsys, [field, "--to", grid, "-o", out, *warped], "grid.nii.gz", "nothing to see")
    assert main(["carry", str(nameless), "--to", str(grid), "-o", str(out), "--assume-orientation", "RAS"]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("which", ["field", "warped"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_what_cannot_be_written_leaves_everything_as_it_was(
    tmp_path: Path, field: Path, which: str, suffix: str
) -> None:
    grid = to_grid(tmp_path, *GRIDS["finer"])
    save_volume(tmp_path / "moving.nii.gz", moving_image(SHAPE, AFFINE), AFFINE)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / f"disp{suffix}").write_bytes(b"before")
    warped = folder / f"warped{suffix}"
    if which == "warped":
        (tmp_path / "file").write_text("no folder")
        warped = tmp_path / "file" / f"warped{suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if which == "field":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a disk that is full before the field is whole
    try:
        with pytest.raises(InputError, match="disp.*cannot be written" if which == "field" else "warped.*cannot be"):
            resample_field(field, grid, folder / f"disp{suffix}", image=tmp_path / "moving.nii.gz", warped=warped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {f"disp{suffix}": b"before"}


def test_help_says_what_happens_outside(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["carry", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "example: sitreg-lumir resample-field" in text and "the displacement of FIELD's border holds" in text
