"""What pays per CPU second: short trainings of equal cost, one per option, scored without labels on held-back subjects.

    python benchmarks/trials.py REALBRAINS/2mm                                     # all options at half resolution
    python benchmarks/trials.py REALBRAINS/2mm narrow wide --minutes 12
    python benchmarks/trials.py REALBRAINS/2mm window7 --full --start runs/mind/checkpoints/last.ckpt

24 training subjects, drawn by a named seed, are held back; the others are trained on. How many pairs an option gets in
its CPU minutes is measured first, in the same way for all. A trial that was interrupted goes on, one that is done is
kept. The table and ``trials.json`` have a row per option (``held_back.py`` explains the scores).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from held_back import augmented, cycle_mm, full, markdown, mean_scores, read_brain, score, split
from lightning.pytorch import Callback

from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.network.weights import load_member, read_checkpoint
from sitreg_lumir.train.run import build

EPOCH = 50  # pairs
WARM_UP, TIMED = 4, 16  # steps before and in the measurement of a step's CPU seconds
VOXEL_SIZE = 2.0  # mm
COMMON: dict[str, Any] = {
    "features": [8, 16, 32, 32],
    "head_features": [8, 16, 32, 32],
    "learning_rate": 1e-3,
    "final_rate_share": 0.05,
    "one_direction": True,
    "stage_every": 4,
    "coarse_window": 7,
}
OPTIONS: dict[str, dict[str, Any]] = {  # what differs from COMMON; "trainer" and "data" go to those
    "narrow": {},
    "wide": {"features": [16, 32, 64, 64], "head_features": [16, 32, 64, 64]},
    "wide_coarse": {"features": [8, 32, 64, 64], "head_features": [8, 32, 64, 64]},
    "window11": {"window": 11, "coarse_window": 11},
    "window5": {"window": 5, "coarse_window": 5},
    "window3": {"window": 3, "coarse_window": 3},
    "smooth": {"diffusion_weight": 2.0},
    "loose": {"diffusion_weight": 0.3},
    "both_directions": {"one_direction": False},
    "every_stage": {"stage_every": 1},
    "last_stage": {"stage_weight": 0.0},
    "constant_rate": {"final_rate_share": 1.0},
    "half_rate": {"learning_rate": 5e-4},
    "double_rate": {"learning_rate": 2e-3},
    "average": {"trainer": {"callbacks": [{"class_path": "WeightAverage", "init_args": {"decay": 0.99}}]}},
    "mirror": {"data": {"mirror": True}},
    "augmented": {"augmentation": "Augmentation"},
    "batch2": {"data": {"batch_size": 2}},
    "float32": {"trainer": {"precision": "32-true"}},
}


def main() -> None:
    """Trains and scores the named options, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the data set, 2 mm")
    parser.add_argument("options", nargs="*", metavar="OPTION", help=f"of {', '.join(OPTIONS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=12, help="CPU minutes of training per option (default: 12)")
    parser.add_argument("--full", action="store_true", help="train at full instead of half resolution")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights all options begin with")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings (default: 0)")
    parser.add_argument("--triplets", type=int, default=8, help="of held-back subjects, to score (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/trials"), help="default: runs/trials")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.options) - set(OPTIONS)):
        parser.error(f"unknown option {unknown[0]}; choose from {', '.join(OPTIONS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    dataset = training_split(arguments.root, arguments.out)
    file = arguments.out / "trials.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    for option in arguments.options or OPTIONS:
        name = run_name(option, arguments)
        if name not in rows:
            rows[name] = trial(name, OPTIONS[option], dataset, arguments)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            print(markdown({name: rows[name]}), flush=True)
    print(markdown(rows))


def run_name(option: str, arguments: argparse.Namespace) -> str:
    """All that decides a trial's result."""
    start = f"_from_{arguments.start.resolve().parts[-3]}" if arguments.start else ""
    return f"{option}_{'full' if arguments.full else 'half'}{start}_{arguments.minutes:g}min_seed{arguments.seed}"


def training_split(root: Path, folder: Path) -> Path:
    """A dataset JSON of the subjects that are trained on, which keeps the images where they are."""
    kept, _ = split(root)
    content = json.loads((root / "LUMIR_dataset.json").read_text())
    content |= {"training": [{"image": f"./imagesTr/{image.path.name}"} for image in kept], "numTraining": len(kept)}
    file = folder / "LUMIR_dataset.json"
    file.write_text(json.dumps(content | {"validation": []}, indent=1) + "\n")
    return file


def trial(name: str, option: dict[str, Any], dataset: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains one option for its CPU time and scores it."""
    checkpoint = arguments.out / name / "checkpoints" / "last.ckpt"
    config = arguments.out / f"{name}.yaml"
    if not config.is_file():
        seconds = step_seconds(settings(option, dataset, arguments, WARM_UP + TIMED, 1), arguments)
        epochs = max(1, round(60 * arguments.minutes / seconds / EPOCH))
        wanted = settings(option, dataset, arguments, EPOCH, began(arguments)[0] + epochs)
        config.write_text(yaml.safe_dump(wanted, sort_keys=False))
        (arguments.out / f"{name}.json").write_text(json.dumps({"pair_s": seconds, "pairs": epochs * EPOCH}))
    counted = json.loads((arguments.out / f"{name}.json").read_text())
    steps = began(arguments)[1] + counted["pairs"] // option.get("data", {}).get("batch_size", 1)
    if not checkpoint.is_file() or int(read_checkpoint(checkpoint)["global_step"]) < steps:
        command = [sys.executable, "-m", "sitreg_lumir.cli", "fit", "--config", str(config), "--name", name]
        command += [
            "--runs",
            str(arguments.out),
            "--wandb",
            "off",
            "--keep-every",
            "100000",
            "--panels-every",
            "100000",
        ]
        if checkpoint.is_file() or arguments.start:
            command += ["--resume", str(checkpoint if checkpoint.is_file() else arguments.start)]
        with (arguments.out / f"{name}.log").open("a") as log:
            subprocess.run(command, check=True, env=os.environ, stdout=log, stderr=subprocess.STDOUT)
    return counted | scored(checkpoint, arguments)


def settings(
    option: dict[str, Any], dataset: Path, arguments: argparse.Namespace, pairs: int, epochs: int
) -> dict[str, Any]:
    """The config of a training."""
    model = COMMON | {key: value for key, value in option.items() if key not in ("trainer", "data")}
    model["coarse_epochs"] = 0 if arguments.full else epochs
    data = {"root": str(dataset.resolve()), "images": str(arguments.root.resolve()), "seed": arguments.seed}
    data |= {"pairs_per_epoch": pairs, "batch_size": 1, "num_workers": 0} | option.get("data", {})
    trainer = {"max_epochs": epochs, "limit_val_batches": 0, "precision": "bf16-mixed"} | option.get("trainer", {})
    return {
        "seed_everything": arguments.seed,
        "data": data,
        "model": {"class_path": "MindRegistration", "init_args": model},
        "trainer": trainer,
    }


def began(arguments: argparse.Namespace) -> tuple[int, int]:
    """Epochs and steps that the checkpoint to start from has behind it."""
    if arguments.start is None:
        return 0, 0
    checkpoint = read_checkpoint(arguments.start)
    return int(checkpoint["epoch"]) + 1, int(checkpoint["global_step"])


class Clock(Callback):
    """CPU time after each batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *arguments: Any, **named: Any) -> None:
        """Keeps the processor time of the step."""
        self.times.append(time.process_time())


def step_seconds(config: dict[str, Any], arguments: argparse.Namespace) -> float:
    """CPU seconds per pair, without the first steps."""
    file = arguments.out / "measured.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    cli = build(["--config", str(file)])
    clock = Clock()
    cli.trainer.callbacks.append(clock)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    batch = config["data"]["batch_size"]
    first = WARM_UP // batch - 1
    return (clock.times[-1] - clock.times[first]) / ((len(clock.times) - 1 - first) * batch)


@torch.inference_mode()
def scored(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Mean scores of the held-back triplets' pairs and cycles."""
    member = load_member(checkpoint)
    _, held = split(arguments.root)
    rows = []
    for first in range(0, 3 * arguments.triplets, 3):
        brains = [read_brain(image, VOXEL_SIZE) for image in held[first : first + 3]]
        pairs, disps = [], []
        for k in range(3):
            fixed, moving = brains[k], brains[k - 1]
            images = {"fixed": fixed, "moving": moving}
            images = {role: augmented(brain, not arguments.full)[0] for role, brain in images.items()}
            (stage,) = Ensemble.of([member]).run(**images)
            disp, disp_inv = full(stage.disp, fixed.image), full(stage.disp_inv, moving.image)
            pairs.append(score(disp, disp_inv, fixed, moving, VOXEL_SIZE))
            disps.append(disp)
        rows.append(mean_scores(pairs) | {"cycle_mm": cycle_mm(disps, brains[2], VOXEL_SIZE)})
    return mean_scores(rows)


if __name__ == "__main__":
    main()
