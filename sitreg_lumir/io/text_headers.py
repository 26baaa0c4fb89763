"""Headers of NRRD and MetaImage files: read as text, and compared with the bytes there before ITK reads the voxels."""

from dataclasses import dataclass
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import DEFLATE_RATIO, check_regular, check_voxels

_MOST_LINES, _LONGEST_LINE = 500, 1 << 16
_LONGEST_FIELD = 500  # letters of a line of NRRD: ITK copies what it does not understand into 1024 bytes, and ends
_MOST_AXES = 5
_NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int"), 8),
    **dict.fromkeys(("int64", "int64_t", "ulonglong", "unsigned long long", "unsigned long long int"), 8),
    **dict.fromkeys(("uint64", "uint64_t"), 8),
    "float": 4,
    "double": 8,
}
_META_BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 8, "ULONG": 8, "LONG_LONG": 8,
    "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip
_BZIP2_RATIO = 50_000


@dataclass(frozen=True)
class TextHeader:
    """A header of text.

    Attributes:
        fields: values by names in small letters.
        end: bytes until the end of its last line.
        nrrd: whether it is NRRD's, else MetaImage's.
    """

    fields: dict[str, str]
    end: int
    nrrd: bool


def read_text_header(path: Path) -> TextHeader:
    """The fields before the voxels.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: its lines are too long to be a header.
    """
    fields: dict[str, str] = {}
    nrrd = path.name.lower().endswith((".nrrd", ".nhdr"))
    check_regular(path)
    with path.open("rb") as stream:
        for _ in range(_MOST_LINES):
            line = stream.readline(_LONGEST_LINE)
            if len(line) == _LONGEST_LINE:
                raise ValueError("no header: a line has no end")
            text = line.decode("latin-1").strip()
            name, _, value = text.partition(":" if nrrd else "=")
            if nrrd and len(line) > _LONGEST_FIELD and not (text.startswith("#") or value.startswith("=")):
                raise ValueError(f"a field of {len(line)} letters")
            name = name.strip().lower()
            if name in fields and not name.startswith(("#", "comment")):
                raise ValueError(f"two fields {name[:40]!r}")
            fields[name] = value.strip()
            if not text or name == "elementdatafile":
                break
        return TextHeader(fields, stream.tell(), nrrd)


def check_text_header(path: Path, text: TextHeader, *, header_only: bool) -> None:
    """Refuses a header that claims more voxels than there are bytes, or that cannot be understood.

    Args:
        path: of the file.
        text: its header.
        header_only: whether the voxels are not going to be read.

    Raises:
        InputError: it claims more voxels than are read.
        ValueError: it does not say its size or type, or voxels are missing.
    """
    shape, bytes_each = _nrrd(text.fields) if text.nrrd else _meta(text.fields)
    count = check_voxels(path, shape)
    if header_only:
        return
    file = voxels_file(path, text)
    present = path.stat().st_size - text.end if file == path else check_regular(file)
    expected = count * bytes_each
    if text.nrrd:
        encoding = text.fields.get("encoding", "").lower()
        ratios = {"raw": 1.0, "gzip": DEFLATE_RATIO, "gz": DEFLATE_RATIO, "bzip2": _BZIP2_RATIO, "bz2": _BZIP2_RATIO}
        ratios |= dict.fromkeys(("txt", "text", "ascii"), bytes_each / 2) | {"hex": 0.5}
        if encoding not in ratios:
            raise ValueError(f"the encoding {encoding[:40]!r}")
        ratio = ratios[encoding]
    elif text.fields.get("compresseddata", "false").lower() in ("true", "t", "1"):
        stated = text.fields.get("compresseddatasize")
        if stated and present < _whole_number(stated, "CompressedDataSize"):
            raise ValueError(f"{stated} bytes of voxels expected, {present} found")
        ratio = DEFLATE_RATIO
    else:
        binary = text.fields.get("binarydata", "true").lower() in ("true", "t", "1")
        ratio = 1.0 if binary else bytes_each / 2
    if present * ratio + 1024 * (ratio == DEFLATE_RATIO) < expected - (bytes_each if ratio == bytes_each / 2 else 0):
        raise ValueError(f"{expected} bytes of voxels expected, {present} found in {file.name}")


def _nrrd(fields: dict[str, str]) -> tuple[list[int], int]:
    """All axes and the bytes of a value."""
    if not any(name.startswith("nrrd000") for name in fields):
        raise ValueError("no NRRD header")
    kind = fields.get("type", "").lower()
    if kind not in _NRRD_BYTES:
        raise ValueError(f"the type {kind[:40]!r}")
    return _sizes(fields.get("sizes", ""), fields.get("dimension", "")), _NRRD_BYTES[kind]


def _meta(fields: dict[str, str]) -> tuple[list[int], int]:
    """All axes, that of the channels last, and the bytes of a value."""
    kind = fields.get("elementtype", "").upper().removeprefix("MET_").removesuffix("_ARRAY")
    if kind not in _META_BYTES:
        raise ValueError(f"the type {kind[:40]!r}")
    sizes = _sizes(fields.get("dimsize", ""), fields.get("ndims", ""))
    channels = _whole_number(fields.get("elementnumberofchannels", "1"), "ElementNumberOfChannels")
    return [*sizes, channels] if channels != 1 else sizes, _META_BYTES[kind]


def _sizes(stated: str, dimension: str) -> list[int]:
    sizes = [_whole_number(size, "a size") for size in stated.split()]
    if not 1 <= len(sizes) <= _MOST_AXES or len(sizes) != _whole_number(dimension, "the dimension"):
        raise ValueError(f"the sizes {stated[:60]!r} of {dimension[:20]!r} axes")
    return sizes


def _whole_number(stated: str, name: str) -> int:
    if not (stated.isascii() and stated.isdigit() and len(stated) < 16):
        raise ValueError(f"{name} is {stated[:40]!r}")
    return int(stated)


def voxels_file(path: Path, text: TextHeader) -> Path:
    """The file that holds the voxels, which may be that of the header.

    Args:
        path: of the header.
        text: the header.

    Raises:
        InputError: several files hold them.
        ValueError: the header does not name it.
    """
    if text.nrrd:
        named = text.fields.get("data file") or text.fields.get("datafile") or ""
    else:
        named = text.fields.get("elementdatafile", "")
        if not named:
            raise ValueError("it does not name its voxels (ElementDataFile)")
    if not named or (not text.nrrd and named.upper() == "LOCAL"):
        return path
    if named.split()[0].upper() == "LIST" or "%" in named:
        raise InputError(f"{path}: its voxels lie in several files; save it as a single one")
    return path.parent / named
