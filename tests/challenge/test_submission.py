"""A folder of fields becomes the challenge's zip, or is refused with every reason; the container's entry point."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import data_samples
import nibabel
import numpy as np
import pytest
import torch
import warm_processes

from sitreg_lumir.challenge import submission
from sitreg_lumir.challenge.provenance import make_provenance, provenance_path, save_field
from sitreg_lumir.challenge.submission import submission_name
from sitreg_lumir.cli import main
from sitreg_lumir.data.images import Image, Pair
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.io.write import save_disp
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import ModelCard, save_member

MEMBERS = [{"name": f"{n}.safetensors", "sha256": str(n) * 64} for n in (1, 2)]
PAIRS = ("0100_0101", "0101_0102", "0102_0100")
REPOSITORY = Path(__file__).resolve().parents[2]


def write_field(
    folder: Path, pair: Pair, name: str | None = None, seed: int = 0, members: Any = MEMBERS, **options: Any
) -> Path:
    path = folder / f"disp_{name or pair.name}.nii.gz"
    disp = np.random.default_rng(seed).normal(0, 0.05, (3, *data_samples.SHAPE))
    save_field(path, disp, data_samples.AFFINE, make_provenance(pair, members, {"precision": "float32", **options}))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_samples.make_dataset(tmp_path / "data")


@pytest.fixture
def pairs(root: Path) -> tuple[Pair, ...]:
    return read_dataset(root, validation=True).validation


@pytest.fixture
def folder(tmp_path: Path, pairs: tuple[Pair, ...]) -> Path:
    for seed, pair in enumerate(pairs):
        write_field(tmp_path / "fields", pair, seed=seed)
    return tmp_path / "fields"


def submit(folder: Path, dataset: Path, out: Path, *more: str) -> int:
    return main(["submit", str(folder), "--dataset", str(dataset), "-o", str(out), *more])


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, root: Path) -> list[str]:
    """The reasons of a refused folder: one line each, then one line of error, and no zip."""
    capsys.readouterr()
    out = root.parent / "refused" / "submission.zip"
    assert submit(folder, root / "LUMIR_dataset.json", out) == 2
    assert not out.exists() and not list(out.parent.glob("*"))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("checking", "\r"))]
    assert lines[-1].startswith("sitreg-lumir: error:") and lines[-1].count(str(folder)) == 1
    assert all(line.startswith("refused: ") for line in lines[:-1])
    return lines[:-1]


def image(subject: str, modality: str) -> Image:
    return Image(Path(f"/data/imagesVal/LUMIRMRI_{subject}_{modality}.nii.gz"), subject, modality)


@pytest.mark.parametrize(
    ("fixed", "moving", "name"),
    [
        ("0000", "0000", "disp_0100_0101"),
        ("0001", "0001", "disp_0100_0101"),
        ("0000", "0001", "disp_0100_0101"),
        ("0001", "0000", "disp_0100_0001_0101_0000"),
        ("0000", "0002", "disp_0100_0000_0101_0002"),
    ],
)
def test_the_name_is_the_official_evaluation_s(fixed: str, moving: str, name: str) -> None:
    assert submission_name(Pair(image("0100", fixed), image("0101", moving), "")) == f"{name}.nii.gz"


def test_a_good_folder_becomes_a_zip_of_the_same_bytes_each_time(
    root: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.zip", tmp_path / "new" / "second.zip"
    assert submit(folder, root / "LUMIR_dataset.json", first) == 0
    printed = capsys.readouterr().out
    assert "3 fields" in printed and "NDV: mean" in printed and "fixed foreground" in printed and "2 members" in printed
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert submit(folder, root, second) == 0
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in second.parent.iterdir()) == ["second.zip"]
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"disp_{pair}.nii.gz" for pair in PAIRS]
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            assert archive.read(entry) == (folder / entry.filename).read_bytes()


def test_without_images_names_decide_and_it_is_said(
    root: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    shutil.copy(root / "LUMIR_dataset.json", lists)
    assert submit(folder, lists / "LUMIR_dataset.json", tmp_path / "a.zip") == 0
    printed = capsys.readouterr().out
    assert "3 of 3 images are not in" in printed and "all voxels" in printed
    images = ["--images", str(root / "imagesVal" / "..")]
    assert submit(folder, lists / "LUMIR_dataset.json", tmp_path / "b.zip", *images) == 0
    assert "fixed foreground" in capsys.readouterr().out
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_long_names_are_shortened_where_the_evaluation_wants_it(
    root: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = read_dataset(root / "LUMIR_dataset_multimodal.json", validation=True)
    path = write_field(folder, mixed.validation[0], mixed.validation[0].long_name, seed=7)
    assert submit(folder, mixed.path, tmp_path / "mixed.zip") == 0
    assert "3 fields" in capsys.readouterr().out  # those of the other list are left out, and named
    with zipfile.ZipFile(tmp_path / "mixed.zip") as archive:
        assert archive.namelist() == ["disp_0100_0101.nii.gz"]
        assert archive.read("disp_0100_0101.nii.gz") == path.read_bytes()
    both = data_samples.content(root)
    both["validation"] += json.loads(mixed.path.read_text())["validation"]
    data_samples.write(root, both)
    (reason,) = refusal(capsys, folder, root)
    assert "2 pairs" in reason and "disp_0100_0101.nii.gz" in reason


def test_every_reason_is_reported_at_once(
    root: Path, folder: Path, pairs: tuple[Pair, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "disp_0100_0101.nii.gz").rename(folder / "disp_0101_0100.nii.gz")
    provenance_path(folder / "disp_0100_0101.nii.gz").unlink()
    save_disp(folder / "disp_0101_0102.nii.gz", np.zeros((3, 4, 4, 4)), np.eye(4))
    provenance_path(folder / "disp_0101_0102.nii.gz").unlink()
    reasons = refusal(capsys, folder, root)
    assert len(reasons) == 2
    assert "disp_0100_0101.nii.gz: missing" in reasons[0] and "fixed image comes first" in reasons[0]
    assert "(4, 4, 4)" in reasons[1]

    write_field(folder, pairs[0], members=[MEMBERS[0]])
    write_field(folder, pairs[1])
    reasons = refusal(capsys, folder, root)
    assert len(reasons) == 1 and "disp_0100_0101.nii.gz" in reasons[0] and "members.1.sha256" in reasons[0]
    write_field(folder, pairs[0], tolerance=0.1)
    (reason,) = refusal(capsys, folder, root)
    assert "options.tolerance is 0.1, absent in most" in reason
    write_field(folder, pairs[0])
    provenance_path(folder / "disp_0100_0101.nii.gz").unlink()
    (reason,) = refusal(capsys, folder, root)
    assert "has no disp_0100_0101.json" in reason
    write_field(folder, pairs[1], "0100_0101")
    (reason,) = refusal(capsys, folder, root)
    assert "another image" in reason and "LUMIRMRI_0102_0000.nii.gz" in reason


def damage(path: Path, kind: str) -> str:
    """Makes a field unfit; the word that the reason must have."""
    content = nibabel.load(path)
    values, affine = np.asarray(content.dataobj), content.affine
    if kind == "double":
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float64), affine), path)
    elif kind == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "integers":
        nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), affine), path)
    elif kind == "nan":
        values = values.copy()
        values[1, 1, 1, 1] = np.nan
        nibabel.save(nibabel.Nifti1Image(values, affine), path)
    elif kind == "plain":
        path.write_bytes(gzip.decompress(path.read_bytes()))
    elif kind == "components first":
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(values, -1, 0), affine), path)
    elif kind == "other":
        save_disp(path, np.zeros((3, *data_samples.SHAPE)), affine)
        return "is not the field"
    provenance = json.loads(provenance_path(path).read_text())
    provenance["field"]["sha256"] = sha256_file(path)
    provenance_path(path).write_text(json.dumps(provenance))
    words = {"double": "float64", "half": "truncated", "integers": "int16", "nan": "NaN", "plain": "gzip"}
    return words.get(kind, "(X, Y, Z, 3)")


@pytest.mark.parametrize("kind", ["double", "half", "integers", "nan", "plain", "components first", "other"])
def test_an_unfit_field_is_refused(root: Path, folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    word = damage(folder / "disp_0101_0102.nii.gz", kind)
    (reason,) = refusal(capsys, folder, root)
    assert "disp_0101_0102.nii.gz" in reason and word in reason


def test_fields_of_changed_images_are_refused(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_samples.save(root / "imagesVal/LUMIRMRI_0101_0000.nii.gz", data_samples.head(9))
    reasons = refusal(capsys, folder, root)
    assert len(reasons) == 2 and all("LUMIRMRI_0101_0000.nii.gz" in reason for reason in reasons)


def test_fields_of_other_software_are_taken_on_trust(
    root: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.glob("*.json"):
        path.unlink()
    assert submit(folder, root, tmp_path / "a.zip") == 0
    assert "no provenance" in capsys.readouterr().out


def test_wrong_arguments_end_in_one_line(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str, folder: Path = folder, dataset: Path = root, out: str = "a.zip", more: str = "") -> None:
        assert submit(folder, dataset, root / out, *more.split()) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines

    refused("gone", folder=root / "gone")
    refused("gone.json", dataset=root / "gone.json")
    refused("a.tar", ".zip", out="a.tar")
    refused("--fast", more="--fast")
    before = (root / "LUMIR_dataset.json").read_text()
    data_samples.write(root, {**json.loads(before), "validation": [{"fixed": "../a_0_0.nii", "moving": "/b_0_0.nii"}]})
    refused("2 problems", "../a_0_0.nii leaves", "/b_0_0.nii leaves")


@pytest.mark.slow
def test_the_challenge_s_own_lists(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """36 full-size fields under our names -> a zip that holds what the four evaluation configs ask for."""
    monkeypatch.setattr(submission, "ndv", lambda disp, mask: 0.0)  # it has tests of its own, and takes seconds
    lists = shared / "lumir25"
    dataset = read_dataset(lists / "LUMIR25_dataset.json", validation=True, check_files=False)
    assert len(dataset.validation) == 36
    source = tmp_path / "zero.nii.gz"
    save_disp(source, np.zeros((3, *dataset.shape), dtype=np.float32), np.eye(4))
    folder = tmp_path / "fields"
    folder.mkdir()
    for pair in dataset.validation:
        multimodal = pair.contrasts == "T1-T2"
        path = folder / f"disp_{pair.long_name if multimodal else pair.name}.nii.gz"
        os.link(source, path)
        images = {
            role: {"name": image.path.name, "sha256": "0" * 64}
            for role, image in (("fixed", pair.fixed), ("moving", pair.moving))
        }
        made = {"members": MEMBERS, "options": {}, "version": "1", "field": {"sha256": sha256_file(source)}}
        provenance_path(path).write_text(json.dumps(images | made))
    out = tmp_path / "submission.zip"
    assert submit(folder, dataset.path, out) == 0
    printed = capsys.readouterr().out
    assert "36 fields" in printed and "images are not in" in printed and "NDV: mean 0.0000 %" in printed
    wanted = set()
    for config in sorted(lists.glob("*_evaluation_config.json")):
        content = json.loads(config.read_text())
        assert content["expected_shape"] == [*dataset.shape, 3]
        for wanted_pair in content["eval_pairs"]:
            fixed, moving = (Path(wanted_pair[role]).name.split("_")[1] for role in ("fixed", "moving"))
            wanted.add(f"disp_{fixed}_{moving}.nii.gz")
    with zipfile.ZipFile(out) as archive:
        assert len(wanted) == 36 and set(archive.namelist()) == wanted


@pytest.fixture
def members(tmp_path: Path) -> Path:
    network = SITReg(6, features=(4, 4), head_features=(4, 4))
    for head in network.heads:
        torch.nn.init.normal_(head.final.weight, std=0.3)  # type: ignore[union-attr]
    card = ModelCard(network.architecture, {}, list(data_samples.SHAPE), data_samples.AFFINE.tolist())
    save_member(tmp_path / "members" / "one.safetensors", network, card)
    return tmp_path / "members"


@pytest.mark.slow
def test_the_entry_point_as_the_container_runs_it(root: Path, members: Path, tmp_path: Path) -> None:
    """Mounts apart from each other, read-only input, another folder, no home; a second run finds all done."""
    mounts = tmp_path / "app"
    mounts.mkdir()
    (root / "LUMIR_dataset.json").rename(mounts / "LUMIR25_dataset.json")
    (root / "LUMIR_dataset_multimodal.json").unlink()
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(path for path in root.rglob("*"))
    elsewhere, scratch = tmp_path / "elsewhere", tmp_path / "scratch"
    elsewhere.mkdir()
    scratch.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "TMPDIR": str(scratch),
        "OMP_NUM_THREADS": "1",
        "SITREG_DATASET": str(mounts / "LUMIR25_dataset.json"),
        "SITREG_IMAGES": str(root),
        "SITREG_MEMBERS": str(members),
        "SITREG_OUTPUT": str(tmp_path / "output"),
    }

    def run(**changes: str) -> "subprocess.CompletedProcess[str]":
        return warm_processes.run(["container", "--device", "cpu"], elsewhere, {**environment, **changes})

    command = [sys.executable, "-m", "sitreg_lumir.cli", "container", "--device", "cpu"]
    done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fields = sorted(path.name for path in (tmp_path / "output").glob("*.nii.gz"))
    assert fields == [f"disp_{pair}.nii.gz" for pair in PAIRS]
    field = nibabel.load(tmp_path / "output" / fields[0])
    assert field.shape == (*data_samples.SHAPE, 3) and field.get_data_dtype() == np.float32
    assert not list(elsewhere.iterdir()) and not list(scratch.glob("sitreg*"))
    assert sorted(path for path in root.rglob("*")) == before
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").iterdir()}
    assert "3 fields are there already" in run().stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "output").iterdir()}

    for variable in ("SITREG_DATASET", "SITREG_IMAGES", "SITREG_MEMBERS"):
        wrong = run(**{variable: str(tmp_path / "gone")})
        lines = [line for line in wrong.stderr.splitlines() if line.startswith("sitreg-lumir: error:")]
        assert wrong.returncode == 2 and len(lines) == 1 and "gone" in lines[0] and "Traceback" not in wrong.stderr
    assert submit(tmp_path / "output", mounts / "LUMIR25_dataset.json", tmp_path / "a.zip", "--images", str(root)) == 0


def test_the_dockerfile_holds_to_what_is_there() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    instructions = [line for line in lines if line and not line.startswith("#")]
    assert not any("://" in line or "index" in line for line in instructions)
    for line in instructions:
        if line.startswith("COPY") and "${" not in line:
            assert all((REPOSITORY / source).exists() for source in line.split()[1:-1]), line
    assert instructions[-1] == 'ENTRYPOINT ["sitreg-lumir", "container"]'
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert not {"configs", "sitreg_lumir", "members", "constraints.txt", "pyproject.toml", "README.md"} & set(ignored)


@pytest.mark.parametrize("verb", ["submit", "container"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"example: sitreg-lumir {verb}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"sitreg-lumir {verb} " in capsys.readouterr().out


def test_paths_of_a_list_start_at_the_images_folder_and_stay_there(root: Path, tmp_path: Path) -> None:
    content = data_samples.content(root)
    file = data_samples.write(tmp_path, content, "elsewhere.json")
    for folder in (root, root / "imagesVal" / ".."):
        dataset = read_dataset(file, validation=True, images=folder)
        assert dataset.validation[0].fixed.path.is_file() and dataset.path == file
    content["validation"] = [{"fixed": f"../{root.name}/imagesVal/LUMIRMRI_0100_0000.nii.gz", "moving": "a_1_0.nii"}]
    data_samples.write(tmp_path, content, "elsewhere.json")
    with pytest.raises(InputError, match="leaves the folder"):
        read_dataset(file, validation=True, images=root / "imagesVal", check_files=False)
