"""How far a run is and its state, whether or not anybody renders it. Without torch, Ray or ffmpeg."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pyarrow import ArrowException, BufferReader, parquet

from magi_ray.drivers.driver_monitor import Driver, find_driver
from magi_ray.errors import ObjectDamaged, ObjectMissing, Problem
from magi_ray.render.artifacts.videos import published
from magi_ray.render.driving import requests
from magi_ray.render.driving.inventory import take_inventory_of_run
from magi_ray.render.driving.progress import Phase, RunProgress
from magi_ray.render.driving.reports import ReportedProgress, read_failures, read_progress
from magi_ray.render.runs.record import Run, open_run
from magi_ray.storage import keys
from magi_ray.storage.records import read_record
from magi_ray.storage.store import Store
from magi_ray.system import local_time

# The states that people see; a driver needs fewer (``RunState``).
State = Literal[
    "new", "rendering", "pausing", "cancelling", "paused", "cancelled", "broken", "stopped", "failed", "done"
]  # fmt: skip
_WHILE_DRIVEN: dict[requests.Request | None, State] = {None: "rendering", "pause": "pausing", "cancel": "cancelling"}
_AT_REST: dict[requests.Request, State] = {"pause": "paused", "cancel": "cancelled"}


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """``driver``: the process that renders the run now, if any.  ``problems``: of the rows that were left out."""

    progress: RunProgress
    state: State
    driver: Driver | None
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        driver = None if self.driver is None else self.driver.as_json()
        problems = [asdict(problem) for problem in self.problems]
        return self.progress.as_json() | {"state": self.state, "driver": driver, "problems": problems}


def run_status(store: Store, run: Run, driver: Driver | None) -> RunStatus:
    """While ``run`` is rendered, its driver's report is newest; otherwise the store is asked what it holds."""
    reported = read_progress(store, run.run_id)
    if driver is not None and reported is not None:
        progress = reported.progress
    else:
        progress = _progress_at_rest(store, run, reported)
    left = len(progress.videos) - progress.count(Phase.DONE)
    failed, left_out = progress.count(Phase.FAILED), run.record.left_out
    state = state_of(store, run.run_id, driver, reported, left=left, failed=failed, left_out=left_out)
    return RunStatus(progress=progress, state=state, driver=driver, problems=run.record.problems)


def run_summary(store: Store, run_id: str) -> dict[str, Any]:
    """A run in one line. Without its plans, unless takes were asked for: a video counts as done if it and its record
    exist.

    Raises ObjectDamaged if its record or manifest cannot be read.
    """
    record = read_record(store.get(keys.run_record(run_id)))
    try:
        manifest = parquet.ParquetFile(BufferReader(store.get(keys.run_manifest(run_id))))
        written = manifest.read(["job_id"], use_threads=False)["job_id"].to_pylist()
        submitted, settings = float(record["created_unix"]), str(record["settings"]["name"])
    except (ObjectMissing, OSError, ArrowException, KeyError, TypeError, ValueError) as exc:
        raise ObjectDamaged("its manifest is gone" if isinstance(exc, ObjectMissing) else "it cannot be read") from exc
    left_out = {problem["row"] for problem in record.get("problems", ())}
    jobs = {job_id for number, job_id in enumerate(written, 1) if number not in left_out}
    found = set(store.list(keys.videos(run_id)))
    done = {job_id for job_id in jobs if {keys.video(run_id, job_id), keys.video_record(run_id, job_id)} <= found}
    if any(store.list(keys.takes(run_id))):
        plans = open_run(store, run_id).plans
        done = {job_id for job_id in done if published(store, run_id, plans[job_id]) is not None}
    driver, reported = find_driver(store, run_id), read_progress(store, run_id)
    left, failed = len(jobs - done), len(read_failures(store, run_id, jobs - done))
    return {
        "run_id": run_id,
        "submitted": local_time(submitted),
        "videos": len(written),
        "done": len(done),
        "failed": failed + len(left_out),
        "state": state_of(store, run_id, driver, reported, left=left, failed=failed, left_out=len(left_out)),
        "settings": settings,
    }


def state_of(
    store: Store,
    run_id: str,
    driver: Driver | None,
    reported: ReportedProgress | None,
    *,
    left: int,
    failed: int,
    left_out: int,
) -> State:
    """The run in one word. The report of a driver that is gone may still say that it renders.

    reported: what the last driver wrote.  left: how many videos are not done.  failed: how many of these have
    failed.  left_out: how many rows were left out at submission.
    """
    wanted = requests.requested(store, run_id)
    if driver is not None:
        return _WHILE_DRIVEN[wanted]
    if left == failed:
        return "failed" if failed or left_out else "done"
    if wanted is not None:
        return _AT_REST[wanted]
    if reported is None:
        return "new"
    return "broken" if reported.state == "broken" else "stopped"


def _progress_at_rest(store: Store, run: Run, reported: ReportedProgress | None) -> RunProgress:
    """What the store holds, with the failures that were reported.

    The keys of segments need the identity of the run's ffmpeg, which this machine may lack: their number is taken from
    the last report.
    """
    rows = take_inventory_of_run(store, run, None)
    progress = RunProgress.of(run.run_id, rows, {job_id: plan.forwards_per_stage for job_id, plan in run.plans.items()})
    before = {} if reported is None else reported.progress.videos
    if reported is not None:
        progress.times = replace(reported.progress.times, left_s=None)
    for video in progress.videos.values():
        if video.phase is not Phase.DONE and video.job_id in before:
            clean = max(0, video.stages_done - (video.stages - video.chunks))
            video.chunks_done = min(clean, before[video.job_id].chunks_done)
    for job_id, failure in read_failures(store, run.run_id, run.plans).items():
        if progress.videos[job_id].phase is not Phase.DONE:
            progress.note(failure)
    return progress
