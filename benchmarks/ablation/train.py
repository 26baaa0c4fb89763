"""Trains the variants of the ablation, each from where it stopped; runs that are done are skipped.

    python benchmarks/ablation/train.py REALBRAINS/2mm                  # 8000 pairs at 4 mm, 4000 at 2 mm; 150 triplets
    python benchmarks/ablation/train.py REALBRAINS/2mm --only member2     # one process and one thread for each core
    python benchmarks/ablation/train.py REALBRAINS/2mm --only member1 --init-from-shipped --coarse 2000 --fine 600

A variant is trained on pairs at half resolution, where a step costs a seventh (``runs/ablation/..._coarse``), then at
the full one (``..._fine``), both under one learning rate that falls along a cosine; then on triplets. All rows have the
same budget: those without the final epochs' penalties train on the same triplets with both weights 0. Convolutions run
in bfloat16, which processors with matrix units compute twice as fast. The local correlation's window is about 20 mm at
both resolutions: pairs of held-back training subjects, optimised one by one, agree best with it (``objectives.py``).
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
RATE, FINAL_SHARE = 1e-3, 0.05  # of the pairs; the share is left at their end
COARSE_WINDOW, COARSE_SMOOTHNESS = 5, 1.0  # voxels of 4 mm; less smoothness there lets ventricles go astray
FINAL_RATES = {"": 1e-4, "_4e-4": 4e-4}  # of the triplets: the published one, and that of the authors' command
NDV_WEIGHT, CONSISTENCY_WEIGHT = 8e-5, 40.0  # a voxel sum at 2 mm has 1/8 of the terms of 1 mm


@dataclass(frozen=True)
class Run:
    """One call of ``fit``.

    Attributes:
        name: of the run folder.
        config: what differs from the defaults.
        start: run whose last checkpoint it starts from, or None.
        weights: shipped member whose weights it begins with, or None.
        steps: optimiser steps after which it is done.
    """

    name: str
    config: dict
    start: str | None
    steps: int
    weights: str | None = None


def main() -> None:
    """Trains all variants, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_budget(parser)
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    options = parser.parse_args()
    for run in runs(options):
        train(run, options.root, options.runs, options.threads)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The options that say which runs an ablation consists of."""
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of T1 volumes at 2 mm in LUMIR's layout")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument("--coarse", type=int, default=8000, help="pairs at half resolution, n x 100 (default: 8000)")
    parser.add_argument("--fine", type=int, default=4000, help="pairs at full resolution, n x 100 (default: 4000)")
    parser.add_argument("--triplets", type=int, default=150, help="afterwards (default: 150)")
    parser.add_argument("--members", type=int, default=3, help="of the ensemble (default: 3)")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32, 32], help="channels, finest level first")
    parser.add_argument("--smoothness", type=float, default=0.5, help="weight of diffusion at 2 mm (default: 0.5)")
    parser.add_argument(
        "--init-from-shipped", action="store_true", help="member1, ... begin with the weights of the shipped members"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of baseline mind mind_final member1 member2 ...")


def variants(options: argparse.Namespace) -> list[str]:
    """All rows of the table that are trained; ``member1`` is ``mind_final_aug``."""
    names = ["baseline", "mind", *(f"mind_final{rate}" for rate in FINAL_RATES)]
    names += [f"member{seed}" for seed in range(1, options.members + 1)]
    return [name for name in names if not options.only or name in options.only]


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """All runs in their order; ``mind_final`` starts from ``mind``'s pairs."""
    pairs = options.coarse + options.fine
    for variant in variants(options):
        coarse = _config(variant, options)
        coarse["model"]["init_args"]["diffusion_weight"] = COARSE_SMOOTHNESS
        coarse["trainer"]["max_steps"] = options.coarse
        yield Run(
            coarse_run(variant, options),
            coarse,
            None,
            options.coarse,
            variant if _begins_shipped(variant, options) else None,
        )
        yield Run(fine_run(variant, options), _config(variant, options), coarse_run(variant, options), pairs)
        if not options.triplets:
            continue
        final = _config(variant, options)
        rate = next(rate for end, rate in reversed(FINAL_RATES.items()) if variant.endswith(end))
        final["model"]["init_args"]["final_rate_share"] = 1.0
        final["trainer"] |= _final_epoch(options, rate, with_penalties=variant not in ("baseline", "mind"))
        yield Run(final_run(variant, options), final, fine_run(variant, options), all_steps(options))


