"""Epochs: which driver is a run's driver. Each takes the next number; the highest is it, the others are superseded."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from pydantic import ValidationError

from magi_ray.errors import ObjectMissing
from magi_ray.settings import Frozen
from magi_ray.storage import keys
from magi_ray.storage.leases import Owner
from magi_ray.storage.records import canonical_json, new_write_id
from magi_ray.storage.store import Store

FORMAT_VERSION = 1


class EpochRecord(Frozen):
    version: int = FORMAT_VERSION
    number: int
    owner: Owner
    write_id: str


def take_epoch(store: Store, run_id: str, owner: Owner) -> int:
    """Become the driver of ``run_id``: the number is ours alone, and higher than all before. Raises StoreError."""
    # One after the other, without a gap: that is what lets ``superseded`` look at one key.
    number = _highest(store, run_id) + 1
    while not store.put_if_absent(
        keys.epoch(run_id, number),
        canonical_json(EpochRecord(number=number, owner=owner, write_id=new_write_id()).model_dump()),
    ):
        number += 1
    return number


def superseded(store: Store, run_id: str, number: int) -> bool:
    """Whether a newer driver than ``number`` has come. One call to the store."""
    return store.exists(keys.epoch(run_id, number + 1))


def newest_epoch(store: Store, run_id: str) -> tuple[int, Owner | None] | None:
    """The driver of ``run_id`` and who it was or is (None if its record is damaged); None when it never had one."""
    number = _highest(store, run_id)
    if not number:
        return None
    try:
        body = json.loads(store.get(keys.epoch(run_id, number)))
        return number, EpochRecord.model_validate(body).owner
    except (ValueError, ValidationError, ObjectMissing):
        return number, None


def _highest(store: Store, run_id: str) -> int:
    return max((int(PurePosixPath(key).stem) for key in store.list(keys.epochs(run_id))), default=0)
