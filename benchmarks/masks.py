"""Right and wrong masks of stripped scans: what the checks of masks measure on each.

Example: python benchmarks/masks.py REALBRAINS/contrasts/*.nii.gz
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import read_image
from sitreg_lumir.preprocessing.brain_mask import check_mask, cut_area
from sitreg_lumir.preprocessing.intensity import Mask


def variants(mask: Mask, spacing: list[float]) -> Iterator[tuple[str, Mask]]:
    """Masks by what is wrong with them; the first ones are right or nearly so."""
    outwards, inwards = (ndimage.distance_transform_edt(part, sampling=spacing) for part in (~mask, mask))
    yield "right", mask
    for size in (3, 6):
        yield f"{size} mm larger", outwards <= size
    for size in (2, 4, 8):
        yield f"{size} mm smaller", inwards > size
    x, y, z = (int(place) for place in ndimage.center_of_mass(mask))
    for name, axis, start, stop in (
        ("half", 0, 0, x),
        ("without the top", 2, 0, z + round(20 / spacing[2])),
        ("without the back", 1, y - round(50 / spacing[1]), mask.shape[1]),
    ):
        index = np.arange(mask.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        yield name, mask & (index >= start) & (index < stop)
    for distance in (8, 15, 30, 60):
        yield f"{distance} mm away", np.roll(mask, round(distance / spacing[1]), 1)


def main() -> None:
    """Prints a line for each scan and mask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", type=Path, help="skull-stripped, 0 outside the brain")
    for path in parser.parse_args().scans:
        scan = read_image(path)
        for name, mask in variants(scan.data > 0, scan.spacing.tolist()):
            try:
                check_mask(scan, mask, "mask")
                verdict = "taken"
            except InputError as error:
                verdict = str(error)
            print(f"{path.name} {name}: cuts {cut_area(scan, mask):.0f} cm2 of tissue; {verdict}", flush=True)


if __name__ == "__main__":
    main()
