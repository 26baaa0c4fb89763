"""Many pairs by several processes and in parts, killed and resumed: is anything lost, done twice, or different?

    python benchmarks/many_pairs.py --pairs 200 -o many_pairs

Makes small scans (4 mm, each of other values), one fixed scan for all of them, and an untrained member, so that a pair
costs seconds. Registers all pairs by `--workers 2`, and by four `--shard` processes at once into one folder; each time
everything is killed (SIGKILL, workers too) when a third is done, and started again. Then `--collect`, and all maps are
compared byte for byte. A run that is stopped goes on with the same command; numbers are in ``many_pairs.json``.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from sitreg_lumir.io.read import read_image
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import ModelCard, save_member
from sitreg_lumir.preprocessing.intensity import conform, support_mask
from sitreg_lumir.preprocessing.template import lumir_grid
from sitreg_lumir.registration.scan import EXAMPLES, EXAMPLES_FOLDER

SHARDS, WORKERS = 4, 2
SPACING = 4.0


def make_inputs(folder: Path, pairs: int) -> None:
    """Writes the scans, the member and the table of pairs."""
    shape, affine = lumir_grid(SPACING)
    brains: dict[str, Any] = {}
    for number, name in enumerate(["fixed", *(f"moving{number}" for number in range(pairs))]):
        path = folder / f"{name}.nii.gz"
        if path.is_file():
            continue
        example = "EXAMPLE-T1" if number == 0 else "EXAMPLE-T2"
        if example not in brains:
            scan = read_image(EXAMPLES_FOLDER / EXAMPLES[example])
            brain = support_mask(scan.data, scan.affine, str(scan.path))
            brains[example] = conform(scan.data, scan.affine, brain, np.eye(4), shape, affine)
        values, inside = brains[example]
        noise = np.random.default_rng(number).normal(scale=5, size=shape)
        stored = np.where(inside, np.clip(values + noise, 1, 255), 0).astype(np.uint8)
        nibabel.Nifti1Image(stored, affine).to_filename(path)
    torch.manual_seed(1)
    network = SITReg(in_channels=6, features=(4, 8, 8), head_features=(8, 8, 8))
    with torch.no_grad():
        for head in network.heads:
            head.final.weight.normal_(std=0.3)
    mind = Mind()
    card = ModelCard(network.architecture, {"sigma": mind.sigma, "radius": mind.radius}, list(shape), affine.tolist())
    if not (folder / "member.safetensors").is_file():
        save_member(folder / "member.safetensors", network, card)
    lines = [f"{number},fixed.nii.gz,moving{number}.nii.gz\n" for number in range(pairs)]
    (folder / "pairs.csv").write_text("name,fixed,moving\n" + "".join(lines))


def command(folder: Path, out: str, *more: str) -> list[str]:
    """The command line of one process."""
    start = [sys.executable, "-m", "sitreg_lumir.cli", "register", "--pairs", str(folder / "pairs.csv")]
    options = [] if "--collect" in more else ["--members", str(folder / "member.safetensors"), "--align", "none"]
    options += [] if "--collect" in more else ["--save", "map"]
    return [*start, "-o", str(folder / out), *options, *more]


def finished(folder: Path) -> dict[str, int]:
    """When each pair that is done was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}


def killed_and_resumed(folder: Path, out: str, ways: list[list[str]], pairs: int) -> dict[str, Any]:
    """Starts one process for each of ``ways``, kills all when a third of the pairs is done, and starts them again."""
    before = finished(folder / out)
    result: dict[str, Any] = {"pairs": pairs}
    if len(before) < pairs // 3:
        running = [start(folder, out, way) for way in ways]
        while len(finished(folder / out)) < pairs // 3 and any(process.poll() is None for process in running):
            time.sleep(0.5)
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            process.wait()
        before = finished(folder / out)
    result["done when killed"] = len(before)
    codes = [process.wait() for process in [start(folder, out, way) for way in ways]]
    after = finished(folder / out)
    result["exit codes after resuming"] = codes
    result["done twice"] = sum(after.get(name) != when for name, when in before.items())
    result["missing"] = pairs - len(after)
    return result


def start(folder: Path, out: str, way: list[str]) -> "subprocess.Popen[bytes]":
    """One process, in a group of its own."""
    log = (folder / f"{out}.log").open("ab")
    return subprocess.Popen(command(folder, out, *way), stdout=log, stderr=log, start_new_session=True)


def main() -> None:
    """Runs what is not done yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, default=Path("many_pairs"))
    options = parser.parse_args()
    folder, pairs = options.output, options.pairs
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder, pairs)
    path = folder / "many_pairs.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    ways = {
        "workers": [["--workers", str(WORKERS)]],
        "shards": [["--shard", f"{number}/{SHARDS}"] for number in range(1, SHARDS + 1)],
    }
    for name, way in ways.items():
        if name not in results:
            results[name] = killed_and_resumed(folder, name, way, pairs)
            path.write_text(json.dumps(results, indent=1))
    collected = subprocess.run(command(folder, "shards", "--collect"), capture_output=True, text=True)
    results["collect"] = {"exit code": collected.returncode, "says": collected.stdout.splitlines()[-1:]}
    maps = {name: {p.parent.name: p.read_bytes() for p in (folder / name).glob("*/map.safetensors")} for name in ways}
    different = sum(maps["workers"].get(name) != content for name, content in maps["shards"].items())
    results["maps"] = {"compared": len(maps["shards"]), "different": different}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    results["processor seconds of this call"] = round(usage.ru_utime + usage.ru_stime)
    path.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    print("\n| | pairs | done when killed | done twice | missing |\n|---|---|---|---|---|")
    for name in ways:
        row = results[name]
        print(f"| {name} | {row['pairs']} | {row['done when killed']} | {row['done twice']} | {row['missing']} |")


if __name__ == "__main__":
    main()
