"""How far a folder of predicted fields misses the identity around cycles of three subjects.

    python benchmarks/cycle_error.py predictions --dataset ../shared/minilumir/2mm/LUMIR_dataset.json

Every ordered pair of the subjects must be in the folder, as `sitreg-lumir predict` writes them. Printed are the mean
length of the cycle's displacement (voxels, within the mask) and the loss that training sees, as means over all cycles.
"""

import argparse
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from sitreg_lumir.challenge.provenance import find_field
from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.deform.ops import compose
from sitreg_lumir.io.read import load_disp, read_volume
from sitreg_lumir.losses import cycle_mask, group_consistency


def main() -> None:
    """Prints the mean cycle error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    options = parser.parse_args()
    dataset = read_dataset(options.dataset, validation=True)
    pairs = {(pair.moving.subject, pair.fixed.subject): pair for pair in dataset.validation}
    subjects = sorted({subject for key in pairs for subject in key})
    lengths, losses = [], []
    for first, second, third in combinations(subjects, 3):
        cycle = [(first, second), (second, third), (third, first)]
        disps = [field(options.folder, pairs[key]) for key in cycle]
        inverse = [field(options.folder, pairs[key[::-1]]) for key in cycle]
        masks = [mask(pairs[key]) for key in ((third, first), (first, second), (second, third))]
        losses.append(float(group_consistency(disps, inverse, masks)))
        valid = cycle_mask(disps, [masks[1], masks[2], masks[0]])
        lengths.append(float(compose(*disps).norm(dim=1, keepdim=True)[valid].mean()))
    print(f"{len(lengths)} cycles: mean displacement {mean(lengths):.4f} voxels, loss {mean(losses):.3e}")


def field(folder: Path, pair: Pair) -> Tensor:
    """The stored field of a pair, ``(1, 3, X, Y, Z)``, voxels."""
    stored = find_field(folder, pair)
    if stored is None:
        raise SystemExit(f"{folder}: no field of {pair.long_name}")
    return torch.from_numpy(load_disp(stored.path)[0])[None]


def mask(pair: Pair) -> Tensor:
    """The mask of a pair's fixed image, ``(1, 1, X, Y, Z)``."""
    return torch.from_numpy(read_volume(pair.fixed.path)[0] > 0)[None, None]


if __name__ == "__main__":
    main()
