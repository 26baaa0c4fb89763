"""A field on disk stands for a pair only if it was made from the same things."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sitreg_lumir import __version__
from sitreg_lumir.challenge.provenance import (
    Provenance,
    compare,
    find_field,
    make_provenance,
    plan_fields,
    provenance_path,
    read_provenance,
    save_field,
)
from sitreg_lumir.data.images import Image, Pair
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.checksum import sha256_file

MEMBER = {"name": "last.ckpt", "sha256": "0" * 64}


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Image]:
    folder = tmp_path / "data" / "imagesVal"
    folder.mkdir(parents=True)
    made = {}
    for subject in ("0100", "0101", "0102"):
        for modality in ("0000", "0001"):
            path = folder / f"LUMIRMRI_{subject}_{modality}.nii.gz"
            path.write_text(f"{subject} {modality}")
            made[f"{subject}_{modality}"] = Image(path, subject, modality)
    return made


@pytest.fixture
def inner(images: dict[str, Image]) -> list[Pair]:
    return [
        Pair(images["0100_0000"], images["0101_0000"], "T1-T1"),
        Pair(images["0101_0000"], images["0102_0000"], "T1-T1"),
    ]


@pytest.fixture
def cross(images: dict[str, Image]) -> list[Pair]:
    return [
        Pair(images["0100_0000"], images["0101_0001"], "T1-T2"),
        Pair(images["0101_0000"], images["0102_0001"], "T1-T2"),
    ]


def provenance_of(pair: Pair) -> Provenance:
    return make_provenance(pair, [MEMBER], {"tolerance": 0.01})


def write(path: Path, pair: Pair, seed: int = 0) -> None:
    disp = np.random.default_rng(seed).normal(size=(3, 4, 4, 4))
    save_field(path, disp, np.eye(4), provenance_of(pair))


def run(folder: Path, pairs: list[Pair], **options: Any) -> list[str]:
    """Plans and writes what is not there; the names that were written."""
    written = []
    for seed, planned in enumerate(plan_fields(folder, pairs, provenance_of, **options)):
        if not planned.skip:
            write(planned.path, planned.pair, seed)
            written.append(planned.path.name)
    return written


def test_content_names_files_without_folders(tmp_path: Path, inner: list[Pair]) -> None:
    path = tmp_path / "disp_0100_0101.nii.gz"
    write(path, inner[0])
    stored = read_provenance(path)
    assert stored is not None
    assert stored["pair"] == "0100_0000_0101_0000"
    assert stored["fixed"] == {"name": "LUMIRMRI_0100_0000.nii.gz", "sha256": sha256_file(inner[0].fixed.path)}
    assert stored["members"] == [MEMBER]
    assert stored["version"] == __version__
    assert stored["field"]["sha256"] == sha256_file(path)
    assert str(tmp_path) not in provenance_path(path).read_text()


def test_checksum_follows_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a")
    before = sha256_file(path)
    path.write_text("bb")
    assert sha256_file(path) != before
    with pytest.raises(InputError, match="no such file"):
        sha256_file(tmp_path / "absent")


def test_differences_are_named(inner: list[Pair]) -> None:
    first = provenance_of(inner[0])
    assert compare(first, first) == []
    renamed = first | {"members": [MEMBER | {"name": "copy.ckpt"}]}
    assert compare(renamed, first) == []
    second = first | {"options": {"tolerance": 0.1}, "version": "0"}
    assert {difference.entry for difference in compare(second, first)} == {"options.tolerance", "version"}
    more = first | {"members": [MEMBER, MEMBER]}
    assert [str(difference) for difference in compare(first, more)] == [
        "members.1.sha256 is absent there, 000000000000.. now"
    ]


def test_finished_fields_are_skipped(tmp_path: Path, inner: list[Pair]) -> None:
    assert run(tmp_path / "out", inner) == ["disp_0100_0101.nii.gz", "disp_0101_0102.nii.gz"]
    assert run(tmp_path / "out", inner) == []


def test_runs_of_two_contrasts_into_one_folder_never_mix(tmp_path: Path, inner: list[Pair], cross: list[Pair]) -> None:
    folder = tmp_path / "out"
    run(folder, inner)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    long = ["disp_0100_0000_0101_0001.nii.gz", "disp_0101_0000_0102_0001.nii.gz"]
    assert run(folder, cross) == long
    assert all((folder / name).read_bytes() == content for name, content in kept.items())
    assert run(folder, cross) == run(folder, inner) == run(folder, inner + cross) == []
    assert run(folder, cross, overwrite=True) == []
    fields = [find_field(folder, pair) for pair in inner + cross]
    assert [field.path.name for field in fields if field] == [*sorted(n for n in kept if n.endswith("gz")), *long]


def test_short_names_that_collide_become_long(tmp_path: Path, inner: list[Pair], cross: list[Pair]) -> None:
    folder = tmp_path / "out"
    assert run(folder, inner[:1] + cross[:1]) == [
        "disp_0100_0000_0101_0000.nii.gz",
        "disp_0100_0000_0101_0001.nii.gz",
    ]
    assert run(folder, inner[:1]) == []


def test_a_field_made_otherwise_stops_the_run(tmp_path: Path, inner: list[Pair]) -> None:
    folder = tmp_path / "out"
    run(folder, inner)

    def other_options(pair: Pair) -> Provenance:
        return make_provenance(pair, [MEMBER], {"tolerance": 0.001})

    with pytest.raises(InputError, match=r"disp_0100_0101.*options\.tolerance is 0\.01 there, 0\.001 now") as caught:
        plan_fields(folder, inner, other_options)
    assert "--overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(field.skip for field in plan_fields(folder, inner, other_options, overwrite=True))


def test_a_changed_image_of_the_same_name_stops_the_run(tmp_path: Path, inner: list[Pair]) -> None:
    run(tmp_path / "out", inner[:1])
    inner[0].moving.path.write_text("another brain")
    with pytest.raises(InputError, match=r"moving\.sha256"):
        plan_fields(tmp_path / "out", inner[:1], provenance_of)
    with pytest.raises(InputError, match="another version"):
        find_field(tmp_path / "out", inner[0])


def test_a_field_without_or_with_a_wrong_json_stops_the_run(tmp_path: Path, inner: list[Pair]) -> None:
    folder = tmp_path / "out"
    run(folder, inner[:1])
    field = folder / "disp_0100_0101.nii.gz"
    sidecar = provenance_path(field)
    content = sidecar.read_text()
    for text, match in ((None, "without"), ("{", "not a readable"), ("[]", "not a readable")):
        sidecar.unlink() if text is None else sidecar.write_text(text)
        with pytest.raises(InputError, match=match):
            plan_fields(folder, inner[:1], provenance_of)
        assert not plan_fields(folder, inner[:1], provenance_of, overwrite=True)[0].skip
    sidecar.write_text(content)
    field.write_bytes(field.read_bytes() + b"more")
    with pytest.raises(InputError, match="is not the field"):
        plan_fields(folder, inner[:1], provenance_of)
    with pytest.raises(InputError, match="is not the field"):
        find_field(folder, inner[0])


def test_an_interrupted_field_is_made_again(tmp_path: Path, inner: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    path = folder / "disp_0100_0101.nii.gz"
    replace = os.replace

    def die(source: str | Path, target: str | Path) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            write(path, inner[0])
    assert [file.name for file in folder.glob("[!.]*")] == ["disp_0100_0101.json"]
    assert run(folder, inner[:1]) == [path.name]
    assert run(folder, inner[:1]) == []
    assert "field" in json.loads(provenance_path(path).read_text())


def test_fields_of_other_software_and_of_other_pairs(tmp_path: Path, inner: list[Pair], cross: list[Pair]) -> None:
    folder = tmp_path / "out"
    assert find_field(folder, inner[0]) is None
    run(folder, inner[:1])
    with pytest.raises(InputError, match="another image"):
        find_field(folder, cross[0])
    provenance_path(folder / "disp_0100_0101.nii.gz").unlink()
    field = find_field(folder, inner[0])
    assert field is not None
    assert field.provenance is None
    with pytest.raises(InputError, match="which of several pairs"):
        find_field(folder, inner[0], shared=True)
