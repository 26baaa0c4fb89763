"""The symmetric state that the stages refine: four maps, composed from both sides at once."""

from collections.abc import Sequence

from torch import Tensor

from sitreg_lumir.deform.ops import compose, invert, upsample_control_points


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
