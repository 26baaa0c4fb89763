"""SITReg: symmetric, inverse consistent, diffeomorphic registration from coarse to fine.

One loop over the stages serves a single network and an ensemble: a single network is a list of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import warp
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.network.encoder import ControlPointHead, Encoder
from sitreg_lumir.network.normalization import sum_and_difference


@dataclass(frozen=True)
class Stage:
    """What is known after one stage.

    Attributes:
        level: 0 is full resolution, the last stage.
        disp: ``(B, 3, X, Y, Z)``, voxels, fixed grid: ``warp(moving, disp)`` matches the fixed image.
        inverse: the same with the roles swapped, on the moving grid; None where only ``disp`` was asked for.
        control_points: of this stage's update on the moving side, ``(B, 3, ...)``, voxels of the level.
        control_points_reverse: of the update on the fixed side.
        disagreement: ``(B, 1, X, Y, Z)``, voxels, fixed grid, when asked for: see :func:`run_stages`.
    """

    level: int
    disp: Tensor
    inverse: Tensor | None
    control_points: Tensor
    control_points_reverse: Tensor
    disagreement: Tensor | None = None

    @property
    def disp_inv(self) -> Tensor:
        """The inverse field, which must have been asked for."""
        if self.inverse is None:
            raise ValueError("this stage was run without the inverse field")
        return self.inverse


class SITReg(nn.Module):
    """One registration network, by default with the sizes of the published LUMIR configuration.

    ``forward``: keyword arguments ``fixed`` and ``moving`` ``(B, in_channels, X, Y, Z)`` -> ``disp`` on the fixed
    grid and ``disp_inv`` on the moving grid, ``(B, 3, X, Y, Z)``, voxels. Any volume shape.

    Args:
        in_channels: 6 for MIND features, 1 for raw intensities.
        features: channels of the encoder, finest level first.
        head_features: channels of the control point heads, finest level first.
        convolutions: 3x3x3 convolutions in each block.
        groups: of the group normalisations.
        bound_multiplier: share of the control point bound that is used.
        inversion_tolerance: voxels, of full resolution.

    Examples:
        >>> network = sitreg_lumir.SITReg(in_channels=1, features=[4, 4], head_features=[4, 4])
        >>> fixed, moving = torch.rand(2, 1, 1, 8, 10, 6)
        >>> disp, disp_inv = network(fixed=fixed, moving=moving)
        >>> disp.shape, network.levels
        (torch.Size([1, 3, 8, 10, 6]), 2)

    Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024; Strategies for Robust
    Deep Learning Based Deformable Registration, 2025.
    """

    def __init__(
        self,
        in_channels: int = 6,
        features: Sequence[int] = (12, 32, 64, 128, 128, 128),
        head_features: Sequence[int] = (12, 64, 128, 256, 256, 256),
        convolutions: int = 2,
        groups: int = 4,
        bound_multiplier: float = 0.99,
        inversion_tolerance: float = 1e-2,
    ) -> None:
        super().__init__()
        if len(features) != len(head_features) or not features:
            raise ValueError(f"features and head_features need one entry per level, got {features} and {head_features}")
        if not 0 < bound_multiplier < 1:
            raise ValueError(f"bound_multiplier must lie between 0 and 1, got {bound_multiplier}")
        self.architecture = {
            "in_channels": in_channels,
            "features": list(features),
            "head_features": list(head_features),
            "convolutions": convolutions,
            "groups": groups,
            "bound_multiplier": bound_multiplier,
        }
        self.inversion_tolerance = inversion_tolerance
        self.encoder = Encoder(in_channels, features, convolutions, groups)
        self.heads = nn.ModuleList(
            ControlPointHead(
                channels,
                head_channels,
                bound_multiplier * control_point_bound((2**level,) * 3),
                convolutions,
                groups,
            )
            for level, (channels, head_channels) in enumerate(zip(features, head_features, strict=True))
        )

    @property
    def levels(self) -> int:
        """Number of stages."""
        return len(self.heads)

    def features(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Both images' features at every level, finest first, from ``(B, in_channels, X, Y, Z)``."""
        pyramids: tuple[list[Tensor], list[Tensor]] = self.encoder(moving, fixed)
        return pyramids

    def finest_features(self, image: Tensor) -> list[Tensor]:
        """One image's features of full resolution alone."""
        return self.encoder.finest(image)

    def control_points(
        self, level: int, moving: Tensor, fixed: Tensor, left_fwd: Tensor | None, right_fwd: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """This network's update at ``level``, given what is known so far.

        Args:
            level: 0 is full resolution.
            moving: the encoder's features of the moving image at that level; without gradients, overwritten.
            fixed: of the fixed image.
            left_fwd: the state's map from the middle to the moving image, voxels; None at the first stage.
            right_fwd: the same for the fixed image.

        Returns:
            control points of the moving and of the fixed side, ``(B, 3, ...)``, voxels of the level.
        """
        if left_fwd is not None and right_fwd is not None:
            moving = warp(moving, left_fwd, 2**level)
            fixed = warp(fixed, right_fwd, 2**level)
        head = self.heads[level]
        assert isinstance(head, ControlPointHead)
        parts = list(sum_and_difference(moving, fixed))  # overwrites what nobody needs any more, where it may
        del moving, fixed
        return head.from_sum_and_difference(parts)

    def forward(self, *, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        stage = run_stages([self], fixed=fixed, moving=moving)[-1]
        return stage.disp, stage.disp_inv


class StageNetwork(Protocol):
    """What :func:`run_stages` needs of a member: see :class:`SITReg`, whose attributes and methods these are."""

    architecture: dict[str, Any]
    inversion_tolerance: float

    @property
    def levels(self) -> int: ...

    def features(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], list[Tensor]]: ...

    def finest_features(self, image: Tensor) -> list[Tensor]: ...

    def control_points(
        self, level: int, moving: Tensor, fixed: Tensor, left_fwd: Tensor | None, right_fwd: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def run_stages(
    members: Sequence[StageNetwork],
    *,
    fixed: Tensor,
    moving: Tensor,
    levels: Sequence[int] = (0,),
    inverse: bool = True,
    disagreement: bool = False,
    recompute: bool = False,
) -> list[Stage]:
    """Runs all stages, averaging the members' control points at each, and gives the wanted stages' results.

    The members run one after the other at each stage, and their average is a running one: besides the networks
    only the features of the coarser levels are held per member. Those of full resolution, the largest by far, an
    ensemble computes again for the last stage.

    The disagreement is ``sqrt(sum over the stages of the members' variance)``: of the upsampled updates of the
    moving side, population variance, summed over the three components, added up in the middle between the images
    and pulled to the fixed grid by ``right_inv``. At each stage the members go on from the common state, so what
    they would have drifted apart by themselves is not in it: a lower bound, and no measure of the error. It takes
    one side's updates, so exchanging the images gives the map of the other side's.

    Args:
        members: networks of one architecture, or mirrored ones; each warps its own features by the common state.
        fixed: ``(B, C, X, Y, Z)``, the members' input (MIND features or intensities).
        moving: the same shape.
        levels: after which stages fields are wanted; 0 is the last.
        inverse: also give ``disp_inv``; without it less is computed.
        disagreement: also tell how far the members' updates differ, up to each of those stages.
        recompute: with gradients, keep no activation of an encoder or a head, and compute them again in the backward
            pass: a fraction of the memory for a little more time, the same numbers.

    Returns:
        one :class:`Stage` per wanted level, coarsest first.

    Raises:
        ValueError: shapes or architectures differ, a level does not exist, or a single member is to disagree.
    """
    if not members:
        raise ValueError("no member given")
    if disagreement and len(members) < 2:
        raise ValueError("disagreement needs two members or more, got 1")
    first = members[0]
    if any(member.architecture != first.architecture for member in members):
        raise ValueError("the members differ in architecture")
    channels = first.architecture["in_channels"]
    if fixed.ndim != 5 or fixed.shape[1] != channels or fixed.shape != moving.shape:
        raise ValueError(
            f"fixed and moving must be (B, {channels}, X, Y, Z), got {tuple(fixed.shape)} and {tuple(moving.shape)}"
        )
    if not set(levels) <= set(range(first.levels)):
        raise ValueError(f"levels must lie in 0..{first.levels - 1}, got {list(levels)}")
    recompute = recompute and torch.is_grad_enabled()
    held = slice(1 if len(members) > 1 else 0, None)
    shape = tuple(fixed.shape[2:])
    pyramids = []
    for member in members:
        encode = partial(recomputed, member.features) if recompute else member.features
        pyramids.append([levels[held] for levels in encode(moving, fixed)])
    if len(members) == 1:
        del fixed, moving  # in inference nobody else holds them
    state = SymmetricState(shape, first.inversion_tolerance, inverse)
    stages = []
    for level in reversed(range(first.levels)):
        averages: tuple[Tensor, Tensor] | None = None
        for count, (member, pyramid) in enumerate(zip(members, pyramids, strict=True), start=1):
            if not pyramid[0]:
                pyramid = [member.finest_features(moving), member.finest_features(fixed)]
            compute = member.control_points if not recompute else partial(recomputed, member.control_points)
            update = compute(level, pyramid[0].pop(), pyramid[1].pop(), state.maps.left_fwd, state.maps.right_fwd)
            if averages is None:
                averages = update
                continue
            differences = update[0] - averages[0], update[1] - averages[1]
            if disagreement:  # what this member adds to the sum of squares about the mean of all so far
                state.add_variance(differences[0], 2**level, weight=(count - 1) / count / len(members))
            averages = averages[0] + differences[0] / count, averages[1] + differences[1] / count
        assert averages is not None
        state.update(*averages, 2**level, last=level == min(levels))
        if level in levels:
            spread = state.disagreement() if disagreement else None
            stages.append(Stage(level, *state.fields(), *averages, spread))
    return stages


def recomputed(function: Any, *args: Any) -> Any:
    """Calls the function, and again in the backward pass instead of keeping what it computed on the way."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
