"""Registers one pair by this package and writes its field; run by ``compare.py``.

    python ours.py --describe
    python ours.py FIXED MOVING FIELD --members runs/mind --refine 40

The same as ``sitreg-lumir predict`` does for the pair; ``--refine`` adds the instance optimisation that
``sitreg-lumir register --refine`` does. Neither knows the contrasts. Prints one JSON line.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir import __version__
from sitreg_lumir.data.views import clean_view
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.io.write import save_disp
from sitreg_lumir.registration.model import Model, load_model
from sitreg_lumir.registration.pair import ModelPair
from sitreg_lumir.registration.register import optimise_pair
from sitreg_lumir.train.settings import prepare_process

CONTRASTS = ("same", "other")


def main() -> None:
    """Registers one pair, or reports how pairs would be registered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FIXED MOVING FIELD")
    parser.add_argument("--contrasts", choices=CONTRASTS, help="makes no difference here")
    parser.add_argument("--members", nargs="+", metavar="PATH", help="default: the shipped ones")
    parser.add_argument("--refine", type=int, default=0, metavar="N", help="steps (default: 0)")
    parser.add_argument("--describe", action="store_true", help="print the call and the versions only")
    options = parser.parse_args()
    model = load_model(options.members, device="cpu")
    if options.describe:
        print(json.dumps(describe(model, options.refine)))
        return
    prepare_process()
    torch.set_num_threads(1)
    fixed, moving, field = options.files
    (first, affine), (second, _) = read_volume(fixed), read_volume(moving)
    images = [torch.from_numpy(values)[None, None] for values in (first, second)]
    start = time.process_time()
    disp = register(model, images[0], images[1], options.refine)
    seconds = time.process_time() - start
    save_disp(field, disp[0].numpy(), affine)
    print(json.dumps({"call_seconds": seconds}))


def describe(model: Model, steps: int) -> dict[str, Any]:
    """The call as text, and what else the fields depend on."""
    names = ", ".join(f"{entry['name']} {entry['sha256'][:12]}" for entry in model.checksums)
    call = f"members {names}" + (f"; refined by {steps} steps, lncc" if steps else "")
    return {
        "calls": dict.fromkeys(CONTRASTS, call),
        "versions": {"sitreg-lumir": __version__, "torch": torch.__version__},
    }


def register(model: Model, fixed: Tensor, moving: Tensor, steps: int) -> Tensor:
    """``(1, 3, X, Y, Z)``, voxels, fixed grid, of stored intensities ``(1, 1, X, Y, Z)``."""
    (fixed, fixed_mask), (moving, moving_mask) = clean_view(fixed), clean_view(moving)
    if steps:
        updates = model.control_points(fixed=fixed, moving=moving)
        pair = ModelPair(fixed, fixed_mask, moving, moving_mask)
        return optimise_pair(model, pair, updates, steps, "lncc").disp
    with torch.inference_mode():
        return model.ensemble.run(fixed=fixed, moving=moving, inverse=False)[-1].disp


if __name__ == "__main__":
    main()
