"""Who drives a run: what a driver makes of a lease that it could not keep beating."""

from __future__ import annotations

import pytest
from runs import MakeRun

from magi_ray.errors import StoreError, Superseded
from magi_ray.render.driving import requests as control
from magi_ray.render.driving import session as session_module
from magi_ray.render.driving.leadership import Leadership
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.scheduler import RunState
from magi_ray.storage import keys
from magi_ray.storage.epochs import become_driver, take_epoch
from magi_ray.storage.leases import TTL_S, Owner
from magi_ray.storage.memory import MemoryStore


def test_a_driver_whose_lease_ran_out_in_an_outage_goes_on_until_another_has_come() -> None:
    """A store that was away for longer than a lease holds, but not for longer than the patience, ended every run."""
    store, now = MemoryStore(), [0.0]
    lease = become_driver(store, "film", Owner.here("driver"), clock=lambda: now[0])
    leadership = Leadership(store, "film", lease, clock=lambda: now[0])
    now[0] = 2 * TTL_S
    assert not lease.valid
    leadership.check()
    assert store.exists(keys.run_lease("film"))
    take_epoch(store, "film", Owner.here("another"))
    with pytest.raises(Superseded, match="Another driver has taken over run film"):
        leadership.check()


def test_a_driver_does_not_render_into_a_store_from_which_its_run_was_deleted() -> None:
    store, now = MemoryStore(), [0.0]
    lease = become_driver(store, "film", Owner.here("driver"), clock=lambda: now[0])
    leadership = Leadership(store, "film", lease, clock=lambda: now[0])
    for key in list(store.list("")):
        store.delete(key)
    with pytest.raises(Superseded):
        lease.beat()
    with pytest.raises(StoreError, match="Run film is gone from memory:"):
        leadership.check()


@pytest.mark.parametrize(("wish", "state"), [("pause", RunState.PAUSED), ("cancel", RunState.CANCELLED)])
@pytest.mark.parametrize("look_s", [0.0, 3600.0])
def test_a_run_that_is_to_stop_does_not_begin(
    wish: control.Request, state: RunState, look_s: float, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heard while the store is looked at, or right after.
    monkeypatch.setattr(session_module, "LOOK_S", look_s)
    store = MemoryStore()
    run = make_run(store, [{"job_id": "a", "prompt": "sea", "num_chunks": 2}])
    control.request(store, run.run_id, wish)
    outcome = render_locally(store, run)
    assert (outcome.state, outcome.stages_rendered) == (state, 0)
    assert not list(store.list("texts/"))
