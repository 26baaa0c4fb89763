"""Two brains that come with the package, so that everything can be tried at once: rendered, no patient data.

python -m sitreg_lumir.data.examples     # makes the files again, the same voxels
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from sitreg_lumir.data.demo import CENTRE
from sitreg_lumir.data.demo_brain import CONTRAST, Affine, exponential, load_template, render, sample, velocity

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = {"EXAMPLE-T1": "example_t1.nii.gz", "EXAMPLE-T2": "example_t2.nii.gz"}
"""Names that stand for the files, wherever a scan is asked for."""

_SEED = 2025
_SUBJECTS = {"EXAMPLE-T1": ("0001", "0000"), "EXAMPLE-T2": ("0002", "0001")}  # subject, modality


def labels_of(example: str) -> Path:
    """The label map of an example; ids as in :data:`~sitreg_lumir.data.demo_brain.STRUCTURES`.

    Examples:
        >>> sitreg_lumir.labels_of("EXAMPLE-T1").name
        'example_t1_labels.nii.gz'
    """
    return FOLDER / EXAMPLES[example].replace(".nii", "_labels.nii")


def grid_of(example: str) -> tuple[tuple[int, int, int], Affine]:
    """Shape and ``(4, 4)`` voxel-to-world matrix, RAS, mm: the T2 is oblique, shifted, and has 2 mm slices."""
    affine = np.eye(4)
    if example == "EXAMPLE-T1":
        shape, affine[:3, :3] = (160, 208, 176), np.diag([1.0, 1.0, 1.0])
        middle = CENTRE
    else:
        turn = Rotation.from_euler("xyz", (9, -5, 7), degrees=True).as_matrix()
        shape, affine[:3, :3] = (176, 216, 92), turn @ np.diag([-1.0, -1.0, 2.0])
        middle = CENTRE + np.array([6.0, -11.0, 14.0])
    affine[:3, 3] = middle - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return shape, affine


def make_examples(folder: Path) -> None:
    """Writes both scans and their label maps."""
    folder.mkdir(parents=True, exist_ok=True)
    template = load_template(1.0)
    size = (160, 224, 192)
    world = np.eye(4)
    world[:3, 3] = CENTRE - (np.array(size) - 1) / 2
    for example, (subject, modality) in _SUBJECTS.items():
        shape, affine = grid_of(example)
        place = affine if example == "EXAMPLE-T1" else _displaced() @ affine
        still = np.zeros((3, *shape), np.float32)
        disp = exponential(velocity(size, 1.0, _SEED, subject))
        warped = [sample(tissue, disp, world, template.affine, order=1) for tissue in template.tissues]
        thick = [ndimage.gaussian_filter(tissue, _blur(affine)) for tissue in warped]
        tissues = np.stack([sample(part, still, place, world, order=1) for part in thick])
        image = render(tissues, CONTRAST[modality], float(np.abs(np.linalg.det(affine)) ** (1 / 3)), _SEED, example)
        labels = sample(template.labels, disp, world, template.affine, order=0)
        labels = sample(labels, still, place, world, order=0) * (image > 0)
        for path, volume in ((folder / EXAMPLES[example], image), (folder / labels_of(example).name, labels)):
            stored = nib.Nifti1Image(volume.astype(np.uint8), affine)
            stored.set_qform(affine, code=1)
            stored.set_sform(affine, code=1)
            stored.header.set_xyzt_units("mm")
            if "labels" in path.name:
                stored.header.set_intent(1002)
            nib.save(stored, path)


def _displaced() -> Affine:
    """Where the T2's scanner put the head: turned and shifted, which an alignment has to find."""
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("xyz", (-9, 5, -7), degrees=True).as_matrix() * 1.04
    moved[:3, 3] = (-6.0, 11.0, -14.0)
    return moved


def _blur(affine: Affine) -> tuple[float, ...]:
    """Thick slices: mm, along the axes of the world, about."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return tuple(0.4 * np.sqrt(np.maximum(spacing**2 - 1, 0)))


if __name__ == "__main__":
    make_examples(FOLDER)
