"""Users' requests to the driver of a run: pause or cancel. The driver reads them every few seconds."""

from __future__ import annotations

import json
import time
from typing import Literal

from magi_ray.errors import ObjectMissing
from magi_ray.storage import keys
from magi_ray.storage.records import canonical_json, new_write_id
from magi_ray.storage.store import Store

Request = Literal["pause", "cancel"]


def request(store: Store, run_id: str, what: Request) -> None:
    """Ask the driver of ``run_id`` to stop. Stays until ``clear``."""
    wanted = {"want": what, "asked_unix": round(time.time(), 3), "write_id": new_write_id()}
    store.put(keys.run_wanted(run_id), canonical_json(wanted))


def requested(store: Store, run_id: str) -> Request | None:
    """What is asked of ``run_id`` now."""
    try:
        want = json.loads(store.get(keys.run_wanted(run_id))).get("want")
    except (ObjectMissing, ValueError, AttributeError):
        return None
    return want if want in ("pause", "cancel") else None


def clear(store: Store, run_id: str) -> None:
    """Withdraw the request."""
    store.delete(keys.run_wanted(run_id))
