"""Reads safetensors files, plain or as ``.zst``, without unpacking them as a whole.

Format: 8 bytes length, a JSON header (name → dtype, shape, place), the tensors. Compressed files are read once from
front to end.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import zstandard
from safetensors import SafetensorError, safe_open
from torch import Tensor

from magi_ray.errors import WeightsError
from magi_ray.models.files import COMPRESSED

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100 * 2**20  # the format's own bound
_FRAME_MAGIC, _SKIPPABLE_MAGIC = 0xFD2FB528, 0x184D2A50
_LONGEST_FRAME_HEADER = 18
_LARGEST_WINDOW = 2**31  # of `zstd --long=31`


@dataclass(frozen=True)
class Entry:
    """One tensor: ``dtype`` in the format's letters, ``shape``, and its bytes [begin, end) behind the header."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of ``file`` in the order they are stored. Of a compressed file, only the header is unpacked.

    Raises WeightsError: not readable, not this format, or cut short (with both sizes).
    """
    with _as_weights_error(file):
        if file.suffix == COMPRESSED:
            packed = _require_whole_frames(file)
            with _unpacked(file) as stream:
                entries, size = _parse_header(stream, file)
            if packed is not None and packed != size:
                raise _cut_short(file, f"unpacks to {packed} bytes", size)
        else:
            with file.open("rb") as stream:
                entries, size = _parse_header(stream, file)
            if (found := file.stat().st_size) != size:
                raise _cut_short(file, f"has {found} bytes", size)
    return entries


def read_tensors(file: Path, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``file`` named in ``wanted``, one by one, in host memory.

    Those of a plain file are memory-mapped; those of a compressed one are unpacked one at a time.
    Raises WeightsError as ``read_header``, and for compressed bytes that do not unpack.
    """
    with _as_weights_error(file):
        if file.suffix == COMPRESSED:
            with _unpacked(file) as stream:
                entries, _ = _parse_header(stream, file)
                position = 0
                for name, entry in entries.items():
                    _read(stream, entry.begin - position, file)
                    data = _read(stream, entry.end - entry.begin, file)
                    position = entry.end
                    if name in wanted:
                        dtype = _DTYPES[entry.dtype]
                        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                        yield name, flat.view(entry.shape)
        else:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if name in wanted:
                        yield name, opened.get_tensor(name)


def _parse_header(stream: BinaryIO, file: Path) -> tuple[dict[str, Entry], int]:
    """The entries by place, and how many bytes the whole file must have."""
    (length,) = struct.unpack("<Q", _read(stream, 8, file))
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header would be {length} bytes long")
    content = json.loads(bytes(_read(stream, length, file)))
    content.pop("__metadata__", None)
    entries = {
        name: Entry(facts["dtype"], [int(n) for n in facts["shape"]], *facts["data_offsets"])
        for name, facts in content.items()
    }
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    place = 0
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise ValueError(f"{name} has the unknown dtype {entry.dtype}")
        needed = math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        if entry.begin != place or entry.end - entry.begin != needed:
            found = f"{entry.begin}–{entry.end}"
            raise ValueError(f"{name} needs {needed} bytes from {place} on, but is said to lie at {found}")
        place = entry.end
    return entries, 8 + length + place


def _read(stream: BinaryIO, size: int, file: Path) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        read = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not read:
            raise _cut_short(file, f"ends {size - done} bytes early, after {done} of", size)
        done += read
    return data


@contextmanager
def _unpacked(file: Path) -> Iterator[BinaryIO]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    with file.open("rb") as packed, unpacker.stream_reader(packed, read_across_frames=True) as stream:
        yield stream


def _require_whole_frames(file: Path) -> int | None:
    """The unpacked size, None where the frames do not say it. Goes from block to block without unpacking.

    Raises WeightsError for a file that ends within a frame.
    """
    total: int | None = 0
    size = file.stat().st_size
    with file.open("rb") as stream:
        while (start := stream.tell()) < size:
            head = stream.read(_LONGEST_FRAME_HEADER)
            magic = int.from_bytes(head[:4], "little")
            if magic & ~0xF == _SKIPPABLE_MAGIC and len(head) >= 8:
                end = start + 8 + int.from_bytes(head[4:8], "little")
            elif magic == _FRAME_MAGIC:
                header = zstandard.frame_header_size(head)
                facts = zstandard.get_frame_parameters(head)
                known = facts.content_size != zstandard.CONTENTSIZE_UNKNOWN
                total = total + facts.content_size if known and total is not None else None
                end, last = start + header, False
                while not last:
                    stream.seek(end)
                    block = stream.read(3)
                    if len(block) < 3:
                        raise _cut_short(file, f"has {size} bytes", end + 3, least=True)
                    value = int.from_bytes(block, "little")
                    last, kind = bool(value & 1), value >> 1 & 3
                    end += 3 + (1 if kind == 1 else value >> 3)  # kind 1: one byte, repeated
                end += 4 * facts.has_checksum
            else:
                raise ValueError(f"no zstd frame begins at byte {start}")
            if end > size:
                raise _cut_short(file, f"has {size} bytes", end, least=True)
            stream.seek(end)
    return total


def _cut_short(file: Path, found: str, expected: int, *, least: bool = False) -> WeightsError:
    return WeightsError(
        f"{file} {found}, but needs {'at least ' * least}{expected}.", remedy="Download it again; it is damaged."
    )


@contextmanager
def _as_weights_error(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, zstandard.ZstdError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(
            f"{file} is not a readable safetensors file: {exc}", remedy="Download it again; it may be damaged."
        ) from exc
