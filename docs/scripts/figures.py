"""Draws the figures of the documentation from the package itself: `python docs/scripts/figures.py`, minutes.

The files in docs/images are kept in the repository, so that building the site needs no trained members.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
from exact_map_figure import draw_exact_map

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from sitreg_lumir import (
    Augmentation,
    GroupConsistency,
    Mind,
    NdvPenalty,
    clean_view,
    load_model,
    make_demo_data,
    read_volume,
    warp,
)
from sitreg_lumir.deform.bspline import control_point_bound, cubic_bspline

IMAGES = Path(__file__).parents[1] / "images"
SHAPE, VOXEL = (80, 112, 96), 2.0
BLUE = "tab:blue"
mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "sitreg-lumir", "svg.fonttype": "path", "savefig.dpi": 110})


def save(figure: plt.Figure, name: str) -> None:
    """Writes a figure without the date, so that equal figures are equal files."""
    metadata = {"Date": None} if name.endswith(".svg") else {"Software": None}
    figure.savefig(IMAGES / name, metadata=metadata)
    plt.close(figure)
    print(IMAGES / name)


def brains() -> tuple[Tensor, Tensor, Tensor]:
    """T1 of one anatomy, T1 and T2 of another, ``(1, 1, X, Y, Z)``, intensity in [0, 1], rendered at 2 mm."""
    with TemporaryDirectory() as folder:
        images = make_demo_data(folder, shape=SHAPE, voxel_size=VOXEL, training=2, validation=2).parent / "imagesVal"
        names = ("0100_0000", "0101_0000", "0101_0001")
        stored = [read_volume(images / f"LUMIRMRI_{name}.nii.gz")[0] for name in names]
    fixed, moving_t1, moving_t2 = (clean_view(torch.from_numpy(volume)[None, None])[0] for volume in stored)
    return fixed, moving_t1, moving_t2


def show(axes: Axes, volume: Tensor, title: str) -> None:
    """The middle axial slice of ``(X, Y, Z)``."""
    axes.imshow(volume[:, :, volume.shape[2] // 2].T.numpy(), cmap="gray", origin="lower")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_views(t1: Tensor, t2: Tensor) -> None:
    """What the network sees: the same anatomy in two contrasts, an augmented view, and MIND of each."""
    mind, mask = Mind(), t1 > 0
    augmented = Augmentation(inversion_probability=1.0, noise_probability=1.0)(t1, mask, torch.tensor([4]))
    figure, rows = plt.subplots(3, 4, figsize=(8, 7.4), layout="constrained")
    named = zip(
        rows, (t1, augmented, t2), ("T1, clean view", "T1, augmented view", "T2, never trained on"), strict=True
    )
    for row, image, name in named:
        show(row[0], image[0, 0], name)
        for axes, channel, direction in zip(row[1:], (1, 3, 5), ("right", "front", "up"), strict=True):
            show(axes, mind(image)[0, channel] * (image[0, 0] != 0), f"MIND, {direction}")
    save(figure, "views.png")


def deformed_grid(axes: Axes, disp: Tensor, image: Tensor) -> None:
    """Every fourth grid line of ``x + disp(x)`` over the middle slice."""
    middle = image.shape[2] // 2
    show(axes, image, "")
    x, y = np.meshgrid(np.arange(image.shape[0]), np.arange(image.shape[1]), indexing="ij")
    x, y = x + disp[0, :, :, middle].numpy(), y + disp[1, :, :, middle].numpy()
    axes.plot(x[::4].T, y[::4].T, color="gold", linewidth=0.5)
    axes.plot(x[:, ::4], y[:, ::4], color="gold", linewidth=0.5)
    axes.set(xlim=(0, image.shape[0] - 1), ylim=(0, image.shape[1] - 1))


def draw_stages(fixed: Tensor, moving: Tensor) -> None:
    """The shipped members from coarse to fine: the field after every stage, and the moving image warped by it."""
    stages = load_model().run(fixed=fixed, moving=moving, levels=range(4))
    figure, rows = plt.subplots(2, 6, figsize=(10, 4.9), layout="constrained")
    show(rows[0, 0], moving[0, 0], "moving, T2")
    rows[1, 0].set_axis_off()
    for column, stage in enumerate(stages, start=1):
        warped = warp(moving, stage.disp.float())[0, 0]
        spacing = int(VOXEL * 2**stage.level)
        show(rows[0, column], warped, f"after stage {column}")
        deformed_grid(rows[1, column], stage.disp[0].float(), warped)
        rows[1, column].set_title(f"control points every {spacing} mm", fontsize=8)
    show(rows[0, 5], fixed[0, 0], "fixed, T1")
    rows[1, 5].set_axis_off()
    save(figure, "stages.png")


def draw_bound() -> None:
    """One update in one dimension: control points within the bound can be inverted, larger ones fold."""
    bound = control_point_bound((8,))
    positions, knots = np.linspace(0, 64, 641), np.arange(-2, 12)
    signs = np.where(knots % 2 == 0, 1.0, -1.0)
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
    for axes, share, title in ((panels[0], 0.99, "0.99 of the bound"), (panels[1], 4.0, "4 times the bound: it folds")):
        points = share * bound * signs
        at = (positions + 0.5) / 8 - 0.5
        update = 8 * (cubic_bspline(at[:, None] - knots) * points).sum(1)
        mapped = positions + update
        axes.plot(positions, positions, color="gray", linewidth=0.8, linestyle="--", label="identity")
        axes.plot(positions, mapped, color=BLUE, label="x + u(x)")
        folds = np.gradient(mapped) <= 0
        axes.plot(positions[folds], mapped[folds], ".", color="tab:red", markersize=3)
        axes.set(title=title, xlabel="x, voxels", aspect="equal", xlim=(0, 64), ylim=(-4, 68))
    panels[0].set_ylabel("x + u(x), voxels")
    panels[0].legend(frameon=False)
    save(figure, "bound.svg")


def draw_schedule() -> None:
    """The published schedule: learning rate and the weights of the final epochs' terms."""
    epochs = np.linspace(0, 45, 901)[:-1]
    ndv, group = NdvPenalty(), GroupConsistency()
    curves = {
        "learning rate": [4e-4 if epoch < group.start_epoch else group.learning_rate for epoch in epochs],
        "weight of NDV": [ndv.weight_at(epoch, 0) for epoch in epochs],
        "weight of group consistency": [group.weight_at(epoch, 0) for epoch in epochs],
    }
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
    for axes, (name, values) in zip(panels, curves.items(), strict=True):
        axes.plot(epochs, values, color=BLUE)
        axes.axvspan(group.start_epoch, 45, color="tab:green", alpha=0.12)
        axes.set(title=name, xlabel="epoch", xlim=(0, 45), ylim=(0, None))
        axes.ticklabel_format(axis="y", scilimits=(-3, 3))
    panels[0].text(37.5, 2e-4, "triplets", ha="center", color="tab:green")
    panels[0].text(15, 2e-4, "pairs", ha="center", color="gray")
    save(figure, "schedule.svg")


