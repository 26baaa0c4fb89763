"""Promises of the deformation operations: gradients, identity, borders, errors."""

import pytest
import torch
from torch import Tensor

from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.deform.backends.torch.images import box_sum
from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import (
    compose,
    invert,
    upsample_control_points,
    warp,
    warp_labels,
    warp_mask,
)
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.deform.update import Maps, update_maps

SHAPE = (7, 6, 5)


@pytest.fixture(params=["torch", "cpu"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1)


def small_field(seed: int = 0, batch: int = 2) -> Tensor:
    """A field that is a contraction: control points of a coarse level within the bound."""
    control_points = random(batch, 3, 4, 3, 3, seed=seed, scale=0.9 * control_point_bound((2, 2, 2)))
    return upsample_control_points(control_points, 2, SHAPE)


@pytest.mark.slow
def test_gradients_agree_with_finite_differences():
    control_points = random(1, 3, 4, 3, 3, scale=0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: upsample_control_points(c, 2, SHAPE), control_points)
    disp, second = small_field(1, 1).requires_grad_(), small_field(2, 1).requires_grad_()
    values = random(1, 2, *SHAPE, seed=3).requires_grad_()
    features = random(1, 2, 4, 3, 3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: invert(d, 1e-13, 500), disp, atol=1e-6)
    assert torch.autograd.gradcheck(lambda a, b: compose(a, b, a), (disp, second), atol=1e-6)
    assert torch.autograd.gradcheck(lambda v, d: warp(v, d), (values, disp), atol=1e-6)
    assert torch.autograd.gradcheck(lambda v, d: warp(v, d, 2), (features, disp), atol=1e-6)


def test_the_inverse_inverts_inside_and_outside_the_volume():
    disp = small_field()
    inverse = invert(disp, 1e-12, 500)
    assert float(compose(disp, inverse).abs().max()) < 1e-10


def test_an_outermost_control_point_at_the_bound_still_inverts():
    bound = 0.99 * control_point_bound((2, 2, 2))
    signs = random(1, 3, 4, 3, 3, seed=5).sign()
    disp = upsample_control_points(bound * signs, 2, SHAPE)
    assert float(compose(disp, invert(disp, 1e-9, 5000)).abs().max()) < 1e-6


def test_zero_fields_change_nothing():
    zero, values = torch.zeros(1, 3, *SHAPE), torch.rand(1, 4, *SHAPE)
    torch.testing.assert_close(warp(values, zero), values)
    assert float(invert(zero).abs().max()) == 0
    assert float(compose(zero, zero, zero).abs().max()) == 0
    labels = torch.arange(7 * 6 * 5).view(1, 1, *SHAPE)
    assert torch.equal(warp_labels(labels, zero), labels)
    assert bool(warp_mask(torch.ones(1, 1, *SHAPE), zero).all())


def test_labels_outside_are_zero_and_rounding_is_half_up():
    labels = torch.arange(1, 6).view(1, 1, 5, 1, 1)
    disp = torch.zeros(1, 3, 5, 1, 1)
    disp[0, 0, :, 0, 0] = torch.tensor([-0.1, 0.5, 0.49, 1.0, 0.01])
    assert warp_labels(labels, disp).flatten().tolist() == [0, 3, 3, 5, 0]


def test_images_repeat_their_border_and_masks_do_not():
    image = torch.arange(1.0, 5).view(1, 1, 4, 1, 1)
    disp = torch.zeros(1, 3, 4, 1, 1)
    disp[:, 0] = 2.0
    assert warp(image, disp).flatten().tolist() == [3, 4, 4, 4]
    assert warp_mask(torch.ones_like(image), disp).flatten().tolist() == [True, True, False, False]


def test_a_constant_control_point_is_a_translation():
    control_points = torch.full((1, 3, 2, 2, 2), 0.25, dtype=torch.float64)
    torch.testing.assert_close(
        upsample_control_points(control_points, 4, SHAPE), torch.ones(1, 3, *SHAPE, dtype=torch.float64)
    )


def test_box_sum_counts_voxels_and_keeps_float32_exact():
    ones = torch.ones(1, 1, 9, 8, 7)
    sums = box_sum(ones, 3)
    assert float(sums[0, 0, 4, 4, 4]) == 27 and float(sums[0, 0, 0, 0, 0]) == 8
    for window in (1, 5, 7, 11):
        kernel = torch.ones(1, 1, window, window, window, dtype=torch.float64)
        values = random(1, 1, 9, 8, 7, seed=6)
        expected = torch.nn.functional.conv3d(values, kernel, padding=window // 2)
        torch.testing.assert_close(box_sum(values, window), expected)


def test_half_precision_is_computed_in_float32_and_given_back():
    values, disp = random(1, 2, *SHAPE).float(), small_field(1, 1).float()
    warped = warp(values.bfloat16(), disp)
    assert warped.dtype == torch.bfloat16
    torch.testing.assert_close(warped, warp(values.bfloat16().float(), disp).bfloat16())


def test_wrong_shapes_are_named():
    field = torch.zeros(1, 3, *SHAPE)
    with pytest.raises(ValueError, match=r"\(B, 3, X, Y, Z\)"):
        invert(torch.zeros(1, 2, *SHAPE))
    with pytest.raises(ValueError, match="differ in shape"):
        compose(field, torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="values must be"):
        warp(torch.zeros(1, 1, 3, 3, 3), field)
    with pytest.raises(ValueError, match="control_points of factor 2"):
        upsample_control_points(torch.zeros(1, 3, 3, 3, 3), 2, SHAPE)
    with pytest.raises(ValueError, match="backend"), use_backend("gpu"):
        pass


def test_a_state_without_updates_has_no_fields():
    with pytest.raises(ValueError, match="no update"):
        SymmetricState(SHAPE).fields()


def test_the_update_has_the_gradient_of_the_operations_it_is_made_of():
    """Two stages, so that the second one's maps are the same tensor twice."""
    points = [random(1, 3, 4, 3, 3, seed=seed, scale=0.2).requires_grad_() for seed in range(4)]

    def fused(*points: Tensor) -> tuple[Tensor, ...]:
        maps = update_maps(Maps(), points[0], points[1], 2, SHAPE, 1e-13)
        return tuple(update_maps(maps, points[2], points[3], 2, SHAPE, 1e-13))  # type: ignore[arg-type]

    def plain(*points: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = (upsample_control_points(control_points, 2, SHAPE) for control_points in points)
        a_inv, b_inv, c_inv, d_inv = (invert(control_points, 1e-13, 500) for control_points in (a, b, c, d))
        left, right = compose(a, b_inv), compose(b, a_inv)
        return (compose(left, c, d_inv), compose(right, d, c_inv), compose(d, c_inv, right), compose(c, d_inv, left))

    weights = [random(1, 3, *SHAPE, seed=seed) for seed in range(10, 14)]

    def gradient(maps: tuple[Tensor, ...], of: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((map_ * weight).sum() for map_, weight in zip(maps, weights, strict=True)), of)

    grads = [gradient(maps, points) for maps in (fused(*points), plain(*points))]
    torch.testing.assert_close(fused(*points), plain(*points))
    torch.testing.assert_close(grads[0], grads[1])
    second_alone = gradient(fused(*(point.detach() for point in points[:2]), *points[2:]), points[2:])
    torch.testing.assert_close(second_alone, grads[1][2:])
    assert all(float(grad.abs().max()) > 0 for grad in grads[0])


@torch.no_grad()
def test_forward_only_gives_the_same_field_with_fewer_maps():
    points = [random(1, 3, 4, 3, 3, seed=seed, scale=0.2) for seed in range(4)]
    both, forward = SymmetricState(SHAPE), SymmetricState(SHAPE, inverse=False)
    for state in (both, forward):
        state.update(points[0], points[1], 2)
        state.update(points[2], points[3], 2, last=True)
    assert torch.equal(both.fields()[0], forward.fields()[0])
    assert both.fields()[1] is not None and forward.fields()[1] is None and forward.maps.left_inv is None
