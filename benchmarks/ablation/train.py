"""Trains the five variants of the ablation, each stage from where it stopped; stages that are done are skipped.

    python benchmarks/ablation/train.py MINILUMIR/2mm    # pairs: 1600 at 4 mm, 700 at 2 mm; then 30 triplets
    python benchmarks/ablation/train.py MINILUMIR/2mm --loose 2000 --triplets 300 --members 5

A variant is trained on pairs in ``runs/ablation/<variant>_<coarse>_pairs``, first at half resolution, where a step
costs a sixth; then in ``<variant>_<coarse>_<steps>_loose`` with less weight on smoothness (constant learning rate, so
that a larger budget goes on from a smaller one's checkpoint); then on triplets in
``<variant>_<coarse>_<steps>_<loose>_<triplets>``. All rows have the same budget: those without the final epochs'
penalties train on the same triplets with both weights 0.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

PAIRS_PER_EPOCH = 100
WIDTHS = [8, 16, 32, 32]
RATE, FINAL_RATE = 1e-3, 5e-4
DIFFUSION, LOOSE_DIFFUSION = 1.0, 0.3  # at 2 mm the published 1.0 holds the cortex back, and folding is not near
NDV_WEIGHT, CONSISTENCY_WEIGHT = 8e-5, 40.0  # a voxel sum at 2 mm has 1/8 of the terms of 1 mm


@dataclass(frozen=True)
class Stage:
    """One call of ``fit``.

    Attributes:
        run: name of the run folder.
        config: what differs from the defaults.
        start: run whose last checkpoint it starts from, or None.
        steps: optimiser steps after which it is done.
    """

    run: str
    config: dict
    start: str | None
    steps: int


def main() -> None:
    """Runs all stages, or those of the variants that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_budget(parser)
    parser.add_argument("--threads", type=int, default=None, help="of each run (default: all)")
    options = parser.parse_args()
    for stage in stages(options):
        train(stage, options.root, options.runs, options.threads)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The options that say which runs an ablation consists of."""
    parser.add_argument("root", type=Path, metavar="MINILUMIR", help="folder of miniLUMIR at 2 mm")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument("--coarse", type=int, default=1600, help="pairs at half resolution, n x 100 (default: 1600)")
    parser.add_argument("--steps", type=int, default=300, help="pairs at full resolution, n x 100 (default: 300)")
    parser.add_argument("--loose", type=int, default=400, help="then with less smoothness, n x 100 (default: 400)")
    parser.add_argument("--triplets", type=int, default=30, help="afterwards (default: 30)")
    parser.add_argument("--members", type=int, default=3, help="of the ensemble (default: 3)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="baseline mind mind_final member1 member2 ...")


def stages(options: argparse.Namespace) -> Iterator[Stage]:
    """All stages in their order; ``mind_final`` starts from ``mind``'s pairs, ``member1`` is ``mind_final_aug``."""
    variants = {"baseline": (0, "baseline"), "mind": (0, "mind"), "mind_final": (0, "mind")}
    variants |= {f"member{seed}": (seed, f"member{seed}") for seed in range(1, options.members + 1)}
    for variant, (seed, pairs) in variants.items():
        if options.only and variant not in options.only:
            continue
        first, second = options.coarse + options.steps, options.coarse + options.steps + options.loose
        start, loose = f"{pairs}_{options.coarse}_pairs", f"{pairs}_{options.coarse}_{options.steps}_loose"
        if variant != "mind_final" or options.only:
            yield Stage(start, _config(variant, seed, options.coarse, first, DIFFUSION), None, first)
            yield Stage(loose, _config(variant, seed, options.coarse, second, LOOSE_DIFFUSION), start, second)
        with_penalties = variant not in ("baseline", "mind")
        final = _config(variant, seed, options.coarse, second, LOOSE_DIFFUSION)
        final["trainer"] = _final_trainer(second, options.triplets, with_penalties)
        yield Stage(final_run(variant, options), final, loose, all_steps(options))


def final_run(variant: str, options: argparse.Namespace) -> str:
    """Name of the run folder that holds a variant's last checkpoint."""
    return f"{variant}_{budget(options)}"


def budget(options: argparse.Namespace) -> str:
    """The four numbers of steps, for names of files."""
    return f"{options.coarse}_{options.steps}_{options.loose}_{options.triplets}"


def all_steps(options: argparse.Namespace) -> int:
    """Optimiser steps of a whole variant."""
    return int(options.coarse + options.steps + options.loose + options.triplets)


def _config(variant: str, seed: int, coarse: int, pairs: int, diffusion: float) -> dict:
    model: dict = {"features": WIDTHS, "head_features": WIDTHS, "learning_rate": RATE}
    model |= {"coarse_epochs": coarse // PAIRS_PER_EPOCH, "diffusion_weight": diffusion}
    if variant.startswith("member"):
        model["augmentation"] = "Augmentation"
    return {
        "seed_everything": seed,
        "data": {"seed": seed, "pairs_per_epoch": PAIRS_PER_EPOCH, "batch_size": 1, "num_workers": 1},
        "model": {"class_path": "RawRegistration" if variant == "baseline" else "MindRegistration", "init_args": model},
        "trainer": {"max_epochs": pairs // PAIRS_PER_EPOCH, "limit_val_batches": 0},
    }


def _final_trainer(pairs: int, triplets: int, with_penalties: bool) -> dict:
    first, weight = pairs // PAIRS_PER_EPOCH, float(with_penalties)
    consistency = {
        "start_epoch": first,
        "weight": weight * CONSISTENCY_WEIGHT,
        "ramp_epochs": 0.25,
        "learning_rate": FINAL_RATE,
        "triplets_per_epoch": triplets,
    }
    return {
        "max_epochs": first + 1,
        "limit_val_batches": 0,
        "callbacks": [
            {"class_path": "NdvPenalty", "init_args": {"start_epoch": first, "weight": weight * NDV_WEIGHT}},
            {"class_path": "GroupConsistency", "init_args": consistency},
        ],
    }


def train(stage: Stage, root: Path, runs: Path, threads: int | None) -> None:
    """Runs ``fit`` for one stage, from its own last checkpoint or that of the run before."""
    folder = runs / stage.run
    own, before = folder / "checkpoints" / "last.ckpt", None
    if stage.start is not None:
        before = runs / stage.start / "checkpoints" / "last.ckpt"
    if own.is_file() and steps_of(own) >= stage.steps:
        return
    runs.mkdir(parents=True, exist_ok=True)
    config = runs / f"{stage.run}.yaml"
    config.write_text(yaml.safe_dump(stage.config, sort_keys=False))
    command = [sys.executable, "-m", "sitreg_lumir.cli", "fit", "--config", str(config), "--name", stage.run]
    command += ["--runs", str(runs), "--wandb", "off", "--data.root", str(root), "--keep-every", "1000"]
    resume = own if own.is_file() else before
    if resume is not None:
        command += ["--resume", str(resume)]
    environment = dict(os.environ)
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    print(f"training {stage.run} up to step {stage.steps}", flush=True)
    with (runs / f"{stage.run}.log").open("a") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)


def steps_of(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint has behind it."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


if __name__ == "__main__":
    main()
