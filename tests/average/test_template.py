"""`template`: a mean brain that no scan leads, the same whatever the order, and kept when it is stopped."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import sitreg_lumir
from sitreg_lumir.average import build as build_module
from sitreg_lumir.average import outputs
from sitreg_lumir.average.rounds import Rounds
from sitreg_lumir.average.subjects import names_of
from sitreg_lumir.cli import main
from sitreg_lumir.demo.data import make_demo_data
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import ModelCard, save_member
from sitreg_lumir.registration.scan import ScanFiles

Array = NDArray[Any]
SHAPE = (40, 56, 48)
OUTPUTS = {"template.nii.gz", "template_brain.nii.gz", "template_deviation.nii.gz", "affine_mean.nii.gz"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four T1 brains at 4 mm, and two more with a T2, on LUMIR's field of view."""
    folder = tmp_path_factory.mktemp("scans") / "data"
    make_demo_data(folder, training=4)
    return folder


@pytest.fixture(scope="module")
def images(data: Path) -> list[str]:
    return sorted(str(path) for path in (data / "imagesTr").glob("*.nii.gz"))


@pytest.fixture(scope="module")
def member(images: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained member whose fields are a few mm large."""
    torch.manual_seed(1)
    network = SITReg(in_channels=6, features=(4, 8, 8), head_features=(8, 8, 8))
    with torch.no_grad():
        for head in network.heads:
            head.final.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
    mind, affine = Mind(), np.asarray(nib.load(images[0]).affine)  # type: ignore[attr-defined]
    described = {"sigma": mind.sigma, "radius": mind.radius}
    path = tmp_path_factory.mktemp("members") / "seed1.safetensors"
    save_member(path, network, ModelCard(network.architecture, described, list(SHAPE), affine.tolist()))
    return path


@pytest.fixture(scope="module")
def template(member: Path) -> Callable[..., int]:
    """The command, quick: without alignment, one member, one round."""

    def run(images: list[str], out: Path, *more: str) -> int:
        quick = ["--members", str(member), "--device", "cpu", "--align", "none"]
        more = more if "--rounds" in more else ("--rounds", "1", *more)
        return main(["template", "--images", *images, "-o", str(out), *quick, *more])

    return run


@pytest.fixture(scope="module")
def average(images: list[str], template: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "average"
    assert template(images, folder, "--save", "all") == 0
    return folder


def load(path: Path) -> tuple[Array, Array]:
    image: Any = nib.load(path)  # type: ignore[attr-defined]
    return np.asarray(image.dataobj), np.asarray(image.affine)


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_the_folder_holds_what_is_promised(average: Path, images: list[str]) -> None:
    names = [Path(image).name.removesuffix(".nii.gz") for image in images]
    expected = {*OUTPUTS, "picture.png", "summary.json", "maps", "warped"}
    assert {path.name for path in average.iterdir()} == expected  # the work folder is gone
    assert {path.name for path in (average / "maps").iterdir()} == {
        f"{name}{ending}" for name in names for ending in (".safetensors", ".json")
    }
    image, affine = load(average / "template.nii.gz")
    brain, _ = load(average / "template_brain.nii.gz")
    assert image.dtype == np.float32 and (image[brain == 0] == 0).all()
    assert image[brain == 1].min() >= 1 and image.max() == 255
    assert affine[0, 0] == 4.0 and image.shape == SHAPE
    summary = summary_of(average)
    assert [entry["name"] for entry in summary["scans"]] == names
    assert all(len(entry["image"]["sha256"]) == 64 for entry in summary["scans"])
    assert (average / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_map_brings_its_scan_onto_the_template(average: Path, images: list[str], tmp_path: Path) -> None:
    name = Path(images[1]).name
    source = average / "maps" / name.replace(".nii.gz", ".safetensors")
    assert main(["apply", "-t", str(source), "--to", "fixed", "--image", images[1], "-o", str(tmp_path / name)]) == 0
    moved, affine = load(tmp_path / name)
    warped, of_warped = load(average / "warped" / name)
    np.testing.assert_array_equal(moved, warped)
    np.testing.assert_array_equal(affine, of_warped)
    np.testing.assert_array_equal(affine, load(average / "template.nii.gz")[1])
    brain, _ = load(average / "template_brain.nii.gz")
    assert (moved[brain == 1] > 0).mean() > 0.9


@pytest.mark.slow
def test_the_next_line_works(
    images: list[str], template: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], member: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    spaced = []
    for number, folder in enumerate(("sub 1", "sub 2")):  # one file name in both, and blanks
        (tmp_path / folder).mkdir()
        spaced.append(shutil.copy(images[number], Path(folder) / "t1.nii.gz"))
    assert template([str(path) for path in spaced], Path("my average")) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("next: sitreg-lumir apply ")
    assert main(shlex.split(line)[2:]) == 0
    assert Path("sub 1_t1_on_template.nii.gz").is_file()
    assert template([str(path) for path in spaced], Path("without maps"), "--save", "none") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    arguments = shlex.split(line)[2:]
    assert arguments[0] == "register" and not Path("without maps/maps").exists()
    quick = ["--members", str(member), "--device", "cpu", "--align", "none", "--save", "map"]
    assert main([*arguments, *quick]) in (0, 3)  # an untrained member
    assert Path("registration/map.safetensors").is_file()


def test_neither_order_nor_threads_change_a_bit(
    images: list[str], average: Path, template: Callable[..., int], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert template([images[2], images[0], images[3], images[1]], tmp_path / "again", "--save", "all") == 0
    finally:
        torch.set_num_threads(threads)
    files = sorted(path.relative_to(average) for path in average.rglob("*") if path.name != "summary.json")
    assert len(files) >= 15
    for file in files:
        if (average / file).is_file():
            assert (average / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    first, again = (summary_of(folder) for folder in (average, tmp_path / "again"))
    assert first.pop("seconds") > 0 and again.pop("seconds") > 0
    assert first == again


def test_the_mean_displacement_becomes_nearly_zero(average: Path) -> None:
    (entry,) = summary_of(average)["rounds"]
    assert entry["mean_displacement_mm"]["mean"] > 0.5  # untrained members lead all scans the same way
    assert entry["left_mm"] < 0.25 * entry["mean_displacement_mm"]["mean"]


def test_a_stopped_run_goes_on_where_it_was(
    images: list[str], average: Path, template: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    original = Rounds._register

    def stop_at_the_third(self: Rounds, reference: Any, scan: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(scan.name)
        return original(self, reference, scan)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "_register", stop_at_the_third)
        assert template(images, out, "--save", "all") == 130
    assert {path.name for path in out.iterdir()} == {"work"}
    damaged = next((out / "work").glob("place-*"))
    damaged.write_bytes(damaged.read_bytes()[:1000])  # what a full disk may leave
    later: list[str] = []

    def counted(self: Rounds, reference: Any, scan: Any) -> Any:
        later.append(scan.name)
        return original(self, reference, scan)

    monkeypatch.setattr(Rounds, "_register", counted)
    assert template(images, out, "--save", "all") == 0
    assert len(later) == 2 + 4 and not set(later[:2]) & set(done)  # the rest of the round, and the maps
    for name in OUTPUTS:
        assert (out / name).read_bytes() == (average / name).read_bytes()


def test_what_is_there_is_not_made_again_and_what_differs_is_refused(
    images: list[str], average: Path, template: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "average"
    shutil.copytree(average, out)
    (out / "notes.txt").write_text("the user's")
    before = (out / "template.nii.gz").stat().st_mtime_ns
    assert template(images[::-1], out, "--save", "all") == 0  # another order
    assert "is there already" in capsys.readouterr().out
    assert template(images, out, "--average", "median", "--save", "all") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "options.average" in error and "--overwrite" in error
    assert template(images[:3], out, "--save", "all") == 2
    assert (out / "template.nii.gz").stat().st_mtime_ns == before

    def fails(*args: Any) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "picture", fails)
        assert template(images, out, "--average", "median", "--save", "warped", "--overwrite") == 2
    assert summary_of(out) == summary_of(average)  # the earlier template is whole
    assert (out / "template.nii.gz").stat().st_mtime_ns == before
    assert template(images, out, "--average", "median", "--save", "none", "--overwrite") == 0
    assert not (out / "maps").exists() and not (out / "work").exists() and (out / "notes.txt").is_file()
    assert summary_of(out)["made_from"]["options"]["average"] == "median"
    assert [path.name for path in tmp_path.iterdir()] == ["average"]  # no temporary file, no lock
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    (out / "notes.txt").unlink()
    assert template(images[:2], out, "--save", "maps", "--overwrite") == 0  # the folder is exchanged as a whole
    assert (out / "maps").is_dir() and not (out / "work").exists()


def test_a_finer_grid_is_sampled_from_the_exact_maps(
    images: list[str], average: Path, template: Callable[..., int], tmp_path: Path
) -> None:
    assert template(images[:2], tmp_path / "coarse", "--save", "none", "--sharpen", "0") == 0
    assert template(images[:2], tmp_path / "fine", "--save", "none", "--sharpen", "0", "--spacing", "2") == 0
    coarse, affine = load(tmp_path / "coarse/template.nii.gz")
    fine, finer = load(tmp_path / "fine/template.nii.gz")
    assert fine.shape == tuple(2 * size for size in coarse.shape)
    np.testing.assert_allclose(finer @ [0.5, 0.5, 0.5, 1], affine @ [0, 0, 0, 1])
    means = fine.reshape(40, 2, 56, 2, 48, 2).mean(axis=(1, 3, 5))
    both = (coarse > 0) & (fine.reshape(40, 2, 56, 2, 48, 2).min(axis=(1, 3, 5)) > 0)
    assert np.corrcoef(means[both], coarse[both])[0, 1] > 0.98


def test_a_scan_that_changes_meanwhile_is_refused(
    images: list[str], template: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copy = tmp_path / "copy.nii.gz"
    shutil.copy(images[0], copy)
    original = Rounds.affine_mean

    def replaced(self: Rounds, grid: Any) -> Any:
        shutil.copy(images[3], copy)
        return original(self, grid)

    monkeypatch.setattr(Rounds, "affine_mean", replaced)
    assert template([str(copy), images[1]], tmp_path / "out") == 2
    assert "copy.nii.gz: changed while the template was made" in capsys.readouterr().err


def test_scans_of_one_name_get_different_ones(tmp_path: Path) -> None:
    def names(*files: str) -> list[str]:
        return names_of([ScanFiles(str(tmp_path / file), "image") for file in files])

    assert names("a/t1.nii.gz", "b/t1.nii.gz") == ["a_t1", "b_t1"]
    assert names("s1/ses/t1.nii.gz", "s2/ses/t1.nii.gz", "s3/ses/x.nii") == ["s1_ses_t1", "s2_ses_t1", "s3_ses_x"]
    assert names("t1.nii", "t1.nii.gz") == ["t1_1", "t1_2"]
    with pytest.raises(InputError, match="named twice"):
        names("t1.nii", "t1.nii")


def test_rounds_end_early_where_the_mean_stays(images: list[str], template: Callable[..., int], tmp_path: Path) -> None:
    arguments = ("--rounds", "3", "--tolerance", "50", "--save", "none")
    assert template(images[:2], tmp_path / "early", *arguments) == 0
    assert len(summary_of(tmp_path / "early")["rounds"]) == 1


@pytest.mark.slow
def test_rounds_end_where_the_mean_map_hardly_changes(
    images: list[str], template: Callable[..., int], tmp_path: Path
) -> None:
    """An untrained member leads all scans the same way in every round: the mean map stays large."""
    arguments = ("--rounds", "6", "--tolerance", "1.7", "--save", "none")
    assert template(images[:2], tmp_path / "settled", *arguments) == 0
    rounds = summary_of(tmp_path / "settled")["rounds"]
    assert 1 < len(rounds) < 6 and rounds[0]["changed_mm"] is None
    assert rounds[-1]["changed_mm"] < 1.7 < rounds[-1]["mean_displacement_mm"]["mean"]


@pytest.mark.slow
def test_masks_say_where_the_brain_is(images: list[str], template: Callable[..., int], tmp_path: Path) -> None:
    masks, filled = [], []
    for image in images[:2]:
        values, affine = load(Path(image))
        brain = values > 0
        for kind, volume in (("mask", brain), ("filled", np.where(brain, values, 1 + np.arange(48) % 7))):
            path = tmp_path / f"{kind}_{Path(image).name}"
            nib.Nifti1Image(volume.astype(np.uint8), affine).to_filename(path)
            (masks if kind == "mask" else filled).append(str(path))
    assert template(images[:2], tmp_path / "stripped", "--save", "none") == 0
    assert template(filled, tmp_path / "masked", "--save", "none", "--masks", *masks) == 0
    for name in ("template.nii.gz", "template_deviation.nii.gz"):
        of_stripped, of_masked = (load(tmp_path / folder / name)[0] for folder in ("stripped", "masked"))
        np.testing.assert_array_equal(of_stripped, of_masked)


@pytest.fixture
def mistakes(images: list[str], data: Path, tmp_path: Path) -> dict[str, tuple[list[str], list[str], str]]:
    """Arguments after the images that are wrong, and what the one line says."""
    plain = tmp_path / "plain.nii"
    nib.load(images[0]).to_filename(plain)  # type: ignore[attr-defined]
    (tmp_path / "broken.nii.gz").write_bytes(Path(images[0]).read_bytes()[:2000])
    shutil.copy(images[0], tmp_path / "copy.nii.gz")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("all of it")
    t2 = str(sorted((data / "imagesVal").glob("*_0001.nii.gz"))[0])
    head = tmp_path / "head.nii.gz"
    values, affine = load(Path(images[1]))
    nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1]) @ affine).to_filename(head)
    masks = [images[0]]
    return {
        "a single image": (images[:1], [], "two or more"),
        "twice": ([images[0], images[1], images[0]], [], "named twice"),
        "a copy": ([images[0], str(tmp_path / "copy.nii.gz")], [], "is the same scan as"),
        "the same, not compressed": ([images[0], str(plain)], [], "is the same scan as"),
        "T1 and T2": ([images[0], images[1], t2], [], "another contrast"),
        "broken": ([images[0], str(tmp_path / "broken.nii.gz")], [], "broken.nii.gz"),
        "missing": ([images[0], str(tmp_path / "nowhere.nii.gz")], [], "nowhere.nii.gz"),
        "a folder": ([images[0], str(tmp_path)], [], str(tmp_path)),
        "a head": ([images[0], str(head)], [], "give the brain's mask with --masks, or add --strip deepbet"),
        "too few masks": (images[:2], ["--masks", *masks], "--masks names 1 files for 2"),
        "no round": (images[:2], ["--rounds", "0"], "--rounds must be"),
        "sharpened away": (images[:2], ["--sharpen", "-1"], "--sharpen must be"),
        "too fine": (images[:2], ["--spacing", "0.01"], "--spacing must be"),
        "unknown output": (images[:2], ["--save", "maps,everything"], "--save everything"),
        "foreign folder": (images[:2], ["-o", str(full)], "thesis.txt"),
        "a file": (images[:2], ["-o", str(plain)], "is a file"),
        "unknown argument": (images[:2], ["--seed", "3"], "--seed"),
    }


def test_mistakes_are_one_line(
    mistakes: dict[str, tuple[list[str], list[str], str]], member: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, (images, more, said) in mistakes.items():
        out = tmp_path / name
        quick = ["--members", str(member), "--device", "cpu", "--align", "none"]
        assert main(["template", "-o", str(out), *quick, *more, "--images", *images]) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, (name, error)
        assert not out.exists() or {path.name for path in out.iterdir()} <= {"work"}, name


def test_a_library_call_gives_the_summary(images: list[str], member: Path, tmp_path: Path) -> None:
    made = sitreg_lumir.build_template(images[:2], tmp_path / "a", model=member, rounds=1, align="none", save="none")
    assert made == summary_of(tmp_path / "a") and made["final_mean_displacement_mm"] is None
    with pytest.raises(InputError, match="`average` must be"):
        sitreg_lumir.build_template(images[:2], tmp_path / "b", model=member, average="mode")  # type: ignore[arg-type]


def test_the_template_s_size_is_the_mean_of_the_scans_sizes(images: list[str], member: Path, tmp_path: Path) -> None:
    """A brain and the same brain shown 0.81 times as large make a template of 0.9 times the brain's size."""
    values, affine = load(Path(images[0]))
    smaller = np.diag([0.81, 0.81, 0.81, 1.0])
    nib.Nifti1Image(values + (values > 100), smaller @ affine).to_filename(tmp_path / "small.nii.gz")
    place = build_module.Subjects._place

    def placed(self: Any, files: Any, checksum: str) -> Any:
        """As an alignment would place it: the header's size undone."""
        arrays = place(self, files, checksum)
        is_small = "small" in str(files.image)
        arrays["prealign"] = np.linalg.inv(smaller) if is_small else np.eye(4)
        return arrays

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module.Subjects, "_place", placed)
        made = sitreg_lumir.build_template(
            [images[0], tmp_path / "small.nii.gz"], tmp_path / "out", model=member, rounds=1, align="none", save="none"
        )
    np.testing.assert_allclose(made["template_to_MNI152"], np.diag([1 / 0.9] * 3 + [1]), atol=1e-9)
    template, of_template = load(tmp_path / "out/affine_mean.nii.gz")
    litres = [(v > 0).sum() * abs(np.linalg.det(a)) for v, a in ((values, affine), (template, of_template))]
    assert litres[1] / litres[0] == pytest.approx(0.9**3, rel=0.03)
