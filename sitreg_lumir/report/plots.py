"""Pictures of one registered pair: the images, and the grid as the field deforms it."""

from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PLANES = (("sagittal", 0), ("coronal", 1), ("axial", 2))


def plot_pair(
    fixed: Array,
    moving: Array,
    warped: Array,
    disp: Array,
    file: str | Path | IO[bytes],
    title: str = "",
    spacing: int = 4,
    moving_name: str = "moving",
) -> None:
    """Fixed, moving, warped and the deformed grid, in the middle slice of each plane, as a PNG.

    Args:
        fixed: ``(X, Y, Z)``, RAS.
        moving: the same shape.
        warped: the moving image on the fixed grid.
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        file: where the PNG goes; a file or a stream.
        title: above the picture.
        spacing: voxels between two lines of the grid.
        moving_name: what the moving image is called.

    Examples:
        >>> fixed, moving, warped = np.random.default_rng(0).random((3, 8, 10, 6))
        >>> sitreg_lumir.plot_pair(fixed, moving, warped, np.zeros((3, 8, 10, 6)), "pair.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PLANES), 4)
    tops = [float(np.percentile(image[image > 0], 99.5)) if (image > 0).any() else 1.0 for image in (fixed, moving)]
    middle = [size // 2 for size in fixed.shape]
    for row, (plane, axis) in zip(axes, PLANES, strict=True):
        shown = ((fixed, "fixed", tops[0]), (moving, moving_name, tops[1]), (warped, "warped moving", tops[1]))
        for panel, (image, name, top) in zip(row, shown, strict=False):
            slice_ = np.take(image, middle[axis], axis)
            panel.imshow(slice_.T, origin="lower", cmap="gray", vmin=0, vmax=top, interpolation="nearest")
            panel.set_title(f"{name}, {plane}", fontsize=10)
        _draw_grid(row[3], np.take(fixed, middle[axis], axis), np.take(disp, middle[axis], axis + 1), axis, spacing)
        row[3].set_title(f"deformed grid, {plane}", fontsize=10)
        for panel in row:
            panel.set_axis_off()
    figure.suptitle(title, fontsize=12)
    figure.savefig(file, dpi=100, format="png")


def _draw_grid(panel: Any, background: Array, disp: Array, axis: int, spacing: int) -> None:
    """Lines of the fixed grid at their places in the moving image, within the slice's plane."""
    across, along = (other for other in range(3) if other != axis)
    x, y = np.meshgrid(*(np.arange(size) for size in background.shape), indexing="ij")
    moved_x, moved_y = x + disp[across], y + disp[along]
    panel.imshow(background.T, origin="lower", cmap="gray", alpha=0.35, interpolation="nearest")
    style = {"color": "tab:blue", "linewidth": 0.7}
    for index in range(0, background.shape[0], spacing):
        panel.plot(moved_x[index], moved_y[index], **style)
    for index in range(0, background.shape[1], spacing):
        panel.plot(moved_x[:, index], moved_y[:, index], **style)
    panel.set_xlim(-0.5, background.shape[0] - 0.5)
    panel.set_ylim(-0.5, background.shape[1] - 0.5)
