"""Compares other registration methods with ours on the validation pairs of miniLUMIR: scores, CPU time, memory.

    python benchmarks/others/compare.py MINILUMIR/2mm --python OTHERS/bin/python            # all, table and JSON
    python benchmarks/others/compare.py MINILUMIR/2mm --python OTHERS/bin/python --only syn --check
    python benchmarks/others/compare.py MINILUMIR/2mm --only ours --members runs/mind --refine 30

The others live in an environment of their own:

    python -m venv OTHERS
    OTHERS/bin/pip install torch==2.13.0    # first, and from the index of CPU builds unless CUDA libraries are welcome
    OTHERS/bin/pip install antspyx==0.6.3 convexadam==0.2.0 fireants==1.5.0

Each pair is registered in a process of its own on one CPU thread. Fields go to ``benchmarks/results/others/<method>``
in the challenge's format and are all scored by ``sitreg-lumir evaluate``; a field that is there already, made by the
same call and versions, is kept. How each method is called stands in ``methods.py`` and in the table.

``--check`` registers an image to itself, moved by known voxels, and compares what the others' fields say: whether
they were converted rightly.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np

from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lumir import read_dataset

DATASETS = ("LUMIR_dataset.json", "LUMIR_dataset_multimodal.json")
GROUPS = ("T1-T1", "T1-T2")
OTHERS = {"convexadam": "ConvexAdam", "syn": "ANTs SyN", "fireants": "FireANTs, greedy"}
FOLDER = Path(__file__).resolve().parent
SHIFT = (2, -3, 1)  # voxels: differs between the axes in size and sign
THREADS = ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
ONE_THREAD = dict.fromkeys(THREADS, "1") | {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    """Registers what is missing, scores and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="MINILUMIR", help="folder of miniLUMIR at 2 mm")
    parser.add_argument("--python", type=Path, help="of the environment with the other packages")
    parser.add_argument("--only", nargs="+", choices=(*OTHERS, "ours"), default=[*OTHERS, "ours"], help="default: all")
    parser.add_argument("--members", nargs="+", type=Path, metavar="PATH", help="ours (default: the shipped ones)")
    parser.add_argument("--refine", type=int, metavar="N", help="ours once more, with N steps of instance optimisation")
    parser.add_argument("--pairs", nargs="+", metavar="NAME", help="only these, e.g. 0100_0000_0101_0001")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "results" / "others", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="only test the fields' convention by a known shift")
    options = parser.parse_args()
    if options.python is None and set(options.only) != {"ours"}:
        parser.error("--python is missing: the environment with the other packages, or --only ours")
    pairs = [pair for name in DATASETS for pair in read_dataset(options.root / name, validation=True).validation]
    commands = {row: command for row, command in workers(options).items() if row.split("_")[0] in options.only}
    if options.check:
        check({row: command for row, command in commands.items() if row in OTHERS}, pairs[0])
        return
    for row, command in commands.items():
        wanted = [pair for pair in pairs if not options.pairs or pair.long_name in options.pairs]
        register_pairs(row, command, wanted, options.out / row)
    write_table(pairs, options)


def workers(options: argparse.Namespace) -> dict[str, list[str]]:
    """How one pair is registered by each row of the table: a command that takes FIXED MOVING FIELD."""
    commands = {name: [str(options.python), str(FOLDER / "methods.py"), name] for name in OTHERS}
    commands["ours"] = [sys.executable, str(FOLDER / "ours.py")]
    if options.refine:
        commands[f"ours_refine{options.refine}"] = [*commands["ours"], "--refine", str(options.refine)]
    for row in commands:
        if row.startswith("ours") and options.members:
            commands[row] = [*commands[row], "--members", *map(str, options.members)]
    return commands


def check(commands: dict[str, list[str]], pair: Pair) -> None:
    """Compares the other methods' fields with a known shift; ends with an error where one is not found."""
    image = nib.load(pair.fixed.path)
    values = np.asarray(image.dataobj)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        moving, field = Path(folder) / "moving.nii.gz", Path(folder) / "field.nii.gz"
        nib.save(nib.Nifti1Image(np.roll(values, SHIFT, (0, 1, 2)), image.affine), moving)
        for row, command in commands.items():
            run([*command, str(pair.fixed.path), str(moving), str(field), "--contrasts", "other"], Path(folder) / "log")
            median_shift = np.median(np.asarray(nib.load(field).dataobj)[values > 0], axis=0)
            print(f"{row}: moved by {SHIFT} voxels, found {', '.join(f'{moved:.2f}' for moved in median_shift)}")
            wrong += [row] if np.abs(median_shift - SHIFT).max() > 0.3 else []
    if wrong:
        sys.exit(f"the field's convention, or the registration, is wrong: {', '.join(wrong)}")


