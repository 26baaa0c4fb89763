"""Every file that a user can name: a small valid one, and the command that reads it."""

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813 (its usual name)
import torch
from data_samples import make_dataset

from sitreg_lumir.challenge.provenance import make_provenance, save_field
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.io.itk import save_itk_field
from sitreg_lumir.io.maps import save_map
from sitreg_lumir.io.read import load_disp
from sitreg_lumir.io.write import save_disp
from sitreg_lumir.network.card import CARD_KEY, ModelCard
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import save_member

SHAPE = (8, 10, 6)
OUT = ("-o", "out.nii")


@dataclass(frozen=True)
class Door:
    """A file and the command that reads it.

    Attributes:
        file: that is changed, from the working folder.
        arguments: of the command line; the file is named among them.
        form: ``binary`` or ``text``; ``gzip`` and ``zip:RECORD`` are also changed inside of their container.
        beside: a JSON that holds the file's checksum, which follows the change in most cases.
        code: that the command ends with if the file is as it should be; 2 where a later file is none, so that the
            command ends soon.
        leaves: whether the command writes something even if it is refused.
    """

    file: str
    arguments: tuple[str, ...]
    form: str = "binary"
    beside: str = ""
    code: int = 0
    leaves: bool = False


def _apply(*transform: str, image: str = "scan.nii.gz", more: tuple[str, ...] = ()) -> tuple[str, ...]:
    reference = ("--reference", "grid.nii.gz")
    return ("apply", *(part for name in transform for part in ("-t", name)), "--image", image, *reference, *OUT, *more)


def _scan(name: str, form: str = "binary") -> Door:
    return Door(name, _apply("affine.tfm", image=name), form)


