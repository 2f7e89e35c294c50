"""Takes: a row rendered once more from a chunk on, beside what was committed before."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import MakeRun, contents

from magi_ray.errors import InputError, ObjectDamaged
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.driving.inventory import stages_committed
from magi_ray.render.driving.local import render_locally
from magi_ray.render.plans.identity import Digests
from magi_ray.render.plans.row_plan import RowPlan, plan_row
from magi_ray.render.plans.takes import BackTo, Wish, add_take, bring_back, list_takes, read_takes, take_in_use
from magi_ray.render.runs.record import open_run, with_takes
from magi_ray.render.tasks import denoise_network
from magi_ray.render.upkeep.gc import collect, garbage
from magi_ray.render.upkeep.verify import verify
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import seal
from magi_ray.system import System

ROWS = [{"job_id": "a", "prompt": "sea", "num_chunks": 4}, {"job_id": "b", "prompt": "hills", "num_chunks": 1}]


def planned(settings: Settings, *takes: Wish) -> RowPlan:
    [row] = manifest_of([{"job_id": "a", "prompt": "sea", "num_chunks": 6}], Defaults.of(settings), base=Path("/")).rows
    return plan_row(row, settings, Digests(dit="d", vae="v", t5="t", special_tokens="s"), None, takes)


def test_takes_are_numbered_and_read_in_the_order_they_were_asked_for() -> None:
    store = MemoryStore()
    asked = [("a", 2), ("b", 0), ("a", 1)]
    # Take 1 is what was rendered first.
    assert [add_take(store, "run", job, chunk, num_chunks=4) for job, chunk in asked] == [2, 2, 3]
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
    store.put(keys.take("run", 1), seal({"format": 3, "job_id": "a", "from_chunk": 0}))
    with pytest.raises(InputError, match="Take 1 of run run has format 3, but this magi-ray reads up to 2"):
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


def test_a_take_brought_back_has_its_own_keys_and_what_is_asked_for_then_has_new_ones(settings: Settings) -> None:
    one, two, three = planned(settings), planned(settings, 2), planned(settings, 2, 3)
    assert planned(settings, 2, 3, BackTo(1)).stage_keys == one.stage_keys
    assert planned(settings, 2, 3, BackTo(2)).stage_keys == two.stage_keys
    assert planned(settings, 2, 3, BackTo(1), BackTo(3)).stage_keys == three.stage_keys
    # From the same chunk of the same take, but not the take that was rendered then.
    again = planned(settings, 2, BackTo(1), 2)
    assert again.stage_keys[:2] == one.stage_keys[:2]
    assert not set(again.stage_keys[2:]) & {*one.stage_keys, *two.stage_keys}
    other = planned(settings, 4, BackTo(1), 3, BackTo(2), 4, BackTo(3), 4)
    every = [planned(settings, *other.takes[:count]).stage_keys for count in range(len(other.takes))]
    assert not set(other.stage_keys[4:]) & {key for stage_keys in every for key in stage_keys}
    assert other.stage_keys[:4] == planned(settings, 4, BackTo(1), 3).stage_keys[:4]
    assert [take_in_use(p.takes) for p in (one, two, again, other)] == [1, 2, 3, 5]


def test_takes_are_listed_with_what_they_begin_from_and_when_they_were_asked_for() -> None:
    class Noon(System):
        def unix_time(self) -> float:
            return 12.0

    store = MemoryStore()
    store.put(keys.take("run", 1), seal({"format": 1, "job_id": "a", "from_chunk": 2}))  # before it was noted when
    bring_back(store, "run", "a", 1, system=Noon())
    assert add_take(store, "run", "a", 3, num_chunks=4, system=Noon()) == 3
    store.put("runs/run/takes/.DS_Store", b"")
    listed = list_takes(store, "run", ["a"], submitted_unix=1.0)["a"]
    assert [(take.number, take.from_chunk, take.base, take.asked_unix) for take in listed] == [
        (1, None, None, 1.0), (2, 2, 1, None), (3, 3, 1, 12.0),
    ]  # fmt: skip
    assert listed[-1].wishes == read_takes(store, "run")["a"] == (2, BackTo(1), 3)
    for take in (0, 4):
        with pytest.raises(InputError, match=f"Job a has no take {take}: it has 3, numbered from 1"):
            bring_back(store, "run", "a", take)


def test_an_earlier_take_comes_back_to_its_bytes_without_a_forward_unless_its_stages_were_collected(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    render_locally(store, run)
    first = contents(store, run)
    add_take(store, run.run_id, "a", 2, num_chunks=4)
    with monkeypatch.context() as patch:  # else a take has the same bytes again
        noise = denoise_network.chunk_noise
        patch.setattr(denoise_network, "chunk_noise", lambda **given: noise(**{**given, "seed": 99}))
        second_run = open_run(store, run.run_id)
        render_locally(store, second_run)
    second = contents(store, second_run)
    assert second["a.mp4"] != first["a.mp4"]

    for take, expected in ((1, first), (2, second), (1, first)):
        bring_back(store, run.run_id, "a", take)
        back = open_run(store, run.run_id)
        outcome = render_locally(store, back)
        assert (outcome.stages_rendered, outcome.failed) == (0, ())
        assert contents(store, back) == expected
    again = with_takes(store, make_run(store, ROWS))
    assert render_locally(store, again).stages_rendered == 0

    # Garbage collection keeps what the take in use needs, as before; what it took is rendered again.
    plan = run.plan(run.manifest.rows[0], (2,))
    assert stages_committed(store, plan) == len(plan.stage_keys)
    collect(store, garbage(store, min_age_s=0))
    assert not verify(store).damages
    assert stages_committed(store, plan) == 2
    assert contents(store, again) == first
    bring_back(store, run.run_id, "a", 2)
    outcome = render_locally(store, open_run(store, run.run_id))
    assert (outcome.stages_rendered, outcome.failed) == (len(plan.stage_keys) - 2, ())


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
