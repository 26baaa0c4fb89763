"""PyTorch's files: an archive of plain records, of which every checksum is verified before anything is loaded."""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.io.bounded import read_bytes

_LARGEST = 1 << 36  # bytes
_LARGEST_PICKLE = 1 << 27
_MOST_RECORDS, _MOST_VALUES = 100_000, 2_000_000
_DEEPEST = 64
_PIECE = 1 << 20
_MODULES = re.compile(r"torch(\.[\w.]+)?|collections")
_NEEDLESS = ("builtins.set",)  # beyond these modules


class DamagedArchiveError(ValueError):
    """A file is no whole archive of PyTorch's, or claims more than it holds."""


def load_archive(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors on the CPU, and plain values.

    PyTorch itself compares no checksums, and makes room for whatever a file claims.

    Args:
        path: of the file, which is read once.

    Raises:
        OSError: the file is missing or unreadable.
        InputError: it is larger than any checkpoint, or no regular file.
        DamagedArchiveError: it is truncated, damaged or foreign, holds compressed records, or code beyond tensors.
    """
    content = read_bytes(path, _LARGEST, "a checkpoint")
    _verify(content)
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        raise DamagedArchiveError(" ".join(str(error).split())[:160] or type(error).__name__) from None
    _check_values(loaded, len(content))
    return loaded


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in lists and dictionaries within each other."""
    for entry in values_in(value):
        if isinstance(entry, Tensor):
            yield entry


def values_in(value: Any) -> Iterator[Any]:
    """All values in lists and dictionaries within each other, these included.

    Raises:
        DamagedArchiveError: there are too many, or they are nested too deeply, in a circle for example.
    """
    waiting = [(value, 0)]
    count = 0
    while waiting:
        entry, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST_VALUES:
            raise DamagedArchiveError("its values are nested too deeply" if depth > _DEEPEST else "too many values")
        yield entry
        if isinstance(entry, dict):
            waiting += [(child, depth + 1) for pair in entry.items() for child in pair]
        elif isinstance(entry, list | tuple | set | frozenset):
            waiting += [(child, depth + 1) for child in entry]


def _verify(content: bytes) -> None:
    """Refuses an archive with a record that is damaged, compressed, there twice, or larger than the file."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, EOFError, OSError):
        raise DamagedArchiveError("truncated, or not an archive of PyTorch's") from None
    with archive:
        records = archive.infolist()
        names = {record.filename for record in records}
        if len(records) > _MOST_RECORDS or len(names) < len(records):
            raise DamagedArchiveError("records are there twice, or too many")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise DamagedArchiveError("its records are compressed, which PyTorch does not do")
        if sum(record.file_size for record in records) > len(content):
            raise DamagedArchiveError("its records claim more bytes than there are")
        for record in records:
            try:
                with archive.open(record) as stream:
                    while stream.read(_PIECE):  # to the end, which compares the checksum
                        pass
            except Exception as error:  # zipfile raises many kinds, too
                raise DamagedArchiveError(f"the record {record.filename[:80]!r} is damaged ({error})") from None
            if record.filename.endswith("data.pkl"):
                _check_pickle(archive.read(record))


def _check_pickle(content: bytes) -> None:
    """Refuses a pickle that names anything but tensors and what belongs to them."""
    if len(content) > _LARGEST_PICKLE:
        raise DamagedArchiveError(f"{len(content)} bytes of plain values")
    try:
        named = [str(argument) for code, argument, _ in pickletools.genops(content) if code.name in ("GLOBAL", "INST")]
        unusual = any(code.name == "STACK_GLOBAL" for code, _, _ in pickletools.genops(content))
    except Exception as error:
        raise DamagedArchiveError(f"no pickle ({' '.join(str(error).split())[:80]})") from None
    for name in named:
        module, _, attribute = name.partition(" ")
        if not _MODULES.fullmatch(module) and f"{module}.{attribute}" not in _NEEDLESS:
            raise DamagedArchiveError(f"it names {module}.{attribute}, which is no tensor")
    if unusual:
        raise DamagedArchiveError("its values are stored in a form that PyTorch does not write")


def _check_values(loaded: Any, size: int) -> None:
    """Refuses tensors that claim more than the file holds, and values nested in a circle."""
    storages: dict[int, int] = {}
    for tensor in tensors_in(loaded):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise DamagedArchiveError(f"it holds a {tensor.layout} tensor on {tensor.device.type}")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise DamagedArchiveError(f"a tensor claims {tuple(tensor.shape)}, more than is there")
    if sum(storages.values()) > size:
        raise DamagedArchiveError("its tensors claim more bytes than there are")