def register_pairs(row: str, command: list[str], pairs: list[Pair], folder: Path) -> None:
    """Registers the pairs that are not there yet; beside each field ``<pair>.json`` says how and at what cost."""
    folder.mkdir(parents=True, exist_ok=True)
    described = subprocess.run([*command, "--describe"], stdout=subprocess.PIPE, text=True, check=True)
    made: dict[str, Any] = json.loads(described.stdout.splitlines()[-1])
    for pair in pairs:
        contrasts = "same" if pair.fixed.modality == pair.moving.modality else "other"
        by = {"call": made["calls"][contrasts], "versions": made["versions"]}
        field, record = folder / f"disp_{pair.long_name}.nii.gz", folder / f"{pair.long_name}.json"
        if field.is_file() and record.is_file() and json.loads(record.read_text())["by"] == by:
            continue
        record.unlink(missing_ok=True)
        (folder / "evaluation.json").unlink(missing_ok=True)
        files = [str(pair.fixed.path), str(pair.moving.path), str(field)]
        cost = run([*command, *files, "--contrasts", contrasts], folder / "log.txt")
        record.write_text(
            json.dumps({"pair": pair.long_name, "group": pair.contrasts, "by": by} | cost, indent=1) + "\n"
        )
        numbers = f"{cost['call_seconds']:.1f} CPU s, with start and files {cost['cpu_seconds']:.1f}"
        print(f"{row} {pair.long_name}: {numbers}, {cost['peak_gb']:.2f} GB", flush=True)


def run(command: list[str], log: Path) -> dict[str, float]:
    """Runs one registration on one thread and gives its cost: CPU seconds, of the call and of the whole process.

    ``peak_gb`` is the largest resident memory; ``seconds`` is wall time, which other processes on the machine lengthen.
    """
    start = time.perf_counter()
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **ONE_THREAD})
        assert process.stdout is not None
        printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: failed, {' '.join(log.read_text().splitlines()[-1:])}; see {log}")
    return json.loads(printed.splitlines()[-1]) | {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6),
        "seconds": time.perf_counter() - start,
    }


def write_table(pairs: list[Pair], options: argparse.Namespace) -> None:
    """Scores the methods that have all pairs; ``others.json`` and ``others.md`` beside the folder of the fields."""
    rows: dict[str, Any] = {"affine": {"scores": scores(options.out / "affine", options.root, "--identity")}}
    for folder in sorted(path for path in options.out.iterdir() if path.is_dir() and path.name != "affine"):
        records = [folder / f"{pair.long_name}.json" for pair in pairs]
        done = sum(record.is_file() for record in records)
        if done < len(pairs):
            print(f"{folder.name}: left out of the table, {done} of {len(pairs)} pairs are done")
            continue
        costs = [json.loads(record.read_text()) for record in records]
        rows[folder.name] = {"scores": scores(folder, options.root), "cost": {}, "by": {}}
        for group in GROUPS:
            members = [cost for cost in costs if cost["group"] == group]
            if any(cost["by"] != members[0]["by"] for cost in members):
                sys.exit(f"{folder}: {group} pairs were made by different calls; run {folder.name} again")
            rows[folder.name]["by"][group] = members[0]["by"]
            summary = {key: median(cost[key] for cost in members) for key in ("call_seconds", "cpu_seconds")}
            rows[folder.name]["cost"][group] = summary | {"peak_gb": max(cost["peak_gb"] for cost in members)}
    conditions = {"cpu": processor(), "cores": os.cpu_count(), "threads": 1, "python": platform.python_version()}
    target = options.out.with_name("others.json")
    target.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    text = table(rows)
    target.with_suffix(".md").write_text(text + "\n")
    print(text)
    print(f"written: {target}, {target.with_suffix('.md')}")


def scores(folder: Path, root: Path, *arguments: str) -> dict[str, Any]:
    """Means over the pairs of each group."""
    file = folder / "evaluation.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        where = [*arguments, "-o", str(folder)] if arguments else [str(folder)]
        command = [sys.executable, "-m", "sitreg_lumir.cli", "evaluate", *where]
        command += ["--data", *(str(root / name) for name in DATASETS)]
        subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
    groups: dict[str, Any] = json.loads(file.read_text())["groups"]
    return groups


def table(rows: dict[str, Any]) -> str:
    """Markdown: means over the pairs, T1-T1 / T1-T2, medians of the cost, then how each method was called."""
    heads = ["", "Dice T1-T1", "Dice T1-T2", "HD95 mm", "TRE mm", "NDV %", "CPU s, call", "CPU s, process", "peak GB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    calls = []
    for name, row in rows.items():
        groups = [row["scores"][group] for group in GROUPS]
        cells = [title(name), *(f"{group['dsc']['mean']:.3f} ({group['dsc']['sd']:.3f})" for group in groups)]
        for score, digits in (("hd95_mm", 2), ("tre_mm", 2), ("ndv", 4)):
            cells.append(" / ".join(f"{group[score]['mean']:.{digits}f}" for group in groups))
        for key, digits in (("call_seconds", 1), ("cpu_seconds", 1), ("peak_gb", 2)):
            costs = [f"{row['cost'][group][key]:.{digits}f}" for group in GROUPS] if "cost" in row else ["-"]
            cells.append(" / ".join(costs))
        lines.append("| " + " | ".join(cells) + " |")
        for group, by in row.get("by", {}).items():
            versions = ", ".join(f"{package} {number}" for package, number in by["versions"].items())
            calls.append(f"* {title(name)}, {group}: `{by['call']}` ({versions})")
    return "\n".join([*lines, "", *calls])


def title(row: str) -> str:
    """A row's name as people read it."""
    refined = row.removeprefix("ours_refine")
    if refined != row:
        return f"ours, {refined} steps of refinement"
    return {"affine": "affine only", **OTHERS}.get(row, row)


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
