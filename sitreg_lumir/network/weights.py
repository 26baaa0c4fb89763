"""Trained members on disk: Lightning checkpoints in, safetensors + JSON in and out.

A member never travels without its card: the grid it knows, what intensities mean, how MIND is computed, its
architecture and where it comes from. Loading refuses a file without one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing_together
from sitreg_lumir.io.bounded import read_bytes
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.network.archive import DamagedArchiveError, load_archive
from sitreg_lumir.network.card import CARD_KEY as CARD_KEY
from sitreg_lumir.network.card import ModelCard as ModelCard
from sitreg_lumir.network.input_transform import STATE_PREFIX, channels_of, make
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.shipped import member_files
from sitreg_lumir.network.sitreg import SITReg, shapes_of

_LARGEST = 1 << 36  # bytes


class Member(nn.Module):
    """A trained network with its input transform and its card.

    Args:
        network: with its weights.
        card: what the network needs to know.
        transform_state: parameters and buffers of the input transform, if it has any.
        allow_imports: modules from which the card may name an input transform, besides this package.

    Raises:
        InputError: the input transform may not be imported, or is not there.
        ValueError: it gives another number of channels than the network takes.
    """

    def __init__(
        self,
        network: SITReg,
        card: ModelCard,
        transform_state: dict[str, Tensor] | None = None,
        allow_imports: bool | str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.card = card
        self.input_transform = make(card.input_transform, transform_state or {}, allow_imports)
        channels, wanted = channels_of(self.input_transform), network.architecture["in_channels"]
        if channels != wanted:
            name = (
                "raw intensities have"
                if card.input_transform is None
                else f"{card.input_transform['class_path']} gives"
            )
            raise ValueError(f"{name} {channels} channel(s), but the network takes in_channels={wanted}")

    @property
    def mind(self) -> Mind | None:
        """The input transform, if it is MIND."""
        return self.input_transform if type(self.input_transform) is Mind else None


@dataclass(frozen=True, eq=False)
class StoredMember:
    """What a file holds of a member: nothing is imported yet.

    Attributes:
        path: of the file.
        card: what the member needs to know.
        network: parameters of the network.
        transform: parameters and buffers of the input transform.
    """

    path: Path
    card: ModelCard
    network: dict[str, Tensor]
    transform: dict[str, Tensor]

    def build_network(self) -> SITReg:
        """The network with its weights, float32, on the CPU.

        Raises:
            InputError: the weights do not fit the card.
        """
        check_finite(self.network, self.path)
        try:
            wanted = shapes_of(**self.card.architecture)
            stored = {name: tensor.shape for name, tensor in self.network.items()}
            differing = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
            if differing:
                name = differing[0]
                shapes = (None if shape is None else tuple(shape) for shape in (stored.get(name), wanted.get(name)))
                raise ValueError("{} is {}, the card wants {}".format(name[:80], *shapes))
            if not all(tensor.is_floating_point() for tensor in self.network.values()):
                raise ValueError("they are no floating-point numbers")
            network = SITReg(**self.card.architecture)
            network.load_state_dict({name: tensor.float() for name, tensor in self.network.items()})
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._misfit(error) from None
        return network

    def build(self, allow_imports: bool | str | Sequence[str] = ()) -> Member:
        """The member in evaluation mode, float32, on the CPU.

        Raises:
            InputError: the weights do not fit the card, or its input transform cannot be made.
        """
        network = self.build_network()
        try:
            return Member(network, self.card, self.transform, allow_imports).eval()
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._misfit(error) from None

    def _misfit(self, error: Exception) -> InputError:
        return InputError(f"{self.path}: the weights do not fit the card: {' '.join(str(error).split())[:200]}")


def load_member(path: str | Path, allow_imports: bool | str | Sequence[str] = ()) -> Member:
    """A member from a Lightning checkpoint (``.ckpt``) or from ``.safetensors`` with its JSON beside it.

    Args:
        path: of the file.
        allow_imports: modules from which the card may name an input transform, besides this package: importing runs
            their code. True allows any; ``SITREG_LUMIR_ALLOW_IMPORTS`` names more.

    Returns:
        the member in evaluation mode, float32, on the CPU.

    Raises:
        InputError: missing, truncated, without card, of another architecture than its card says, or with an input
            transform that is not allowed or not there.
    """
    return read_member(path).build(allow_imports)


def read_member(path: str | Path) -> StoredMember:
    """What a file holds of a member; imports nothing that the card names.

    Raises:
        InputError: missing, truncated, or without card.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a .ckpt or .safetensors file, or a folder that holds them")
    if path.suffix == ".ckpt":
        return _read_checkpoint(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise InputError(
        f"{path}: not a model; expected .ckpt or .safetensors (a file of the authors' code: `export --official` first)"
    )


def load_members(paths: Sequence[str | Path], allow_imports: bool | str | Sequence[str] = ()) -> list[Member]:
    """Members of one ensemble; a folder stands for all ``.safetensors``, else all ``.ckpt`` files in it.

    Args:
        paths: files and folders.
        allow_imports: see :func:`load_member`.

    Raises:
        InputError: nothing found, or the members differ in architecture, geometry or input transform.
    """
    stored = [read_member(file) for file in member_files(paths)]
    first = stored[0]
    contract = first.card.input_contract()
    for member in stored[1:]:
        for key, value in member.card.input_contract().items():
            if value != contract[key]:
                raise InputError(
                    f"{member.path}: {key} is {value}, but {first.path} has {contract[key]}; "
                    "members of one ensemble must agree"
                )
        same = first.transform.keys() == member.transform.keys() and all(
            torch.equal(tensor, member.transform[name]) for name, tensor in first.transform.items()
        )
        if not same:
            raise InputError(
                f"{member.path}: its input transform has learned other values than that of {first.path}; "
                "members of one ensemble see the same input"
            )
    return [member.build(allow_imports) for member in stored]


def save_member(
    path: str | Path,
    network: SITReg,
    card: ModelCard,
    dtype: torch.dtype = torch.float32,
    input_transform: nn.Module | None = None,
) -> None:
    """Writes ``path`` (``.safetensors``) and its card (``.json``), both or neither.

    The card holds the weights' SHA-256, so that a pair of files that do not belong together is refused.

    Args:
        path: ends in ``.safetensors``.
        network: with its weights.
        card: what the network needs to know.
        dtype: of the network's weights in the file.
        input_transform: the one that the card names, for its parameters and buffers, if it has any.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the name of a member must end in .safetensors")
    tensors = {name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in network.state_dict().items()}
    for name, tensor in ({} if input_transform is None else input_transform.state_dict()).items():
        tensors[STATE_PREFIX + name] = tensor.detach().clone().contiguous().cpu()
    with writing_together(path, path.with_suffix(".json")) as (file, card_file):
        try:
            save_file(tensors, file)
        except SafetensorError as error:  # which says so of a full disk
            raise OSError(str(error)) from error
        text = json.dumps({"format": 1, **card.to_dict(), "sha256": sha256(file.read_bytes()).hexdigest()}, indent=1)
        card_file.write_text(text + "\n")
        file.chmod(card_file.stat().st_mode & 0o777)  # safetensors lets nobody else read it


def _read_safetensors(path: Path) -> StoredMember:
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise InputError(f"{path}: its card {card_path.name} is missing beside it")
    values = read_json(card_path, "a model card", f"copy {path.name} and its card again")
    card = ModelCard.from_dict(values, card_path)
    stored = values.get("sha256")
    if not isinstance(stored, str) or not re.fullmatch("[0-9a-f]{64}", stored):
        raise InputError(
            f"{card_path}: holds no SHA-256 of the weights, so that they cannot be checked; copy both files again, or "
            "write the member again with `sitreg-lumir export`"
        )
    try:
        content = read_bytes(path, _LARGEST, "a member")
        if stored != sha256(content).hexdigest():
            raise InputError(f"{path}: its SHA-256 is not the one in {card_path.name}; copy both files again")
        tensors = load(content)
    except InputError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds for damaged files
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: truncated or not a safetensors file ({reason})") from None
    transform = _with_prefix(tensors, STATE_PREFIX)
    network = {name: tensor for name, tensor in tensors.items() if not name.startswith(STATE_PREFIX)}
    return StoredMember(path, card, network, transform)


def _read_checkpoint(path: Path) -> StoredMember:
    checkpoint = read_checkpoint(path)
    card = ModelCard.from_dict(checkpoint.get(CARD_KEY), path)
    state = checkpoint["state_dict"]
    return StoredMember(path, card, _with_prefix(state, "network."), _with_prefix(state, STATE_PREFIX))


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint, on the CPU; only tensors and plain values are accepted.

    Raises:
        InputError: missing, truncated, or not a checkpoint.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        checkpoint = load_archive(path)
    except DamagedArchiveError as error:
        raise InputError(f"{path}: cannot be read as a checkpoint ({error}); use an earlier one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"{path}: not a Lightning checkpoint (no state_dict)")
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise InputError(f"{path}: not a Lightning checkpoint (its state_dict holds more than tensors)")
    check_finite(state, path)
    return checkpoint


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses weights that hold NaN or infinite values (InputError)."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name[:80]} holds NaN or infinite values; use an earlier checkpoint")
