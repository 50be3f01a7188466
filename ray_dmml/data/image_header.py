"""The size of an image as its file's header claims it, before anything is decoded.

Decoders reserve memory for what the header claims: a file of a few hundred bytes can ask for
gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # DHT, JPG and DAC are none
_WITHOUT_LENGTH = frozenset([0x01, *range(0xD0, 0xD9)])  # TEM, RST0 to RST7, SOI
_START_OF_SCAN = 0xDA

Size = tuple[int, int]


def claimed_size(data: bytes) -> Size | None:
    """(width, height) of a PNG, JPEG or WEBP file; None: it is another or its header is broken."""
    for magic, read in _READERS:
        if data.startswith(magic):
            try:
                return read(data)
            except IndexError:  # the file ends within its header
                return None
    return None


def _png(data: bytes) -> Size | None:
    if data[12:16] != b"IHDR":
        return None
    return _big(data, 16, 4), _big(data, 20, 4)


def _jpeg(data: bytes) -> Size | None:
    """Goes from marker to marker as libjpeg does, over whatever lies between, to the frame's."""
    at = 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            return None
        while data[at] == 0xFF:  # any number of them may lead a marker
            at += 1
        marker = data[at]
        at += 1
        if marker in _START_OF_FRAME:
            return _big(data, at + 5, 2), _big(data, at + 3, 2)
        if marker == _START_OF_SCAN:
            return None
        if marker and marker not in _WITHOUT_LENGTH:
            at += _big(data, at, 2)


def _webp(data: bytes) -> Size | None:
    kind = data[8:16]
    if kind == b"WEBPVP8X":
        return 1 + _little(data, 24, 3), 1 + _little(data, 27, 3)
    if kind == b"WEBPVP8 ":
        return _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF
    if kind == b"WEBPVP8L":
        bits = _little(data, 21, 4)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _big(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(_cut(data, at, count), "big")


def _little(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(_cut(data, at, count), "little")


def _cut(data: bytes, at: int, count: int) -> bytes:
    if at + count > len(data):
        raise IndexError
    return data[at : at + count]


_READERS: tuple[tuple[bytes, Callable[[bytes], Size | None]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"\xff\xd8", _jpeg),
    (b"RIFF", _webp),
)
