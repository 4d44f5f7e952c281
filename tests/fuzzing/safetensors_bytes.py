"""A safetensors file taken apart, so that it can be put together wrongly.

``8 bytes: size of the header | header: {name: {dtype, shape, data_offsets}} as JSON | data``
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor: what the header says of it, and its bytes."""

    dtype: Any
    shape: Any
    raw: bytes

    @classmethod
    def of(cls, value: Tensor, dtype: str = "F32") -> Stored:
        """A tensor's values in a dtype of the format."""
        value = value.to(DTYPES[dtype]).contiguous()
        return cls(dtype, list(value.shape), value.flatten().view(torch.uint8).numpy().tobytes())

    def value(self) -> Tensor:
        """As float32."""
        return torch.frombuffer(bytearray(self.raw), dtype=DTYPES[self.dtype]).view(self.shape).float()

    def map(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The tensor with other values, or of another shape."""
        return Stored.of(change(self.value()), self.dtype)


@dataclass
class Shard:
    """All tensors of a file by name."""

    tensors: dict[str, Stored]
    metadata: Any = field(default_factory=lambda: {"format": "pt"})

    @classmethod
    def read(cls, path: Path) -> Shard:
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        metadata = header.pop("__metadata__", None)
        tensors = {
            name: Stored(entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        return cls(tensors, metadata)

    def header(self) -> dict[str, Any]:
        """What the file says of the tensors, one behind the other."""
        out: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        start = 0
        for name, stored in self.tensors.items():
            end = start + len(stored.raw)
            out[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, end]}
            start = end
        return out

    @property
    def data(self) -> bytes:
        return b"".join(stored.raw for stored in self.tensors.values())

    def write(self, path: Path) -> None:
        path.write_bytes(joined(json.dumps(self.header()).encode(), self.data))


def joined(header: bytes, data: bytes, size: int | None = None) -> bytes:
    """A file of a header, padded to 8 bytes, and data; ``size`` lies about the header's."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if size is None else size) + header + data
