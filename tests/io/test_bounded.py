"""Files are measured before memory is spent on them, and their checksums are those of the bytes that were read."""

import gzip
import hashlib
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import MAX_VOXELS, USUAL_MAX_VOXELS, check_voxels, recorded_checksums
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.io.itk import load_itk_field
from sitreg_lumir.io.points import read_points
from sitreg_lumir.io.read import load_disp, read_grid, read_image, read_labels, read_volume

HUGE = (30000, 30000, 30000)


def claiming(path: Path, shape: tuple[int, ...], voxels: int = 0, dtype: type = np.float32) -> Path:
    """A file whose header claims a shape, with so many bytes of voxels."""
    header = nibabel.Nifti2Header() if max(shape) > 32767 else nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["magic"] = b"n+2\0\r\n\x1a\n" if header.sizeof_hdr == 540 else b"n+1"
    header["vox_offset"] = 544 if header.sizeof_hdr == 540 else 352
    header.set_sform(np.eye(4), 1)
    header["pixdim"][:4] = 1
    header["xyzt_units"] = 2
    header["intent_code"] = 1007
    content = header.binaryblock + bytes(4) + bytes(voxels)
    path.write_bytes(gzip.compress(content, 9) if path.suffix == ".gz" else content)
    return path


def test_what_is_claimed_is_compared_with_what_is_there(tmp_path: Path) -> None:
    """A process that may not use 2 GB refuses all of them, and neither runs out of memory nor takes long."""
    files = [
        claiming(tmp_path / "a.nii.gz", HUGE),
        claiming(tmp_path / "b.nii", HUGE),
        claiming(tmp_path / "c.nii.gz", (900, 900, 600)),
        claiming(tmp_path / "d.nii", (900, 900, 600)),
        claiming(tmp_path / "e.nii.gz", (700, 700, 600, 1, 3)),
        claiming(tmp_path / "f.nii", (700, 700, 600, 1, 3)),
        claiming(tmp_path / "g.nii.gz", (700, 700, 600, 3)),
        claiming(tmp_path / "h.nii.gz", (8, 8, 8), 1 << 28),  # 270 kB that unpack to 256 MB
        tmp_path / "i.mgz",
        tmp_path / "j.nrrd",
        tmp_path / "k.mha",
        tmp_path / "l.mhd",
        tmp_path / "m.nhdr",
        claiming(tmp_path / "n.hdr", (900, 900, 600)),
    ]
    files[8].write_bytes(gzip.compress(struct.pack(">7i", 1, 900, 900, 600, 1, 3, 0) + bytes(256)))
    nrrd = (
        "NRRD0004\ntype: float\ndimension: 4\nspace: left-posterior-superior\nsizes: 3 1000 1000 100\n"
        "space directions: none (1,0,0) (0,1,0) (0,0,1)\nkinds: vector domain domain domain\nendian: little\n"
        "encoding: raw\nspace origin: (0,0,0)\n"
    )
    meta = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = False\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\n"
        "DimSize = 1000 1000 100\nElementNumberOfChannels = 3\n"
        "ElementType = MET_FLOAT\n"
    )
    files[9].write_text(f"{nrrd}\n")
    files[10].write_text(f"{meta}ElementDataFile = LOCAL\n")
    files[11].write_text(f"{meta}ElementDataFile = voxels\n")
    files[12].write_text(f"{nrrd}data file: voxels\n")
    (tmp_path / "voxels").write_bytes(bytes(1000))
    content = bytearray(files[13].read_bytes())
    content[344:348] = b"ni1\0"
    files[13].write_bytes(content)
    (tmp_path / "n.img").write_bytes(bytes(1000))
    code = (
        "import sys; from pathlib import Path; from sitreg_lumir.errors import InputError\n"
        "from sitreg_lumir.io.read import *\nfrom sitreg_lumir.io.itk import load_itk_field\n"
        "for name in sys.argv[1:]:\n"
        "    for read in (read_image, read_volume, read_labels, load_disp, load_itk_field):\n"
        "        try:\n            read(Path(name))\n        except InputError as error:\n"
        "            assert chr(10) not in str(error), error\n"
        "        else:\n            raise SystemExit(f'{name} was read')\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # most of it is address space of libraries

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, preexec_fn=limit,
        env=environment, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    for path in (files[0], files[1]):
        with pytest.raises(InputError, match=MAX_VOXELS):
            read_grid(path)


def test_the_limit_is_stated_and_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = claiming(tmp_path / "a.nii", (10, 10, 10), 4000)
    read_grid(path)
    monkeypatch.setenv(MAX_VOXELS, "999")
    for read in (read_grid, read_image, read_volume, read_labels):
        with pytest.raises(InputError, match=rf"10 x 10 x 10 voxels, more than the 999 .*{MAX_VOXELS}"):
            read(path)  # type: ignore[operator]
    assert check_voxels(path, (9, 37, 3, 3)) == 2997  # three components make a voxel
    for wrong in ("0", "-5", "many", "1e9", "9" * 30):
        monkeypatch.setenv(MAX_VOXELS, wrong)
        with pytest.raises(InputError, match=MAX_VOXELS):
            read_grid(path)
    monkeypatch.delenv(MAX_VOXELS)
    with pytest.raises(InputError, match=str(USUAL_MAX_VOXELS)):
        check_voxels(path, (1000, 1000, 1000))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 1e9])
