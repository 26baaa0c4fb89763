"""Scores what ``train.py`` trained, on real and on rendered validation pairs, and writes the table.

    python benchmarks/ablation/score.py REALBRAINS/2mm --rendered MINILUMIR/2mm      # the same budget as train.py
    python benchmarks/ablation/score.py REALBRAINS/2mm --only mind member1

Each variant's last checkpoint counts. ``ablation_<budget>.json`` and ``.md`` beside the runs hold mean and standard
deviation over the pairs of each group: real T1 onto T1, and of miniLUMIR, whose images no variant has seen, T1 onto
T1 and T1 onto T2. ``.png`` shows the learning curves. Fields and scores that are there already are kept; variants that
are not trained yet are left out and named.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from train import add_budget, all_steps, coarse_run, final_run, fine_run, steps_of, variants

REAL, RENDERED = ("LUMIR_dataset.json",), ("LUMIR_dataset.json", "LUMIR_dataset_multimodal.json")
GROUPS = {"real": "T1-T1", "rendered T1-T1": "T1-T1", "rendered T1-T2": "T1-T2"}
ROWS = {"mind_final": "mind_final, 1e-4", "mind_final_4e-4": "mind_final, 4e-4", "member1": "mind_final_aug (member1)"}


def main() -> None:
    """Predicts, evaluates and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_budget(parser)
    parser.add_argument("--rendered", type=Path, metavar="MINILUMIR", help="folder of miniLUMIR at 2 mm")
    options = parser.parse_args()
    options.root, options.runs = options.root.resolve(), options.runs.resolve()
    datasets = {"real": [options.root / name for name in REAL]}
    if options.rendered:
        datasets["rendered"] = [options.rendered.resolve() / name for name in RENDERED]
    scores = {"affine only": {name: affine_only(options.runs / name, files) for name, files in datasets.items()}}
    members = [name for name in variants(options) if name.startswith("member")]
    rows = {name: [name] for name in variants(options)} | ({"ensemble": members} if len(members) > 1 else {})
    budget = final_run("member1", options).removeprefix("member1_").replace("_member1_", "_")
    for row, names in rows.items():
        checkpoints = [options.runs / final_run(name, options) / "checkpoints" / "last.ckpt" for name in names]
        missing = [path for path in checkpoints if not trained(path, all_steps(options))]
        if missing:
            print(f"{row}: left out, not trained: {', '.join(path.parts[-3] for path in missing)}")
            continue
        of = f"_of_{len(checkpoints)}" if row == "ensemble" else ""
        folder = options.runs / "predictions" / f"{row}{of}_{budget}"
        scores[ROWS.get(row, row)] = {
            name: predicted(checkpoints, folder / name, files) for name, files in datasets.items()
        }
    name = options.runs / f"ablation_{budget}"
    settings = {option: getattr(options, option) for option in ("coarse", "fine", "triplets", "members", "widths")}
    name.with_suffix(".json").write_text(json.dumps({"budget": settings, "rows": scores}, indent=1) + "\n")
    text = table(scores)
    name.with_suffix(".md").write_text(text + "\n")
    draw_curves(options, name.with_suffix(".png"))
    print(text)


def trained(checkpoint: Path, steps: int) -> bool:
    """Whether a checkpoint is there and has all its steps behind it."""
    return checkpoint.is_file() and steps_of(checkpoint) >= steps


def affine_only(folder: Path, datasets: list[Path]) -> dict[str, Any]:
    """Scores of the images as they are."""
    folder = folder.parent / "predictions" / f"identity_{folder.name}"
    if not (folder / "evaluation.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        call("evaluate", "--identity", "-o", folder, "--data", *datasets)
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return evaluation


def predicted(checkpoints: list[Path], folder: Path, datasets: list[Path]) -> dict[str, Any]:
    """Predicts all pairs by the members together and scores them."""
    more = ["--data.validation", json.dumps([path.name for path in datasets[1:]])] if datasets[1:] else []
    call("predict", "--members", *checkpoints, "--data", datasets[0], *more, "-o", folder)
    if not (folder / "evaluation.json").is_file():
        call("evaluate", folder, "--data", *datasets)
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return evaluation


def call(*arguments: Any) -> None:
    """Runs the package's command."""
    subprocess.run([sys.executable, "-m", "sitreg_lumir.cli", *map(str, arguments)], check=True)


def table(rows: dict[str, Any]) -> str:
    """Markdown: a line for each row and group of pairs, mean and standard deviation over pairs."""
    heads = ["", "pairs", "Dice", "HD95 mm", "TRE mm", "NDV %"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, evaluations in rows.items():
        for label, group in GROUPS.items():
            evaluation = evaluations.get(label.split()[0])
            if evaluation is None:
                continue
            means = evaluation["groups"][group]
            scores = (("dsc", 3), ("hd95_mm", 2), ("tre_mm", 2), ("ndv", 5))
            cells = [row, label, *(spread(means[score], digits) for score, digits in scores)]
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
    for variant in variants(options):
        runs = [options.runs / run(variant, options) for run in (coarse_run, fine_run)]
        points = logged(runs[0], options.coarse) + logged(runs[1], options.coarse + options.fine)
        smooth = [sum(value for _, value in points[i - window : i]) / window for i in range(window, len(points) + 1)]
        if smooth and not variant.startswith("mind_"):  # whose pairs are those of mind
            axes.plot([step for step, _ in points[window - 1 :]], smooth, label=variant)
    axes.set_xlabel("step (one T1 pair each)")
    axes.set_ylabel(f"LNCC of the last fields, training (mean of {window} logged values)")
    axes.axvline(options.coarse, color="grey", linestyle="--", label="full resolution from here on")
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
