"""Scores what ``train.py`` trained, on all validation pairs of miniLUMIR, and writes the table.

    python benchmarks/ablation/score.py ../shared/minilumir/2mm                 # the same budget options as train.py
    python benchmarks/ablation/score.py ../shared/minilumir/2mm --only mind member1

Each variant's last checkpoint counts. ``runs/ablation/ablation_<four budgets>.json`` and ``.md`` hold mean
and standard deviation over the 12 T1-T1 and the 12 T1-T2 pairs, ``.png`` the learning curves. Fields and scores that
are there already are kept; variants that are not trained yet are left out and named.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from train import add_budget, all_steps, budget, final_run, steps_of

DATASETS = ("LUMIR_dataset.json", "LUMIR_dataset_multimodal.json")


def main() -> None:
    """Predicts, evaluates and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_budget(parser)
    options = parser.parse_args()
    options.root, options.runs = options.root.resolve(), options.runs.resolve()
    found: dict[str, Any] = {"affine only": affine_only(options)}
    rows = {variant: [variant] for variant in ("baseline", "mind", "mind_final", "member1")}
    rows |= {f"member{seed}": [f"member{seed}"] for seed in range(2, options.members + 1)}
    rows["ensemble"] = [f"member{seed}" for seed in range(1, options.members + 1)]
    for row, variants in rows.items():
        if options.only and row not in options.only:
            continue
        checkpoints = [options.runs / final_run(each, options) / "checkpoints" / "last.ckpt" for each in variants]
        missing = [path for path in checkpoints if not trained(path, all_steps(options))]
        if missing:
            print(f"{row}: left out, not trained: {', '.join(path.parts[-3] for path in missing)}")
            continue
        of = f"_of_{len(checkpoints)}" if row == "ensemble" else ""
        folder = options.runs / "predictions" / f"{row}{of}_{budget(options)}"
        found["mind_final_aug (member 1)" if row == "member1" else row] = scores(checkpoints, folder, options)
    name = options.runs / f"ablation_{budget(options)}"
    given = {option: getattr(options, option) for option in ("coarse", "steps", "loose", "triplets", "members")}
    name.with_suffix(".json").write_text(json.dumps({"budget": given, "rows": found}, indent=1) + "\n")
    text = table(found)
    name.with_suffix(".md").write_text(text + "\n")
    draw_curves(options, name.with_suffix(".png"))
    print(text)


def trained(checkpoint: Path, steps: int) -> bool:
    """Whether a checkpoint is there and has all its steps behind it."""
    return checkpoint.is_file() and steps_of(checkpoint) >= steps


def affine_only(options: argparse.Namespace) -> dict[str, Any]:
    """Scores of the images as they are."""
    folder = options.runs / "predictions" / "identity"
    if not (folder / "evaluation.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        call("evaluate", "--identity", "-o", folder, "--data", *(options.root / name for name in DATASETS))
    return json.loads((folder / "evaluation.json").read_text())


def scores(checkpoints: list[Path], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predicts all pairs by the members together and scores them."""
    datasets = [options.root / name for name in DATASETS]
    call(
        "predict", "--members", *checkpoints, "--data", datasets[0],
        "--data.validation", f'["{datasets[1].name}"]', "-o", folder,
    )  # fmt: skip
    if not (folder / "evaluation.json").is_file():
        call("evaluate", folder, "--data", *datasets)
    return json.loads((folder / "evaluation.json").read_text())


def call(*arguments: Any) -> None:
    """Runs the package's command."""
    subprocess.run([sys.executable, "-m", "sitreg_lumir.cli", *map(str, arguments)], check=True)


def table(rows: dict[str, Any]) -> str:
    """Markdown: T1-T1 / T1-T2, mean and standard deviation over pairs."""
    heads = ["", "Dice T1-T1", "Dice T1-T2", "difference", "TRE vox", "TRE mm", "HD95 vox", "HD95 mm", "NDV %"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        first, second = (row["groups"][group] for group in ("T1-T1", "T1-T2"))
        cells = [name, spread(first["dsc"], 3), spread(second["dsc"], 3), f"{row['gap']:.3f}"]
        for score, digits in (("tre", 2), ("tre_mm", 2), ("hd95", 2), ("hd95_mm", 2), ("ndv", 5)):
            cells.append(f"{spread(first[score], digits)} / {spread(second[score], digits)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(score: dict[str, float | None], digits: int) -> str:
    """``mean (standard deviation)``."""
    deviation = "" if score["sd"] is None else f" ({score['sd']:.{digits}f})"
    return "-" if score["mean"] is None else f"{score['mean']:.{digits}f}{deviation}"


def draw_curves(options: argparse.Namespace, file: Path) -> None:
    """The similarity of training pairs in every run, as a running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    window = 5
    first, second = f"_{options.coarse}_pairs", f"_{options.coarse}_{options.steps}_loose"
    for folder in sorted(options.runs.glob(f"*{first}")):
        name = folder.name.removesuffix(first)
        points = logged(folder, options.coarse + options.steps) + logged(options.runs / f"{name}{second}")
        smooth = [sum(value for _, value in points[i - window : i]) / window for i in range(window, len(points) + 1)]
        axes.plot([step for step, _ in points[window - 1 :]], smooth, label=name)
    axes.set_xlabel("step (one T1 pair each)")
    axes.set_ylabel(f"LNCC of the last fields, training (mean of {window} logged values)")
    axes.axvline(options.coarse, color="grey", linestyle="--", label="full resolution from here on")
    axes.axvline(options.coarse + options.steps, color="grey", linestyle=":", label="less weight on smoothness")
    axes.legend()
    figure.savefig(file, dpi=110)


def logged(folder: Path, end: int = sys.maxsize) -> list[tuple[int, float]]:
    """Steps before ``end`` and their LNCC."""
    metrics = folder / "metrics.csv"
    if not metrics.is_file():
        return []
    with metrics.open(newline="") as stream:
        rows = [(int(row["step"]), row.get("train/lncc")) for row in csv.DictReader(stream)]
    return [(step, float(value)) for step, value in rows if value and step < end]


if __name__ == "__main__":
    main()
