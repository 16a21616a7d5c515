"""Makes a screenshot smaller: a page has few colours, and 256 of them are enough for eyes."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = 256


def shrink(png: bytes) -> bytes:
    """Return the same picture with a palette. Takes what Chromium writes: 8 bits a channel, RGB or RGBA, not interlaced."""
    chunks = list(_chunks(png))
    width, height, depth, kind, *_, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    if (depth, kind, interlaced) not in {(8, 2, 0), (8, 6, 0)}:
        raise ValueError(f"{depth} bits of kind {kind} are not what Chromium writes")
    each = 3 if kind == 2 else 4
    data = zlib.decompress(b"".join(content for name, content in chunks if name == b"IDAT"))
    rows = [
        [row[place : place + 3] for place in range(0, width * each, each)]
        for row in _rows(data, width * each, height, each)
    ]
    palette, index = _palette(Counter(pixel for row in rows for pixel in row))
    # No filter: with a palette, neighbours are no better a guess.
    flat = b"".join(b"\0" + bytes(index[pixel] for pixel in row) for row in rows)
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", b"".join(palette)),
            (b"IDAT", zlib.compress(flat, 9)),
            (b"IEND", b""),
        )
    )


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_SIGNATURE)
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        place += length + 12


def _rows(data: bytes, length: int, height: int, each: int) -> Iterator[bytes]:
    """Undo the filters: each byte was written as the difference from a guess by those to its left and above."""
    above = bytearray(length)
    for number in range(height):
        start = number * (length + 1)
        kind, row = data[start], bytearray(data[start + 1 : start + 1 + length])
        for place in range(length) if kind else ():
            left = row[place - each] if place >= each else 0
            up, corner = above[place], above[place - each] if place >= each else 0
            if kind == 1:
                guess = left
            elif kind == 2:
                guess = up
            elif kind == 3:
                guess = (left + up) // 2
            else:
                guess = _paeth(left, up, corner)
            row[place] = (row[place] + guess) & 255
        yield bytes(row)
        above = row


def _paeth(left: int, up: int, corner: int) -> int:
    estimate = left + up - corner
    return min(
        (abs(estimate - left), 0, left), (abs(estimate - up), 1, up), (abs(estimate - corner), 2, corner)
    )[2]


def _palette(found: Counter[bytes]) -> tuple[list[bytes], dict[bytes, int]]:
    """The most frequent colours, and for each colour the place of the nearest among them."""
    palette = [colour for colour, _ in found.most_common(_COLOURS)]

    def nearest(colour: bytes) -> int:
        return min(
            range(len(palette)),
            key=lambda place: sum(
                (one - other) ** 2 for one, other in zip(palette[place], colour, strict=True)
            ),
        )

    index = {colour: place for place, colour in enumerate(palette)}
    return palette, index | {colour: nearest(colour) for colour in found if colour not in index}
