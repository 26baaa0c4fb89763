"""NIfTI volumes written plane by plane, so that memory does not grow with the volume.

A NIfTI file stores the first axis fastest and the components of a vector slowest, so planes of the last spatial axis
are contiguous within a component. They go to an uncompressed file, which is compressed at the end in blocks of a fixed
size: equal values give equal bytes, however they came and on however many threads.
"""

import struct
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import reason_of
from sitreg_lumir.io.write import FIELD_LEVEL

Put = Callable[[int, NDArray[Any]], None]

_BLOCK = 1 << 20  # bytes compressed at once; larger ones gain nothing
_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # no name and time: same bytes


@contextmanager
def writing_planes(
    path: Path, header: nibabel.Nifti1Header, name: Path, *, compresslevel: int = FIELD_LEVEL
) -> Iterator[Put]:
    """Writes a volume or field in pieces; the file is whole at the end of the block.

    To be used inside :func:`~sitreg_lumir.io.atomic.writing`, which gives the file its name. While a ``.nii.gz`` is
    written, its folder holds the uncompressed values, too: in a file without a name, of which nothing remains however
    the program ends.

    Args:
        path: where to write, ends in ``.nii.gz`` or ``.nii``.
        header: of :func:`plain_header`.
        name: for errors: several files may be written at once.
        compresslevel: of gzip, 0..9.

    Yields:
        ``put(first, values)``: takes planes ``first, first + 1, ...`` of the third axis as ``(C, planes, Y, X)``,
        ``C`` components (1 for a volume). Every plane must be put once, in any order.

    Raises:
        ValueError: planes of another shape, or some are missing at the end.
        InputError: the file cannot be written.
    """
    x, y, z, *vector = header.get_data_shape()
    components = int(np.prod(vector, dtype=int))
    dtype, start = header.get_data_dtype(), header.get_data_offset()
    done = 0
    compressed = path.name.endswith(".gz")
    with _naming_in_errors(name), tempfile.TemporaryFile(dir=path.parent) if compressed else path.open("w+b") as raw:
        raw.write(header.binaryblock + bytes(start - header.sizeof_hdr))

        def put(first: int, values: NDArray[Any]) -> None:
            nonlocal done
            planes = values.shape[1]
            if values.shape != (components, planes, y, x) or not 0 <= first <= z - planes:
                raise ValueError(f"planes {values.shape} from {first} on do not fit into {header.get_data_shape()}")
            with _naming_in_errors(name):
                for component, part in enumerate(np.asarray(values, dtype, order="C")):
                    raw.seek(start + (component * z + first) * y * x * dtype.itemsize)
                    raw.write(part.data)
            done += planes

        yield put
        if done != z:
            raise ValueError(f"{done} of {z} planes were put")
        if compressed:
            raw.seek(0)
            with path.open("wb") as stream:
                _gzip(raw, stream, compresslevel)


@contextmanager
def _naming_in_errors(name: Path) -> Iterator[None]:
    """Turns a failure of writing into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{name}: cannot be written ({reason_of(error)}); choose a folder with space and access"
        ) from None


def _gzip(raw: IO[bytes], stream: IO[bytes], level: int) -> None:
    """One gzip member of blocks that are compressed independently, on as many threads as torch uses."""

    def deflate(block: bytes) -> bytes:
        squeeze = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
        return squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)  # ends on a byte, so the next can follow

    threads = torch.get_num_threads()
    checksum = size = 0
    waiting: deque[Future[bytes]] = deque()
    stream.write(_GZIP_HEADER)
    with ThreadPoolExecutor(threads) as pool:
        while block := raw.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
            waiting.append(pool.submit(deflate, block))
            if len(waiting) > 2 * threads:
                stream.write(waiting.popleft().result())
        for last in waiting:
            stream.write(last.result())
    stream.write(zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS).flush())  # an empty final block
    stream.write(struct.pack("<LL", checksum, size % 2**32))
