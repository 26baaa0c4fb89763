"""Pictures of the same pairs, slices and intensity windows every few epochs: what the network can do by now."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.groups import ordered
from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lightning_internals import datamodule_of
from sitreg_lumir.deform.ops import warp
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.report.pictures import Plane, Volumes, render
from sitreg_lumir.train.registration import RegistrationModule

COLUMNS = ("fixed", "moving", "warped", "checkerboard", "grid")
MAX_BYTES = 1_000_000  # of one picture
_MOST_PAIRS = 3
_TILE = 224  # pixels of the longest side of a slice, about
_SLICES = 3  # of each plane, of which the middle one is shown
_FIELDS = 8  # of the checkerboard, along the longer side
_TITLE = 16  # pixels above each pair
_DIM = 0.45  # of the image below the grid

Picture = Image.Image


class ShownPair(NamedTuple):
    """A pair whose registration is shown: stored intensities ``(X, Y, Z)``, as many volumes as there are pairs."""

    title: str
    fixed: NDArray[np.uint8] | NDArray[np.float32]
    moving: NDArray[np.uint8] | NDArray[np.float32]


class Panels(Callback):
    """Draws ``panels/epoch-000.png`` after the first epoch, every few epochs, and after the last one.

    Shown are the first validation pair of each group (of each contrasts where no groups are named); without
    validation pairs, the first two training images. Each row is the middle slice of a plane: fixed, moving, warped
    moving image, a checkerboard of fixed and warped, and the moving image's grid as the deformation moves it.
    Nothing random is drawn and the module is left as it was, so that a training goes the same way with and without
    pictures.

    Args:
        folder: the run folder.
        every_n_epochs: between two pictures.
        to_wandb: also into the W&B run.
    """

    def __init__(self, folder: Path, every_n_epochs: int, to_wandb: bool) -> None:
        if every_n_epochs < 1:
            raise InputError(f"panels must be at least 1 epoch apart, got {every_n_epochs}")
        self.folder = folder / "panels"
        self.every_n_epochs = every_n_epochs
        self.to_wandb = to_wandb
        self.pairs: list[ShownPair] = []
        self.voxel_size = (1.0, 1.0, 1.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the volumes once: later the files may be out of reach."""
        data = datamodule_of(trainer)
        if trainer.is_global_zero and isinstance(data, LumirDataModule):
            self.pairs = [read_pair(pair) for pair in choose_pairs(data)]
            x, y, z = voxel_sizes(data.affine).tolist()
            self.voxel_size = (x, y, z)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the panels when an epoch is due."""
        epoch = trainer.current_epoch
        due = epoch % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs
        if not due or not self.pairs or not isinstance(pl_module, RegistrationModule):
            return
        with trainer.precision_plugin.forward_context():
            shown = [(pair.title, register(pl_module, pair, self.voxel_size)) for pair in self.pairs]
        file = self.folder / f"epoch-{epoch:03d}.png"
        write_picture(file, draw(shown))
        step = max(trainer.global_step - 1, 0)  # that of the epoch's scores
        for logger in trainer.loggers if self.to_wandb else ():
            if isinstance(logger, WandbLogger):
                logger.log_image("panels", [str(file)], step, caption=[f"epoch {epoch}"])


def choose_pairs(data: LumirDataModule) -> list[Pair]:
    """The first pair of each group, or the first two training images where there are no pairs."""
    if not data.pairs:
        fixed, moving = data.dataset.training[:2]
        return [Pair(fixed, moving, "training")]
    first = {pair.group: pair for pair in reversed(data.pairs)}
    pairs = [first[group] for group in ordered(first)]
    again = [pair for i, pair in enumerate(pairs) if pair.contrasts in {earlier.contrasts for earlier in pairs[:i]}]
    chosen = [*(pair for pair in pairs if pair not in again), *again][:_MOST_PAIRS]  # no contrasts are left out
    return [pair for pair in pairs if pair in chosen]


def read_pair(pair: Pair) -> ShownPair:
    """A pair's volumes, as they are stored.

    Raises:
        InputError: a file cannot be read.
    """
    fixed, moving = (read_volume(image.path)[0] for image in (pair.fixed, pair.moving))
    return ShownPair(f"{pair.group}  {pair.long_name}", fixed, moving)


def register(module: RegistrationModule, pair: ShownPair, voxel_size: tuple[float, float, float]) -> Volumes:
    """Registers a pair by a module in training, which is left as it was; voxel sizes in mm."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            fixed, moving = (
                module.clean(torch.from_numpy(volume)[None, None].to(module.device))[0]
                for volume in (pair.fixed, pair.moving)
            )
            disp = module.disp(fixed=fixed, moving=moving)
            warped = warp(moving, disp)
    finally:
        module.train(training)
    return Volumes(
        fixed=fixed[0, 0].float().cpu().numpy(),
        moving=moving[0, 0].float().cpu().numpy(),
        warped=warped[0, 0].float().cpu().numpy(),
        disp=disp[0].float().cpu().numpy(),
        voxel_size=voxel_size,
    )


