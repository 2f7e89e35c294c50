"""Latents and embeddings as bytes and in the store; torch's errors and threads."""

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
    """``tensors`` as safetensors. The same tensors give the same bytes."""
    return bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}))


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors given to ``pack``, on the CPU. ``data``: already checked against its digest."""
    return dict(load(data))


def load_tensor(store: Store, kind: CommitKind, key: str) -> Tensor:
    """The tensor of a text or prefix commit, float32 on the CPU: [tokens, caption_channels] or [1, 16, latents, h, w].

    Raises ObjectMissing, ObjectDamaged.
    """
    return unpack(read_payload(store, committed(store, kind, key), kind))[kind]


def load_window(store: Store, plan: RowPlan, stage: int) -> dict[int, Tensor]:
    """The chunks in flight after ``stage``: number → [1, 16, 6, h, w] float32. Raises ObjectMissing, ObjectDamaged."""
    tensors = unpack(read_payload(store, committed(store, "stage", plan.stage_keys[stage]), "state"))
    return {int(name): latent for name, latent in tensors.items()}


def load_clean_chunk(store: Store, plan: RowPlan, chunk: int) -> Tensor:
    """The clean latent of ``chunk``: [1, 16, 6, h, w] float32, frames of a video prefix included.

    Raises ObjectMissing, ObjectDamaged.
    """
    return unpack(read_payload(store, chunk_commit(store, plan, chunk), "chunk"))["chunk"]


def require_finite(tensor: Tensor, *, what: str) -> None:
    """Raises NumericError if a value is NaN or infinite. ``what``: the tensor's name in the message."""
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise NumericError(
            f"{what}: {bad} of {tensor.numel()} values are NaN or infinite.",
            remedy="Check the weights and the precision (params_dtype).",
        )


@contextmanager
def convert_out_of_memory(what: str) -> Iterator[None]:
    """Raises DeviceOutOfMemory instead of torch's own error. ``what``: the message begins with it."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise DeviceOutOfMemory(
            f"{what}: {str(exc).splitlines()[0]}",
            remedy="Use a smaller size, window_size 1, or a device with more memory.",
        ) from exc


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """``set_torch_threads`` within the block only."""
    before = torch.get_num_threads()
    set_torch_threads(count)
    try:
        yield
    finally:
        set_torch_threads(before)


def set_torch_threads(count: int) -> None:
    """Let torch compute with ``count`` CPU threads in this process. Their number decides how sums are split, and so the
    last bits of a result: it is part of the identity."""
    torch.set_num_threads(count)
