"""Exact maps: the same by every backend and any number of threads, inverse to themselves, whole on disk."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from nitransforms.nonlinear import DenseFieldTransform
from transform_samples import by_sitk, distance, grid_points, matrix, sitk_field

from sitreg_lumir.deform.backends import backend_of, use_backend
from sitreg_lumir.deform.bspline import control_point_bound, cubic_bspline
from sitreg_lumir.deform.ops import compose, invert, upsample_control_points
from sitreg_lumir.deform.splines import (
    TOLERANCE,
    FollowedPoints,
    NotInvertedError,
    SplineUpdates,
    quantum,
    to_integers,
)
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import DisplacementField, composite_field, look_up, map_points, transform_by
from sitreg_lumir.io.itk import save_itk_field
from sitreg_lumir.io.maps import DESCRIPTION, MAP, load_map, read_map, save_map
from sitreg_lumir.registration.quality import folded_percent

SHAPE = (21, 30, 26)  # divisible by no spacing
SCALE = 2.0  # mm per voxel


def random_updates(seed: int, share: float, shape: tuple[int, int, int] = SHAPE, levels: int = 4) -> SplineUpdates:
    """Random control points, each within ``share`` of its bound."""
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for level in reversed(range(levels)):
        size = (1, 3, *(-(-n // 2**level) for n in shape))
        bound = share * control_point_bound((2**level,) * 3)
        first, second = ((2 * torch.rand(size, generator=generator) - 1) * bound for _ in range(2))
        updates.append((first, second))
    return SplineUpdates.rounded(updates, shape)


def corners(seed: int, share: float) -> SplineUpdates:
    """Control points at their bound, of random sign: the steepest that a network can predict."""
    updates = random_updates(seed, share)
    steep = [
        tuple(torch.sign(points)[None] * share * control_point_bound((2**level,) * 3) for points in pair)
        for level, pair in zip((3, 2, 1, 0), updates.updates, strict=True)
    ]
    return SplineUpdates.rounded([(first, second) for first, second in steep], SHAPE)


def random_points(seed: int, count: int, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """Also beyond the grid."""
    size = torch.tensor(shape)[:, None]
    return torch.rand(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (size + 12) - 6


def a_map(seed: int = 0, share: float = 0.5) -> SplineMap:
    """A map between two worlds that are turned and scaled."""
    fixed, moving, grid = np.eye(4), np.eye(4), np.diag([SCALE, SCALE, SCALE, 1.0])
    fixed[:3, :3] = [[0.9, 0.1, 0], [-0.1, 1.0, 0.05], [0, 0, 1.1]]
    moving[:3, 3] = 3, -5, 2
    grid[:3, 3] = -20, -30, -25
    middle = np.zeros(SHAPE, np.bool_)
    middle[6:-6, 8:-8, 7:-7] = True
    return SplineMap(fixed, moving, grid, random_updates(seed, share), middle, middle.copy())


@pytest.mark.parametrize("seed", range(3))
def test_compiled_loop_and_plain_torch_agree(seed: int) -> None:
    updates, points = random_updates(seed, 0.99), random_points(seed, 3000)
    for inverse in (False, True):
        compiled = updates.move(points, inverse=inverse, jacobians=True)
        with use_backend("torch"):
            plain = updates.move(points, inverse=inverse, jacobians=True)
        assert compiled.jacobians is not None and plain.jacobians is not None
        assert (compiled.points - plain.points).abs().max() < 1e-4
        assert (compiled.jacobians - plain.jacobians).abs().max() < 1e-3 * plain.jacobians.abs().max()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("steepest", [False, True])
def test_inversion_converges_at_the_bound(seed: int, steepest: bool) -> None:
    """The worst that bounded control points can be: the map stays one to one, and inverse to its inverse."""
    updates = corners(seed, 0.99) if steepest else random_updates(seed, 0.99)
    points = random_points(seed, 4000)
    moved = updates.move(points, jacobians=True)
    back = updates.move(moved.points, inverse=True).points
    assert moved.jacobians is not None
    assert torch.linalg.det(moved.jacobians.movedim(-1, 0)).min() > 0
    assert (back - points).abs().max() < 1e-3
    assert (moved.points - points).abs().max() > 1  # it does move


def spline(r: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of four control points, ``r`` behind the second, and their derivatives."""
    offsets, small = r + np.array([1.0, 0, -1, -2]), 1e-6
    return cubic_bspline(offsets), (cubic_bspline(offsets + small) - cubic_bspline(offsets - small)) / (2 * small)


