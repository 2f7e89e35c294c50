"""Who drives a run: what a driver makes of a lease that it could not keep beating."""

from __future__ import annotations

import pytest
from runs import MakeRun

from magi_ray.errors import StoreError, Superseded
from magi_ray.render.driving import requests as control
from magi_ray.render.driving.leadership import Leadership
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.scheduler import RunState
from magi_ray.render.driving.timings import Timings
from magi_ray.storage import keys
from magi_ray.storage.epochs import become_driver, take_epoch
from magi_ray.storage.leases import TTL_S
from magi_ray.storage.memory import MemoryStore
from magi_ray.system import Owner, System


class OtherTime(System):
    now = 0.0

    def clock(self) -> float:
        return self.now


def test_a_driver_whose_lease_ran_out_in_an_outage_goes_on_until_another_has_come() -> None:
    """A store that was away for longer than a lease holds, but not for longer than the patience, ended every run."""
    store, system = MemoryStore(), OtherTime()
    lease = become_driver(store, "film", Owner.here("driver"), system=system)
    leadership = Leadership(store, "film", lease, system)
    system.now = 2 * TTL_S
    assert not lease.valid
    leadership.check()
    assert store.exists(keys.run_lease("film"))
    take_epoch(store, "film", Owner.here("another"))
    with pytest.raises(Superseded, match="Another driver has taken over run film"):
        leadership.check()


def test_a_driver_does_not_render_into_a_store_from_which_its_run_was_deleted() -> None:
    store, system = MemoryStore(), OtherTime()
    lease = become_driver(store, "film", Owner.here("driver"), system=system)
    leadership = Leadership(store, "film", lease, system)
    for key in list(store.list("")):
        store.delete(key)
    with pytest.raises(Superseded):
        lease.beat()
    with pytest.raises(StoreError, match="Run film is gone from memory:"):
        leadership.check()


@pytest.mark.parametrize(("wish", "state"), [("pause", RunState.PAUSED), ("cancel", RunState.CANCELLED)])
@pytest.mark.parametrize("look_s", [0.0, 3600.0])
def test_a_run_that_is_to_stop_does_not_begin(
    wish: control.Request, state: RunState, look_s: float, make_run: MakeRun
) -> None:
    store = MemoryStore()
    run = make_run(store, [{"job_id": "a", "prompt": "sea", "num_chunks": 2}])
    control.request(store, run.run_id, wish)
    # Heard while the store is looked at, or right after.
    outcome = render_locally(store, run, timings=Timings(requests_s=look_s))
    assert (outcome.state, outcome.stages_rendered) == (state, 0)
    assert not list(store.list("texts/"))
