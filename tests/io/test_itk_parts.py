"""ITK's transform files are understood and measured before ITK gets them, and mean what they mean to ITK."""

import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.composite import load_composite
from sitreg_lumir.io.itk import LPS, load_affine
from sitreg_lumir.io.itk_parts import read_parts

RANDOM = np.random.default_rng(0)


def kinds() -> list[Any]:
    """Linear transforms of all kinds that SimpleITK makes, with parameters and centres of many digits."""
    made = [
        sitk.AffineTransform(3), sitk.Euler3DTransform(), sitk.VersorTransform(), sitk.VersorRigid3DTransform(),
        sitk.Similarity3DTransform(), sitk.ScaleTransform(3), sitk.ScaleVersor3DTransform(),
        sitk.ScaleSkewVersor3DTransform(), sitk.TranslationTransform(3),
    ]  # fmt: skip
    for transform in made:
        parameters = np.array(transform.GetParameters())
        transform.SetParameters((parameters + RANDOM.normal(0, 0.05, parameters.size)).tolist())
        if transform.GetFixedParameters():
            transform.SetFixedParameters(RANDOM.normal(0, 9, len(transform.GetFixedParameters())).tolist())
    return made


def by_itk(transform: Any) -> np.ndarray:
    lps = np.eye(4)
    lps[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    lps[:3, :3] = np.transpose([transform.TransformPoint(axis) for axis in np.eye(3).tolist()]) - lps[:3, 3:]
    return np.asarray(LPS @ lps @ LPS)


@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".mat", ".h5"])
def test_all_linear_kinds_mean_what_itk_says(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for transform in kinds():
        sitk.WriteTransform(transform, str(path))
        np.testing.assert_array_equal(load_affine(path), by_itk(sitk.ReadTransform(str(path))))
    if suffix != ".mat":
        both = sitk.CompositeTransform([*kinds()[:3]])
        sitk.WriteTransform(both, str(path))
        np.testing.assert_array_equal(load_affine(path), by_itk(sitk.ReadTransform(str(path))))


def test_fields_in_hdf5_are_those_of_itk(tmp_path: Path) -> None:
    vectors = sitk.GetImageFromArray(RANDOM.normal(size=(5, 6, 7, 3)), isVector=True)
    vectors.SetSpacing((1.5, 0.8, 1.1))
    vectors.SetOrigin((4, -5, 6))
    vectors.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3).GetMatrix())
    field = sitk.DisplacementFieldTransform(sitk.Image(vectors))
    sitk.WriteTransform(field, str(tmp_path / "a.h5"))
    (part,) = load_composite(tmp_path / "a.h5")
    expected = field.GetDisplacementField()
    values = sitk.GetArrayFromImage(expected).transpose(3, 2, 1, 0).astype(np.float32) * np.array([-1, -1, 1]).reshape(
        3, 1, 1, 1
    )
    np.testing.assert_array_equal(part.disp, values)  # type: ignore[union-attr]
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(expected.GetDirection(), (3, 3)) * np.array(expected.GetSpacing())
    affine[:3, 3] = expected.GetOrigin()
    np.testing.assert_array_equal(part.affine, LPS @ affine)  # type: ignore[union-attr]


def hdf5(path: Path, kind: str, fixed: Any, **parameters: Any) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("TransformGroup/0")
        group.create_dataset("TransformType", data=np.array([kind.encode()], object), dtype=h5py.string_dtype("ascii"))
        group.create_dataset("TransformFixedParameters", data=np.asarray(fixed, float))
        group.create_dataset("TransformParameters", **parameters)
    return path


def grid(*size: float) -> list[float]:
    return [*size, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]


FIELD, SPLINE = "DisplacementFieldTransform_double_3_3", "BSplineTransform_double_3_3"


def test_grids_that_files_only_claim_are_refused(tmp_path: Path) -> None:
    chunked = {"dtype": "f4", "chunks": (1 << 20,), "compression": "gzip"}
    text = f"#Insight Transform File V1.0\nTransform: {SPLINE}\nParameters: 0\nFixedParameters: 100000 100000 100000"
    bombs = {
        "claims.h5": hdf5(tmp_path / "claims.h5", FIELD, grid(1000, 1000, 100), shape=(3 * 10**8,), **chunked),
        "more.h5": hdf5(tmp_path / "more.h5", FIELD, grid(1e5, 1e5, 1e5), data=np.zeros(3)),
        "less.h5": hdf5(tmp_path / "less.h5", FIELD, grid(2, 2, 2), data=np.zeros(9)),
        "odd.h5": hdf5(tmp_path / "odd.h5", FIELD, grid(np.nan, 2, 2), data=np.zeros(9)),
        "flat.h5": hdf5(
            tmp_path / "flat.h5", FIELD, [*grid(1, 1, 1)[:6], 0, 1, 1, *grid(1, 1, 1)[9:]], data=np.zeros(3)
        ),
        "spline.h5": hdf5(tmp_path / "spline.h5", SPLINE, grid(1000, 1000, 1000), shape=(3 * 10**9,), **chunked),
        "spline.tfm": tmp_path / "spline.tfm",
        "matrix.mat": tmp_path / "matrix.mat",
        "affine.tfm": tmp_path / "affine.tfm",
    }
    bombs["spline.tfm"].write_text(text + "\n")
    bombs["matrix.mat"].write_bytes(struct.pack("<5i", 0, 2**30, 1, 0, 4) + b"abc\0")
    bombs["affine.tfm"].write_text(
        "#Insight Transform File V1.0\nTransform: AffineTransform_double_3_3\nParameters: 1 nan\n"
    )
    outside = hdf5(tmp_path / "outside.h5", FIELD, grid(1, 1, 1), data=np.zeros(3))
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["TransformGroup"] = h5py.ExternalLink(str(outside), "TransformGroup")
    bombs["linked.h5"] = tmp_path / "linked.h5"
    for name, path in bombs.items():
        for read in (load_composite, load_affine):
            with pytest.raises(InputError, match=name) as error:
                read(path)  # type: ignore[operator]
            assert "\n" not in str(error.value)
    assert len(read_parts(outside)) == 1
