"""`register --bids`: derivatives with the scans' entities, in a data set that says what made it."""

import json
import shutil
from pathlib import Path

import pytest
from cli_calls import refused

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.registration import bids
from sitreg_lumir.registration.bids import BidsName, check_names, lay_out, prepare_dataset
from sitreg_lumir.registration.outputs import FILES, MODEL_FIELDS

NAMES = [
    (
        "sub-02_T1w.nii.gz", "sub-01_ses-1_T1w.nii.gz", "sub-01/ses-1/anat/sub-01_ses-1_",
        {"space-sub02T1w_T1w.nii.gz", "from-T1w_to-sub02T1w_mode-image_xfm.h5",
         "from-sub02T1w_to-T1w_mode-image_xfm.h5", "from-T1w_to-MNI152NLin2009aSym_mode-points_xfm.tfm",
         "desc-brain_mask.nii.gz", "space-sub02T1w_desc-whole_jacobian.nii.gz"},
    ),
    ("sub-02_T1w.nii.gz", "sub-01_ses-1_T1w.nii.gz", "sub-02/anat/sub-02_", {"space-sub01ses1T1w_T1w.nii.gz"}),
    (
        "sub-01_ses-1_T1w.nii.gz", "sub-01_ses-2_run-3_FLAIR.mgz", "sub-01/ses-2/anat/sub-01_ses-2_run-3_",
        {"space-ses1T1w_FLAIR.nii.gz", "from-FLAIR_to-ses1T1w_mode-image_xfm.h5"},
    ),
    ("MNI152", "sub-01_T1w.nii", "sub-01/anat/sub-01_", {"space-MNI152NLin2009aSym_T1w.nii.gz"}),
    (
        "sub-01_space-orig_desc-preproc_T1w.nii", "my template.nii.gz", "sub-01/anat/sub-01_",
        {"space-mytemplate_desc-preproc_T1w.nii.gz", "from-T1w_to-mytemplate_mode-image_desc-preproc_xfm.h5",
         "desc-wholeTomytemplate_jacobian.nii.gz"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fixed", "moving", "start", "ends"), NAMES)
def test_names_have_the_scans_entities(fixed: str, moving: str, start: str, ends: set[str]) -> None:
    targets = {derivative.target.as_posix() for derivative in bids._derivatives(fixed, moving)}
    assert {start + end for end in ends} <= targets
    sources = {derivative.source for derivative in bids._derivatives(fixed, moving)}
    if BidsName.of(fixed) and BidsName.of(moving):
        assert sources == FILES - set(MODEL_FIELDS)
    assert len(targets) == len(list(bids._derivatives(fixed, moving)))


def test_pairs_that_bids_has_no_names_for() -> None:
    with pytest.raises(InputError, match="neither this one nor MNI152 is named"):
        check_names([("a", "MNI152", "scans/a.nii.gz")])
    twice = [("a", "MNI152", "x/sub-1_T1w.nii.gz"), ("b", "MNI152", "y/sub-1_T1w.nii.gz")]
    with pytest.raises(InputError, match="pairs a and b would both be sub-1/anat"):
        check_names(twice)
    check_names([("a", "sub-1_T1w.nii", "sub-2_T1w.nii"), ("b", "sub-2_T1w.nii", "sub-3_T1w.nii"),
                 ("c", "sub-3_T1w.nii", "sub-2_T1w.nii"), ("d", "sub-1_T1w.nii", "sub-3_T1w.nii")])  # fmt: skip


def test_files_are_linked_or_copied_and_follow_what_is_registered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "registrations/pair"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(name)
    (folder / "summary.json").write_text('{"verdict": "ok"}')
    prepare_dataset(tmp_path)
    scans = "in/sub-1_T1w.nii.gz", "in/sub-2_T1w.nii.gz"
    lay_out(tmp_path, folder, *scans)
    image = tmp_path / "sub-2/anat/sub-2_space-sub1T1w_T1w.nii.gz"
    assert image.samefile(folder / "warped_moving.nii.gz")
    assert json.loads(image.with_name("sub-2_space-sub1T1w_T1w.json").read_text()) == {
        "SpatialReference": "sub-1_T1w.nii.gz", "Sources": ["sub-2_T1w.nii.gz", "sub-1_T1w.nii.gz"],
        "RegistrationVerdict": "ok",
    }  # fmt: skip
    (folder / "warped_moving.nii.gz").unlink()
    (folder / "warped_moving.nii.gz").write_text("again")
    (folder / "jac_det.nii.gz").unlink()

    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(bids.os, "link", no_links)
    lay_out(tmp_path, folder, *scans)
    assert image.read_text() == "again" and not image.samefile(folder / "warped_moving.nii.gz")
    assert not list(tmp_path.rglob("*_desc-whole_jacobian.nii.gz")) and not list(tmp_path.rglob(".*.nii.gz"))
    prepare_dataset(tmp_path)  # its own data set
    (tmp_path / "dataset_description.json").write_text('{"Name": "study"}')
    with pytest.raises(InputError, match="another BIDS data set"):
        prepare_dataset(tmp_path)


@pytest.mark.slow
def test_the_command_makes_a_data_set(
    t1: Path, t2: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed, moving = tmp_path / "sub-A_T1w.nii.gz", tmp_path / "sub-B_ses-1_T2w.nii.gz"
    shutil.copy(t1, fixed)
    shutil.copy(t2, moving)
    out = tmp_path / "derivatives/sitreg-lumir"
    command = ["register", "--fixed", str(fixed), "--moving", str(moving), "--members", str(members), "--align", "none"]
    command += ["--no-report", "--bids", "-o", str(out)]
    assert main(command) in (0, 3)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "sitreg-lumir"
    anat = out / "sub-B/ses-1/anat"
    assert (anat / "sub-B_ses-1_from-T2w_to-subAT1w_mode-image_xfm.h5").is_file()
    assert (out / "sub-A/anat/sub-A_space-subBses1T2w_T1w.nii.gz").is_file()
    exact = anat / "sub-B_ses-1_space-subAT1w_desc-exact_map.safetensors"
    moved = ["--to", "fixed", "--image", str(moving), "-o", str(tmp_path / "moved.nii.gz")]
    assert main(["apply", "-t", str(exact), *moved]) == 0  # the map is whole under its name, too
    assert main(command) in (0, 3)  # skipped: registered already
    with_others = ["register", "--fixed", "MNI152", "--moving", str(tmp_path / "x.nii.gz"), *command[5:]]
    (tmp_path / "x.nii.gz").write_bytes(t1.read_bytes())
    refused(capsys, with_others, "--bids takes names from scans")