def gradients_sum(*place: float) -> np.ndarray:
    """``(4, 4, 4)``: what each control point around a place adds to the sum of a component's three derivatives."""
    (x, dx), (y, dy), (z, dz) = (spline(r) for r in place)
    terms = (dx, y, z), (x, dy, z), (x, y, dz)
    return sum(np.einsum("i,j,k->ijk", *term) for term in terms)


def test_bounded_updates_are_contractions_between_the_samples_too() -> None:
    """The bound is made for sampled updates; it proves the continuous ones invertible, wherever they are evaluated."""
    places = np.linspace(0, 1, 21)
    steepest = max(np.abs(gradients_sum(*place)).sum() for place in product(places, repeat=3))
    assert 2.4 < steepest < 2.5
    for factor in (1, 2, 4, 8, 16, 32, 64):
        assert steepest * control_point_bound((factor,) * 3) < 0.9991


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_steepest_control_points_can_be_inverted(signs: tuple[int, int]) -> None:
    """Chosen against the inversion, at all levels at once: places are squeezed to a millionth, but nothing folds.

    What comes back from there is not known to a voxel, but it leads to where it came from.
    """
    pattern, updates = -np.sign(gradients_sum(0.17, 0.17, 0.17)), []
    for level in reversed(range(4)):
        size = [-(-n // 2**level) for n in SHAPE]
        tiled = np.tile(pattern, [-(-n // 4) for n in size])[: size[0], : size[1], : size[2]]
        points = torch.from_numpy(np.stack([tiled] * 3)[None] * 0.99 * control_point_bound((2**level,) * 3))
        updates.append((points * signs[0], points * signs[1]))
    steep = SplineUpdates.rounded(updates, SHAPE)
    points = random_points(0, 3000)
    for inverse in (False, True):
        moved = steep.move(points, inverse=inverse, jacobians=True)
        assert moved.jacobians is not None
        assert torch.linalg.det(moved.jacobians.movedim(-1, 0)).min() > 0
        back = steep.move(moved.points, inverse=not inverse).points
        assert (steep.move(back, inverse=inverse).points - moved.points).abs().max() < 2 * TOLERANCE


def test_beyond_the_bound_is_an_error_of_one_line() -> None:
    updates = random_updates(0, 0.9)
    folded = SplineUpdates([(4 * first, 4 * second) for first, second in updates.updates], SHAPE)
    with pytest.raises(NotInvertedError, match="beyond their bound"):
        folded.move(random_points(0, 500))
    with pytest.raises(ValueError, match="beyond their bound"):
        to_integers(torch.full((3, 2, 2, 2), 0.4), quantum(1))


def test_jacobian_is_the_derivative() -> None:
    updates, points, step = random_updates(1, 0.5), random_points(1, 500), 1e-3
    inside = ((points > 0.5) & (points < torch.tensor(SHAPE)[:, None] - 1.5)).all(dim=0)
    points = points[:, inside]
    jacobians = updates.move(points, jacobians=True, tolerance=1e-6).jacobians
    assert jacobians is not None
    for axis in range(3):
        shift = torch.zeros(3, 1, dtype=torch.float64)
        shift[axis] = step
        moved = [updates.move(points + sign * shift, tolerance=1e-6).points for sign in (1, -1)]
        difference = (moved[0] - moved[1]) / (2 * step) - jacobians[:, axis]
        assert difference.abs().median() < 1e-3
        assert difference.abs().max() < 0.1  # second derivatives jump where the splines' pieces meet


def test_it_is_what_the_network_samples() -> None:
    """On the model's grid one update, and its inverse, are the fields that the network composes."""
    generator = torch.Generator().manual_seed(3)
    points = (2 * torch.rand(1, 3, *SHAPE, generator=generator) - 1) * 0.3 * control_point_bound((1, 1, 1))
    still = torch.zeros_like(points)
    updates = SplineUpdates([(points[0], still[0])], SHAPE)  # a o b^-1 with b = 0, twice
    field = upsample_control_points(points, 1, SHAPE)
    sampled = compose(field, field)[0]
    assert (updates.sample() - sampled).abs().mean() < 0.02  # that one interpolates the outer field
    inside = (slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    inverse = invert(compose(field, field), 1e-4)[0]
    assert (updates.sample(inverse=True) - inverse)[inside].abs().mean() < 0.02


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_finite_differences(backend: str, inverse: bool) -> None:
    """Of where points end, with respect to the control points of both sides of the finest two levels, in float64."""
    updates = [(first.double(), second.double()) for first, second in random_updates(0, 0.6).updates]
    points, generator, step = random_points(1, 300), torch.Generator().manual_seed(2), 1e-4
    weights = torch.randn(3, points.shape[1], generator=generator, dtype=torch.float64)
    with use_backend(backend):
        follow = FollowedPoints(points, updates, 2, SHAPE, inverse=inverse, tolerance=1e-9)
        finest = [tuple(part.clone().requires_grad_() for part in update) for update in updates[2:]]
        moved = follow([(first, second) for first, second in finest])
        exact = SplineUpdates(updates, SHAPE).move(points, inverse=inverse).points
        torch.testing.assert_close(moved.detach() + points, exact, rtol=0, atol=1e-4)  # that one keeps float32
        gradients = torch.autograd.grad((moved * weights).sum(), [part for update in finest for part in update])
        for place, gradient in enumerate(gradients):
            direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                displaced = [part.clone() for update in updates[2:] for part in update]
                displaced[place] += sign * step * direction
                values.append(
                    float((follow([(displaced[0], displaced[1]), (displaced[2], displaced[3])]) * weights).sum())
                )
            expected = (values[0] - values[1]) / (2 * step)
            assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_gradients_do_not_depend_on_threads() -> None:
    """Bit for bit, though points of several threads add to the same control points; and as plain torch has them."""
    updates = [(first.float(), second.float()) for first, second in random_updates(0, 0.9).updates]
    points = torch.stack(torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij")).flatten(1).double()

    def gradients(kept: int = 1) -> list[torch.Tensor]:
        finest = [tuple(part.clone().requires_grad_() for part in update) for update in updates[kept:]]
        moved = FollowedPoints(points, updates, kept, SHAPE)([(first, second) for first, second in finest])
        return list(torch.autograd.grad(moved.square().sum(), [part for update in finest for part in update]))

    before = torch.get_num_threads()
    try:
        computed = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            computed.append(gradients())
    finally:
        torch.set_num_threads(before)
    for again in computed[1:]:
        assert all(torch.equal(first, second) for first, second in zip(again, computed[0], strict=True))
    with use_backend("torch"):
        plain = gradients()
    for compiled, expected in zip(computed[0], plain, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_unknown_points_stay_unknown() -> None:
    points = random_points(0, 5)
    points[1, 2] = torch.nan
    moved = random_updates(0, 0.5).move(points, jacobians=True)
    assert moved.jacobians is not None
    assert moved.points.isnan().any(dim=0).tolist() == [False, False, True, False, False]
    assert moved.jacobians[:, :, 2].isnan().all()


def test_results_depend_neither_on_threads_nor_on_what_else_is_asked() -> None:
    """At real size: bit for bit the same on 1, 2 and 4 threads, in parts or at once."""
    shape = (80, 112, 96)
    updates, points = random_updates(0, 0.9, shape), random_points(0, 40_000, shape)
    before = torch.get_num_threads()
    try:
        moved = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            moved.append(updates.move(points, jacobians=True))
    finally:
        torch.set_num_threads(before)
    parts = torch.cat([updates.move(part).points for part in points.split(777, dim=1)], dim=1)
    for result in moved[1:]:
        assert result.jacobians is not None and moved[0].jacobians is not None
        assert torch.equal(result.points, moved[0].points)
        assert torch.equal(result.jacobians, moved[0].jacobians)
    assert torch.equal(parts, moved[0].points)


def test_exchanging_sides_exchanges_directions() -> None:
    updates, points = random_updates(2, 0.9), random_points(2, 1000)
    exchanged = SplineUpdates([(second, first) for first, second in updates.updates], SHAPE)
    assert torch.equal(updates.move(points, inverse=True).points, exchanged.move(points).points)


def test_world_points_come_back() -> None:
    exact = a_map()
    points = np.random.default_rng(0).uniform(-40, 40, (2000, 3))
    mapped = map_points(exact, points)
    assert np.abs(map_points(exact.inverse, mapped) - points).max() < 5e-3
    assert np.abs(mapped - points).max() > 3


def test_grids_agree_with_points_near_the_brain() -> None:
    """Whatever the grid, a voxel near the brain has the exact map; further out its samples are near it."""
    exact = a_map()
    for spacing in (0.7, 1.3):
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = -18, -25, -20
        shape = (40, 44, 36)
        world = np.indices(shape).reshape(3, -1).T @ affine[:3, :3].T + affine[:3, 3]
        field = composite_field(exact.on_grids, shape, affine).reshape(3, -1).T
        truth = map_points(exact, world) - world
        near = exact.on_grids.is_near(exact.to_voxels[:3, :3] @ world.T + exact.to_voxels[:3, 3:])
        assert 0.2 < near.mean() < 1 or near.all()
        assert np.abs(field - truth)[near].max() < 1e-4
        assert np.abs(field - truth).mean() < 0.3


def test_further_out_only_the_samples_that_are_looked_at_are_computed() -> None:
    """And they give what all samples give, also beyond the model's grid."""
    exact = a_map()
    exact.brain[1:] = exact.other_brain[1:] = False
    exact.brain[0, 10:20, 10:16] = True  # at the border of the grid
    quick = exact.on_grids
    assert 0.02 < (quick.far_samples == 0).all(axis=0).mean() < 0.8
    points = random_points(4, 5000).numpy()
    far = points[:, ~quick.is_near(points)]
    assert np.array_equal(quick.deform(far), far + look_up(exact.disp, far))


def test_grids_agree_as_interpolation_allows() -> None:
    """The same samples where grids share them, and between them an error that falls with the spacing's square."""
    exact, fields = a_map(share=0.3), []
    for spacing, count in ((1.0, 16), (0.5, 31), (0.25, 61)):
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = -8, -8, -8
        fields.append(DisplacementField(composite_field(exact.on_grids, [count] * 3, affine), affine))
    assert np.abs(fields[1].disp[:, ::2, ::2, ::2] - fields[0].disp).max() < 1e-5
    points = np.random.default_rng(0).uniform(-8, 7, (4000, 3))
    truth = map_points(exact, points)
    errors = [np.sqrt(np.square(map_points(field, points) - truth).mean()) for field in fields]
    assert errors[0] < 0.05
    assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5


@pytest.mark.parametrize("backward", [False, True])
def test_other_software_reads_its_fields_as_the_map(tmp_path: Path, backward: bool) -> None:
    """On an oblique grid of unequal voxels, one axis the other way."""
    exact = a_map().inverse if backward else a_map()
    shape = (22, 17, 13)
    affine = matrix("LAS", (0.7, 1.0, 1.3), (12, -7, 20), shape, (1, 2, -1))
    save_itk_field(tmp_path / "xfm.nii.gz", composite_field(exact.on_grids, shape, affine), affine)
    samples = grid_points(shape, affine)
    assert exact.on_grids.is_near(transform_by(exact.to_voxels, samples.T)).all()
    expected = map_points(exact, samples)
    assert distance(expected, samples).max() > 3
    inner = (np.indices(shape).reshape(3, -1).T > 0).all(axis=1)  # ITK's rounding may leave the outermost outside
    by_itk = by_sitk(sitk_field(tmp_path / "xfm.nii.gz"), samples)
    assert distance(by_itk, expected)[inner].max() < 0.01
    by_nitransforms = DenseFieldTransform.from_filename(tmp_path / "xfm.nii.gz", fmt="itk").map(samples)
    assert distance(by_nitransforms, expected).max() < 0.01


def test_determinant_is_that_of_the_map() -> None:
    exact = a_map(share=0.3)
    world = np.random.default_rng(1).uniform(-8, 8, (3, 200))
    determinant = exact.jacobian_determinant(world)
    step = 1e-3
    columns = [
        (map_points(exact, (world + step * unit).T) - map_points(exact, (world - step * unit).T)) / (2 * step)
        for unit in np.eye(3)[:, :, None]
    ]
    whole = np.linalg.det(np.stack(columns, axis=2))
    alignments = np.linalg.det(exact.fixed_to_model) / np.linalg.det(exact.moving_to_model)
    assert np.abs(determinant * alignments - whole).max() < 0.05
    assert np.isnan(exact.jacobian_determinant(np.full((3, 1), 1e4))).all()


def test_folded_volume_is_that_of_the_map() -> None:
    """Within the bound nothing folds, however steep; four times beyond it, a displacement alone does."""
    steep, still = corners(0, 0.99), torch.zeros(3, *SHAPE)
    exact = a_map()
    bounded = replace(exact, updates=steep)
    folding = replace(exact, updates=SplineUpdates([(4 * steep.updates[-1][0], still)], SHAPE))
    assert folded_percent(bounded, exact.brain) == folded_percent(bounded.inverse, exact.brain) == 0
    assert folded_percent(folding, exact.brain) > 1


def grids() -> dict[str, tuple[tuple[int, int, int], np.ndarray]]:
    """Any two."""
    return {"fixed": ((10, 11, 12), np.eye(4)), "moving": ((5, 6, 7), np.diag([2.0, 2, 2, 1]))}


def test_files_keep_the_map_to_the_last_bit(tmp_path: Path) -> None:
    exact = a_map(seed=5)
    save_map(tmp_path, exact, grids())
    saved = read_map(tmp_path)
    for pair, again in zip(exact.updates.updates, saved.forward.updates.updates, strict=True):
        assert all(torch.equal(points, copy) for points, copy in zip(pair, again, strict=True))
    points = np.random.default_rng(0).uniform(-30, 30, (100, 3))
    assert np.array_equal(map_points(saved.forward, points), map_points(exact, points))
    assert np.array_equal(map_points(load_map(tmp_path / MAP).inverse, points), map_points(exact.inverse, points))
    assert saved.grids["moving"][0] == (5, 6, 7)
    assert np.array_equal(saved.forward.brain, exact.brain)
    assert (tmp_path / MAP).stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / MAP).unlink(), "cannot be read"),
        (lambda d: (d / DESCRIPTION).unlink(), "no such file"),
        (lambda d: (d / DESCRIPTION).write_text("[" * 100_000), "nested too deeply"),
        (lambda d: (d / DESCRIPTION).write_text("[]"), "holds one object"),
        (lambda d: _change(d, version=2), "version 2"),
        (lambda d: _change(d, shape=[10**9, 1, 1]), "shape"),
        (lambda d: _change(d, levels=10**9), "levels"),
        (lambda d: _change(d, levels=5), "no exact map"),
        (lambda d: _change(d, grids={}), "no exact map"),
        (lambda d: (d / MAP).write_bytes((d / MAP).read_bytes()[:-1] + b"\x07"), "damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    save_map(tmp_path, a_map(), grids())
    damage(tmp_path)
    with pytest.raises(InputError, match=words) as error:
        load_map(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def _change(folder: Path, **entries: object) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | entries))


def test_backends_that_have_no_loop_of_their_own_take_plain_torch() -> None:
    """So that a map on another device is evaluated there."""
    assert backend_of(torch.zeros(1, dtype=torch.float16)).move_points is not None
    code = "import sitreg_lumir.deform.splines, sys; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
