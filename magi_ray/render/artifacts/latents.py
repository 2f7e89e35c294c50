"""The one bridge between tensors and bytes, and between tensors and the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors.torch import load, save
from torch import Tensor

from magi_ray.errors import DeviceOutOfMemory, NumericError
from magi_ray.render.artifacts.commits import chunk_commit, committed
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage.keys import CommitKind
from magi_ray.storage.records import read_payload
from magi_ray.storage.store import Store


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """``tensors`` as safetensors bytes. The same tensors give the same bytes."""
    return bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}))


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors of ``pack``, on the CPU. ``data`` has been checked against its digest by whoever read it."""
    return dict(load(data))


def load_tensor(store: Store, kind: CommitKind, key: str) -> Tensor:
    """The tensor of a text or prefix commit. Raises ObjectMissing, ObjectDamaged."""
    return unpack(read_payload(store, committed(store, kind, key), kind))[kind]


def load_window(store: Store, plan: RowPlan, stage: int) -> dict[int, Tensor]:
    """The chunks in flight after ``stage``: number → [1, 16, 6, h, w] float32."""
    tensors = unpack(read_payload(store, committed(store, "stage", plan.stage_keys[stage]), "state"))
    return {int(name): latent for name, latent in tensors.items()}


def load_clean_chunk(store: Store, plan: RowPlan, chunk: int) -> Tensor:
    """The clean latent of ``chunk``: [1, 16, 6, h, w] float32, frames of a video prefix included."""
    return unpack(read_payload(store, chunk_commit(store, plan, chunk), "chunk"))["chunk"]


def require_finite(tensor: Tensor, *, what: str) -> None:
    """Raises NumericError, saying how many of ``what``'s values are NaN or infinite."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise NumericError(
            f"{what}: {bad} of {tensor.numel()} values are NaN or infinite.",
            remedy="Check the weights and the precision (params_dtype).",
        )


@contextmanager
def telling_out_of_memory(what: str) -> Iterator[None]:
    """Turns the device's own error into DeviceOutOfMemory, which has a budget of its own."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise DeviceOutOfMemory(
            f"{what}: {str(exc).splitlines()[0]}",
            remedy="Use a smaller size, window_size 1, or a device with more memory.",
        ) from exc


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``use_threads`` for a while."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)


def use_threads(count: int) -> None:
    """How many threads this process computes with from now on. Sums are split by it, so it is part of the identity."""
    torch.set_num_threads(count)