def coarse_run(variant: str, options: argparse.Namespace) -> str:
    """Name of the run folder of a variant's pairs at half resolution."""
    trained = "mind" if variant.startswith("mind") else variant
    begun = "shipped_" if _begins_shipped(variant, options) else ""
    return f"{trained}_{begun}{'-'.join(map(str, options.widths))}_{options.coarse}+{options.fine}_coarse"


def fine_run(variant: str, options: argparse.Namespace) -> str:
    """Name of the run folder of a variant's pairs at full resolution."""
    return f"{coarse_run(variant, options).removesuffix('_coarse')}_{options.smoothness:g}_fine"


def final_run(variant: str, options: argparse.Namespace) -> str:
    """Name of the run folder that holds a variant's last checkpoint."""
    if not options.triplets:
        return fine_run(variant, options)
    return f"{fine_run(variant, options).removesuffix('_fine')}_{variant}_{options.triplets}"


def _begins_shipped(variant: str, options: argparse.Namespace) -> bool:
    return bool(options.init_from_shipped and variant.startswith("member"))


def all_steps(options: argparse.Namespace) -> int:
    """Optimiser steps of a whole variant."""
    return int(options.coarse + options.fine + options.triplets)


def _config(variant: str, options: argparse.Namespace) -> dict:
    seed = int(variant.removeprefix("member")) if variant.startswith("member") else 0
    model: dict = {"features": options.widths, "head_features": options.widths, "learning_rate": RATE}
    model |= {"coarse_epochs": options.coarse // PAIRS_PER_EPOCH, "diffusion_weight": options.smoothness}
    if _begins_shipped(variant, options):
        model["learning_rate"] = RATE / 2
    model |= {"coarse_window": COARSE_WINDOW, "final_rate_share": FINAL_SHARE, "recompute": False}
    if variant.startswith("member"):
        model["augmentation"] = "Augmentation"
    epochs = (options.coarse + options.fine) // PAIRS_PER_EPOCH
    return {
        "seed_everything": seed,
        "data": {
            "seed": seed,
            "pairs_per_epoch": PAIRS_PER_EPOCH,
            "batch_size": 1,
            "micro_batch": 1,
            "num_workers": 1,
        },
        "model": {"class_path": "RawRegistration" if variant == "baseline" else "MindRegistration", "init_args": model},
        "trainer": {"max_epochs": epochs, "limit_val_batches": 0, "precision": "bf16-mixed"},
    }


def _final_epoch(options: argparse.Namespace, rate: float, with_penalties: bool) -> dict:
    first, weight = (options.coarse + options.fine) // PAIRS_PER_EPOCH, float(with_penalties)
    consistency = {
        "start_epoch": first,
        "weight": weight * CONSISTENCY_WEIGHT,
        "ramp_epochs": 0.25,
        "learning_rate": rate,
        "triplets_per_epoch": options.triplets,
    }
    return {
        "max_epochs": first + 1,
        "callbacks": [
            {"class_path": "NdvPenalty", "init_args": {"start_epoch": first, "weight": weight * NDV_WEIGHT}},
            {"class_path": "GroupConsistency", "init_args": consistency},
        ],
    }


def train(run: Run, root: Path, folder: Path, threads: int) -> None:
    """Runs ``fit``, from the run's own last checkpoint or that of the run before."""
    own = folder / run.name / "checkpoints" / "last.ckpt"
    before = None if run.start is None else folder / run.start / "checkpoints" / "last.ckpt"
    if own.is_file() and steps_of(own) >= run.steps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{run.name}.yaml"
    config.write_text(yaml.safe_dump(run.config, sort_keys=False))
    command = [sys.executable, "-m", "sitreg_lumir.cli", "fit", "--config", str(config), "--name", run.name]
    command += ["--runs", str(folder), "--wandb", "off", "--data", str(root), "--keep-every", "1000"]
    resume = own if own.is_file() else before
    if resume is not None:
        command += ["--resume", str(resume)]
    elif run.weights is not None:
        command += ["--init-from", run.weights]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    print(f"training {run.name} up to step {run.steps}", flush=True)
    with (folder / f"{run.name}.log").open("a") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)


def steps_of(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint has behind it."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


if __name__ == "__main__":
    main()