APPLY, SCORE, FIXED = ("apply", "-t", "affine.tfm"), ("evaluate", "fields"), ("--to", "fixed")
EXPORT, GROUPS = ("export", "-o", "out.safetensors"), "x_evaluation_config.json"
EVALUATE = ("evaluate", "--identity", "-o", "scores", "--data")
REGISTER = ("register", "--fixed", "head.nii.gz", "--moving", "text.nii", "-o", "out", "--align", "none")
REGISTER = (*REGISTER, "--members", "whole.safetensors", "--fixed-mask", "mask.nii.gz")
ENTRY = "made2/made/T1_points-csv_0000.json"
BIDS = ("register", "--fixed", "sub-1_T1w.nii", "--moving", "text.nii", "-o", "bids", "--bids")
TEMPLATE = ("template", "--images", "text.nii", "points.csv", "-o", "template")
COLLECT = ("register", "--pairs", "collected.csv", "-o", "collected", "--collect")
DOORS = {
    "scan .nii": _scan("scan.nii"),
    "scan .nii.gz": _scan("scan.nii.gz", "gzip"),
    "scan .mgz": _scan("scan.mgz", "gzip"),
    "scan .nrrd": _scan("scan.nrrd", "text"),
    "scan .nhdr": _scan("scan.nhdr", "text"),
    "scan .mha": _scan("scan.mha", "text"),
    "scan .hdr": Door("pair.hdr", _apply("affine.tfm", image="pair.img")),
    "labels": Door("labels.nii.gz", (*APPLY, "--labels", "labels.nii.gz", "--reference", "grid.nii.gz", *OUT), "gzip"),
    "grid of --reference": Door("grid.nii.gz", _apply("affine.tfm"), "gzip"),
    "grid of --to": Door("grid.nii.gz", ("resample-field", "disp.nii.gz", "--to", "grid.nii.gz", *OUT), "gzip"),
    "field of ITK": Door("xfm.nii.gz", _apply("xfm.nii.gz"), "gzip"),
    "field of ITK .mha": Door("xfm.mha", _apply("xfm.mha"), "text"),
    "field of LUMIR": Door("disp.nii.gz", ("resample-field", "disp.nii.gz", "--to", "grid.nii.gz", *OUT), "gzip"),
    "transform .tfm": Door("affine.tfm", _apply("affine.tfm"), "text"),
    "transform .mat": Door("affine.mat", _apply("affine.mat")),
    "transform .h5": Door("composite.h5", _apply("composite.h5")),
    "LTA": Door("affine.lta", _apply("affine.lta"), "text"),
    "FLIRT": Door("flirt.mat", _apply("flirt.mat"), "text"),
    "points": Door("points.csv", (*APPLY, "--points", "points.csv", "-o", "out.csv"), "text"),
    "map .safetensors": Door("map_a.safetensors", (*_apply("map_a.safetensors"), *FIXED), "text", "map_a.json"),
    "map .json": Door("map_a.json", (*_apply("map_a.safetensors"), *FIXED), "text"),
    "member .safetensors": Door("m.safetensors", (*EXPORT, "m.safetensors"), "text", "m.json"),
    "member .json": Door("m.json", (*EXPORT, "m.safetensors"), "text"),
    "checkpoint": Door("m.ckpt", (*EXPORT, "m.ckpt"), "zip:data.pkl"),
    "weights of the authors": Door("o.pt", (*EXPORT, "o.pt", "--official", "--data", "data"), "zip:data.pkl"),
    "config": Door("c.yaml", ("fit", "--config", "c.yaml", "--data.root", "data", "--print_config"), "text"),
    "dataset JSON": Door("data/LUMIR_dataset.json", (*EVALUATE, "data/LUMIR_dataset.json"), "text"),
    "evaluation config": Door(GROUPS, (*EVALUATE, "data", "--groups", GROUPS), "text"),
    "labels of a data set": Door("data/labelsVal/LUMIRMRI_0100_0000.nii.gz", (*EVALUATE, "data"), "gzip"),
    "image of a data set": Door("data/imagesVal/LUMIRMRI_0100_0000.nii.gz", (*EVALUATE, "data"), "gzip"),
    "field that is scored": Door("fields/disp_0100_0101.nii.gz", (*SCORE, "--data", "data", "-o", "scores"), "gzip"),
    "landmarks": Door("data/landmarksVal/LUMIRMRI_0100_0000.nii.gz", (*EVALUATE, "data"), "gzip"),
    "provenance": Door("fields/disp_0100_0101.json", ("submit", "fields", "--data", "data", "-o", "out.zip"), "text"),
    "field of submit": Door("fields/disp_0100_0101.nii.gz", ("submit", "fields", "--data", "data", "-o", "out.zip"),
                            "gzip"),
    "mask": Door("mask.nii.gz", REGISTER, "gzip", code=2),
    "lesion": Door("lesion.nii.gz", (*REGISTER, "--refine", "1", "--fixed-lesion", "lesion.nii.gz"), "gzip", code=2),
    "alignment": Door("affine.tfm", (*REGISTER, "--fixed-to-template", "affine.tfm"), "text", code=2),
    "pairs table": Door("pairs.csv", ("register", "--pairs", "pairs.csv", "-o", "pairs"), "text", "", 2, True),
    "summary": Door("collected/a/summary.json", COLLECT, "text", "", 2, True),
    "error of a pair": Door("collected/.pairs/b.error.json", COLLECT, "text", "", 2, True),
    "scans table": Door("scans.csv", ("dataset", "scans.csv", "-o", "made"), "text", "", 2, True),
    "entry of a scan": Door(ENTRY, ("dataset", "scans.csv", "-o", "made2"), "text", "", 2, True),
    "BIDS description": Door("bids/dataset_description.json", BIDS, "text", "", 2, True),
    "template's summary": Door("template/summary.json", TEMPLATE, "text", "", 2),
}  # fmt: skip
"""By name; in the order of the documentation's table."""


