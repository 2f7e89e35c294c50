"""Files of a network: where the published layout keeps them, and the digest of their contents. No torch.

Any safetensors file may also be stored compressed, as ``<name>.zst``; if both exist, the plain one is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from magi_ray.errors import WeightsError
from magi_ray.settings import inference_folder

INDEX = "model.safetensors.index.json"
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
COMPRESSED = ".zst"
SIDECAR = ".sha256"


def published_folder(load: Path, *, fp8: bool, distill: bool) -> Path:
    """The DiT folder below ``load``: ``inference_weight[.fp8][.distill]`` (spec §2)."""
    return load / inference_folder(fp8=fp8, distill=distill)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder`` in name order: the shards its index names, or its single file.

    Raises WeightsError: no such folder, no weights in it, a broken index, or shards that are not there.
    """
    if not folder.is_dir():
        raise WeightsError(f"There is no weights folder {folder}.", remedy="Check `load` in the config, or --weights.")
    index = folder / INDEX
    if index.is_file():
        return _indexed(index)
    for name in SINGLE:
        file = _stored(folder / name)
        if file.is_file():
            return [file]
    raise WeightsError(
        f"{folder} holds none of {', '.join((INDEX, *SINGLE))}, plain or {COMPRESSED}.",
        remedy="Download the checkpoint into it.",
    )


def text_encoder_files(t5_pretrained: Path) -> list[Path]:
    """Every file of the transformers folder ``<t5_pretrained>/t5-v1_1-xxl``, in name order (spec §2).

    Raises WeightsError when there is none.
    """
    folder = t5_pretrained / "t5-v1_1-xxl"
    files = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix != SIDECAR)
    if not files:
        raise WeightsError(f"There is no text encoder in {folder}.", remedy="Check `t5_pretrained` in the config.")
    return files


def text_encoder_sizes(t5_pretrained: Path) -> dict[str, int]:
    """vocab_size, d_model, d_ff, d_kv, num_heads and num_layers of the encoder's config.json.

    Raises WeightsError when it is not the config of a T5.
    """
    path = text_encoder_files(t5_pretrained)[0].parent / "config.json"
    try:
        config = json.loads(path.read_text())
        names = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers")
        return {name: int(config[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise WeightsError(f"{path} is not the config of a T5: {exc!r}", remedy="Download it again.") from exc


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(f"{index} is not a safetensors index: {exc!r}", remedy="Download it again.") from exc
    files = [_stored(index.parent / name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise WeightsError(
            f"{index} names {len(files)} shards, of which {len(missing)} are missing: {', '.join(missing)}.",
            remedy="Download the missing shards.",
        )
    return files


def _stored(file: Path) -> Path:
    """``file``, or its compressed form where only that is there."""
    packed = file.with_name(file.name + COMPRESSED)
    return packed if packed.is_file() and not file.is_file() else file


def digest_files(files: Sequence[Path], *, cache: Path | None) -> str:
    """sha256 (hex) over the names and contents of ``files``; their order and folder do not matter.

    It covers the files as they are stored: the same tensors in other shards, or compressed, have another digest.
    A file with a ``<file>.sha256`` beside it (the hex digest, alone or as ``sha256sum`` writes it) must have that one.
    cache: a JSON file that keeps the digest of each file by (resolved path, size, mtime, inode), so that 48 GB are
    read once; None reads everything. A cache that cannot be read or written costs time only.
    Raises WeightsError for a file that cannot be read, or is not what its sidecar says.
    """
    known = _read_cache(cache)
    digests, changed = {}, False
    for file in files:
        try:
            stat = file.stat()
            key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
            if key not in known:
                with file.open("rb") as stream:
                    known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
                changed = True
        except OSError as exc:
            raise WeightsError(f"{file} cannot be read: {exc}", remedy="Check the path and its permissions.") from exc
        digests[file.name] = known[key]
    if cache is not None and changed:
        _write_cache(cache, known)
    for file in files:
        _check_sidecar(file, digests[file.name])
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _check_sidecar(file: Path, found: str) -> None:
    sidecar = file.with_name(file.name + SIDECAR)
    if not sidecar.is_file():
        return
    try:
        words = sidecar.read_text().split(maxsplit=1)
    except (OSError, UnicodeDecodeError) as exc:
        raise WeightsError(f"{sidecar} cannot be read: {exc}", remedy="Download it again, or delete it.") from exc
    expected = words[0].removeprefix("\\").lower() if words else ""
    if not re.fullmatch("[0-9a-f]{64}", expected):
        wrong = f"{sidecar} does not begin with a sha256 of 64 hex digits, but with {expected[:80]!r}."
        raise WeightsError(wrong, remedy="Download it again, or delete it.")
    if found != expected:
        raise WeightsError(
            f"{file} has sha256 {found}, but {sidecar.name} says {expected}.",
            remedy="Download the file again; it is damaged, or belongs to another release.",
        )


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return {}
    try:
        content = json.loads(cache.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(cache: Path, known: dict[str, str]) -> None:
    # Renamed into place: workers on one machine share this file.
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1, sort_keys=True))
        partial.replace(cache)
    except OSError:
        partial.unlink(missing_ok=True)
