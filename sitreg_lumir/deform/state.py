"""The symmetric state that the stages refine: four maps, composed from both sides at once."""

from collections.abc import Sequence

from torch import Tensor

from sitreg_lumir.deform.ops import compose, upsample_control_points, warp
from sitreg_lumir.deform.update import Maps, update_maps


class SymmetricState:
    """The maps from the middle to both images and back (``maps``), each tracked by its own composition.

    All fields are ``(B, 3, X, Y, Z)``, voxels of the full-resolution grid; ``None`` stands for the identity.

    Args:
        shape: ``(X, Y, Z)`` of the full-resolution grid.
        tolerance: of the inversions, voxels.
        inverse: whether :meth:`fields` is to give the inverse field too; without it ``left_inv`` stays None.

    Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
    """

    def __init__(self, shape: Sequence[int], tolerance: float = 1e-2, inverse: bool = True) -> None:
        self.shape = tuple(shape)
        self.tolerance = tolerance
        self.inverse = inverse
        self.maps = Maps()
        self.variance: Tensor | None = None  # (B, 1, X, Y, Z), voxels^2, middle; see add_variance

    def update(self, control_points: Tensor, control_points_reverse: Tensor, factor: int, last: bool = False) -> None:
        """Composes one stage's two updates into the maps: see :func:`~sitreg_lumir.deform.update.update_maps`."""
        self.maps = update_maps(
            self.maps,
            control_points,
            control_points_reverse,
            factor,
            self.shape,
            self.tolerance,
            forward_only=not self.inverse,
            last=last,
        )

    def fields(self) -> tuple[Tensor, Tensor | None]:
        """``disp`` (on the fixed grid, into the moving image) and ``disp_inv`` (the reverse, or None), voxels."""
        maps = self.maps
        if maps.left_fwd is None or maps.right_inv is None:
            raise ValueError("the state has no update yet")
        disp = compose(maps.left_fwd, maps.right_inv)
        if maps.right_fwd is None or maps.left_inv is None:
            return disp, None
        return disp, compose(maps.right_fwd, maps.left_inv)

    def add_variance(self, difference: Tensor, factor: int, weight: float) -> None:
        """Adds ``weight * |u|^2`` to the running sum that :meth:`disagreement` shows.

        ``u`` is the upsampled ``difference``. Each stage's part lies in the middle as that stage left it; the
        parts are added as they are, although later stages still move the middle.

        Args:
            difference: of control points of the moving side, ``(B, 3, ...)``, voxels of the level.
            factor: spacing of the level in full-resolution voxels.
            weight: the share of this difference in a variance.
        """
        field = upsample_control_points(difference, factor, self.shape)
        part = weight * field.square().sum(dim=1, keepdim=True)
        self.variance = part if self.variance is None else self.variance + part

    def disagreement(self) -> Tensor:
        """Root of the summed variance, pulled from the middle by ``right_inv``.

        Returns:
            ``(B, 1, X, Y, Z)``, voxels, fixed grid.

        Raises:
            ValueError: no variance was added, or the state has no update yet.
        """
        if self.variance is None or self.maps.right_inv is None:
            raise ValueError("the state has no variance of several members' updates yet")
        return warp(self.variance, self.maps.right_inv).sqrt()
