"""Users' requests to the driver of a run: pause or cancel. The driver reads them every few seconds."""

from __future__ import annotations

import time
from typing import Literal, get_args

from magi_ray.errors import ObjectDamaged, ObjectMissing
from magi_ray.storage import keys
from magi_ray.storage.records import canonical_json, json_object, new_write_id
from magi_ray.storage.store import Store

Request = Literal["pause", "cancel"]


def request(store: Store, run_id: str, what: Request) -> None:
    """Ask the driver of ``run_id`` to stop. Stays until ``clear``."""
    wanted = {"want": what, "asked_unix": round(time.time(), 3), "write_id": new_write_id()}
    store.put(keys.run_wanted(run_id), canonical_json(wanted))


def requested(store: Store, run_id: str) -> Request | None:
    """What is asked of ``run_id`` now."""
    try:
        want = json_object(store.get(keys.run_wanted(run_id))).get("want")
    except (ObjectMissing, ObjectDamaged):
        return None
    return want if want in get_args(Request) else None


def clear(store: Store, run_id: str) -> None:
    """Withdraw the request."""
    store.delete(keys.run_wanted(run_id))
