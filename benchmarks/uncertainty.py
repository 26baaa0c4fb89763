"""Do the members' differences tell where the field is wrong? Where the true field is known, it can be seen.

    python benchmarks/uncertainty.py                       # the shipped members, data made from the MNI152 template
    python benchmarks/uncertainty.py --members A.ckpt B.ckpt --subjects 4

Prints the rank correlation (Spearman) with the error over brain voxels, for each pair and pooled, of ``uncertainty``
(`register --uncertainty`), of ``disagreement`` (`predict --disagreement`), and of the size of the displacement, which
any useful map must beat; draws mean error against uncertainty in ten bins of equally many voxels. Rendered brains that
are warps of one template: no more than a lower bar.
"""

import argparse
import json
import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from sitreg_lumir.demo.data import make_demo_data, true_disp
from sitreg_lumir.registration.model import Model, as_tensor, load_model
from sitreg_lumir.registration.pair import ModelPair
from sitreg_lumir.registration.uncertainty import spread_of_members

Array = NDArray[Any]
BINS = 10


def main() -> None:
    """Prints JSON and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", help="two or more (default: the shipped ones)")
    parser.add_argument("--subjects", type=int, default=3, help="default: 3, which are 6 ordered pairs of each kind")
    parser.add_argument("--data", type=Path, help="where the data is kept (default: made again)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "uncertainty.json")
    options = parser.parse_args()
    model = load_model(options.members)
    if len(model.members) < 2:
        parser.error("a single member does not differ")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary) / "data"
        make_demo_data(
            folder, shape=model.shape, voxel_size=model.spacing, training=2, validation=options.subjects, seed=1
        )
        samples_of = {
            kind: [pair(model, folder, *subjects, modality) for subjects in pairs(options.subjects)]
            for kind, modality in (("T1-T1", "0000"), ("T1-T2", "0001"))
        }
    result = {"model": str(model), "kinds": {kind: pooled(samples) for kind, samples in samples_of.items()}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out.with_suffix(".png"))
    print(json.dumps(result, indent=1))


def pairs(subjects: int) -> list[tuple[str, str]]:
    """Ordered pairs of validation subjects."""
    names = [f"{100 + number:04d}" for number in range(subjects)]
    return list(permutations(names, 2))


def pair(model: Model, folder: Path, fixed: str, moving: str, modality: str) -> dict[str, Array]:
    """Uncertainty, disagreement, error and displacement of one pair, mm, at every third brain voxel along each axis."""
    stored = [
        np.asarray(nib.load(folder / "imagesVal" / f"LUMIRMRI_{name}.nii.gz").dataobj)  # type: ignore[attr-defined]
        for name in (f"{fixed}_0000", f"{moving}_{modality}")
    ]
    images = [as_tensor(values) for values in stored]
    spread = spread_of_members(model, ModelPair(images[0], images[0] > 0, images[1], images[1] > 0))
    with torch.inference_mode():
        (stage,) = model.ensemble.run(fixed=images[0], moving=images[1], inverse=False, disagreement=True)
    assert stage.disagreement is not None
    disp = stage.disp[0].float().cpu()
    error = (disp - torch.from_numpy(true_disp(folder, fixed, moving))).norm(dim=0)
    disagreement = stage.disagreement[0, 0].float().cpu()
    maps = {"uncertainty": torch.from_numpy(spread), "disagreement": disagreement, "error": error}
    maps["displacement"] = disp.norm(dim=0)
    thin = (slice(None, None, 3),) * 3
    brain = (stored[0] > 0)[thin]
    return {name: values[thin].numpy()[brain] * model.spacing for name, values in maps.items()}


def pooled(samples: list[dict[str, Array]]) -> dict[str, Any]:
    """Rank correlations, and mean error in bins of the uncertainty."""
    together = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    order = np.argsort(together["uncertainty"])
    bins = [
        {name: float(together[name][part].mean()) for name in ("uncertainty", "error")}
        for part in np.array_split(order, BINS)
    ]
    return {
        "pairs": len(samples),
        "voxels": len(order),
        "error_mm_mean": float(together["error"].mean()),
        "uncertainty_mm_mean": float(together["uncertainty"].mean()),
        "spearman": {
            name: {
                "pooled": float(stats.spearmanr(together[name], together["error"]).statistic),
                "by_pair": [float(stats.spearmanr(sample[name], sample["error"]).statistic) for sample in samples],
            }
            for name in ("uncertainty", "disagreement", "displacement")
        },
        "bins": bins,
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Mean error against uncertainty; on the dashed line they are equal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, pooled_pairs in result["kinds"].items():
        across, along = ([means[name] for means in pooled_pairs["bins"]] for name in ("uncertainty", "error"))
        label = f"{kind}, rank correlation {pooled_pairs['spearman']['uncertainty']['pooled']:.2f}"
        axes.plot(across, along, "o-", label=label)
    most = max(max(means.values()) for kind in result["kinds"].values() for means in kind["bins"])
    axes.plot([0, most], [0, most], "--", color="grey", linewidth=1)
    axes.set_xlabel("uncertainty, mm")
    axes.set_ylabel("mean error of the field, mm")
    axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