def box(
    axes: Axes, x: float, y: float, text: str, width: float = 1.7, height: float = 0.62, colour: str = "0.93"
) -> None:
    """A labelled box, centred."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="0.3"))
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "0.3") -> None:
    """An arrow between two places."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0})


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """Empty axes in units of boxes."""
    figure, axes = plt.subplots(figsize=(width * 0.74, height * 0.74), layout="constrained")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.set_axis_off()
    return figure, axes


def draw_loop() -> None:
    """The network: one stage of the loop, and what it goes on with."""
    figure, axes = canvas(11, 5.2)
    blue, orange = "#cfe2f3", "#fde3c8"
    box(axes, 1, 4.5, "moving image", colour=orange)
    box(axes, 1, 0.7, "fixed image", colour=blue)
    box(axes, 3.1, 4.5, "MIND, encoder", colour=orange)
    box(axes, 3.1, 0.7, "MIND, encoder", colour=blue)
    axes.text(3.1, 2.6, "one encoder,\nshared weights", ha="center", va="center", fontsize=8, color="0.4")
    box(axes, 5.4, 4.5, "features at level k,\nwarped to the middle", 2.1, colour=orange)
    box(axes, 5.4, 0.7, "features at level k,\nwarped to the middle", 2.1, colour=blue)
    box(axes, 7.6, 2.6, "head k, in both orders:\nbounded control points", 2.3, 0.8, "#e2efda")
    box(axes, 9.95, 3.6, "update of the\nmoving side, a", 1.8, colour=orange)
    box(axes, 9.95, 1.6, "update of the\nfixed side, b", 1.8, colour=blue)
    for y in (4.5, 0.7):
        arrow(axes, (1.87, y), (2.23, y))
        arrow(axes, (3.97, y), (4.33, y))
    arrow(axes, (6.2, 4.15), (7.1, 3.05))
    arrow(axes, (6.2, 1.05), (7.1, 2.15))
    arrow(axes, (8.5, 3.02), (9.0, 3.4))
    arrow(axes, (8.5, 2.18), (9.0, 1.8))
    for y, start in ((4.5, 3.95), (0.7, 1.25)):
        axes.plot([9.95, 9.95], [start, y], color="0.3", linewidth=1.2)
        arrow(axes, (9.95, y), (6.5, y))
    text = "next level: composed into the maps"
    axes.text(8.25, 4.72, text, ha="center", va="center", fontsize=7)
    axes.text(8.25, 0.48, text, ha="center", va="center", fontsize=7)
    axes.set_ylim(-0.1, 5.3)
    save(figure, "loop.svg")


