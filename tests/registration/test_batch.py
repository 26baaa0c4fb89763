"""`register --pairs` in several processes and parts: the same results, nothing lost, and a table of what is there."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import refused

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import recorded_checksums
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.preprocessing import place
from sitreg_lumir.preprocessing.align import Alignment
from sitreg_lumir.registration import placed_scans, scan
from sitreg_lumir.registration.batch import Shard
from sitreg_lumir.registration.pair_rows import STATE
from sitreg_lumir.registration.pairs_table import PairRow
from sitreg_lumir.registration.placed_scans import KeptOnDisk, PlacedScans
from sitreg_lumir.registration.scan import ScanFiles
from sitreg_lumir.workers import WorkerDied, share_out

FEW = ["--align", "none", "--save", "map,warped"]


@pytest.fixture
def table(t1: Path, t2: Path, tmp_path: Path) -> Path:
    """Four pairs with a common fixed scan, one of which cannot be registered."""
    shutil.copy(t1, tmp_path / "fixed.nii.gz")
    for name in "abd":
        shutil.copy(t2, tmp_path / f"{name}.nii.gz")
    (tmp_path / "c.nii.gz").write_bytes(t2.read_bytes()[:1000])
    path = tmp_path / "pairs.csv"
    path.write_text("name,fixed,moving\n" + "".join(f"{name},fixed.nii.gz,{name}.nii.gz\n" for name in "abcd"))
    return path


def register(table: Path, out: Path, members: Path, *more: str) -> int:
    return main(["register", "--pairs", str(table), "-o", str(out), "--members", str(members), *FEW, *more])


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "pairs.csv").open(newline="") as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def results(out: Path) -> dict[str, bytes]:
    """The bytes of all maps and images."""
    return {str(file.relative_to(out)): file.read_bytes() for name in "abd" for file in (out / name).glob("*.[sn]*")}


@pytest.mark.slow
def test_parts_register_everything_once_and_collect_makes_the_table(
    table: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert register(table, out, members, "--shard", "1/3") in (0, 3)
    assert sorted(path.name for path in out.iterdir()) == [STATE, "a", "d"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: sitreg-lumir "))
    collect = line.removeprefix("next: sitreg-lumir ").split()
    refused(capsys, collect, "b: not registered yet (2 of 4 pairs failed")
    assert {name: row["verdict"] in ("missing",) for name, row in rows(out).items()} == dict(
        zip("abcd", (False, True, True, False), strict=True)
    )
    for part in ("2/3", "3/3"):
        register(table, out, members, "--shard", part)
    refused(capsys, collect, "c: ", "1 of 4 pairs failed")
    assert rows(out)["c"]["verdict"] == "error" and "c.nii.gz" in rows(out)["c"]["reasons"]
    summary = json.loads((out / "a" / "summary.json").read_text())
    del summary["made_from"]["options"]["refine_mm"]  # as if that option had come later
    (out / "a" / "summary.json").write_text(json.dumps(summary))
    before = (out / "a" / "summary.json").stat().st_mtime_ns
    assert register(table, out, members) == 2  # the whole table finds what the parts have left
    assert (out / "a" / "summary.json").stat().st_mtime_ns == before
    shutil.copy(table.parent / "b.nii.gz", table.parent / "c.nii.gz")
    assert register(table, out, members) in (0, 3)
    assert not list((out / STATE).glob("*error*")) and "error" not in {row["verdict"] for row in rows(out).values()}
    shutil.copy(table.parent / "fixed.nii.gz", table.parent / "b.nii.gz")
    refused(capsys, collect, "b: moving b.nii.gz is another file")
    assert rows(out)["b"]["verdict"] == "outdated"
    summary = json.loads((out / "a" / "summary.json").read_text())
    summary["made_from"]["options"]["refine"] = 40
    (out / "a" / "summary.json").write_text(json.dumps(summary))
    refused(capsys, collect, "a and b were registered with different settings", "options.refine is 40")


def test_a_pair_that_another_process_registers_is_left_to_it(
    table: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    table.write_text("name,fixed,moving\na,fixed.nii.gz,a.nii.gz\n")
    (out / STATE).mkdir(parents=True)
    code = "from sitreg_lumir.io.lock import locked; from pathlib import Path; import sys, time\n"
    code += f"with locked(Path({str(out / STATE / '.a.lock')!r})): print('held', flush=True); time.sleep(2)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert register(table, out, members) in (0, 3)
        assert process.poll() == 0  # it was waited for, and its pair, which it left undone, was registered
    assert "waiting for other processes, which register 1 of the pairs" in capsys.readouterr().out
    assert (out / "a/summary.json").is_file() and "running" not in {row["verdict"] for row in rows(out).values()}


@pytest.mark.slow
def test_workers_give_the_same_to_the_last_bit(table: Path, members: Path, tmp_path: Path) -> None:
    assert register(table, tmp_path / "single", members) == 2
    assert register(table, tmp_path / "double", members, "--workers", "2") == 2
    first, second = (rows(tmp_path / name) for name in ("single", "double"))
    assert [*first] == [*second] == [*"abcd"] and first["c"] == second["c"]
    assert results(tmp_path / "single") == results(tmp_path / "double") != {}
    for name in "abd":
        assert {k: v for k, v in first[name].items() if k != "seconds"} == {
            k: v for k, v in second[name].items() if k != "seconds"
        }


@pytest.mark.slow
def test_killed_with_its_workers_and_resumed_it_loses_nothing(table: Path, members: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sitreg_lumir.cli", "register", "--pairs", str(table), "-o", str(out)]
    command += ["--members", str(members), *FEW, "--workers", "2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not list(out.glob("?/summary.json")):
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = next(out.glob("?/summary.json"))
    before = done.stat().st_mtime_ns
    assert register(table, out, members) == 2
    assert done.stat().st_mtime_ns == before
    assert [row["verdict"] in ("ok", "check", "failed") for row in rows(out).values()] == [True, True, False, True]


def test_options_of_tables_only(table: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["register", "--fixed", "MNI152", "--moving", "EXAMPLE-T1", "-o", str(tmp_path / "out")]
    for option, words in (
        (["--workers", "2"], "--workers is for a table"),
        (["--shard", "1/2"], "--shard is for a table"),
        (["--collect"], "--collect is for a table"),
    ):
        refused(capsys, [*pair, *option], words)
    of_table = ["register", "--pairs", str(table), "-o", str(tmp_path / "out"), "--members", str(members)]
    for option, words in (
        (["--workers", "0"], "--workers must be 1 or more"),
        (["--shard", "0/4"], "--shard 0/4: of N parts, the first is 1/N"),
        (["--shard", "5/4"], "--shard 5/4"),
        (["--shard", "two"], "--shard must be I/N"),
        (["--collect"], "no such folder"),
    ):
        refused(capsys, [*of_table, *option], words)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_parts_are_all_pairs_and_each_once(count: int) -> None:
    pairs = [PairRow(str(number), {}) for number in range(20)]
    parts = [Shard(number, count).of(pairs) for number in range(1, count + 1)]
    assert sorted((pair for part in parts for pair in part), key=lambda pair: int(pair.name)) == pairs
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shared_scan_is_read_and_aligned_once(t1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def align(*arguments: Any) -> Alignment:
        computed.append("aligned")
        turned = np.eye(4) + np.random.default_rng(5).normal(size=(4, 4)) / 1e3
        return Alignment(turned, 0.1, 1 / 3, float("nan"), 0.97, 20.0, 30.0)

    original = placed_scans.place_scan

    def place(*arguments: Any) -> Any:
        computed.append("read")
        return original(*arguments)

    monkeypatch.setattr(scan, "align_brain", align)
    monkeypatch.setattr(placed_scans, "place_scan", place)
    files = ScanFiles(t1, "fixed")
    first = PlacedScans(tmp_path)
    placed = first.place(files, "each", None, None)
    assert first.place(files, "each", None, None) is placed and computed == ["read", "aligned"]
    second = PlacedScans(tmp_path).place(files, "each", None, None)  # another process
    assert computed == ["read", "aligned", "read"]
    assert np.array_equal(second.prealign, placed.prealign)
    assert vars(second.alignment).keys() == vars(placed.alignment).keys()
    assert str(second.alignment) == str(placed.alignment)
    for file in tmp_path.glob("*.json"):
        file.write_text("{")  # damaged
    PlacedScans(tmp_path).place(files, "each", None, None)
    PlacedScans(tmp_path).place(files, "auto", None, None)  # other options
    PlacedScans(tmp_path, shared=()).place(files, "each", None, None)  # no pair shares it
    assert computed.count("aligned") == 4
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_what_was_computed_of_a_file_that_was_replaced_meanwhile_is_not_kept(
    t1: Path, t2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(shutil.copy(t1, tmp_path / "scan.nii.gz"))
    original = placed_scans._key

    def replaced_after_hashing(*arguments: Any) -> str:
        key = original(*arguments)
        shutil.copy(t2, file)
        return key

    monkeypatch.setattr(scan, "align_brain", lambda *_: Alignment(np.eye(4), 0.1, 0.3, 0.9, 0.9, 20.0, 30.0))
    scans = PlacedScans(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(placed_scans, "_key", replaced_after_hashing)
        placed = scans.place(ScanFiles(file, "fixed"), "each", None, None)
    assert placed.checksum == sha256_file(t2) and not list((tmp_path / "kept").glob("*.json"))
    with recorded_checksums() as read:
        assert scans.place(ScanFiles(file, "fixed"), "each", None, None) is not placed
        scans.place(ScanFiles(file, "fixed"), "each", None, None)  # from memory
    assert read[str(file)] == sha256_file(t2)


def test_a_stripped_brain_is_kept(tmp_path: Path) -> None:
    brain = np.random.default_rng(1).random((5, 7, 3)) > 0.5
    kept = KeptOnDisk(tmp_path, "key")
    kept.brain(lambda: (brain, "deepbet"))
    again, by = kept.brain(lambda: pytest.fail("computed again"))  # type: ignore[arg-type, return-value]
    assert np.array_equal(again, brain) and again.dtype == np.bool_ and by == "deepbet"


def double(settings: int) -> Any:
    def do(task: int) -> int:
        if task == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return settings * task

    return do


def refuse(settings: str) -> Any:
    raise InputError(settings)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_task_alone() -> None:
    tasks: Sequence[int] = [1, 13, 2, 3]
    done = dict(share_out(double, 10, tasks, 2))
    died = done.pop(1)
    assert done == {0: 10, 2: 20, 3: 30}
    assert isinstance(died, WorkerDied) and "lack of memory" in died.reason
    with pytest.raises(InputError, match="no members"):
        list(share_out(refuse, "no members", tasks, 2))


@pytest.mark.slow
def test_the_line_that_preprocess_prints_registers(
    t1: Path, members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = Alignment(np.eye(4), 0.1, 1.0, 0.5, 0.97, 20.0, 30.0)
    monkeypatch.setattr(place, "align_to_template", lambda *_: known)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brain_to-MNI152").mkdir()  # taken
    command = ["preprocess", str(t1), "-o", "brain.nii.gz", "--strip", "none", "--spacing", "4"]
    assert main([*command, "--no-bias-correction"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: sitreg-lumir "))
    arguments = shlex.split(line.removeprefix("next: sitreg-lumir "))
    assert main([*arguments, "--members", str(members), *FEW, "--no-report"]) in (0, 3)
    assert (tmp_path / "brain_to-MNI152_2/summary.json").is_file()
