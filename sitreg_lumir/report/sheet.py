"""Pictures of a registered pair and of mean images: slices in the middle of three planes, drawn by Pillow alone."""

import io
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sitreg_lumir.report.colours import Array
from sitreg_lumir.report.pictures import Volumes, grid_lines, intensity_window, resized, scaled, sizes, slice_of
from sitreg_lumir.report.plots import PLANES

_PANEL = 300  # pixels of the longest side
_PANEL_OF_MEANS = 360
_BESIDE_MM = 12.0
_HEAD, _GAP, _TITLE = 18, 8, 30  # pixels
_GRID_COLOUR = np.array([31, 119, 180], np.float32)
_DIMMED = 0.35  # of the image under the grid


def sheet_png(volumes: Volumes, title: str) -> bytes:
    """Fixed, aligned and warped moving image and the deformed grid, in the middle slice of each plane, as a PNG.

    Args:
        volumes: of the pair, on the fixed grid.
        title: above the picture; letters that its font lacks are replaced.
    """
    shown = intensity_window(volumes.moving)
    images: list[tuple[str, Array, tuple[float, float]]] = [
        ("fixed", volumes.fixed, intensity_window(volumes.fixed)),
        ("moving, aligned", volumes.moving, shown),
        ("warped moving", volumes.warped, shown),
    ]
    rows = []
    for name, axis in PLANES:
        middle = volumes.fixed.shape[axis] // 2
        width, height = sizes(volumes.fixed.shape, volumes.voxel_size, axis)[0]
        factor = _PANEL / max(width, height)
        size = round(width * factor), round(height * factor)
        cut = partial(slice_of, axis=axis, index=middle)
        row = [
            (f"{heading}, {name}", _grey(resized(scaled(cut(image), limits), size)))
            for heading, image, limits in images
        ]
        under = resized(scaled(cut(volumes.fixed), images[0][2]), size)
        row.append((f"deformed grid, {name}", _with_grid(under, grid_lines(volumes, axis, middle, size))))
        rows.append(row)
    return _encoded(rows, title)


def means_png(
    images: Sequence[tuple[str, Array]], brain: Array, voxel_size: tuple[float, float, float], title: str
) -> bytes:
    """Images of one grid side by side, in slices through the middle of a brain, as a PNG.

    Args:
        images: a heading and ``(X, Y, Z)`` each, axes in RAS order and direction; each in its own window.
        brain: bool, ``(X, Y, Z)``.
        voxel_size: mm along each axis.
        title: above the picture; letters that its font lacks are replaced.
    """
    where = np.argwhere(brain)
    low, high = where.min(axis=0), where.max(axis=0)
    rows = []
    for name, axis in PLANES:
        index = int((low[axis] + high[axis]) // 2)
        if axis == 0:  # beside the gap between the halves
            index += round(_BESIDE_MM / voxel_size[0])
        width, height = sizes(brain.shape, voxel_size, axis)[0]
        factor = _PANEL_OF_MEANS / max(width, height)
        size = round(width * factor), round(height * factor)
        rows.append(
            [
                (
                    f"{heading}, {name}",
                    _grey(resized(scaled(slice_of(image, axis, index), intensity_window(image)), size)),
                )
                for heading, image in images
            ]
        )
    return _encoded(rows, title)


def _grey(picture: Array) -> NDArray[np.uint8]:
    """``(rows, columns)``, 0 to 1 -> ``(rows, columns, 3)``."""
    return np.repeat(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def _with_grid(under: Array, covered: Array) -> NDArray[np.uint8]:
    """The grid's lines over a pale image."""
    pale = 255 - _DIMMED * (255 - _grey(under).astype(np.float32))
    share = np.asarray(covered, np.float32)[..., None]
    return np.rint(pale * (1 - share) + _GRID_COLOUR * share).astype(np.uint8)


def _encoded(rows: list[list[tuple[str, NDArray[np.uint8]]]], title: str) -> bytes:
    heights = [max(picture.shape[0] for _, picture in row) + _HEAD for row in rows]
    widths = [max(row[column][1].shape[1] for row in rows) for column in range(len(rows[0]))]
    size = sum(widths) + _GAP * (len(widths) + 1), _TITLE + sum(heights) + _GAP * (len(heights) + 1)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    draw.text((size[0] // 2, _TITLE // 2), _plain(title), fill="black", font=font, anchor="mm")
    top = _TITLE
    for row, height in zip(rows, heights, strict=True):
        left = _GAP
        for (heading, picture), width in zip(row, widths, strict=True):
            corner = left + (width - picture.shape[1]) // 2, top + _HEAD + (height - _HEAD - picture.shape[0]) // 2
            sheet.paste(Image.fromarray(picture), corner)
            draw.text((left + width // 2, top + _HEAD // 2), heading, fill="black", font=font, anchor="mm")
            left += width + _GAP
        top += height + _GAP
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _plain(text: str) -> str:
    """Text in the letters that Pillow's own font has under all its versions."""
    return text.encode("latin-1", "replace").decode("latin-1")
