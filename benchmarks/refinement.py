"""Refinement by the exact map against refinement by the network's sampled fields, on pairs of training images.

    python benchmarks/refinement.py REALBRAINS/2mm                            # held-back training subjects
    python benchmarks/refinement.py REALBRAINS/2mm --runs 0:40 0.25:40 1:40 --pairs 2
    python benchmarks/refinement.py --known 2                                  # demo brains with a known field
    python benchmarks/refinement.py REALBRAINS/1mm --voxel-size 1 --runs 0:0 0.25:40 0.25:80 0.25:40:1 --known 1

A run is SHARE:STEPS or SHARE:STEPS:MM, where images are compared by the exact map in the last SHARE of the steps, then
also at voxels of MM. Whatever was optimised,
the scores are those of the exact map of the resulting control points, which is what users get: the objective and its
image term on the model's grid (lower is better), overlap of tissues (``held_back.py``), folded volume and spread of the
volume change of its samples at the images' voxel size; with a known field also the error in mm. Rows that are there are
kept.
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

from sitreg_lumir.data.views import downsampled_by_two
from sitreg_lumir.deform.ops import ndv_sum, warp, warp_mask
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.demo.data import make_demo_data, true_disp
from sitreg_lumir.losses import diffusion
from sitreg_lumir.registration.contrast_transfer import channel_lncc
from sitreg_lumir.registration.model import Model, as_tensor, load_model
from sitreg_lumir.registration.objective import ImagePair
from sitreg_lumir.registration.optimise import optimise
from sitreg_lumir.registration.optimised_fields import Updates, exact_samples

PUBLISHED_VOXELS = 160 * 224 * 192  # on whose grid the folded volume has the weight 1e-5


def main() -> None:
    """Refines the pairs that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", metavar="DATA", help="data set in LUMIR's layout")
    parser.add_argument("--voxel-size", type=float, default=2.0, help="of the images, mm: 2 or 1 (default: 2)")
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
                fixed, moving = (read_brain(image, options.voxel_size) for image in held[2 * number : 2 * number + 2])
                pairs.append((f"held back {number}", fixed, moving, None))
        pairs += demo_pairs(model, options.data or Path(folder) / "data", options.known, options.voxel_size)
        for name, fixed, moving, truth in pairs:
            points: list[tuple[torch.Tensor, torch.Tensor]] = []
            for run in options.runs:
                key = f"{name.rsplit(' ', 1)[0]} {run}"
                if name not in rows.setdefault(key, {}):
                    pair = Pair(model, fixed, moving, options.voxel_size)
                    points = points or predicted(model, pair)
                    rows[key][name] = measure(points, pair, run, truth)
                    options.out.write_text(json.dumps(rows, indent=1) + "\n")
                    print(name, run, " ".join(f"{k} {v:.4f}" for k, v in rows[key][name].items()), flush=True)
    print(markdown({key: mean_scores(list(of_run.values())) for key, of_run in rows.items()}))


def demo_pairs(
    model: Model, folder: Path, count: int, voxel_size: float
) -> list[tuple[str, Brain, Brain, torch.Tensor | None]]:
    """Rendered T1 brains whose field is known, with their tissues."""
    if not count:
        return []
    x, y, z = (round(size * model.spacing / voxel_size) for size in model.shape)
    make_demo_data(folder, shape=(x, y, z), voxel_size=voxel_size, training=2, validation=3, seed=1)
    pairs: list[tuple[str, Brain, Brain, torch.Tensor | None]] = []
    for number, subjects in enumerate(list(permutations(("0100", "0101", "0102"), 2))[:count]):
        brains = []
        for subject in subjects:
            file = folder / "imagesVal" / f"LUMIRMRI_{subject}_0000.nii.gz"
            stored = np.asarray(nib.load(file).dataobj)  # type: ignore[attr-defined]
            inside, values = stored > 0, stored.astype(np.float32) / 255
            classes = torch.from_numpy(tissues(values, inside, voxel_size))[None, None]
            brains.append(Brain(subject, as_tensor(stored), torch.from_numpy(inside)[None, None], classes))
        pairs.append((f"known {number}", *brains, torch.from_numpy(true_disp(folder, *subjects))))
    return pairs


