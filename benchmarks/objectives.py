"""Which loss to train with: held-back pairs optimised one by one under each choice, scored by measures of another kind.

    python benchmarks/objectives.py REALBRAINS/2mm --windows 11 7 5 --smoothness 1 0.3
    python benchmarks/objectives.py REALBRAINS/2mm --half --windows 11 7 5 3 --smoothness 1 0.3    # at half resolution

Instead of a network's weights the control points of all its stages are the variables (``registration/optimise.py``), by
default from the prediction of the first shipped member, ``--from-zero`` from the affine alignment. The pairs are those
of triplets of held-back training subjects, cropped to the common box of the brains. Rows that are there are kept.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from held_back import Brain, augmented, cycle_mm, full, markdown, mean_scores, read_brain, score, split
from torch import Tensor

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.network.shipped import default_members
from sitreg_lumir.registration.model import load_model
from sitreg_lumir.registration.optimise import control_points_of, optimise
from sitreg_lumir.train.settings import keep_freed_memory

STEP = 8  # voxels that a box's edges divide by: the coarsest level's spacing
VOXEL_SIZE = 2.0  # mm


def main() -> None:
    """Optimises, scores, writes rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the data set, 2 mm")
    parser.add_argument("--windows", type=int, nargs="+", default=[11, 7, 5])
    parser.add_argument("--smoothness", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--choices", nargs="+", help="WINDOW:SMOOTHNESS instead of all combinations")
    parser.add_argument("--triplets", type=int, default=2, help="of held-back subjects, three pairs each (default: 2)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--half", action="store_true", help="optimise images at half resolution")
    parser.add_argument("--from-zero", action="store_true", help="start from the affine alignment")
    parser.add_argument("--out", type=Path, default=Path("runs/trials/objectives.json"))
    options = parser.parse_args()
    keep_freed_memory()
    choices = [(int(w), float(s)) for w, s in (c.split(":") for c in options.choices or [])]
    choices = choices or [(w, s) for s in options.smoothness for w in options.windows]
    _, held = split(options.root)
    rows = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for triplet in range(options.triplets):
        brains = boxed([read_brain(image, VOXEL_SIZE) for image in held[3 * triplet : 3 * triplet + 3]])
        starts = [start(brains[k], brains[k - 1], options) for k in range(3)]
        start_name = f"{'half' if options.half else 'full'} {'zero' if options.from_zero else 'predicted'}"
        for choice in [None, *choices]:
            name = start_name + (" start" if choice is None else f" {options.steps} {choice[0]} {choice[1]:g}")
            if str(triplet) in rows.get(name, {}):
                continue
            rows.setdefault(name, {})[str(triplet)] = row = optimised(brains, starts, choice, options)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{name} triplet {triplet}: " + " ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
    print(markdown({name: mean_scores(list(row.values())) for name, row in rows.items()}))


def optimised(
    brains: list[Brain],
    starts: list[list[tuple[Tensor, Tensor]]],
    choice: tuple[int, float] | None,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Mean scores of the three pairs of a triplet, and its cycle."""
    scores, disps, begin = [], [], time.process_time()
    for k in range(3):
        fixed, moving = brains[k], brains[k - 1]
        images = [augmented(brain, options.half) for brain in (fixed, moving)]
        window, smoothness = choice or (11, 1.0)
        result = optimise(
            starts[k],
            fixed=images[0][0],
            moving=images[1][0],
            fixed_mask=images[0][1],
            moving_mask=images[1][1],
            steps=0 if choice is None else options.steps,
            window=window,
            diffusion_weight=smoothness,
            levels=4,
            exact_share=0,
        )
        disp, disp_inv = (full(field, fixed.image) for field in (result.disp, result.disp_inv))
        scores.append(score(disp, disp_inv, fixed, moving, VOXEL_SIZE))
        disps.append(disp)
    seconds = (time.process_time() - begin) / 3
    # disps[k] is on the grid of k and leads to k - 1: first 2 -> 1, then 1 -> 0, then 0 -> 2
    return mean_scores(scores) | {
        "cycle_mm": cycle_mm([disps[0], disps[1], disps[2]], brains[2], VOXEL_SIZE),
        "cpu_s": seconds,
    }


def start(fixed: Brain, moving: Brain, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Control points to begin with."""
    images = [augmented(brain, options.half)[0] for brain in (fixed, moving)]
    if options.from_zero:
        shapes = [[-(-n // 2**level) for n in images[0].shape[2:]] for level in (3, 2, 1, 0)]
        return [(torch.zeros(1, 3, *shape), torch.zeros(1, 3, *shape)) for shape in shapes]
    model = load_model(default_members()[0])
    stages = model.run(fixed=images[0], moving=images[1], levels=range(4))
    bounds = [0.99 * control_point_bound((2**level,) * 3) for level in (3, 2, 1, 0)]
    return [
        (first.clamp(-bound, bound), second.clamp(-bound, bound))
        for (first, second), bound in zip(control_points_of(stages, 4), bounds, strict=True)
    ]


def boxed(brains: list[Brain]) -> list[Brain]:
    """The images cropped to the common box of the brains, with a margin."""
    inside = torch.stack([brain.mask[0, 0] for brain in brains]).any(0)
    box = []
    for axis in range(3):
        filled = inside.movedim(axis, 0).flatten(1).any(1).nonzero()
        first = max(int(filled[0]) - 3, 0)
        size = -(-(int(filled[-1]) + 4 - first) // STEP) * STEP
        first = max(min(first, inside.shape[axis] - size), 0)
        box.append(slice(first, first + size))
    return [Brain(b.name, *(t[(..., *box)].contiguous() for t in (b.image, b.mask, b.tissues))) for b in brains]


if __name__ == "__main__":
    main()
