"""Registers one pair by another package and writes its field in the challenge's format; run by ``compare.py``.

    python methods.py --describe syn
    python methods.py syn FIXED MOVING FIELD --contrasts same

Runs in the environment of those packages and imports nothing else but numpy and nibabel. The images are aligned
affinely already, so only deformations are sought. Each package is called as its own documentation does for brain MRI,
by one call for images of one contrast (``same``) and one for different contrasts (``other``). Prints one JSON line.
"""

import argparse
import json
import logging
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

LPS = np.array([-1.0, -1.0, 1.0])  # of ITK against RAS of NIfTI
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "convexadam": {"same": {}, "other": {}},  # its defaults
    # The schedule of antsRegistrationSyN.sh, with CC half its steps at full resolution: on one pair the other half
    # gained 0.006 Dice for 60 % more time.
    "syn": {
        "same": {"syn_metric": "CC", "syn_sampling": 2, "reg_iterations": (100, 70, 50, 10)},
        "other": {"syn_metric": "mattes", "syn_sampling": 32, "reg_iterations": (100, 70, 50, 20)},
    },
    "fireants": {
        "same": {  # of its script for pairs of OASIS
            "loss_type": "cc",
            "cc_kernel_size": 7,
            "scales": [4, 2, 1],
            "iterations": [250, 200, 100],
            "optimizer": "adam",
            "optimizer_lr": 0.25,
            "optimizer_params": {"beta1": 0.1, "scaledown": False},
            "smooth_grad_sigma": 1,
            "smooth_warp_sigma": 0.25,
        },
        "other": {  # of its quickstart, with the loss that its manual names for different contrasts
            "loss_type": "mi",
            "mi_kernel_type": "gaussian",
            "scales": [4, 2, 1],
            "iterations": [200, 100, 25],
            "optimizer": "adam",
            "optimizer_lr": 0.5,
            "smooth_grad_sigma": 1,
        },
    },
}
FUNCTIONS = {
    "convexadam": ("convexAdam.convex_adam_MIND.convex_adam_pt", "fixed, moving", ("convexAdam", "torch")),
    "syn": ("ants.registration", "fixed, moving, 'SyNOnly'", ("antspyx",)),
    "fireants": ("fireants.registration.greedy.GreedyRegistration", "fixed / 255, moving / 255", ("fireants", "torch")),
}


def main() -> None:
    """Registers one pair, or reports how pairs would be registered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=SETTINGS)
    parser.add_argument("files", nargs="*", type=Path, metavar="FIXED MOVING FIELD")
    parser.add_argument("--contrasts", choices=("same", "other"), default="same", help="default: same")
    parser.add_argument("--describe", action="store_true", help="print the calls and the versions only")
    options = parser.parse_args()
    if options.describe:
        print(json.dumps(describe(options.method)))
        return
    fixed, moving, field = options.files
    register = {"convexadam": convexadam, "syn": syn, "fireants": fireants}[options.method]
    disp, seconds = register(fixed, moving, **SETTINGS[options.method][options.contrasts])
    affine = nib.load(fixed).affine
    image = nib.Nifti1Image(disp.astype(np.float32), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, field)
    print(json.dumps({"call_seconds": seconds}))


def describe(method: str) -> dict[str, Any]:
    """The calls as text, and the packages' versions."""
    function, begin, packages = FUNCTIONS[method]
    calls = {}
    for contrasts in ("same", "other"):
        arguments = [f"{name}={value!r}" for name, value in SETTINGS[method][contrasts].items()]
        calls[contrasts] = f"{function}({', '.join([begin, *arguments])})"
    return {"calls": calls, "versions": {package: version(package) for package in packages}}


def convexadam(fixed: Path, moving: Path, **arguments: Any) -> tuple[np.ndarray, float]:
    """ConvexAdam on MIND-SSC; gives voxels of the array's axes already. ``(X, Y, Z, 3)`` and CPU seconds of the call.

    Source: Siebert et al., ConvexAdam, IEEE TMI 2024.
    """
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    torch.set_num_threads(1)
    images = [nib.load(path) for path in (fixed, moving)]
    start = time.process_time()
    disp = convex_adam_pt(*images, device=torch.device("cpu"), dtype=torch.float32, **arguments)
    return disp, time.process_time() - start


def syn(fixed: Path, moving: Path, **arguments: Any) -> tuple[np.ndarray, float]:
    """ANTs' symmetric normalisation. ``(X, Y, Z, 3)``, voxels, fixed grid, and CPU seconds of the call.

    Source: Avants et al., Symmetric diffeomorphic image registration with cross-correlation, MedIA 2008.
    """
    import ants

    images = [ants.image_read(str(path)) for path in (fixed, moving)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        registered = ants.registration(*images, "SyNOnly", outprefix=f"{folder}/syn", **arguments)
        seconds = time.process_time() - start
        whole = ants.apply_transforms(*images, registered["fwdtransforms"], compose=f"{folder}/whole")
        return from_itk(whole, fixed, moving), seconds


def fireants(fixed: Path, moving: Path, **arguments: Any) -> tuple[np.ndarray, float]:
    """FireANTs, greedy. ``(X, Y, Z, 3)``, voxels, fixed grid, and CPU seconds of the call.

    Intensities are divided by 255: the histogram of its mutual information spans 0..1.

    Source: Jena et al., FireANTs, arXiv 2404.01249.
    """
    import SimpleITK as sitk  # noqa: N813, its usual name
    import torch
    from fireants.io import BatchedImages, Image
    from fireants.registration.greedy import GreedyRegistration

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    read = [sitk.ReadImage(str(path), sitk.sitkFloat32) / 255 for path in (fixed, moving)]
    images = [BatchedImages([Image(image, device="cpu")]) for image in read]
    start = time.process_time()
    registration = GreedyRegistration(fixed_images=images[0], moving_images=images[1], progress_bar=False, **arguments)
    registration.optimize()
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        registration.save_as_ants_transforms(f"{folder}/warp.nii.gz")
        return from_itk(f"{folder}/warp.nii.gz", fixed, moving), seconds


def from_itk(field: str, fixed: Path, moving: Path) -> np.ndarray:
    """``(X, Y, Z, 3)``, voxels, fixed grid, of an ITK field on the fixed grid, mm, LPS."""
    world = np.asarray(nib.load(field).dataobj, dtype=np.float64)[:, :, :, 0] * LPS
    to_world, from_world = nib.load(fixed).affine, np.linalg.inv(nib.load(moving).affine)
    if world.shape[:3] != nib.load(fixed).shape:
        raise ValueError(f"the field is {world.shape[:3]}, the fixed image {nib.load(fixed).shape}")
    grid = np.stack(np.indices(world.shape[:3]), axis=-1)
    moved = grid @ to_world[:3, :3].T + to_world[:3, 3] + world
    return moved @ from_world[:3, :3].T + from_world[:3, 3] - grid


if __name__ == "__main__":
    main()
