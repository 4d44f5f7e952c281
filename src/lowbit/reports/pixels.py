"""Matrices as images: one pixel per entry, in PNG data URIs.

As SVG, a matrix of 64 rows would be 4096 elements. The images are transparent at 0, so that they fit light and dark
pages.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

from lowbit.reports.facts import Array

WARM, COLD = (222, 91, 42), (38, 125, 191)  # above and below 0, visible on white and on black
CONTRAST = 0.4  # exponent of the relative size: off-diagonal entries are far smaller than the diagonal


def signed(matrix: Array) -> str:
    """Image of a matrix, positive entries warm and negative ones cold: opacity is ``(|a| / max |a|) ** 0.4``."""
    size = np.abs(matrix)
    return _data_uri((size / max(float(size.max()), 1e-30)) ** CONTRAST, matrix < 0)


def strengths(shares: Array) -> str:
    """Image of values from 0, transparent, to 1, opaque."""
    return _data_uri(np.clip(shares, 0, 1), np.zeros(shares.shape, bool))


def _data_uri(opacity: Array, cold: Array) -> str:
    colours = np.where(cold[..., None], np.array(COLD), np.array(WARM))
    pixels = np.concatenate([colours, np.rint(255 * opacity)[..., None]], -1).astype(np.uint8)
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def png(pixels: Array) -> bytes:
    """A PNG file of ``(rows, columns, 4)`` bytes: red, green, blue, opacity (ISO/IEC 15948, filter 0).

    >>> png(np.zeros((2, 3, 4), np.uint8))[16:24].hex()  # width, height
    '0000000300000002'
    """
    rows, columns, _ = pixels.shape
    head = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*chunks, strict=True)))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