def draw_worlds() -> None:
    """From the fixed to the moving scan: two alignments with the deformation between them."""
    figure, axes = canvas(11, 2.6)
    places = (
        (1.1, "fixed voxel", "#cfe2f3"),
        (3.5, "fixed world\nRAS, mm", "#cfe2f3"),
        (6.0, "model's world\nMNI152, mm", "#e2efda"),
        (8.4, "moving world\nRAS, mm", "#fde3c8"),
        (10.1, "moving\nvoxel", "#fde3c8"),
    )
    for x, text, colour in places:
        box(axes, x, 1.2, text, 1.1 if x > 10 else 1.7, 0.8, colour)
    labels = (
        (2.3, "header"),
        (4.7, "alignment\nof the fixed"),
        (7.2, "alignment of the\nmoving, inverse"),
        (9.4, "header"),
    )
    for x, text in labels:
        axes.text(x, 1.95, text, ha="center", va="center", fontsize=7)
    for start, end in ((1.97, 2.63), (4.37, 5.13), (6.87, 7.53), (9.27, 9.53)):
        arrow(axes, (start, 1.2), (end, 1.2))
    axes.annotate(
        "",
        (6.5, 0.75),
        (5.5, 0.75),
        arrowprops={"arrowstyle": "-|>", "color": "0.3", "connectionstyle": "arc3,rad=0.9"},
    )
    axes.text(6.0, 0.1, "deformation, on the model's grid", ha="center", fontsize=7)
    save(figure, "worlds.svg")


def main() -> None:
    """All figures."""
    torch.manual_seed(0)
    IMAGES.mkdir(exist_ok=True)
    draw_loop()
    draw_worlds()
    draw_bound()
    draw_schedule()
    fixed, moving_t1, moving_t2 = brains()
    draw_views(moving_t1, moving_t2)
    draw_stages(fixed, moving_t2)
    draw_exact_map(fixed, moving_t2, IMAGES / "exact-map.png")


if __name__ == "__main__":
    main()
