"""Many small jobs in one process: does memory, or the number of open files, grow?

    python benchmarks/load.py -o load                     # 1,000 pairs, 2,000 training steps, 200 registrations
    python benchmarks/load.py -o load --pairs 100 --steps 200 --registrations 20
    python benchmarks/load.py -o load --table             # what has been measured so far

All on tiny volumes (20 x 28 x 24 at 8 mm). A job is a process: `predict` over that many pairs, `fit` over that many
steps, and that many calls of ``register``. A thread of that process writes down, ten times a second, its resident
memory, its open files, and its threads. Growth is judged from the median over the third quarter of the samples to that
over the last one: by then all is loaded and compiled. ``results.json`` keeps what each job gave; jobs that are there
are not run again, a training that was stopped goes on with its checkpoint, predictions with the pairs that are missing.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from itertools import islice, permutations
from pathlib import Path
from statistics import median
from typing import Any

SHAPE, VOXEL = (20, 28, 24), 8.0
EVERY = 0.1  # seconds between two samples
_MB = 1e6


class Watch(threading.Thread):
    """Writes down memory (MB), open files and threads of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self.samples: list[tuple[float, int, int]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        """Takes samples."""
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._ended.wait(EVERY):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page / _MB
            self.samples.append((resident, len(os.listdir("/proc/self/fd")), threading.active_count()))

    def summary(self) -> dict[str, Any]:
        """Medians of the last two quarters of all samples, and the largest values."""
        self._ended.set()
        self.join()
        quarter = max(1, len(self.samples) // 4)
        earlier, later = self.samples[-2 * quarter : -quarter] or self.samples, self.samples[-quarter:]
        names = ("resident_mb", "files", "threads")
        return {
            "samples": len(self.samples),
            **{f"{name}_third_quarter": median(row[i] for row in earlier) for i, name in enumerate(names)},
            **{f"{name}_last_quarter": median(row[i] for row in later) for i, name in enumerate(names)},
            **{f"{name}_most": max(row[i] for row in self.samples) for i, name in enumerate(names)},
        }


def dataset(work: Path, pairs: int) -> Path:
    """A data set whose validation list names so many pairs of a few subjects, in turn."""
    from sitreg_lumir.demo.data import make_demo_data

    subjects = next(count for count in range(2, 1000) if count * (count - 1) >= pairs)
    listed = make_demo_data(work / f"data{subjects}", shape=SHAPE, voxel_size=VOXEL, validation=subjects)
    content = json.loads(listed.read_text())
    names = [f"./imagesVal/LUMIRMRI_{100 + number:04d}_0000.nii.gz" for number in range(subjects)]
    chosen = islice(permutations(names, 2), pairs)
    content["validation"] = [{"fixed": fixed, "moving": moving} for fixed, moving in chosen]
    content["numValidation"] = len(content["validation"])
    file = listed.with_name(f"pairs{pairs}.json")
    file.write_text(json.dumps(content))
    return file


def training(data: Path, work: Path, name: str, steps: int) -> list[str]:
    """The arguments of a training of so many steps."""
    return [
        "fit", "--data", str(data), "--data.validation", "[]", "--data.cache", str(work / "cache"), "--runs",
        str(work / "runs"), "--name", name, "--data.num_workers", "0", "--wandb", "off", "--data.batch_size", "1",
        "--data.pairs_per_epoch", "100", "--trainer.max_epochs", str(-(-steps // 100)), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--model.features", "[4,4]", "--model.head_features", "[4,4]",
        "--model.window", "3", "--panels-every", "9999",
    ]  # fmt: skip


def job(name: str, count: int, work: Path) -> None:
    """Runs a job in this process and prints its summary."""
    from sitreg_lumir.cli import main
    from sitreg_lumir.registration.model import load_model
    from sitreg_lumir.registration.register import register

    member = work / "runs" / "member" / "checkpoints" / "last.ckpt"
    watch = Watch()
    start, used = time.monotonic(), time.process_time()
    done = 0
    if name == "pairs":
        data = dataset(work, count)
        watch.start()
        arguments = ["--data", str(data), "-o", str(work / "fields"), "--device", "cpu", "--data.num_workers", "0"]
        code = main(["predict", "--members", str(member), *arguments, "--data.cache", str(work / "cache")])
        done = len(list((work / "fields").glob("disp_*.nii.gz")))
    elif name == "steps":
        watch.start()
        last = work / "runs" / f"steps{count}" / "checkpoints" / "last.ckpt"
        resume = ["--resume"] if last.is_file() else []
        code = main([*training(dataset(work, 2), work, f"steps{count}", count), *resume])
        done = count if code == 0 else 0
    else:
        data, model, code = dataset(work, 2), load_model([member]), 0
        images = sorted((data.parent / "imagesVal").glob("*_0000.nii.gz"))[:2]
        watch.start()
        for number in range(count):
            fixed, moving = images if number % 2 else images[::-1]
            out = work / "registrations" / str(number % 5)
            register(fixed, moving, out, model=model, align="none", report=False, overwrite=True)
            done += 1
    summary = {"asked": count, "done": done, "exit_code": code, **watch.summary()}
    summary |= {"seconds": time.monotonic() - start, "processor_seconds": time.process_time() - used}
    print("\n" + json.dumps(summary))


def table(results: dict[str, Any]) -> str:
    """A Markdown table of the jobs."""
    lines = [
        "| job | done | memory, third quarter, MB | last quarter | most | open files | last quarter | most |",
        "|---" * 8 + "|",
    ]
    for name, result in results.items():
        cells = [name, f"{result['done']} of {result['asked']}"]
        for quantity, form in (("resident_mb", "{:.0f}"), ("files", "{:.0f}")):
            cells += [form.format(result[f"{quantity}_{when}"]) for when in ("third_quarter", "last_quarter", "most")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the jobs that have not been run yet, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the data and results.json")
    for name, count in (("pairs", 1000), ("steps", 2000), ("registrations", 200)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"default: {count}; 0: none")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print what has been measured, and stop")
    options = parser.parse_args()
    work = options.output.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if options.job:
        job(options.job, getattr(options, options.job), work)
        return
    file = work / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not options.table:
        if not (work / "runs" / "member" / "checkpoints" / "last.ckpt").is_file():
            command = [sys.executable, "-m", "sitreg_lumir.cli", *training(dataset(work, 2), work, "member", 100)]
            subprocess.run(command, check=True)
        for name in ("pairs", "steps", "registrations"):
            count = getattr(options, name)
            if count and results.get(name, {}).get("done", 0) < count:
                command = [sys.executable, __file__, "-o", str(work), "--job", name, f"--{name}", str(count)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[name] = json.loads(done.stdout.strip().splitlines()[-1])
                file.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
