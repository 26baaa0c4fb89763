"""The trained members that register scans, loaded once and used for any number of pairs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.io.bounded import recorded_checksums
from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.network.precision import turn_tf32_off
from sitreg_lumir.network.shipped import default_members, member_files
from sitreg_lumir.network.sitreg import Stage, Update
from sitreg_lumir.network.weights import Member, ModelCard, load_members

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class Model:
    """One network or an ensemble.

    Attributes:
        members: of one architecture and geometry, on ``device``.
        files: that the members were loaded from.
        checksums: name and SHA-256 of each file.
        device: that the members run on.
        precision: of the convolutions, ``float32`` or ``bfloat16``.
        flip: whether the members also run on mirrored images, and all are averaged.
        allow_imports: as it was given to :func:`load_model`.

    Examples:
        >>> model = sitreg_lumir.load_model(device="cpu")
        >>> model.shape, model.spacing, len(model.members)
        ((80, 112, 96), 2.0, 4)
    """

    members: tuple[Member, ...]
    files: tuple[Path, ...]
    checksums: tuple[dict[str, str], ...]
    device: torch.device
    precision: str = "float32"
    flip: bool = False
    allow_imports: bool | str | Sequence[str] = ()

    @property
    def card(self) -> ModelCard:
        """The card of the first member; grid, input and architecture are equal for all."""
        return self.members[0].card

    @property
    def ensemble(self) -> Ensemble:
        """The members' networks, with ``flip`` their mirrored twins, too, and what they see of an image."""
        return Ensemble.of(self.members, self.flip)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(X, Y, Z)`` of the members' grid."""
        x, y, z = self.card.shape
        return x, y, z

    @property
    def affine(self) -> NDArray[np.float64]:
        """``(4, 4)`` voxel-to-world matrix of that grid, RAS, mm."""
        return np.asarray(self.card.affine, dtype=np.float64)

    @property
    def spacing(self) -> float:
        """Voxel size of that grid, mm, mean over the axes."""
        return float(spacing_of(self.affine).mean())

    def __str__(self) -> str:
        count = f"{len(self.members)} members" if len(self.members) > 1 else self.files[0].name
        x, y, z = self.shape
        return f"{count}{' and mirrored' if self.flip else ''}, {x} x {y} x {z} at {self.spacing:g} mm"

    def __repr__(self) -> str:
        return f"Model({self}, {self.device}, {self.precision})"

    def run(self, *, fixed: Tensor, moving: Tensor, levels: Sequence[int] = (0,)) -> list[Stage]:
        """The stages of :func:`~sitreg_lumir.network.sitreg.run_stages`, fields both ways, without gradients.

        Args:
            fixed: ``(B, 1, X, Y, Z)``, intensity in [0, 1], on the model's grid.
            moving: ``(B, 1, X, Y, Z)``, intensity in [0, 1], on the model's grid.
            levels: of the stages whose fields are returned.
        """
        with torch.inference_mode(), self._autocast():
            return self.ensemble.run(fixed=fixed.to(self.device), moving=moving.to(self.device), levels=levels)

    def control_points(self, *, fixed: Tensor, moving: Tensor) -> list[Update]:
        """The control points of all stages, coarsest first, without gradients and without the fields of :meth:`run`.

        Args:
            fixed: ``(B, 1, X, Y, Z)``, intensity in [0, 1], on the model's grid.
            moving: ``(B, 1, X, Y, Z)``, intensity in [0, 1], on the model's grid.
        """
        with torch.inference_mode(), self._autocast():
            return self.ensemble.control_points(fixed=fixed.to(self.device), moving=moving.to(self.device))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def load_model(
    paths: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str = "auto",
    precision: str = "float32",
    flip: bool = False,
    allow_imports: bool | str | Sequence[str] = (),
) -> Model:
    """Loads members once, to register any number of pairs.

    Args:
        paths: ``.safetensors`` or ``.ckpt`` files, or folders of them; several are an ensemble. By default what
            ``SITREG_LUMIR_WEIGHTS`` names, else those that come with the package.
        device: ``auto``, ``cpu``, or ``gpu`` (also ``cuda``, ``cuda:1``).
        precision: of the convolutions: ``float32`` or ``bfloat16``.
        flip: also run the members on mirrored images, and average: exactly left-right symmetric, twice the time.
        allow_imports: see :func:`~sitreg_lumir.network.weights.load_member`.

    Raises:
        InputError: a file is missing or damaged, members do not go together, or there is no such device.

    Examples:
        >>> sitreg_lumir.load_model(device="cpu")
        Model(4 members, 80 x 112 x 96 at 2 mm, cpu, float32)
    """
    if precision not in PRECISIONS:
        raise InputError(f"`precision` must be float32 or bfloat16, got {precision}")
    if paths is None:
        files = default_members()
    else:
        files = member_files([paths] if isinstance(paths, str | os.PathLike) else paths)
    turn_tf32_off()
    target = _device(device)
    with recorded_checksums() as read:
        members = tuple(member.to(target) for member in load_members(files, allow_imports))
    checksums = tuple({"name": file.name, "sha256": read[os.path.abspath(file)]} for file in files)
    model = Model(members, tuple(files), checksums, target, precision, flip, allow_imports)
    _ = model.ensemble  # refuses what cannot be mirrored
    return model


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    wanted = "cuda" if name == "gpu" else name
    if wanted != "cpu" and not (wanted.startswith("cuda") and available):
        raise InputError(f"`device` {name}: there is no such device; use cpu")
    try:
        return torch.device(wanted)
    except RuntimeError:
        raise InputError(f"`device` must be auto, cpu or gpu, got {name}") from None


def as_tensor(volume: NDArray[Any]) -> Tensor:
    """``(X, Y, Z)`` stored values 0..255 -> ``(1, 1, X, Y, Z)``, float32, intensity in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None, None] / 255
