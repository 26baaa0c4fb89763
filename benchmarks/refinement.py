"""Refinement by the exact map against refinement by the network's sampled fields, on pairs of training images.

    python benchmarks/refinement.py REALBRAINS/2mm                            # held-back training subjects
    python benchmarks/refinement.py REALBRAINS/2mm --runs 0:40 0.25:40 1:40 --pairs 2
    python benchmarks/refinement.py --known 2                                  # demo brains with a known field

A run is SHARE:STEPS, where images are compared by the exact map in the last SHARE of the steps. Whatever was optimised,
the scores are those of the exact map of the resulting control points, which is what users get: the objective and its
image term (lower is better), overlap of tissues (``held_back.py``), folded volume and spread of the volume change of
its samples at 2 mm; with a known field also the error in mm. Rows that are there are kept.
"""

import argparse
import json
import tempfile
import time
from itertools import permutations
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from held_back import Brain, markdown, mean_scores, read_brain, score, split, tissues

from sitreg_lumir.deform.ops import ndv_sum, warp, warp_mask
from sitreg_lumir.demo.data import make_demo_data, true_disp
from sitreg_lumir.losses import diffusion
from sitreg_lumir.registration.contrast_transfer import channel_lncc
from sitreg_lumir.registration.model import Model, as_tensor, load_model
from sitreg_lumir.registration.optimise import optimise
from sitreg_lumir.registration.optimised_fields import exact_samples

VOXEL_SIZE = 2.0  # mm
PUBLISHED_VOXELS = 160 * 224 * 192  # on whose grid the folded volume has the weight 1e-5


def main() -> None:
    """Refines the pairs that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", metavar="DATA", help="data set at 2 mm in LUMIR's layout")
    parser.add_argument("--runs", nargs="+", default=["0:0", "0:40", "0.25:40", "1:20", "1:40"], metavar="RUN")
    parser.add_argument("--pairs", type=int, default=2, help="of held-back training subjects (default: 2)")
    parser.add_argument("--known", type=int, default=0, metavar="N", help="also N pairs of demo brains (default: 0)")
    parser.add_argument("--data", type=Path, help="where these are kept (default: made again)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "refinement.json")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        pairs: list[tuple[str, Brain, Brain, torch.Tensor | None]] = []
        if options.root is not None:
            _, held = split(options.root)
            for number in range(options.pairs):
                fixed, moving = (read_brain(image, VOXEL_SIZE) for image in held[2 * number : 2 * number + 2])
                pairs.append((f"held back {number}", fixed, moving, None))
        pairs += demo_pairs(model, options.data or Path(folder) / "data", options.known)
        for name, fixed, moving, truth in pairs:
            points: list[tuple[torch.Tensor, torch.Tensor]] = []
            for run in options.runs:
                key = f"{name.rsplit(' ', 1)[0]} {run}"
                if name not in rows.setdefault(key, {}):
                    points = points or predicted(model, fixed, moving)
                    share, steps = run.split(":")
                    weight = model.members[0].card.diffusion_weight
                    rows[key][name] = measure(points, weight, fixed, moving, float(share), int(steps), truth)
                    options.out.write_text(json.dumps(rows, indent=1) + "\n")
                    print(name, run, " ".join(f"{k} {v:.4f}" for k, v in rows[key][name].items()), flush=True)
    print(markdown({key: mean_scores(list(of_run.values())) for key, of_run in rows.items()}))


def demo_pairs(model: Model, folder: Path, count: int) -> list[tuple[str, Brain, Brain, torch.Tensor | None]]:
    """Rendered T1 brains whose field is known, with their tissues."""
    if not count:
        return []
    make_demo_data(folder, shape=model.shape, voxel_size=model.spacing, training=2, validation=3, seed=1)
    pairs: list[tuple[str, Brain, Brain, torch.Tensor | None]] = []
    for number, subjects in enumerate(list(permutations(("0100", "0101", "0102"), 2))[:count]):
        brains = []
        for subject in subjects:
            file = folder / "imagesVal" / f"LUMIRMRI_{subject}_0000.nii.gz"
            stored = np.asarray(nib.load(file).dataobj)  # type: ignore[attr-defined]
            inside, values = stored > 0, stored.astype(np.float32) / 255
            classes = torch.from_numpy(tissues(values, inside, VOXEL_SIZE))[None, None]
            brains.append(Brain(subject, as_tensor(stored), torch.from_numpy(inside)[None, None], classes))
        pairs.append((f"known {number}", *brains, torch.from_numpy(true_disp(folder, *subjects))))
    return pairs


def predicted(model: Model, fixed: Brain, moving: Brain) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The control points to begin with."""
    (stage,) = model.run(fixed=fixed.image, moving=moving.image)
    return [(first.float().clone(), second.float().clone()) for first, second in stage.updates]


def measure(
    points: list[tuple[torch.Tensor, torch.Tensor]],
    weight: float,
    fixed: Brain,
    moving: Brain,
    share: float,
    steps: int,
    truth: torch.Tensor | None,
) -> dict[str, float]:
    """Refines a pair with this weight of the diffusion, and scores the exact map of the result."""
    images = {"fixed": fixed.image, "moving": moving.image, "fixed_mask": fixed.mask, "moving_mask": moving.mask}
    optimise(points, **images, steps=0, exact_share=share, diffusion_weight=weight)  # compiles and reads what it needs
    start = time.process_time()
    result = optimise(points, **images, steps=steps, exact_share=share, diffusion_weight=weight)
    seconds = time.process_time() - start
    disp, disp_inv = exact_samples(result.control_points)
    terms = []
    for field, target, source in ((disp, fixed, moving), (disp_inv, moving, fixed)):
        mask = warp_mask(source.mask, field) & target.mask
        lncc = float(channel_lncc(warp(source.image, field), target.image, mask, 11))
        folded = 1e-5 * PUBLISHED_VOXELS / field[0, 0].numel() * float(ndv_sum(field))
        terms.append({"objective": lncc + weight * float(diffusion(field)) + folded, "lncc": lncc})
    scores = score(disp, disp_inv, fixed, moving, VOXEL_SIZE)
    row = mean_scores(terms) | {name: scores[name] for name in ("dice", "ndv", "log_jac")}
    if truth is not None:
        apart = (disp[0] - truth).norm(dim=0)[fixed.mask[0, 0]] * VOXEL_SIZE
        row |= {"error_mm": float(apart.mean()), "error_mm_95": float(apart.quantile(0.95))}
    return row | {"cpu_seconds": seconds}


if __name__ == "__main__":
    main()
