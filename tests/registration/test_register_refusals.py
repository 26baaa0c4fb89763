"""What `register` cannot use is one clear line and leaves nothing; its options in Python and on the command line."""

import dataclasses
import inspect
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_samples import load

from sitreg_lumir.cli import command_line, main
from sitreg_lumir.cli.parsing import with_flags
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.shipped import VARIABLE
from sitreg_lumir.registration.options import RegisterOptions
from sitreg_lumir.registration.register import register


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
        image = nib.Nifti1Image(np.zeros(values.shape, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), affine)
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
