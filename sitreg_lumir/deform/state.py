"""The symmetric state that the stages refine: four maps, composed from both sides at once."""

from collections.abc import Sequence

from torch import Tensor

from sitreg_lumir.deform.ops import compose, invert, upsample_control_points, warp


class SymmetricState:
    """Maps from the middle to both images and back, each tracked by its own composition.

    All fields are ``(B, 3, X, Y, Z)``, voxels of the full-resolution grid; ``None`` stands for the identity.
    ``left`` belongs to the moving image, ``right`` to the fixed one.

    Args:
        shape: ``(X, Y, Z)`` of the full-resolution grid.
        tolerance: of the inversions, voxels.

    Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
    """

    def __init__(self, shape: Sequence[int], tolerance: float = 1e-2) -> None:
        self.shape = tuple(shape)
        self.tolerance = tolerance
        self.left_fwd: Tensor | None = None
        self.right_fwd: Tensor | None = None
        self.left_inv: Tensor | None = None
        self.right_inv: Tensor | None = None
        self.variance: Tensor | None = None  # (B, 1, X, Y, Z), voxels^2, middle; see add_variance

    def update(self, control_points: Tensor, control_points_reverse: Tensor, factor: int) -> None:
        """Composes one stage's two updates into the four maps.

        Args:
            control_points: of the update of the moving side, ``(B, 3, ...)``, voxels of the level.
            control_points_reverse: of the fixed side, the same shape.
            factor: spacing of the level in full-resolution voxels.
        """
        a = upsample_control_points(control_points, factor, self.shape)
        b = upsample_control_points(control_points_reverse, factor, self.shape)
        a_inv, b_inv = invert(a, self.tolerance), invert(b, self.tolerance)
        if self.left_fwd is None or self.right_fwd is None or self.left_inv is None or self.right_inv is None:
            self.left_fwd = self.right_inv = compose(a, b_inv)
            self.right_fwd = self.left_inv = compose(b, a_inv)
            return
        self.left_fwd = compose(self.left_fwd, a, b_inv)
        self.right_fwd = compose(self.right_fwd, b, a_inv)
        self.left_inv = compose(b, a_inv, self.left_inv)
        self.right_inv = compose(a, b_inv, self.right_inv)

    def fields(self) -> tuple[Tensor, Tensor]:
        """``disp`` (on the fixed grid, into the moving image) and ``disp_inv`` (the reverse), voxels."""
        if self.left_fwd is None or self.right_fwd is None or self.left_inv is None or self.right_inv is None:
            raise ValueError("the state has no update yet")
        return compose(self.left_fwd, self.right_inv), compose(self.right_fwd, self.left_inv)

    def add_variance(self, difference: Tensor, factor: int, weight: float) -> None:
        """Adds ``weight * |u|^2`` to the running sum that :meth:`disagreement` shows.

        ``u`` is the upsampled ``difference``. Each stage's part lies in the middle as that stage found it; the
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
        if self.variance is None or self.right_inv is None:
            raise ValueError("the state has no variance of several members' updates yet")
        return warp(self.variance, self.right_inv).sqrt()
