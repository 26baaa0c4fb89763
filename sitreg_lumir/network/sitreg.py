"""SITReg: symmetric, inverse consistent, diffeomorphic registration from coarse to fine.

One loop over the stages serves a single network and an ensemble: a single network is a list of one. Per stage, as in
the paper's figure: warp both images' features half-way, let the head predict an update in both orders, average over the
members, and compose the update into the maps. ``memory`` does what ``SITReg`` says in less memory and time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import warp
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.deform.update import Maps
from sitreg_lumir.network.architecture import architecture_problem
from sitreg_lumir.network.encoder import Encoder
from sitreg_lumir.network.head import ControlPointHead
from sitreg_lumir.network.memory import Economical

Pyramids = tuple[list[Tensor], list[Tensor]]
"""Features of the moving and of the fixed image, finest level first: ``(B, features[l], ceil(X / 2^l), ...)``."""
Update = tuple[Tensor, Tensor]
"""Control points of one stage, of the moving and of the fixed side: ``(B, 3, ...)`` each, voxels of the level."""


@dataclass(frozen=True)
class Stage:
    """What is known after one stage.

    Attributes:
        level: 0 is full resolution, the last stage.
        disp: ``(B, 3, X, Y, Z)``, voxels, fixed grid: ``warp(moving, disp)`` matches the fixed image.
        inverse: the same with the roles swapped, on the moving grid; None where only ``disp`` was asked for.
        updates: control points of all stages up to this one, coarsest first.
        disagreement: ``(B, 1, X, Y, Z)``, voxels, fixed grid, when asked for: see :func:`run_stages`.
    """

    level: int
    disp: Tensor
    inverse: Tensor | None
    updates: tuple[Update, ...]
    disagreement: Tensor | None = None

    @property
    def control_points(self) -> Tensor:
        """Of this stage's update on the moving side, ``(B, 3, ...)``, voxels of the level."""
        return self.updates[-1][0]

    @property
    def control_points_reverse(self) -> Tensor:
        """Of the update on the fixed side, ``(B, 3, ...)``, voxels of the level."""
        return self.updates[-1][1]

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
        self.architecture = {
            "in_channels": in_channels,
            "features": list(features),
            "head_features": list(head_features),
            "convolutions": convolutions,
            "groups": groups,
            "bound_multiplier": bound_multiplier,
        }
        problem = architecture_problem(self.architecture)
        if problem:
            raise ValueError(problem)
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

    def features(self, moving: Tensor, fixed: Tensor) -> Pyramids:
        """The features of both images ``(B, in_channels, X, Y, Z)``."""
        both = [level.chunk(2) for level in self.encoder(torch.cat([moving, fixed]))]
        return [level[0] for level in both], [level[1] for level in both]

    def control_points(self, level: int, features: Pyramids, maps: Maps) -> tuple[Tensor, Tensor]:
        """This network's update at ``level``: features warped half-way, the head in both orders.

        Args:
            level: 0 is full resolution.
            features: of the moving and of the fixed image, as :meth:`features` gives them.
            maps: from the middle to both images, as known so far; None before the first stage.

        Returns:
            control points of the moving and of the fixed side, ``(B, 3, ...)``, voxels of the level.
        """
        moving, fixed = features[0][level], features[1][level]
        if maps.left_fwd is not None and maps.right_fwd is not None:
            moving = warp(moving, maps.left_fwd, 2**level)
            fixed = warp(fixed, maps.right_fwd, 2**level)
        update: tuple[Tensor, Tensor] = self.heads[level](moving, fixed)
        return update

    def economical(self, hold_finest: bool, recompute: bool) -> Economical:
        """The same arithmetic in less memory and time, for one pair of images."""
        return Economical(self.encoder, self.heads, hold_finest, recompute)

    def forward(self, *, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """Fields on the fixed and on the moving grid, ``(B, 3, X, Y, Z)`` each, voxels."""
        stage = run_stages([self], fixed=fixed, moving=moving)[-1]
        return stage.disp, stage.disp_inv


class UpdateNetwork(Protocol):
    """What each stage needs of a member: see the methods of :class:`SITReg`."""

    def features(self, moving: Tensor, fixed: Tensor) -> Pyramids:
        """Both images' features at every level."""
        ...

    def control_points(self, level: int, features: Pyramids, maps: Maps) -> tuple[Tensor, Tensor]:
        """The update at a level: see :meth:`SITReg.control_points`."""
        ...


class StageNetwork(UpdateNetwork, Protocol):
    """What :func:`run_stages` needs of a member: see :class:`SITReg`, whose attributes and methods these are."""

    architecture: dict[str, Any]
    inversion_tolerance: float

    @property
    def levels(self) -> int:
        """Number of stages."""
        ...

    def economical(self, hold_finest: bool, recompute: bool) -> UpdateNetwork:
        """The same network, computing in less memory: see ``memory``."""
        ...


def run_stages(
    members: Sequence[StageNetwork],
    *,
    fixed: Tensor,
    moving: Tensor,
    levels: Sequence[int] = (0,),
    inverse: bool = True,
    disagreement: bool = False,
    recompute: bool = False,
    plain: bool = False,
) -> list[Stage]:
    """Runs all stages, averaging the members' control points at each, and gives the wanted stages' results.

    The disagreement is ``sqrt(sum over the stages of the members' variance)``: of the upsampled updates of the
    moving side, population variance, summed over the three components, added up in the middle between the images
    and pulled to the fixed grid by ``right_inv``. At each stage the members go on from the common state, so what
    they would have drifted apart independently is not in it: a lower bound, and no measure of the error. It takes
    one side's updates, so exchanging the images gives the map of the other side's.

    Args:
        members: networks of one architecture, or mirrored ones; each warps its own features by the common state.
        fixed: ``(B, C, X, Y, Z)``, the members' input (MIND features or intensities).
        moving: ``(B, C, X, Y, Z)``.
        levels: after which stages fields are wanted; 0 is the last.
        inverse: also give ``disp_inv``; without it less is computed.
        disagreement: also measure how far the members' updates differ, up to each of those stages.
        recompute: with gradients, keep no activation of an encoder or a head, and compute them again in the backward
            pass: a fraction of the memory for a little more time, the same numbers.
        plain: compute as the text of :class:`SITReg` says, without what :mod:`~sitreg_lumir.network.memory` does to
            save memory and time; the same numbers up to the rounding.

    Returns:
        one :class:`Stage` per wanted level, coarsest first.

    Raises:
        ValueError: shapes or architectures differ, a level does not exist, or a single member is to disagree.
    """
    _check(members, fixed, moving, levels, disagreement)
    first = members[0]
    networks: Sequence[UpdateNetwork] = members
    if not plain:
        networks = [member.economical(hold_finest=len(members) == 1, recompute=recompute) for member in members]
    state = SymmetricState(fixed.shape[2:], first.inversion_tolerance, inverse)
    features = [network.features(moving, fixed) for network in networks]
    del fixed, moving  # in inference nobody else holds them
    stages, updates = [], []
    for level in reversed(range(min(levels), first.levels)):
        updates.append(_mean_update(networks, level, features, state, disagreement))
        state.update(*updates[-1], 2**level, last=level == min(levels))
        if level in levels:
            spread = state.disagreement() if disagreement else None
            stages.append(Stage(level, *state.fields(), tuple(updates), spread))
    return stages


def predict_control_points(members: Sequence[StageNetwork], *, fixed: Tensor, moving: Tensor) -> list[Update]:
    """The updates of all stages, as :func:`run_stages` averages them, without the fields that they make up.

    What only fields need is not computed: the last composition, and the maps from the images to the middle.

    Args:
        members: networks of one architecture, or mirrored ones.
        fixed: ``(B, C, X, Y, Z)``, the members' input (MIND features or intensities).
        moving: ``(B, C, X, Y, Z)``.

    Returns:
        control points of the moving and of the fixed side, coarsest stage first, ``(B, 3, ...)`` each, voxels of the
        level; bit for bit those of :func:`run_stages`.

    Raises:
        ValueError: shapes or architectures differ.
    """
    _check(members, fixed, moving, (0,), False)
    first = members[0]
    networks = [member.economical(hold_finest=len(members) == 1, recompute=False) for member in members]
    state = SymmetricState(fixed.shape[2:], first.inversion_tolerance, inverse=False)
    features = [network.features(moving, fixed) for network in networks]
    del fixed, moving
    updates = []
    for level in reversed(range(first.levels)):
        updates.append(_mean_update(networks, level, features, state))
        if level > 0:
            state.update(*updates[-1], 2**level)
    return updates


def _mean_update(
    networks: Sequence[UpdateNetwork],
    level: int,
    features: Sequence[Pyramids],
    state: SymmetricState,
    disagreement: bool = False,
) -> Update:
    """The members' mean update at ``level``: they run one after the other, and their mean is a running one."""
    mean: Update | None = None
    for count, (network, own) in enumerate(zip(networks, features, strict=True), start=1):
        update = network.control_points(level, own, state.maps)
        if mean is None:
            mean = update
            continue
        change = update[0] - mean[0], update[1] - mean[1]
        if disagreement:  # what this member adds to the sum of squares about the mean of all so far
            state.add_variance(change[0], 2**level, weight=(count - 1) / count / len(networks))
        mean = mean[0] + change[0] / count, mean[1] + change[1] / count
    assert mean is not None
    return mean


def _check(
    members: Sequence[StageNetwork], fixed: Tensor, moving: Tensor, levels: Sequence[int], disagreement: bool
) -> None:
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


def shapes_of(**architecture: Any) -> dict[str, torch.Size]:
    """The shapes of a network's parameters and buffers by their names, without memory for them.

    Args:
        architecture: arguments of :class:`SITReg`.

    Raises:
        ValueError, TypeError: there is no such network.
    """
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in SITReg(**architecture).state_dict().items()}
