"""What masks mean, and which are refused: on real scans of three contrasts, in one line that names the mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from numpy.typing import NDArray
from prepare_samples import head
from scipy import ndimage

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import Scan, read_image
from sitreg_lumir.preprocessing.brain_mask import check_mask, inside_of, refuse_inverted
from sitreg_lumir.preprocessing.intensity import support_mask
from sitreg_lumir.preprocessing.place import read_brain_mask

Array = NDArray[Any]
CONTRASTS = ("T1", "T2", "FLAIR")


def ball(radius: float = 20) -> Array:
    x, y, z = np.ogrid[-30:30, -32:32, -28:28]
    return np.asarray(np.sqrt(x**2 + y**2 + z**2) <= radius)


@pytest.fixture(scope="module")
def scans(shared: Path) -> dict[str, Scan]:
    """A person in three contrasts, stripped, 2 mm."""
    return {name: read_image(shared / "realbrains" / "contrasts" / f"P1_{name}.nii.gz") for name in CONTRASTS}


def soft(mask: Array, sigma: float = 1.5) -> Array:
    return ndimage.gaussian_filter(mask.astype(np.float64), sigma)


@pytest.mark.parametrize("scale", [1, 100, 255, 1e-3])
def test_soft_masks_are_cut_at_half_of_their_maximum(scale: float) -> None:
    values = soft(ball())
    values /= values.max()
    np.testing.assert_array_equal(inside_of(values * scale, "m"), values > 0.5)
    if scale > 99:
        whole = np.rint(values * scale).astype(np.uint8)
        np.testing.assert_array_equal(inside_of(whole, "m"), whole > whole.max() / 2)


@pytest.mark.parametrize("kind", ["order3", "order5", "lanczos"])
def test_ripples_of_interpolation_do_not_count(kind: str) -> None:
    shift = (0.4, 0.5, 0.3)
    mask, image = ball().astype(np.float32), sitk.GetImageFromArray(ball().astype(np.float32).T)
    if kind == "lanczos":
        moved = sitk.Resample(image, image, sitk.TranslationTransform(3, shift), sitk.sitkLanczosWindowedSinc)
        rippled = sitk.GetArrayFromImage(moved).T
    else:
        rippled = ndimage.affine_transform(mask, np.eye(3), offset=shift, order=int(kind[-1]))
    assert rippled.min() < -0.05 and rippled.max() > 1.05
    smooth = ndimage.affine_transform(mask, np.eye(3), offset=shift, order=1) > 0.5
    assert (inside_of(rippled, "m") ^ smooth).sum() < 0.03 * smooth.sum()


def test_of_label_maps_all_labels_are_inside(shared: Path) -> None:
    labels = np.asarray(nibabel.load(sorted((shared / "realbrains/2mm/labelsVal").iterdir())[0]).dataobj)  # type: ignore[attr-defined]
    halves = np.where(ball(), 1 + (np.arange(60) < 28)[:, None, None], 0)
    for values in (labels, labels.astype(np.float32), halves, halves * 1000 + (halves > 0) * 3):
        np.testing.assert_array_equal(inside_of(values, "m"), values > 0)


def _distance() -> Array:
    return ndimage.distance_transform_edt(ball()) - ndimage.distance_transform_edt(~ball())


NO_MASKS: dict[str, tuple[Callable[[], Array], str]] = {
    "signed distance": (_distance, "signed distance"),
    "signed distance, negative inside": (lambda: -_distance(), "signed distance"),
    "distance": (lambda: np.maximum(_distance(), 0), "no mask but an image"),
    "negative": (lambda: -ball().astype(np.int8), "signed distance"),
    "image": (lambda: ball() * np.random.default_rng(0).integers(1, 255, ball().shape), "no mask but an image"),
}


@pytest.mark.parametrize("kind", NO_MASKS)
def test_values_of_no_mask_are_refused(kind: str) -> None:
    make, line = NO_MASKS[kind]
    with pytest.raises(InputError, match=line) as error:
        inside_of(make(), "folder/m.nii.gz")
    assert str(error.value).startswith("folder/m.nii.gz: ")


def test_inverted_masks_are_refused_and_full_ones_are_not() -> None:
    big = np.diag([4.0, 4, 4, 1])
    with pytest.raises(InputError, match=r"m: is inverted, 0 in a brain of 2\.1 litres"):
        refuse_inverted(~ball(), big, "m")
    slab = ndimage.zoom(ball(28), 0.5, order=0)[6:-6, 6:-6, 4:-4]  # tissue up to most of the borders
    for mask in (ball(), ball(80), np.ones((5, 5, 5), np.bool_), slab):
        refuse_inverted(mask, big, "m")


def variants(mask: Array) -> dict[str, tuple[Array, str | None]]:
    """Masks by what is wrong with them, and the refusal; None for what is right."""
    outwards, inwards = (ndimage.distance_transform_edt(part, sampling=2) for part in (~mask, mask))
    x, y, z = (int(place) for place in ndimage.center_of_mass(mask))
    top, back, hole = mask.copy(), mask.copy(), mask.copy()
    top[:, :, z + 10 :] = False
    back[:, : y - 25] = False
    hole[x - 3 : x + 3, y - 3 : y + 3, z - 3 : z + 3] = False
    tiny = np.zeros_like(mask)
    tiny[x - 8 : x + 8, y - 8 : y + 8, z - 8 : z + 8] = True
    cut = "cuts through tissue"
    return {
        "right": (mask, None),
        "3 mm larger": (outwards <= 3, None),
        "6 mm larger": (outwards <= 6, None),
        "3 mm smaller": (inwards > 3, None),
        "a small hole": (hole, None),
        "no top": (top, cut),
        "no back": (back, cut),
        "8 mm smaller": (inwards > 8, cut),
        "15 mm away": (np.roll(mask, 8, 1), cut),
        "60 mm away": (np.roll(mask, 30, 1), "background|cuts through tissue"),
        "tiny": (tiny, "too few"),
        "20 mm larger": (outwards <= 20, "too many"),
    }


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_masks_of_real_scans(contrast: str, scans: dict[str, Scan]) -> None:
    scan = scans[contrast]
    for kind, (mask, line) in variants(scan.data > 0).items():
        if line is None:
            check_mask(scan, mask, kind)
        else:
            with pytest.raises(InputError, match=f"{kind}: .*({line})"):
                check_mask(scan, mask, kind)


def test_masks_of_a_whole_head() -> None:
    sample = head(np.eye(4), (2, 2, 2))
    scan = Scan(Path("head.nii.gz"), sample.image, sample.affine, "sform", nibabel.Nifti1Header())
    for kind, (mask, line) in variants(sample.mask).items():
        if line is None and kind != "6 mm larger":  # too large for this sample's narrow skull
            check_mask(scan, mask, kind)
        elif line is not None:
            with pytest.raises(InputError):
                check_mask(scan, mask, kind)


@pytest.mark.parametrize(
    ("contrast", "kind"),
    [("T1", "spline"), ("T1", "spline, clipped"), ("T1", "lanczos"), ("T2", "spline"), ("FLAIR", "lanczos")],
)
def test_stripped_scans_with_ripples_are_stripped(contrast: str, kind: str, scans: dict[str, Scan]) -> None:
    scan, shift = scans[contrast], (0.4, 0.5, 0.3)
    values, brain = scan.data.astype(np.float32), (scan.data > 0).astype(np.float32)
    if kind == "lanczos":
        image = sitk.GetImageFromArray(values.T)
        moved = sitk.Resample(image, image, sitk.TranslationTransform(3, shift), sitk.sitkLanczosWindowedSinc)
        rippled = sitk.GetArrayFromImage(moved).T
    else:
        rippled = ndimage.affine_transform(values, np.eye(3), offset=shift, order=3)
        rippled = np.clip(np.rint(rippled), 0, 255) if "clipped" in kind else rippled
    expected = ndimage.affine_transform(brain, np.eye(3), offset=shift, order=1) >= 0.5
    mask = support_mask(rippled, scan.affine)
    assert 2 * (mask & expected).sum() > 0.975 * (mask.sum() + expected.sum())
    assert (mask & (ndimage.distance_transform_edt(~expected, sampling=2) > 3)).sum() < 1e-3 * mask.sum()
    assert (support_mask(values, scan.affine) ^ (values > 0)).sum() < 1e-3 * mask.sum()  # without ripples


def test_the_command_names_the_mask(scans: dict[str, Scan], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = scans["T1"]
    brain = scan.data > 0
    far = scan.affine.copy()
    far[:3, 3] += 500
    for name, mask, affine, line in (
        ("inverted", ~brain, scan.affine, "is inverted"),
        ("distance", np.where(brain, 1.0, -30.0), scan.affine, "signed distance"),
        ("far", brain, far, "its header places it elsewhere"),
        ("half", brain & (np.arange(brain.shape[2]) < 45), scan.affine, "cuts through tissue of P1_T1.nii.gz"),
    ):
        path = tmp_path / f"{name} [1].nii.gz"
        nibabel.Nifti1Image(mask.astype(np.float32), affine).to_filename(path)
        command = ["preprocess", str(scan.path), "--mask", str(path)]
        if name == "half":
            command = ["register", "--fixed", str(scan.path), "--moving", "MNI152", "--fixed-mask", str(path)]
        assert main([*command, "-o", str(tmp_path / "out.nii.gz")]) == 2
        message = capsys.readouterr().err
        assert line in message and str(path) in message and message.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))
    nibabel.Nifti1Image(soft(brain, 0.8) * 200, scan.affine).to_filename(tmp_path / "soft.mgz.nii")
    inside = read_brain_mask(tmp_path / "soft.mgz.nii", scan, None, None)
    assert (inside ^ brain).sum() < 0.03 * brain.sum()
