"""Runs on Ray: the same bytes as without it, whatever happens to the workers."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from on_ray import wait_until, working_actors
from runs import MakeRun, by_progress, contents, stage_commits

from magi_ray.cluster.actors import ACTORS, WorkerActor, on_concurrency_group
from magi_ray.cluster.workers import render_on_ray
from magi_ray.errors import FailureClass, MediaError, Superseded, WeightsError, WorkerLost
from magi_ray.events import Event, StageCommitted, Task, TaskKind, WorkerGone
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.reports import RunResult
from magi_ray.render.driving.scheduler import MAX_FAILED_STARTS, Command
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.driving.timings import Timings
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import Settings, override, preset
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore

MANIFESTS = Path(__file__).parents[2] / "manifests"
TEXT: dict[str, Any] = {"job_id": "text", "prompt": "sea", "num_chunks": 3}
IMAGE = {"job_id": "image", "prompt": "dusk", "image": str(MANIFESTS / "quickstart-image.png"), "num_chunks": 2}
VIDEO = {"job_id": "video", "prompt": "sails", "video": str(MANIFESTS / "quickstart-clip.mp4"), "num_chunks": 2}


@pytest.fixture(scope="module", autouse=True)
def workers_of_this_module(ray_here: None) -> Iterator[None]:
    """Ray sends the workers that are defined here along, since no other process can import this module."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(autouse=True)
def no_worker_is_left(ray_here: None) -> Iterator[None]:
    """Whether ``render_on_ray`` returns or raises."""
    yield
    wait_until(lambda: not working_actors(), "the workers are gone")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def undisturbed(make_run: MakeRun) -> Callable[[Sequence[dict[str, Any]]], dict[str, bytes]]:
    """What rows become without Ray."""

    def render(rows: Sequence[dict[str, Any]]) -> dict[str, bytes]:
        store = MemoryStore()
        run = make_run(store, rows)
        assert not render_locally(store, run).failed
        return contents(store, run)

    return render