def test_headers_are_finite(tmp_path: Path, value: float) -> None:
    for place in (280, 292):  # a direction and the place of the sform
        path = claiming(tmp_path / "a.nii", (4, 5, 6), 480)
        content = bytearray(path.read_bytes())
        struct.pack_into("<f", content, place, value)
        path.write_bytes(content)
        for read in (read_image, read_grid, read_volume):
            with pytest.raises(InputError, match=r"a\.nii") as error:
                read(path)  # type: ignore[operator]
            assert "\n" not in str(error.value)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    pair = tmp_path / "pair.img"
    nibabel.Nifti1Pair(np.ones((4, 4, 4), np.uint8), np.eye(4)).to_filename(pair)
    pair.with_suffix(".hdr").unlink()
    for pipe in (tmp_path / "pipe.nii.gz", pair.with_suffix(".hdr")):
        os.mkfifo(pipe)
    for path in (tmp_path / "pipe.nii.gz", pair, Path("/dev/zero")):
        for read in (read_image, read_grid, load_disp, load_itk_field, read_points, sha256_file):
            if path == pair and read not in (read_image, read_grid):
                continue
            with pytest.raises(InputError, match=r"pipe|device"):
                read(path)  # type: ignore[operator]
    with pytest.raises(InputError, match="no such file"):
        read_image("a\0b.nii")
    with (tmp_path / "endless.nii").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(InputError, match="1099511627776 bytes"):
        sha256_file(tmp_path / "endless.nii")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mgz", "a.nrrd", "a.mha"])
def test_checksums_are_of_the_bytes_that_were_read(tmp_path: Path, name: str) -> None:
    from test_other_formats import save, voxels

    path = save(tmp_path / name, voxels())
    with recorded_checksums() as read:
        read_image(path)
    assert read == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_scan_that_is_replaced_meanwhile_keeps_the_checksum_of_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sitreg_lumir.registration import register, scan
    from sitreg_lumir.registration.made_from import made_from
    from sitreg_lumir.registration.model import load_model
    from sitreg_lumir.registration.options import RegisterOptions
    from sitreg_lumir.registration.placed_scans import PlacedScans

    path = tmp_path / "fixed.nii.gz"
    path.write_bytes((scan.EXAMPLES_FOLDER / scan.EXAMPLES["EXAMPLE-T1"]).read_bytes())
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    original = scan.read_image

    def replaced(name: Path, *args: object) -> object:
        result = original(name, *args)  # type: ignore[arg-type]
        if name == path:
            path.write_bytes(b"another scan")
        return result

    monkeypatch.setattr(scan, "read_image", replaced)
    options = RegisterOptions(align="none")
    with recorded_checksums() as read:
        scans, _ = register._read(path, "EXAMPLE-T2", options, PlacedScans())
    assert scans[0].checksum == expected
    entries = made_from(path, "EXAMPLE-T2", options, load_model(device="cpu"), read)["files"]
    assert entries == {"fixed": {"name": path.name, "sha256": expected}, "moving": "EXAMPLE-T2"}
