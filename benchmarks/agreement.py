"""How far a forward pass at 160x224x192 differs between backends, and between float32 and bfloat16 convolutions.

    python benchmarks/agreement.py                                   # a random network
    python benchmarks/agreement.py --members runs/mind --data MINILUMIR/1mm

Prints the mean and the largest distance of the fields' components, voxels. On a CPU the torch backend takes minutes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from benchmark import SHAPES, brain, random_module
from torch import Tensor

from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.data.views import clean_view
from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.network.shipped import member_files
from sitreg_lumir.network.weights import load_members


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", metavar="PATH", help="trained members (default: random weights)")
    parser.add_argument("--data", type=Path, metavar="DATASET", help="with --members: its first validation pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-torch", action="store_true", help="compare bfloat16 only")
    options = parser.parse_args()
    if (options.members is None) != (options.data is None):
        parser.error("--members and --data go together")
    print(json.dumps(compare(options.members, options.data, options.device, not options.skip_torch), indent=1))


@torch.inference_mode()
def compare(members: list[str] | None, data: Path | None, device: str, with_torch: bool) -> dict[str, Any]:
    """Differences from the device's backend in float32, by name."""
    if members is None or data is None:
        module = random_module().to(device)
        ensemble = module.ensemble
        fixed, moving = (brain(SHAPES["1mm"], seed).to(device) for seed in range(2))
    else:
        ensemble = Ensemble.of([member.to(device) for member in load_members(member_files(members))])
        pair = read_dataset(data, validation=True).validation[0]
        stored = [torch.as_tensor(read_volume(image.path)[0])[None, None] for image in (pair.fixed, pair.moving)]
        fixed, moving = (clean_view(image)[0].to(device) for image in stored)

    def forward(backend: str = "auto", half: bool = False) -> tuple[Tensor, Tensor]:
        with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=half):
            (stage,) = ensemble.run(fixed=fixed, moving=moving)
        return stage.disp, stage.disp_inv

    reference = forward()
    row = {"shape": list(fixed.shape[2:]), "members": len(ensemble.networks), "device": device}
    row["mean_size_of_field"] = float(reference[0].abs().mean())
    fields_by_way = {"bfloat16": forward(half=True)}
    if with_torch:
        fields_by_way["torch_backend"] = forward("torch")
    for name, fields in fields_by_way.items():
        errors = [(field - expected).abs() for field, expected in zip(fields, reference, strict=True)]
        row[name] = {
            "mean": max(float(error.mean()) for error in errors),
            "largest": max(float(error.max()) for error in errors),
        }
    return row


if __name__ == "__main__":
    main()
