"""The volume cache: same content, one reading, and nothing lost by interruption."""

import os
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_samples import AFFINE, SHAPE, head, save

from sitreg_lumir.data import cache as module
from sitreg_lumir.data.cache import VolumeCache
from sitreg_lumir.errors import InputError


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Four images, the last with fractions."""
    images = [head(0), head(1), head(2), head(3).astype(np.float32) / 2]
    return [save(tmp_path / f"images/{number}.nii.gz", image) for number, image in enumerate(images)]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The NIfTI files that were read."""
    paths: list[Path] = []

    def read(path: Path, **options: Any) -> Any:
        paths.append(path)
        return original(path, **options)

    original = module.read_volume  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "read_volume", read)
    return paths


def _made(paths: list[Path], folder: Path) -> VolumeCache:
    cache = VolumeCache(paths, SHAPE, folder)
    cache.build()
    cache.open()
    return cache


def test_gives_back_what_is_stored_and_reads_once(tmp_path: Path, paths: list[Path], readings: list[Path]) -> None:
    cache = _made([*paths, paths[0]], tmp_path / "cache")
    for number in range(3):
        volume = cache.read(paths[number])
        assert volume.dtype == np.uint8
        np.testing.assert_array_equal(volume, head(number))
    assert cache.read(paths[3]).dtype == np.float32
    np.testing.assert_array_equal(cache.read(paths[3]), head(3).astype(np.float32) / 2)
    np.testing.assert_array_equal(cache.affine(paths[1]), AFFINE)
    assert cache.raw.stat().st_size == head(0).size * (3 + 4)
    assert sorted(readings) == paths
    copy = deepcopy(cache)  # goes through the same state as sending it to a worker
    np.testing.assert_array_equal(copy.read(paths[2]), head(2))
    _made([*paths, paths[0]], tmp_path / "cache")
    assert len(readings) == 4


def test_a_changed_file_is_read_again(tmp_path: Path, paths: list[Path], readings: list[Path]) -> None:
    before = _made(paths, tmp_path / "cache")
    save(paths[1], head(9))
    os.utime(paths[1], ns=(1, 1))
    cache = _made(paths, tmp_path / "cache")
    np.testing.assert_array_equal(cache.read(paths[1]), head(9))
    np.testing.assert_array_equal(cache.read(paths[2]), head(2))
    assert readings[4:] == [paths[1]]
    np.testing.assert_array_equal(before.read(paths[1]), head(1))  # a run that goes on sees no change


def test_all_files_changed_starts_again(tmp_path: Path, paths: list[Path]) -> None:
    before = _made(paths, tmp_path / "cache")
    for path in paths:
        os.utime(path, ns=(1, 1))
    cache = _made(paths, tmp_path / "cache")
    np.testing.assert_array_equal(cache.read(paths[1]), head(1))
    assert [file.name for file in (tmp_path / "cache").glob("*.raw")] == [cache.raw.name]
    with pytest.raises(InputError, match="made again"):
        before.read(paths[0])


def test_an_interrupted_build_is_continued(
    tmp_path: Path, paths: list[Path], readings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    cache = VolumeCache(paths, SHAPE, tmp_path / "cache")
    append = cache._append
    appended: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if len(appended) == 2:
            arguments[0].write(b"half a volume")
            raise KeyboardInterrupt
        appended.append(1)
        return append(*arguments, **options)

    monkeypatch.setattr(cache, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.build()
    readings.clear()
    again = _made(paths, tmp_path / "cache")
    assert readings == paths[2:]
    for number in range(3):
        np.testing.assert_array_equal(again.read(paths[number]), head(number))
    np.testing.assert_array_equal(again.read(paths[3]), head(3).astype(np.float32) / 2)


def test_all_bad_volumes_are_named_and_the_good_ones_kept(
    tmp_path: Path, paths: list[Path], readings: list[Path]
) -> None:
    save(paths[0], head(0) * 0)
    paths[2].write_bytes(paths[2].read_bytes()[:100])
    with pytest.raises(InputError, match=r"2 problems: .*0.nii.gz.*empty.*; .*2.nii.gz") as error:
        _made(paths, tmp_path / "cache")
    assert "\n" not in str(error.value)
    save(paths[0], head(0))
    save(paths[2], head(2))
    readings.clear()
    cache = _made(paths, tmp_path / "cache")
    assert sorted(readings) == [paths[0], paths[2]]
    np.testing.assert_array_equal(cache.read(paths[1]), head(1))


def test_a_full_disk_and_an_unbuilt_cache(tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"4 problems.*not in the cache"):
        VolumeCache(paths, SHAPE, tmp_path / "cache").open()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(InputError, match=r"GB are free; make room or .*--data.cache"):
            _made(paths, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        _made(paths, tmp_path / "file" / "cache")


def test_a_large_cache_is_announced_and_one_without_room_leaves_nothing(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    _made(paths, tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "_LARGE", 4 * head(0).size)
    _made(paths, tmp_path / "announced")
    printed = capsys.readouterr().err
    assert printed.count("takes about") == 1 and str(tmp_path / "announced") in printed and "--data.cache" in printed
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * head(0).size - 1))
    with pytest.raises(InputError, match=r"GB are free; make room"):
        _made(paths, tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())
