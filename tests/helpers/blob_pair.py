"""A tiny pair of images with a known deformation, and random control points to start its optimisation from."""

from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import warp, warp_mask
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.registration.optimise import Optimised
from sitreg_lumir.registration.optimised_fields import exact_samples

SHAPE = (24, 22, 20)
LEVELS = 3
WITHIN = 2e-3  # voxels, what inversions that stop at a hundredth leave


def draw_points(seed: int, share: float) -> list[tuple[Tensor, Tensor]]:
    """Random updates of all levels, coarsest first, at most ``share`` of the bound."""
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for level in reversed(range(LEVELS)):
        size = [-(-length // 2**level) for length in SHAPE]
        reach = 0.99 * share * control_point_bound((2**level,) * 3)
        moving, fixed = (reach * (2 * torch.rand(1, 3, *size, generator=generator) - 1) for _ in range(2))
        updates.append((moving, fixed))
    return updates


def fields(updates: Any) -> tuple[Tensor, Tensor]:
    """What the updates compose to."""
    state = SymmetricState(SHAPE)
    for level, update in zip(reversed(range(LEVELS)), updates, strict=True):
        state.update(*update, 2**level)
    disp, disp_inv = state.fields()
    assert disp_inv is not None
    return disp, disp_inv


def blob_pair() -> dict[str, Tensor]:
    """A smooth brain-like blob, and the same deformed, with the contrast inverted."""
    generator = torch.Generator().manual_seed(5)
    image = torch.nn.functional.interpolate(
        torch.rand(1, 1, 8, 8, 8, generator=generator), size=SHAPE, mode="trilinear", align_corners=True
    )
    axes = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in SHAPE), indexing="ij")
    mask = (sum(axis.square() for axis in axes) < 0.8)[None, None]  # type: ignore[attr-defined]
    disp, _ = fields(draw_points(seed=1, share=0.5))
    moving_mask = warp_mask(mask, disp)
    moving = (1 - warp(image, disp)) * moving_mask
    return {"fixed": image * mask, "moving": moving, "fixed_mask": mask, "moving_mask": moving_mask}


def exchanged(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same pair with the roles swapped."""
    swap = {"fixed": "moving", "moving": "fixed"}
    return {name.replace(role, swap[role]): value for name, value in values.items() for role in [name.split("_")[0]]}


def in_brain(result: Optimised, updates: Any, pair: dict[str, Tensor]) -> float:
    """How far the fields differ from the exact map's samples, at most, in the brains, voxels."""
    compared = zip((result.disp, result.disp_inv), exact_samples(updates), ("fixed", "moving"), strict=True)
    return max(float(((field - exact) * pair[f"{role}_mask"]).abs().max()) for field, exact, role in compared)


def assert_equal(first: Optimised, second: Optimised) -> None:
    """To the last bit."""
    assert torch.equal(first.disp, second.disp) and torch.equal(first.disp_inv, second.disp_inv)
    assert (first.steps, first.objective, first.dissimilarity) == (second.steps, second.objective, second.dissimilarity)
