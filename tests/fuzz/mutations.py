"""How fuzzers change files: bits, ends, numbers, words; and contents that go back into a whole container."""

import gzip
import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Edit = Callable[[bytes], bytes]

_NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    255,
    1 << 15,
    (1 << 15) - 1,
    (1 << 16) - 1,
    1 << 31,
    (1 << 31) - 1,
    -(1 << 31),
    10**9,
]
_FLOATS = [0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e30, 1e-30, 3e38]
_FORMATS = ["<h", ">h", "<i", ">i", "<q", ">q", "<f", ">f", "<d", ">d"]
_WORDS = [
    b"", b"0", b"-1", b"nan", b"inf", b"1e999", b"1e30", b"99999999999999999999", b"9" * 5000, b"100000",
    b"1000 1000 1000", b"\0",
    b"\xff", b"[" * 200, b"{", b"null", b"true", b'"', b"'", b"\n", b",", b"%d", b"LIST", b"../x", b"/dev/zero",
    b"\xed\xa0\x80",
    b"\\ud800", b"x" * 300, b"*a", b"&a [*a]", b"!!python/name:os.system", b"os.system", b"1.5", b"[]", b"{}",
]  # fmt: skip


@st.composite
def edits(draw: st.DrawFn, text: bool = False) -> list[tuple[str, Any]]:
    """One to four changes; places are shares of a file, so that they fit any."""
    kinds = ["flip", "cut", "number", "float", "repeat", "drop"] + ["word", "token", "token", "word"] * text
    result = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(kinds))
        place = draw(st.one_of(st.integers(0, 600), st.floats(0, 1, width=32)))
        value: Any = draw(st.integers(0, 255))
        if kind == "number":
            value = (draw(st.sampled_from(_FORMATS[:6])), draw(st.sampled_from(_NUMBERS)))
        elif kind == "float":
            value = (draw(st.sampled_from(_FORMATS[6:])), draw(st.sampled_from(_FLOATS)))
        elif kind in ("word", "token"):
            value = draw(st.sampled_from(_WORDS))
        result.append((kind, (place, value)))
    return result


def edited(content: bytes, changes: list[tuple[str, Any]]) -> bytes:
    """The content with changes of :func:`edits`."""
    for kind, (where, value) in changes:
        place = min(int(where * len(content)) if isinstance(where, float) else where, max(len(content) - 1, 0))
        data = bytearray(content)
        if kind == "flip" and data:
            data[place] ^= 1 << (value % 8)
        elif kind == "cut":
            del data[place:]
        elif kind in ("number", "float"):
            packed = _packed(*value)
            data[place : place + len(packed)] = packed
        elif kind == "repeat":
            data[place:place] = data[place : place + value] * 3
        elif kind == "drop":
            del data[place : place + value]
        elif kind == "word":
            data[place:place] = value
        elif kind == "token":
            tokens = list(re.finditer(rb"[\w.+-]+", content))
            if tokens:
                token = tokens[
                    min(int(where * len(tokens)) if isinstance(where, float) else where % len(tokens), len(tokens) - 1)
                ]
                data[token.start() : token.end()] = value
        content = bytes(data)
    return content


def _packed(layout: str, value: float) -> bytes:
    if layout[1] in "fd":
        return struct.pack(layout, value)
    bits = struct.calcsize(layout) * 8
    return struct.pack(layout, (int(value) + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1)))


def inside_gzip(change: Edit) -> Edit:
    """Changes what is compressed, so that the checksum is right."""
    return lambda content: gzip.compress(change(gzip.decompress(content)), 1)


def inside_zip(change: Edit, record: str, compression: int = zipfile.ZIP_STORED) -> Edit:
    """Changes a record of an archive, so that its checksum is right."""

    def changed(content: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", compression) as archive:
            for name, data in records.items():
                archive.writestr(name, change(data) if name.endswith(record) else data)
        return target.getvalue()

    return changed


def with_checksum(card: bytes, weights: bytes) -> bytes:
    """A JSON whose ``sha256`` is that of changed weights."""
    return json.dumps({**json.loads(card), "sha256": hashlib.sha256(weights).hexdigest()}).encode()
