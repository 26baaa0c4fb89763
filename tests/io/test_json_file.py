"""JSON files of any content: an object of plain values, or one line that names the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import make_dataset

from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.registration.outputs import SUMMARY
from sitreg_lumir.registration.pair_rows import read_summary

ODD = ["", "{", "[]", "3", "null", "[" * 100_000, '{"a":' * 5000, '{"a": ' + "9" * 5000 + "}", '{"a": 1e999}',
       '{"a": "\\ud800"}',
       '{"a": ' + "[" * 70 + "]" * 70 + "}", '{"a": 99999999999999999999}']  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_odd_files_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.json") as error:
        read_json(path, "a dataset JSON", "give another file")
    assert "\n" not in str(error.value)
    folder = tmp_path / "pair"
    folder.mkdir()
    (folder / SUMMARY).write_text(text)
    with pytest.raises(InputError, match="summary") as error:
        read_summary(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluation_labels", 3), ("evaluation_labels", [10**30]), ("evaluation_labels", ["9" * 5000]),
        ("evaluation_labels", [True]), ("evaluation_labels", [[1]]), ("evaluation_labels", {"1": [2]}),
        ("evaluation_labels", [1.5]), ("modality", [1]), ("modality", {"0": ""}), ("modality", {"0": {}}),
        ("modality", {"0": "  "}), ("modality", {"0": "x" * 1000}), ("name", []),
        ("tensorImageShape", {"0": [True, 1, 1]}),
        ("tensorImageShape", {"0": [10**6, 10**6, 10**6]}), ("tensorImageShape", {"0": [1, 2]}), ("validation", 3),
        ("validation", [{"fixed": "a" * 300 + ".nii.gz", "moving": "b"}]),
        ("validation", [{"fixed": "a\0", "moving": "b"}]),
        ("validation", [{"fixed": {}, "moving": 3}]), ("validation", ["imagesTr/" + "b/" * 3000 + "c.nii.gz"]),
        ("validation", [{"fixed": "./imagesTr/LUMIRMRI_0_\u0663.nii.gz", "moving": "x"}]),
    ],
)  # fmt: skip
def test_oddities_of_dataset_jsons_are_one_line(tmp_path: Path, key: str, value: Any) -> None:
    root = make_dataset(tmp_path / "data")
    file = root / "LUMIR_dataset.json"
    content = json.loads(file.read_text())
    content[key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=file.name) as error:
        read_dataset(root, training=True, validation=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    from sitreg_lumir.data.cache import VolumeCache

    root = make_dataset(tmp_path / "data")
    data = read_dataset(root, training=True)
    paths = [image.path for image in data.training]

    def volumes() -> list[Any]:
        cache = VolumeCache(paths, data.shape, tmp_path / "cache")
        cache.build()
        cache.open()
        return [cache.read(path) for path in paths]

    expected = volumes()
    cache = VolumeCache(paths, data.shape, tmp_path / "cache")
    whole = cache.index.read_bytes()
    stored = json.loads(whole)
    for damage in (
        b"", b"[]", b"{", b"[" * 10**5, whole[:50], json.dumps({**stored, "raw": "../x.raw"}).encode(),
        json.dumps({**stored, "volumes": [1]}).encode(),
        json.dumps({**stored, "volumes": {str(paths[0]): {"offset": -5, "dtype": "|O", "made_from": 1}}}).encode(),
        json.dumps({**stored, "volumes": {str(path): {"offset": 0} for path in paths}}).encode(),
    ):  # fmt: skip
        cache.index.write_bytes(damage)
        for volume, wanted in zip(volumes(), expected, strict=True):
            np.testing.assert_array_equal(volume, wanted)
    raw = cache.folder / json.loads(cache.index.read_text())["raw"]
    content = bytearray(raw.read_bytes())
    content[len(content) // 2] ^= 4
    raw.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        read = volumes()
    for volume, wanted in zip(read, expected, strict=True):
        np.testing.assert_array_equal(volume, wanted)
    for volume, wanted in zip(volumes(), expected, strict=True):  # without a warning
        np.testing.assert_array_equal(volume, wanted)
