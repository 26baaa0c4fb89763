"""Trained members on disk: Lightning checkpoints in, safetensors + JSON in and out.

A member never travels without its card: the grid it knows, what intensities mean, how MIND is computed, its
architecture and where it comes from. Loading refuses a file without one.
"""

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import SITReg

CARD_KEY = "sitreg_lumir"  # where a Lightning checkpoint keeps the card
INTENSITY_RULE = "stored 0..255 -> stored / 255; mask = stored > 0; 0 outside the mask"


@dataclass(frozen=True)
class ModelCard:
    """What must be known to use a member; plain values only.

    Attributes:
        architecture: constructor arguments of :class:`SITReg`.
        mind: constructor arguments of :class:`Mind`, or None for raw intensities.
        shape: of the grid the member was trained on.
        affine: 4x4, voxel to world (RAS, mm) of that grid.
        intensity: what stored values mean.
        training: data set, seed, epochs, steps: whatever is known.
        licence: of the weights.
        version: of this package when it was written.
    """

    architecture: dict[str, Any]
    mind: dict[str, Any] | None
    shape: list[int]
    affine: list[list[float]]
    intensity: str = INTENSITY_RULE
    training: dict[str, Any] = field(default_factory=dict)
    licence: str = "unknown"
    version: str = "unknown"

    @property
    def diffusion_weight(self) -> float:
        """Of the fields' smoothness at the end of the training; the published 1 where the card does not say."""
        weight = self.training.get("diffusion_weight", 1.0)
        return float(weight) if isinstance(weight, int | float) else 1.0

    def input_contract(self) -> dict[str, Any]:
        """What members of one ensemble must share."""
        return {key: getattr(self, key) for key in ("architecture", "mind", "shape", "affine", "intensity")}

    @classmethod
    def from_dict(cls, values: Any, path: Path) -> "ModelCard":
        """Checks that all that is needed is there.

        Raises:
            InputError: not a card.
        """
        required = {"architecture", "mind", "shape", "affine", "intensity"}
        if not isinstance(values, dict) or not required <= values.keys():
            raise InputError(
                f"{path}: holds no model card (geometry, intensity rule, architecture); "
                "write the member again with `sitreg-lumir export`"
            )
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


class Member(nn.Module):
    """A trained network with its input transform and its card."""

    def __init__(self, network: SITReg, card: ModelCard) -> None:
        super().__init__()
        self.network = network
        self.card = card
        self.mind = None if card.mind is None else Mind(**card.mind)

    def inputs(self, image: Tensor) -> Tensor:
        """The network's input from an image ``(B, 1, X, Y, Z)`` with intensity in [0, 1]."""
        if self.mind is None:
            return image
        features: Tensor = self.mind(image)
        return features


def load_member(path: str | Path) -> Member:
    """A member from a Lightning checkpoint (``.ckpt``) or from ``.safetensors`` with its JSON beside it.

    Returns:
        the member in evaluation mode, float32, on the CPU.

    Raises:
        InputError: missing, truncated, without card, or of another architecture than its card says.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a .ckpt or .safetensors file, or a folder that holds them")
    if path.suffix == ".ckpt":
        card, state = _read_checkpoint(path)
    elif path.suffix == ".safetensors":
        card, state = _read_safetensors(path)
    else:
        raise InputError(f"{path}: not a model; expected .ckpt or .safetensors")
    try:
        network = SITReg(**card.architecture)
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        member = Member(network, card)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: the weights do not fit the card: {reason}") from None
    return member.eval()


def load_members(paths: Sequence[str | Path]) -> list[Member]:
    """Members of one ensemble; a folder stands for all ``.safetensors``, else all ``.ckpt`` files in it.

    Raises:
        InputError: nothing found, or the members differ in architecture, geometry or input transform.
    """
    files = member_files(paths)
    members = [load_member(file) for file in files]
    first = members[0].card.input_contract()
    for file, member in zip(files[1:], members[1:], strict=True):
        for key, value in member.card.input_contract().items():
            if value != first[key]:
                raise InputError(
                    f"{file}: {key} is {value}, but {files[0]} has {first[key]}; members of one ensemble must agree"
                )
    return members


def member_files(paths: Sequence[str | Path]) -> list[Path]:
    """The member files that ``paths`` (files and folders) stand for, in order.

    Raises:
        InputError: a path is missing, or a folder holds no member.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.ckpt"))
            if not found:
                raise InputError(f"{path}: the folder holds no .safetensors or .ckpt file")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path}: no such file or folder; name trained members (.ckpt or .safetensors)")
    if not files:
        raise InputError("no member given; name one or more .ckpt or .safetensors files")
    return files


def save_member(path: str | Path, network: SITReg, card: ModelCard, dtype: torch.dtype = torch.float32) -> None:
    """Writes ``path`` (``.safetensors``) and its card (``.json``), each atomically.

    The card holds the weights' SHA-256, so that a pair of files that do not belong together is refused.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the name of a member must end in .safetensors")
    tensors = {name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in network.state_dict().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        text = json.dumps({"format": 1, **asdict(card), "sha256": sha256(partial.read_bytes()).hexdigest()}, indent=1)
        card_partial = partial.with_suffix(".json")
        card_partial.write_text(text + "\n")
        partial.chmod(card_partial.stat().st_mode & 0o777)  # safetensors lets nobody else read it
        os.replace(partial, path)
        os.replace(card_partial, path.with_suffix(".json"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    finally:
        partial.unlink(missing_ok=True)


def _read_safetensors(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise InputError(f"{path}: its card {card_path.name} is missing beside it")
    try:
        values = json.loads(card_path.read_text())
    except ValueError as error:
        raise InputError(f"{card_path}: not valid JSON ({error})") from None
    card = ModelCard.from_dict(values, card_path)
    stored = values.get("sha256")
    if stored is not None and stored != sha256(path.read_bytes()).hexdigest():
        raise InputError(f"{path}: its SHA-256 is not the one in {card_path.name}; copy both files again")
    try:
        return card, load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({error})") from None


def _read_checkpoint(path: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    checkpoint = read_checkpoint(path)
    card = ModelCard.from_dict(checkpoint.get(CARD_KEY), path)
    prefix = "network."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    return card, state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint, on the CPU; only tensors and plain values are accepted.

    Raises:
        InputError: missing, truncated, or not a checkpoint.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: truncated, or not a checkpoint; use an earlier one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: cannot be read as a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"{path}: not a Lightning checkpoint (no state_dict)")
    return checkpoint
