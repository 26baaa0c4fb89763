"""At real size: exchanging two scans exchanges their exact maps, alignments and all, whatever the threads."""

import numpy as np
import pytest
import torch

from sitreg_lumir import Registration, map_points, register
from sitreg_lumir.registration.quality import brain_points

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both_ways() -> tuple[Registration, Registration]:
    """The example pair, whose scans lie apart and are aligned, in both orders, by one and by two threads."""
    before = torch.get_num_threads()
    results = []
    for threads, scans in ((1, ("EXAMPLE-T1", "EXAMPLE-T2")), (2, ("EXAMPLE-T2", "EXAMPLE-T1"))):
        torch.set_num_threads(threads)
        results.append(register(*scans))
    torch.set_num_threads(before)
    return results[0], results[1]


def test_exchanging_the_scans_exchanges_the_maps(both_ways: tuple[Registration, Registration]) -> None:
    registration, exchanged = both_ways
    assert not np.allclose(registration.forward.moving_to_model, np.eye(4))
    for first, second in ((registration.forward, exchanged.backward), (registration.backward, exchanged.forward)):
        scan = registration.fixed if first is registration.forward else registration.moving
        points = brain_points(scan.brain, scan.affine)
        mapped = map_points(first, points)
        assert np.linalg.norm(mapped - points, axis=1).max() > 5  # mm
        assert np.linalg.norm(mapped - map_points(second, points), axis=1).max() < 1e-3
        assert np.linalg.norm(map_points(first.inverse, mapped) - points, axis=1).max() < 1e-3
    assert registration.summary["ndv_percent"] == exchanged.summary["ndv_percent"] == 0
    assert registration.verdict == exchanged.verdict == "ok"


def test_fields_of_any_grid_are_samples_of_the_map(both_ways: tuple[Registration, Registration]) -> None:
    """Of half a millimetre, too: nothing is interpolated near the brain."""
    registration, _ = both_ways
    brain = np.argwhere(registration.fixed.brain)
    affine = registration.fixed.affine @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = (registration.fixed.affine @ np.append(brain.mean(axis=0).round(), 1))[:3]
    field = registration.field_on((40, 36, 32), affine)
    voxels = np.indices((40, 36, 32)).reshape(3, -1).T
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    assert np.abs(field.disp.reshape(3, -1).T - (map_points(registration.forward, world) - world)).max() < 1e-4