def once(marker: Path) -> bool:
    """True for the first who asks, in whatever process."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def replaced(kind: TaskKind, actor: type[WorkerActor]) -> dict[TaskKind, type[WorkerActor]]:
    return {**ACTORS, kind: actor}


def dying(marker: Path) -> type[WorkerActor]:
    """A worker that is killed during its first task, as by ``kill -9``."""

    class Dying(WorkerActor):
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            if once(marker):
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().carry_out(plan, task, attempt)

    return Dying


def test_rows_become_the_same_bytes_as_without_ray(
    make_run: MakeRun, store: LocalStore, undisturbed: Callable[..., dict[str, bytes]]
) -> None:
    rows = [TEXT, IMAGE, VIDEO]
    run = make_run(store, rows)
    outcome = render_on_ray(store, run)
    assert outcome.published == ("text", "image", "video")
    assert contents(store, run) == undisturbed(rows)
    # And there is nothing left to do, not even a worker to start.
    again = render_on_ray(store, run)
    assert (again.stages_rendered, again.already_published) == (0, 3)


def test_several_decoders_share_the_chunks_and_change_no_byte(
    make_run: MakeRun,
    settings: Settings,
    store: LocalStore,
    undisturbed: Callable[..., dict[str, bytes]],
    tmp_path: Path,
) -> None:
    class Waiting(WorkerActor):
        @on_concurrency_group("work")
        def load(self) -> float:
            seconds = super().load()
            (tmp_path / self._worker.name).touch()
            while len(list(tmp_path.glob("decode-*"))) < 2:  # both are there before the first chunk is decoded
                time.sleep(0.05)
            return seconds

    run = make_run(store, [TEXT], settings=override(settings, {"decoders": 2}))
    assert run.run_id == make_run(MemoryStore(), [TEXT]).run_id
    actors = replaced(TaskKind.DECODE, Waiting)
    assert not render_on_ray(store, run, actors=actors, timings=Timings(load_s=60)).failed
    assert contents(store, run) == undisturbed([TEXT])


def test_a_denoise_worker_killed_in_mid_video_loses_nothing_that_was_committed(
    make_run: MakeRun, store: LocalStore, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    class Dying(WorkerActor):
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            for happened in super().carry_out(plan, task, attempt):
                yield happened
                if isinstance(happened, StageCommitted) and happened.stage == 2 and once(tmp_path / "died"):
                    kept = tmp_path / "kept"
                    shutil.copytree(tmp_path / "store" / "stages", kept)
                    os.kill(os.getpid(), signal.SIGKILL)

    run = make_run(store, [TEXT])
    outcome = render_on_ray(store, run, actors=replaced(TaskKind.DENOISE, Dying))
    assert not outcome.failed
    assert contents(store, run) == undisturbed([TEXT])
    kept = {f"stages/{path.relative_to(tmp_path / 'kept')}": path.read_bytes()
            for path in (tmp_path / "kept").glob("*/*/commit.json")}  # fmt: skip
    assert len(kept) >= 3
    assert kept.items() <= stage_commits(store).items()


def test_workers_killed_in_mid_task_are_replaced(
    make_run: MakeRun, store: LocalStore, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    killed = [TaskKind.EMBED, TaskKind.DECODE, TaskKind.FINISH]
    run = make_run(store, [TEXT])
    actors = {**ACTORS, **{kind: dying(tmp_path / kind) for kind in killed}}
    outcome = render_on_ray(store, run, actors=actors)
    assert all((tmp_path / kind).exists() for kind in killed)
    assert not outcome.failed
    assert contents(store, run) == undisturbed([TEXT])


def test_a_worker_that_stays_silent_is_killed_and_replaced(
    make_run: MakeRun, store: LocalStore, tmp_path: Path
) -> None:
    class Hanging(WorkerActor):
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            if once(tmp_path / "hung"):
                time.sleep(3600)
            yield from super().carry_out(plan, task, attempt)

    run = make_run(store, [TEXT])
    render_locally(store, run)
    # Only this is left to do, so that the deadline concerns nothing slow.
    store.delete(keys.video_record(run.run_id, "text"))
    timings = Timings(silence_s={**Timings().silence_s, TaskKind.FINISH: 4.0})
    outcome = render_on_ray(store, run, timings=timings, actors=replaced(TaskKind.FINISH, Hanging))
    assert (tmp_path / "hung").exists()
    assert outcome.published == ("text",)


def test_workers_that_spoke_while_the_driver_could_not_listen_are_not_taken_for_hung(
    make_run: MakeRun, store: LocalStore
) -> None:
    class Slow(WorkerActor):
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            time.sleep(1)
            yield from super().carry_out(plan, task, attempt)

    slept: list[float] = []

    def observe(progress: RunProgress) -> None:
        # Now a chunk is being decoded while others are denoised; and the store is out of reach, say.
        if progress.videos["text"].stages_done == 5 and not slept:
            slept.append(12.0)
            time.sleep(12)

    lost: list[Event] = []

    def note_lost(happened: Event | Command, _: RunProgress) -> None:
        if isinstance(happened, WorkerGone):
            lost.append(happened)

    timings = Timings(silence_s={**Timings().silence_s, TaskKind.DENOISE: 10.0, TaskKind.DECODE: 10.0})
    run = make_run(store, [TEXT | {"num_chunks": 8}])
    actors, observers = replaced(TaskKind.DECODE, Slow), [*by_progress(observe), note_lost]
    assert render_on_ray(store, run, timings=timings, actors=actors, observers=observers).published == ("text",)
    assert (slept, lost) == ([12.0], [])


def test_a_row_that_cannot_be_decoded_is_soon_not_denoised_any_more(make_run: MakeRun, store: LocalStore) -> None:
    class Unable(WorkerActor):
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            raise MediaError("ffmpeg cannot", remedy="Install another one.")
            yield

    class Slow(WorkerActor):
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            for happened in super().carry_out(plan, task, attempt):
                time.sleep(0.1)
                yield happened

    run = make_run(store, [TEXT | {"num_chunks": 60}])
    outcome = render_on_ray(store, run, actors=replaced(TaskKind.DECODE, Unable) | {TaskKind.DENOISE: Slow})
    [failed] = outcome.failed
    assert (failed.failure, failed.kind) == (FailureClass.INPUT, TaskKind.DECODE)
    assert failed.message.splitlines() == ["ffmpeg cannot", "Install another one."]
    assert len(stage_commits(store)) < run.plans["text"].timeline.num_stages


def test_weights_that_vanish_end_the_run_with_that_very_error(
    make_run: MakeRun, store: LocalStore, settings: Settings, tiny_weights: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(tiny_weights, weights)
    elsewhere = preset("magi-tiny", weights=weights).weights.model_dump()
    run = make_run(store, [TEXT], settings=override(settings, {"weights": elsewhere}))
    shutil.rmtree(weights / "magi")
    with pytest.raises(WeightsError) as raised:
        render_on_ray(store, run)
    assert str(weights) in raised.value.message
    assert raised.value.remedy


def test_a_worker_that_dies_while_loading_is_tried_a_few_times_only(
    make_run: MakeRun, store: LocalStore, tmp_path: Path
) -> None:
    class StillBorn(WorkerActor):
        @on_concurrency_group("work")
        def load(self) -> float:
            with (tmp_path / "starts").open("a") as starts:
                starts.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
            return 0.0

    run = make_run(store, [TEXT])
    with pytest.raises(WorkerLost, match=f"{MAX_FAILED_STARTS} embed workers failed to start"):
        render_on_ray(store, run, actors=replaced(TaskKind.EMBED, StillBorn))
    assert (tmp_path / "starts").read_text() == "x" * MAX_FAILED_STARTS


@pytest.mark.parametrize("take_over", [False, True])
def test_of_two_drivers_of_one_run_one_goes_on_and_the_other_stops(
    take_over: bool, make_run: MakeRun, store: LocalStore, undisturbed: Callable[..., dict[str, bytes]]
) -> None:
    row = TEXT | {"num_chunks": 40}
    run = make_run(store, [row])
    ends: dict[str, RunResult | Superseded] = {}

    def render(name: str, take_over: bool) -> None:
        try:
            ends[name] = render_on_ray(store, run, DriveOptions(take_over=take_over))
        except Superseded as exc:
            ends[name] = exc

    first = threading.Thread(target=render, args=("first", False), daemon=True)
    first.start()
    wait_until(lambda: stage_commits(store), "the first driver is at work")
    render("second", take_over)
    first.join(timeout=240)
    stopped, went_on = ("first", "second") if take_over else ("second", "first")
    assert isinstance(ends[stopped], Superseded)
    assert isinstance(ends[went_on], RunResult)
    assert contents(store, run) == undisturbed([row])


def test_an_observer_that_raises_ends_the_run_and_its_workers(make_run: MakeRun, store: LocalStore) -> None:
    run = make_run(store, [TEXT])

    def observe(progress: RunProgress) -> None:
        if progress.videos["text"].stages_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_on_ray(store, run, observers=by_progress(observe))
    assert stage_commits(store)
