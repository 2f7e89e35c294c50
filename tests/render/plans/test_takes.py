"""Takes: a row rendered once more from a chunk on, beside what was committed before."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import MakeRun, contents

from magi_ray.errors import InputError, ObjectDamaged
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.driving.local import render_locally
from magi_ray.render.plans.identity import Digests
from magi_ray.render.plans.row_plan import RowPlan, plan_row
from magi_ray.render.plans.takes import add_take, read_takes
from magi_ray.render.runs.record import open_run, with_takes
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import seal

ROWS = [{"job_id": "a", "prompt": "sea", "num_chunks": 4}, {"job_id": "b", "prompt": "hills", "num_chunks": 1}]


def planned(settings: Settings, *takes: int) -> RowPlan:
    [row] = manifest_of([{"job_id": "a", "prompt": "sea", "num_chunks": 6}], Defaults.of(settings), base=Path("/")).rows
    return plan_row(row, settings, Digests(dit="d", vae="v", t5="t", special_tokens="s"), None, takes)


def test_takes_are_numbered_and_read_in_the_order_they_were_asked_for() -> None:
    store = MemoryStore()
    asked = [("a", 2), ("b", 0), ("a", 1)]
    assert [add_take(store, "run", job, chunk, num_chunks=4) for job, chunk in asked] == [1, 2, 3]
    assert read_takes(store, "run") == {"a": (2, 1), "b": (0,)}
    assert read_takes(store, "another") == {}


def test_a_number_that_somebody_else_took_meanwhile_is_left_to_them() -> None:
    class Raced(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if key == keys.take("run", 1):
                super().put_if_absent(key, seal({"format": 1, "job_id": "theirs", "from_chunk": 0}))
            return super().put_if_absent(key, data)

    store = Raced()
    assert add_take(store, "run", "ours", 3, num_chunks=4) == 2
    assert read_takes(store, "run") == {"theirs": (0,), "ours": (3,)}


@pytest.mark.parametrize("chunk", [-1, 4])
def test_a_take_from_a_chunk_that_is_not_there_is_refused_with_those_that_are(chunk: int) -> None:
    store = MemoryStore()
    with pytest.raises(InputError, match=f"Job a has no chunk {chunk}: it has 4, numbered from 0 to 3"):
        add_take(store, "run", "a", chunk, num_chunks=4)
    assert list(store.list("")) == []


def test_a_take_of_a_newer_format_is_refused() -> None:
    store = MemoryStore()
    store.put(keys.take("run", 1), seal({"format": 2, "job_id": "a", "from_chunk": 0}))
    with pytest.raises(InputError, match="Take 1 of run run has format 2, but this magi-ray reads up to 1"):
        read_takes(store, "run")


def test_a_damaged_take_is_named() -> None:
    store = MemoryStore()
    add_take(store, "run", "a", 2, num_chunks=4)
    store.put(keys.take("run", 1), store.get(keys.take("run", 1)).replace(b"2", b"1", 1))
    with pytest.raises(ObjectDamaged, match="Take 1 of run run in memory: is damaged"):
        read_takes(store, "run")


def test_a_take_changes_the_stages_from_its_chunk_on_and_each_one_changes_them_again(settings: Settings) -> None:
    plans = [planned(settings), planned(settings, 2), planned(settings, 2, 4), planned(settings, 2, 4, 3)]
    for n, first in enumerate((2, 4, 3), start=1):
        assert plans[n].stage_keys[:first] == plans[n - 1].stage_keys[:first]
        assert not set(plans[n].stage_keys[first:]) & {key for earlier in plans[:n] for key in earlier.stage_keys}
    assert "take" not in plans[1].pre_image(1)["entering"]
    assert [plans[3].pre_image(chunk)["entering"]["take"] for chunk in (2, 3, 4, 5)] == [1, 2, 3, 3]


def test_a_row_retried_from_chunk_2_reuses_what_is_before_and_gives_the_same_bytes(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    render_locally(store, run)
    first = contents(store, run)
    committed = {key: store.get(key) for key in store.list("") if not key.startswith("runs/")}

    add_take(store, run.run_id, "a", 2, num_chunks=run.plans["a"].timeline.num_chunks)
    again = open_run(store, run.run_id)
    assert again.plans["b"] == run.plans["b"]
    outcome = render_locally(store, again)
    stages = run.plans["a"].timeline.num_stages
    assert (outcome.stages_rendered, outcome.published) == (stages - 2, ("a", "b"))
    assert contents(store, again) == first
    assert {key: store.get(key) for key in committed} == committed
    new = [key for key in store.list("stages/") if key.endswith("commit.json") and key not in committed]
    assert sorted(new) == sorted(keys.commit("stage", key) for key in again.plans["a"].stage_keys[2:])


def test_a_manifest_submitted_again_goes_on_with_the_takes_of_its_run(make_run: MakeRun) -> None:
    store = MemoryStore()
    add_take(store, make_run(store, ROWS).run_id, "a", 2, num_chunks=4)
    prepared = make_run(store, ROWS)
    assert prepared.plans["a"].takes == ()
    assert with_takes(store, prepared).plans == open_run(store, prepared.run_id).plans
    assert with_takes(store, prepared).plans["a"].takes == (2,)
