"""Arguments of a small training with final epochs."""

import os
from pathlib import Path

QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def arguments(
    root: Path, runs: Path, name: str, *more: str, start: int = 1, epochs: int = 2, pairs: int = 3
) -> list[str]:
    """A run of pairs and, from epoch ``start`` on, triplets, small enough for a test."""
    callbacks = runs.parent / f"callbacks_{start}.yaml"
    callbacks.write_text(
        f"""trainer:
  callbacks:
    - {{class_path: NdvPenalty, init_args: {{start_epoch: {start}, weight: 1e-3}}}}
    - class_path: GroupConsistency
      init_args: {{start_epoch: {start}, ramp_epochs: 0.5, triplets_per_epoch: 3, learning_rate: 1e-4}}
"""
    )
    return [
        "fit", "--config", "mind", "--config", str(callbacks), "--name", name, "--runs", str(runs), "--wandb", "off",
        "--checkpoint-every", "1", "--data.root", str(root), "--data.batch_size", "1",
        "--data.pairs_per_epoch", str(pairs), "--data.num_workers", "0", "--data.cache", str(runs.parent / "cache"),
        "--model.features", "[8,8]", "--model.head_features", "[8,8]", "--model.window", "3",
        "--model.augmentation", "Augmentation", "--model.recompute", "false",
        "--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", *more,
    ]  # fmt: skip
