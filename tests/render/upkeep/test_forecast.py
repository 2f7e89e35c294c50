"""What a submission will do with each row, why, and that it does exactly that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from runs import MakeRun

from magi_ray.errors import NumericError
from magi_ray.events import StageCommitted, StepDone
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.artifacts.provenance import device_name
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.pace import Speed, cost_digest
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import Run, open_run
from magi_ray.render.tasks.decode import Decoder
from magi_ray.render.tasks.denoise import Denoiser
from magi_ray.render.upkeep.forecast import Forecast, forecast
from magi_ray.settings import Settings, override
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

SCHEDULE = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 2, "prompt": "storm"}]
ROW: dict[str, Any] = {"job_id": "a", "schedule": SCHEDULE, "num_chunks": 4}
ROWS: list[dict[str, Any]] = [
    ROW, {"job_id": "b", "prompt": "hills", "num_chunks": 2}, {"job_id": "c", "prompt": "dunes", "num_chunks": 1},
]  # fmt: skip
STORM = {"schedule": [SCHEDULE[0], {"start_chunk": 2, "prompt": "calm"}]}


class Killed(BaseException):
    """Nothing may catch it and go on, as nothing catches SIGKILL."""


class Watch:
    """Counts the forwards of each job; kills the render when ``kill_at`` commits of stages have been reported."""

    def __init__(self) -> None:
        self.forwards: Counter[str] = Counter()
        self.commits, self.kill_at = 0, 0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watched, render = Watch(), Denoiser.carry_out

    def counting(self: Denoiser, *args: Any, **kwargs: Any) -> Iterator[StepDone | StageCommitted]:
        for happened in render(self, *args, **kwargs):
            yield happened
            if isinstance(happened, StepDone):
                watched.forwards[happened.job_id] += 1
                continue
            watched.commits += 1
            if watched.commits == watched.kill_at:
                raise Killed

    monkeypatch.setattr(Denoiser, "carry_out", counting)
    return watched


def told(store: MemoryStore, run: Run) -> dict[str, Forecast]:
    before = {key: store.get(key) for key in store.list("")}
    found = forecast(store, run, encoder_identity(find_ffmpeg()))
    assert {key: store.get(key) for key in store.list("")} == before
    assert [row.job_id for row in found] == list(run.plans)
    return {row.job_id: row for row in found}


def comes_true(store: MemoryStore, run: Run, watch: Watch) -> dict[str, Forecast]:
    """The forecast of ``run``, once rendering has computed just as many forwards as it said for each row."""
    expected = told(store, run)
    watch.forwards.clear()
    assert not render_locally(store, run).failed
    assert watch.forwards == Counter({job_id: row.forwards_left for job_id, row in expected.items()})
    assert {row.what for row in told(store, run).values()} == {"reuse"}
    return expected


def summary(row: Forecast) -> tuple[str, int, tuple[str, ...]]:
    return row.what, row.stages_left, row.reasons


def remove(store: MemoryStore, run: Run, *prefixes: str) -> None:
    """As if nothing under these had been written, nor the videos joined."""
    for prefix in (keys.videos(run.run_id), *prefixes):
        for key in list(store.list(prefix)):
            store.delete(key)


NEW = "new: no video of that job_id was rendered before"
KNOWS = "(the last chunks of a video know how much is left)"


def test_what_was_never_rendered_is_new_and_costs_every_stage(make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    found = comes_true(store, make_run(store, ROWS), watch)
    # 4 chunks in windows of 4 are 7 stages, of 8 / 4 steps each.
    assert found["a"] == Forecast(
        job_id="a", what="render", reasons=("0 of 7 stages are there: the run stopped before its end",),
        frames=96, clip=None, stages=7, stages_left=7, forwards_left=14, left_s=None,
        space_left=found["a"].space_left,
    )  # fmt: skip


def test_the_time_of_a_plan_comes_from_earlier_runs_of_such_rows_on_this_kind_of_device(make_run: MakeRun) -> None:
    store = MemoryStore()
    earlier = make_run(store, ROWS[2:])
    here = Speed(settings=cost_digest(earlier.plans["c"]), device=device_name("cpu"), chunks=2, seconds=80)
    others = here.model_copy(update={"device": "NVIDIA H200"}), here.model_copy(update={"settings": "0" * 64})

    def measured(*speeds: Speed) -> None:
        content = {"run_id": earlier.run_id, "videos": [], "running": False, "speeds": [s.model_dump() for s in speeds]}
        store.put(keys.run_progress(earlier.run_id), json.dumps(content).encode())

    large = {"job_id": "large", "prompt": "sea", "width": 64}
    run = make_run(store, [{**ROW, "fps": 12, "seed": 5}, ROWS[1], large])
    measured(*others)
    assert {row.left_s for row in told(store, run).values()} == {None}, "other settings, another device"
    measured(here, *others)
    found = told(store, run)
    assert (found["a"].left_s, found["b"].left_s, found["large"].left_s) == (4 * 40, 2 * 40, None)
    assert not render_locally(store, make_run(store, ROWS[1:2])).failed
    assert told(store, run)["b"].left_s == 0, "its stages are there"


def test_a_store_that_is_not_there_yet_holds_nothing(make_run: MakeRun) -> None:
    run = make_run(MemoryStore(), ROWS)
    assert {summary(row) for row in told(MemoryStore(), run).values()} == {
        ("render", 7, (NEW,)), ("render", 5, (NEW,)), ("render", 4, (NEW,)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "what", "left", "reason"),
    [
        (STORM, "resume at stage 3", 5, 'prompt of chunks 2 to 3: "storm" → "calm"'),
        ({"seed": 7}, "render", 7, "seed 1234 → 7"),
        ({"num_steps": 4}, "render", 7, "num_steps 8 → 4"),
        ({"num_chunks": None, "seconds": 5}, "render", 8, f"longer: 4 → 5 chunks {KNOWS}"),
        ({"num_chunks": 6}, "render", 9, f"longer: 4 → 6 chunks {KNOWS}"),
        ({"num_chunks": 3}, "render", 6, f"shorter: 4 → 3 chunks {KNOWS}"),
    ],
)
def test_an_edited_row_renders_from_its_first_changed_stage_and_the_others_are_reused(
    edit: dict[str, Any], what: str, left: int, reason: str, make_run: MakeRun, watch: Watch
) -> None:
    store = MemoryStore()
    render_locally(store, make_run(store, ROWS))
    found = comes_true(store, make_run(store, [ROW | edit, *ROWS[1:]]), watch)
    assert summary(found["a"]) == (what, left, (reason,))
    assert {summary(found[job]) for job in "bc"} == {("reuse", 0, ("all of it is in the store, only to be joined",))}


def test_a_long_video_made_longer_keeps_what_knew_only_that_much_is_left(make_run: MakeRun, watch: Watch) -> None:
    store, row = MemoryStore(), {"job_id": "long", "prompt": "sea", "num_chunks": 11, "num_steps": 4}
    render_locally(store, make_run(store, [row]))
    found = comes_true(store, make_run(store, [row | {"num_chunks": 12}]), watch)
    # The chunks 0 to 3 of 11 have 7 or more behind them, which is as far as a chunk knows.
    assert summary(found["long"]) == ("resume at stage 5", 11, (f"longer: 11 → 12 chunks {KNOWS}",))


@pytest.mark.parametrize("commits", [1, 4, 6])
def test_a_killed_run_goes_on_where_it_stopped(commits: int, make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    watch.kill_at = commits
    with pytest.raises(Killed):
        render_locally(store, run)
    found = comes_true(store, run, watch)
    assert summary(found["a"]) == (
        f"resume at stage {commits + 1}",
        7 - commits,
        (f"{commits} of 7 stages are there: the run stopped before its end",),
    )


def test_an_edit_of_a_row_that_stopped_early_names_both(make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    watch.kill_at = 1
    with pytest.raises(Killed):
        render_locally(store, make_run(store, [ROW]))
    edited = make_run(store, [ROW | STORM])
    stopped, change = (
        "1 of 7 stages are there: the run stopped before its end", 'prompt of chunks 2 to 3: "storm" → "calm"',
    )  # fmt: skip
    assert summary(told(store, edited)["a"]) == ("resume at stage 2", 6, (stopped, change))
    # Once it has been rendered beyond the edit, that is no reason any more.
    watch.kill_at = 1 + 3
    with pytest.raises(Killed):
        render_locally(store, edited)
    found = comes_true(store, edited, watch)
    assert summary(found["a"]) == (
        "resume at stage 5", 3, ("4 of 7 stages are there: the run stopped before its end",),
    )  # fmt: skip


def test_a_take_is_named_until_it_has_begun(make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    add_take(store, run.run_id, "a", 2, num_chunks=4)
    again = open_run(store, run.run_id)
    assert summary(told(store, again)["a"]) == ("resume at stage 3", 5, ("take 2 from chunk 2 on was asked for",))
    comes_true(store, again, watch)
    add_take(store, run.run_id, "a", 3, num_chunks=4)
    found = comes_true(store, open_run(store, run.run_id), watch)
    assert summary(found["a"]) == ("resume at stage 4", 4, ("take 3 from chunk 3 on was asked for",))


@pytest.mark.parametrize("damage", ["alter", "empty", "delete"])
def test_a_damaged_or_missing_stage_is_named_and_rendered_alone(damage: str, make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    remove(store, run, "segments/")
    # Stage 5 completes chunk 1, which has to be decoded.
    folder = keys.commit_folder("stage", run.plans["a"].stage_keys[4])
    [payload] = list(store.list(folder + "chunk"))
    match damage:
        case "alter":
            store.put(payload, store.get(payload)[:-1] + b"?")
        case "empty":
            store.put(folder + "commit.json", b"")
        case "delete":
            store.delete(folder + "commit.json")
    found = comes_true(store, run, watch)
    reason = "stage 5 is gone from the store" if damage == "delete" else "stage 5 is damaged in the store"
    assert summary(found["a"]) == ("resume at stage 5", 1, (reason,))


def test_damaged_captions_are_embedded_again_and_nothing_is_denoised(make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    watch.kill_at = 6
    with pytest.raises(Killed):
        render_locally(store, run)
    [damaged, *_] = [key for key in store.list("texts/") if not key.endswith("commit.json")]
    store.put(damaged, b"")
    found = comes_true(store, run, watch)
    assert summary(found["a"])[:2] == ("resume at stage 7", 1)


def test_stages_that_rows_have_in_common_are_computed_for_the_first_of_them(make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    rows = [ROW | {"job_id": "late"} | STORM, ROW | {"job_id": "again"}, ROW | {"job_id": "first", "priority": 1}]
    found = comes_true(store, make_run(store, rows), watch)
    stopped = "0 of 7 stages are there: the run stopped before its end"
    assert summary(found["first"]) == ("render", 7, (stopped,))
    assert summary(found["late"]) == ("resume at stage 3", 5, ("2 of its stages are computed for first", stopped))
    assert summary(found["again"]) == ("decode and join", 0, ("7 of its stages are computed for first", stopped))


def test_a_row_that_failed_is_left_to_retry(make_run: MakeRun, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "carry_out", refuse_b(Decoder.carry_out))
        assert [failed.job_id for failed in render_locally(store, run).failed] == ["b"]
    expected = told(store, run)
    assert summary(expected["b"]) == (
        "leave failed", 0, ("failed before (numeric), `retry` tries again: chunk 0 is black",),
    )  # fmt: skip
    watch.forwards.clear()
    assert [failed.job_id for failed in render_locally(store, run).failed] == ["b"]
    assert not watch.forwards


Decode = Callable[[Decoder, RowPlan, int], Iterator[StepDone | StageCommitted]]


def refuse_b(decode: Decode) -> Decode:
    def refuse(self: Decoder, plan: RowPlan, chunk: int) -> Iterator[StepDone | StageCommitted]:
        if plan.job_id == "b":
            raise NumericError(f"chunk {chunk} is black\nin every pixel")
        return decode(self, plan, chunk)

    return refuse


def test_segments_that_are_missing_are_decoded_alone(make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    remove(store, run)
    commits = [key for key in store.list("segments/") if key.endswith("/commit.json")]
    store.delete(commits[0])
    found = comes_true(store, run, watch)
    assert summary(found["a"]) == (
        "decode and join", 0, ("3 of 4 segments are there: the run stopped before its end",),
    )  # fmt: skip
    remove(store, run)
    store.put(commits[0], b"")
    [reason] = comes_true(store, run, watch)["a"].reasons
    assert reason.startswith("the segment of chunk ")
    assert reason.endswith(" is damaged in the store")


@pytest.mark.parametrize(
    ("columns", "change", "reason"),
    [
        ({"fps": 30}, {}, "fps 24 → 30: segments are encoded anew"),
        ({}, {"encoder": {"crf": 30}}, "encoder.crf 18 → 30: segments are encoded anew"),
        ({}, {"tiles": {"overlap": 0.5}}, "tiles.overlap 0.25 → 0.5: segments are encoded anew"),
    ],
)
def test_what_concerns_segments_alone_reuses_all_stages(
    columns: dict[str, Any], change: dict[str, Any], reason: str, settings: Settings, make_run: MakeRun, watch: Watch
) -> None:
    store = MemoryStore()
    render_locally(store, make_run(store, [ROW]))
    found = comes_true(store, make_run(store, [ROW | columns], settings=override(settings, change)), watch)
    assert summary(found["a"]) == ("decode and join", 0, (reason,))


def test_a_renamed_job_at_another_frame_rate_reuses_all_stages(make_run: MakeRun) -> None:
    store = MemoryStore()
    render_locally(store, make_run(store, [ROW]))
    found = told(store, make_run(store, [ROW | {"job_id": "z", "fps": 30}]))
    assert summary(found["z"]) == ("decode and join", 0, ("fps 24 → 30: segments are encoded anew",))


def test_segments_of_another_ffmpeg_are_told_as_such(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    changed = make_run(store, [ROW | {"tags": {"x": "y"}}])
    ours = encoder_identity(find_ffmpeg())
    [row] = forecast(store, changed, "ffmpeg 99")
    assert summary(row) == ("decode and join", 0, (f"encoder {ours} → ffmpeg 99: segments are encoded anew",))


def test_an_edit_that_also_changes_the_frame_rate_says_that_nothing_is_kept_encoded(make_run: MakeRun) -> None:
    store, row = MemoryStore(), ROW | {"num_chunks": 6}
    render_locally(store, make_run(store, [row]))
    schedule = [*SCHEDULE, {"start_chunk": 5, "prompt": "night"}]
    found = told(store, make_run(store, [row | {"schedule": schedule, "fps": 30}]))
    assert summary(found["a"]) == (
        "resume at stage 6", 4, ('prompt of chunk 5: "storm" → "night"', "fps 24 → 30: segments are encoded anew"),
    )  # fmt: skip


def test_a_job_that_was_renamed_begins_as_the_other_did(make_run: MakeRun, watch: Watch) -> None:
    store = MemoryStore()
    first = make_run(store, [ROW])
    render_locally(store, first)
    found = comes_true(store, make_run(store, [ROW | {"job_id": "z"} | STORM]), watch)
    assert summary(found["z"]) == (
        "resume at stage 3", 5,
        (f"{NEW}; it begins as a of run {first.run_id}", 'prompt of chunks 2 to 3: "storm" → "calm"'),
    )  # fmt: skip


def test_of_several_earlier_runs_the_one_that_shares_most_is_compared(make_run: MakeRun) -> None:
    clock = iter(range(10**9))
    store = MemoryStore(clock=lambda: float(next(clock)))
    for edit in ({}, {"seed": 7}, {"seed": 8}):
        make_run(store, [ROW | edit])
    render_locally(store, make_run(store, [ROW]))
    [reason] = told(store, make_run(MemoryStore(), [ROW | STORM]))["a"].reasons
    assert reason == 'prompt of chunks 2 to 3: "storm" → "calm"'


def test_of_earlier_runs_that_share_equally_much_the_newest_is_compared(make_run: MakeRun) -> None:
    clock = iter(range(10**9))
    store = MemoryStore(clock=lambda: float(next(clock)))
    for seed in (7, 8):
        make_run(store, [ROW | {"seed": seed}])
    assert told(store, make_run(MemoryStore(), [ROW | {"seed": 9}]))["a"].reasons == ("seed 8 → 9",)


@pytest.mark.parametrize("submitted", [True, False])
def test_it_makes_no_difference_whether_the_edit_was_submitted_already(submitted: bool, make_run: MakeRun) -> None:
    store = MemoryStore()
    render_locally(store, make_run(store, ROWS))
    edited = make_run(store if submitted else MemoryStore(), [ROW | STORM, *ROWS[1:]])
    assert summary(told(store, edited)["a"])[2] == ('prompt of chunks 2 to 3: "storm" → "calm"',)


def test_an_earlier_run_that_cannot_be_read_explains_nothing_and_stops_nothing(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    store.put(keys.run_record(run.run_id), b"{")
    found = told(store, make_run(MemoryStore(), [ROW | STORM]))
    assert summary(found["a"])[:2] == ("resume at stage 3", 5)
    assert found["a"].reasons == (f"{NEW}; 2 of 7 stages are those of another",)