class Pair:
    """Two brains, and their images on the model's grid, whose voxels are as large as theirs or twice as large."""

    def __init__(self, model: Model, fixed: Brain, moving: Brain, voxel_size: float) -> None:
        self.fixed, self.moving, self.voxel_size = fixed, moving, voxel_size
        self.factor = round(model.spacing / voxel_size)
        self.weight = model.members[0].card.diffusion_weight
        brains = [(brain.image, brain.mask) for brain in (fixed, moving)]
        self.images = ImagePair(brains[0][0], brains[1][0], brains[0][1], brains[1][1])
        coarse = [downsampled_by_two(image) for image, _ in brains] if self.factor == 2 else brains
        self.on_model_grid = ImagePair(coarse[0][0], coarse[1][0], coarse[0][1], coarse[1][1])

    def exact_fields(self, points: Updates) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact map both ways at the voxels of the brains, in their voxels."""
        if self.factor == 1:
            return exact_samples(points)
        x, y, z = points[-1][0].shape[2:]
        exact = SplineUpdates([(first[0], second[0]) for first, second in points], (x, y, z))
        shape = self.fixed.image.shape[2:]
        voxels = torch.stack(torch.meshgrid(*(torch.arange(size).double() for size in shape), indexing="ij"))
        at = ((voxels - (self.factor - 1) / 2) / self.factor).flatten(1)
        fields = []
        for inverse in (False, True):
            moved = torch.cat([exact.move(part, inverse=inverse).points for part in at.split(2_000_000, dim=1)], dim=1)
            fields.append(((moved - at) * self.factor).float().view(1, 3, *shape))
        return fields[0], fields[1]


def predicted(model: Model, pair: Pair) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The control points to begin with."""
    (stage,) = model.run(fixed=pair.on_model_grid.fixed, moving=pair.on_model_grid.moving)
    return [(first.float().clone(), second.float().clone()) for first, second in stage.updates]


def measure(
    points: list[tuple[torch.Tensor, torch.Tensor]], pair: Pair, run: str, truth: torch.Tensor | None
) -> dict[str, float]:
    """Refines a pair, and scores the exact map of the result."""
    share, steps, *finer = run.split(":")
    options = {"exact_share": float(share), "diffusion_weight": pair.weight} | vars(pair.on_model_grid)
    if finer:
        assert float(finer[0]) == pair.voxel_size, f"{run}: the images have voxels of {pair.voxel_size:g} mm"
        options["finer"] = pair.images
    optimise(points, **options, steps=0)  # compiles and reads what it needs
    start = time.process_time()
    result = optimise(points, **options, steps=int(steps))
    seconds = time.process_time() - start
    terms = []
    images = pair.on_model_grid
    on_model_grid = exact_samples(result.control_points)
    for number, field in enumerate(on_model_grid):
        ways = [(images.fixed, images.fixed_mask), (images.moving, images.moving_mask)]
        (target, target_mask), (source, source_mask) = ways[::-1] if number else ways
        mask = warp_mask(source_mask, field) & target_mask
        lncc = float(channel_lncc(warp(source, field), target, mask, 11))
        folded = 1e-5 * PUBLISHED_VOXELS / field[0, 0].numel() * float(ndv_sum(field))
        terms.append({"objective": lncc + pair.weight * float(diffusion(field)) + folded, "lncc": lncc})
    disp, disp_inv = on_model_grid if pair.factor == 1 else pair.exact_fields(result.control_points)
    scores = score(disp, disp_inv, pair.fixed, pair.moving, pair.voxel_size)
    row = mean_scores(terms) | {name: scores[name] for name in ("dice", "ndv", "log_jac")}
    if truth is not None:
        apart = (disp[0] - truth).norm(dim=0)[pair.fixed.mask[0, 0]] * pair.voxel_size
        row |= {"error_mm": float(apart.mean()), "error_mm_95": float(apart.quantile(0.95))}
    return row | {"cpu_seconds": seconds}


if __name__ == "__main__":
    main()
