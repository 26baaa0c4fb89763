"""The work folder of a template: each intermediate result in a file named by all that it was made from.

A result is used again only where everything that it depends on is equal, down to the SHA-256 of the files. So a run
that was stopped goes on where it was, and one with other options or images takes over what they leave as it was.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sitreg_lumir import __version__
from sitreg_lumir.io.atomic import writing

Arrays: TypeAlias = dict[str, NDArray[Any]]
Key: TypeAlias = Mapping[str, Any]


class WorkFolder:
    """Intermediate results on disk.

    Args:
        folder: made when the first result is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self, kind: str, key: Key, make: Callable[[], Arrays]) -> Arrays:
        """A result from the disk, or made now and written; it takes its name only when it is complete.

        Args:
            kind: first word of the file's name.
            key: plain values, all that the result depends on.
            make: computes it.

        Raises:
            InputError: the result cannot be written.
        """
        described = json.dumps({**key, "version": __version__}, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:32]}.safetensors"
        arrays = _read(path, described)
        if arrays is None:
            arrays = {name: np.ascontiguousarray(values) for name, values in make().items()}
            with writing(path) as temporary:
                temporary.write_bytes(save(arrays, {"made_from": described}))
        return arrays


def digest_of(*values: NDArray[Any]) -> str:
    """SHA-256 of arrays: their types, shapes and values, in order."""
    digest = hashlib.sha256()
    for array in values:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(path: Path, described: str) -> Arrays | None:
    """A result, or None if there is none that is whole and made from what is described."""
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("made_from") != described:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError):
        return None