def draw(shown: Sequence[tuple[str, Volumes]]) -> Picture:
    """One picture of all pairs: below each title a row for each plane, with ``COLUMNS``."""
    blocks = [_block(title, render(volumes, _SLICES)[0]) for title, volumes in shown]
    return _stack(blocks)


def write_picture(file: Path, picture: Picture) -> None:
    """Writes a PNG of at most ``MAX_BYTES``, with as many colours as that allows; it appears whole or not at all."""
    content = b""
    for colours in (128, 16, 4):
        stream = io.BytesIO()
        picture.quantize(colours).save(stream, "PNG", optimize=True)
        content = stream.getvalue()
        if len(content) <= MAX_BYTES:
            break
    with writing(file) as temporary:
        temporary.write_bytes(content)


def _block(title: str, planes: Sequence[Plane]) -> Picture:
    """The rows of one pair, with its title and the columns' names above."""
    factor = max(1, _TILE // max(max(plane.size) for plane in planes))
    width = factor * max(plane.size[0] for plane in planes)
    head = Image.new("RGB", (len(COLUMNS) * width, 2 * _TITLE))
    pen = ImageDraw.Draw(head)
    pen.text((2, 2), title, fill=(255, 255, 255))
    for column, name in enumerate(COLUMNS):
        pen.text((column * width + 2, _TITLE + 2), name, fill=(160, 160, 160))
    return _stack([head, *(_row(plane, factor, width) for plane in planes)])


def _row(plane: Plane, factor: int, width: int) -> Picture:
    """``COLUMNS``, ``width`` pixels each, of one plane's middle slice, ``factor`` times as large as it was rendered."""
    size = (plane.size[0] * factor, plane.size[1] * factor)
    images = {
        key: _decode(plane.layers[key][plane.start]).convert("L").resize(size) for key in ("fixed", "moving", "warped")
    }
    lines = _decode(plane.layers["grid"][plane.start]).convert("RGBA").resize(size, Image.Resampling.BOX)
    grid = images["warped"].point(lambda value: value * _DIM).convert("RGB")
    grid.paste(lines, mask=lines)
    board = Image.composite(images["fixed"], images["warped"], _board(size))
    tiles = [*images.values(), board, grid]
    row = Image.new("RGB", (len(tiles) * width, size[1]))
    for column, tile in enumerate(tiles):
        row.paste(tile, (column * width + (width - size[0]) // 2, 0))
    return row


def _board(size: tuple[int, int]) -> Picture:
    """The fields of a checkerboard, white where the fixed image shows."""
    step = max(1, max(size) // _FIELDS)
    across, down = np.arange(size[0]) // step, np.arange(size[1]) // step
    return Image.fromarray(((across[None, :] + down[:, None]) % 2 == 0).astype(np.uint8) * 255)


def _stack(pictures: Sequence[Picture]) -> Picture:
    """Pictures below each other, the background black."""
    stacked = Image.new(
        "RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures))
    )
    top = 0
    for picture in pictures:
        stacked.paste(picture, (0, top))
        top += picture.height
    return stacked


def _decode(uri: str) -> Picture:
    """The picture in a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