def make(folder: Path) -> None:
    """Writes a valid file for every door into a folder."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    values = np.random.default_rng(0).integers(1, 200, SHAPE).astype(np.int16)
    for name in ("scan.nii", "scan.nii.gz", "grid.nii.gz"):
        nibabel.Nifti1Image(values, affine).to_filename(folder / name)
    nibabel.Nifti1Image((values // 50).astype(np.uint8), affine).to_filename(folder / "labels.nii.gz")
    nibabel.MGHImage(values, affine).to_filename(folder / "scan.mgz")  # type: ignore[no-untyped-call]
    nibabel.Nifti1Pair(values, affine).to_filename(folder / "pair.img")
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    image.SetSpacing((2, 2, 2))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    for name in ("scan.nrrd", "scan.nhdr", "scan.mha"):
        sitk.WriteImage(image, str(folder / name), name == "scan.mha")
    disp = np.random.default_rng(1).normal(0, 1, (3, *SHAPE)).astype(np.float32)
    save_itk_field(folder / "xfm.nii.gz", disp, affine)
    sitk.WriteImage(sitk.ReadImage(str(folder / "xfm.nii.gz"), sitk.sitkVectorFloat32), str(folder / "xfm.mha"))
    save_disp(folder / "disp.nii.gz", disp / 2, affine)
    euler = sitk.Euler3DTransform((1, 2, 3), 0.1, 0.05, -0.1, (1, 2, 3))
    for name in ("affine.tfm", "affine.mat"):
        sitk.WriteTransform(euler, str(folder / name))
    vectors = sitk.Cast(sitk.ReadImage(str(folder / "xfm.nii.gz"), sitk.sitkVectorFloat32), sitk.sitkVectorFloat64)
    composite = sitk.CompositeTransform([euler, sitk.DisplacementFieldTransform(vectors)])
    sitk.WriteTransform(composite, str(folder / "composite.h5"))
    volume = (
        "valid = 1\nfilename = a\nvolume = 8 10 6\nvoxelsize = 2 2 2\nxras = 1 0 0\nyras = 0 1 0\nzras = 0 0 1\n"
        "cras = 7 9 5\n"
    )
    rows = "1 0 0 1\n0 1 0 2\n0 0 1 3\n0 0 0 1\n"
    (folder / "affine.lta").write_text(
        f"type = 1\nnxforms = 1\nmean = 0 0 0\nsigma = 1\n1 4 4\n{rows}"
        f"src volume info\n{volume}dst volume info\n{volume}"
    )
    (folder / "flirt.mat").write_text(rows)
    (folder / "points.csv").write_text("name,x,y,z\na,1,2,3\nb,4,5,6\n")
    _write_map(folder / "map_a.safetensors", affine)
    _write_members(folder, affine)
    make_dataset(folder / "data")
    (folder / "fields").mkdir()
    for pair in ("0100_0101", "0101_0102", "0102_0100"):
        save_disp(folder / f"fields/disp_{pair}.nii.gz", disp / 5, affine)
    (folder / "c.yaml").write_text(
        "seed_everything: 1\nmodel:\n  class_path: MindRegistration\n  init_args: {features: [4, 4], window: 3}\n"
        "trainer: {max_epochs: 2, callbacks: [{class_path: NdvPenalty, init_args: {start_epoch: 1, weight: 8e-5}}]}\n"
    )
    images = {"fixed": "LUMIRMRI_0100_0000.nii.gz", "moving": "LUMIRMRI_0101_0000.nii.gz"}
    methods = [{"metric": "dice", "labels": [1, 2]}, {"metric": "ndv"}]
    evaluation = {"eval_pairs": [images], "evaluation_methods": methods}
    (folder / "x_evaluation_config.json").write_text(json.dumps(evaluation))
    _write_results(folder)
    _write_head(folder)
    (folder / "text.nii").write_text("no scan")
    (folder / "sub-1_T1w.nii").write_text("no scan")
    (folder / "pairs.csv").write_text("name,fixed,moving\na,text.nii,text.nii\nb,text.nii,points.csv\n")


def _write_results(folder: Path) -> None:
    """What earlier commands left, and later ones read."""
    dataset = read_dataset(folder / "data", validation=True)
    for pair in dataset.validation:
        provenance = make_provenance(pair, [{"name": "m", "sha256": "0" * 64}], {"exact": False})
        field = folder / f"fields/disp_{pair.name}.nii.gz"
        disp, affine = load_disp(field)
        save_field(field, disp, affine, provenance)
    for pair in ("0100", "0101"):
        image = nibabel.load(folder / f"data/imagesVal/LUMIRMRI_{pair}_0000.nii.gz")  # type: ignore[attr-defined]
        (folder / "data/landmarksVal").mkdir(exist_ok=True)
        points = (np.asarray(image.dataobj) > 200).astype(np.uint16) * np.arange(1, SHAPE[2] + 1, dtype=np.uint16)
        name = f"data/landmarksVal/LUMIRMRI_{pair}_0000.nii.gz"
        nibabel.Nifti1Image(points, image.affine).to_filename(folder / name)
    summary = {
        "made_from": {"files": {"fixed": {"name": "a"}, "moving": {"name": "b"}}, "options": {"refine": 0}},
        "verdict": "ok",
        "reasons": [],
        "seconds": {"predict": 1.5},
        "similarity": {"aligned": {"mind": 0.3}, "registered": {"mind": 0.2}},
        "inverse_error_mm": {"median": 0.001},
        "rounds": [],
    }
    (folder / "collected.csv").write_text("name,fixed,moving\na,gone,gone\nb,gone,gone\n")
    (folder / "scans.csv").write_text("image,subject\npoints.csv,one\n")
    entry = {"made_from": {"files": {"image": {"name": "a"}}, "options": {"strip": None}}}
    for name, content in {
        "collected/a/summary.json": summary,
        "collected/.pairs/b.error.json": {"name": "b", "reason": "no scan"},
        ENTRY: entry,
        "bids/dataset_description.json": {"Name": "a", "GeneratedBy": [{"Name": "sitreg-lumir"}]},
        "template/summary.json": summary,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "made2/images").mkdir()
    (folder / "made2/images/T1_points-csv_0000.nii.gz").touch()


def _write_head(folder: Path) -> None:
    """A brain alone, its mask, a lesion, and a member whose grid holds it."""
    shape = (24, 32, 24)
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = (-92, -142, -88)
    inside = sum(((np.indices(shape)[axis] - (11.5, 15.5, 11.5)[axis]) / size) ** 2
                 for axis, size in enumerate((8, 9, 7))) < 1  # fmt: skip
    values = np.where(inside, np.random.default_rng(0).integers(50, 200, shape), 0).astype(np.uint8)
    for name, content in (("head", values), ("mask", inside), ("lesion", inside & (values > 190))):
        nibabel.Nifti1Image(content.astype(np.uint8), affine).to_filename(folder / f"{name}.nii.gz")
    torch.manual_seed(0)
    network = SITReg(in_channels=1, features=[4, 4], head_features=[4, 4])
    card = ModelCard(network.architecture, None, list(shape), affine.tolist(), training={"seed": 1})
    save_member(folder / "whole.safetensors", network, card)


def _write_map(path: Path, affine: np.ndarray) -> None:
    random = torch.Generator().manual_seed(0)
    updates = [
        tuple(0.1 * torch.rand(1, 3, *(-(-size // step) for size in SHAPE), generator=random) for _ in range(2))
        for step in (2, 1)
    ]
    whole = np.ones(SHAPE, np.bool_)
    rounded = SplineUpdates.rounded([(first, second) for first, second in updates], SHAPE)
    forward = SplineMap(np.eye(4), np.eye(4), affine, rounded, whole, whole)
    save_map(path, forward, {"fixed": (SHAPE, affine), "moving": (SHAPE, affine)})


def _write_members(folder: Path, affine: np.ndarray) -> None:
    from official_states import official_state

    torch.manual_seed(0)
    network = SITReg(in_channels=1, features=[4, 4], head_features=[4, 4])
    card = ModelCard(network.architecture, None, list(SHAPE), affine.tolist(), training={"seed": 1})
    save_member(folder / "m.safetensors", network, card)
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, CARD_KEY: card.to_dict(), "epoch": 1, "global_step": 2}, folder / "m.ckpt")
    torch.save({"registration_network": official_state(1, features=(4, 4), head_features=(4, 4))}, folder / "o.pt")


def bombs() -> dict[str, tuple[str, Callable[[], bytes]]]:
    """Files that claim or unpack to what no machine holds, by the door that they come to."""
    header = nibabel.Nifti2Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_sform(np.eye(4), 1)
    header.set_data_dtype(np.float32)
    claim = header.binaryblock + bytes(4)
    mgh = gzip.compress(struct.pack(">7i", 1, 30000, 30000, 30000, 1, 3, 0) + bytes(256))
    zeros = gzip.compress(bytes(352) + bytes(1 << 28), 9)
    spline = b"#Insight Transform File V1.0\nTransform: BSplineTransform_double_3_3\nParameters: 0\nFixedParameters: "
    return {
        "a claimed volume": ("scan .nii", lambda: claim),
        "a claimed volume, compressed": ("scan .nii.gz", lambda: gzip.compress(claim)),
        "a claimed grid": ("grid of --reference", lambda: gzip.compress(claim)),
        "a claimed field": ("field of LUMIR", lambda: gzip.compress(claim)),
        "zeros": ("scan .nii.gz", lambda: zeros),
        "a claimed .mgz": ("scan .mgz", lambda: mgh),
        "a claimed spline": ("transform .tfm", lambda: spline + b"100000 100000 100000\n"),
        "nested JSON": ("member .json", lambda: b"[" * 1_000_000),
        "aliases": ("config", lambda: b"a: &a [1, 1]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(20))),
    }  # fmt: skip
