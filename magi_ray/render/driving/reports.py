"""What a driver writes for users during a run and at its end: progress, results, errors.

Everything here can be lost without losing work; the truth is in the commits and the published videos.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from magi_ray.errors import FailureClass, MagiRayError, ObjectDamaged, ObjectMissing
from magi_ray.events import Event, Inspected, RowInventory, Task, TaskDone, TaskKind
from magi_ray.manifest import Row, explain
from magi_ray.render.artifacts.videos import published_video, read_video_record
from magi_ray.render.driving.pace import Pace, Speed
from magi_ray.render.driving.progress import Phase, RunProgress
from magi_ray.render.driving.scheduler import Command, RowFailed, RunState
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.storage import keys
from magi_ray.storage.opening import object_uri
from magi_ray.storage.records import json_object
from magi_ray.storage.retrying import SHUTDOWN_PATIENCE_S, with_patience
from magi_ray.storage.store import Store
from magi_ray.system import System

# With 100,000 rows a write takes seconds: about this share of the time goes into it, but one a minute there is.
SHARE, LONGEST_INTERVAL_S = 0.1, 60.0

# Called with every event and command, and the progress after it.
Observer = Callable[[Event | Command, RunProgress], None]

# sha256 to forwards_reused: as ``PublishedVideo``.  stages_reused: that this driver found in the store.
_RESULTS = pa.schema(
    [("job_id", pa.string()), ("status", pa.string()), ("video", pa.string()), ("sha256", pa.string()),
     ("frames", pa.int64()), ("fps", pa.int64()), ("width", pa.int64()), ("height", pa.int64()), ("seed", pa.int64()),
     ("duration_s", pa.float64()), ("render_seconds", pa.float64()), ("forwards_spent", pa.int64()),
     ("forwards_reused", pa.int64()), ("stages", pa.int64()), ("stages_reused", pa.int64()), ("error", pa.string())]
)  # fmt: skip
# task and index: what failed (decode 3: chunk 3).  stage: the first affected, none if finishing failed.  log: its file.
# A row that was left out at submission has a line for each problem: no task, but the column that is wrong.
_ERRORS = pa.schema(
    [("job_id", pa.string()), ("class", pa.string()), ("message", pa.string()), ("task", pa.string()),
     ("index", pa.int64()), ("stage", pa.int64()), ("attempts", pa.int64()), ("log", pa.string()),
     ("row", pa.int64()), ("column", pa.string())]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. stages_rendered counts what was computed now, stages_reused what was there before."""

    run_id: str
    state: RunState
    published: tuple[str, ...]
    failed: tuple[RowFailed, ...]
    stages_rendered: int
    stages_reused: int
    already_published: int


class RunReports:
    """Passes events and commands to ``observers``; writes ``progress.json`` and new errors, at most every
    ``interval_s`` seconds; ``close`` writes the tables.

    rows: what was in the store when the run began or went on.  earlier: failures not to be tried again.
    encoder: identity of the ffmpeg that makes its segments.
    """

    def __init__(
        self,
        store: Store,
        run: Run,
        rows: Sequence[RowInventory],
        *,
        earlier: Mapping[str, RowFailed],
        observers: Sequence[Observer] = (),
        encoder: str | None = None,
        interval_s: float = 1.0,
        system: System = System(),
    ) -> None:
        self._store, self._run = store, run
        self._observers, self._interval_s, self._system = observers, interval_s, system
        self._failed = {row.job_id: earlier[row.job_id] for row in rows if row.failed}
        self._already = sum(row.published for row in rows)
        self._due: float | None = None
        self._errors_written = False
        self._before = read_progress(store, run.run_id)
        self._encoder = encoder or (self._before and self._before.encoder)
        self._pace = Pace(run.plans, system.clock)
        self._videos = {row.job_id: row.video for row in rows if row.video is not None}
        steps = {job_id: plan.forwards_per_stage for job_id, plan in run.plans.items()}
        self.progress = RunProgress.of(run.run_id, rows, steps)
        for failed in self._failed.values():
            self.progress.note(failed)

    def note(self, happened: Event | Command) -> None:
        """Take note of an event, or of a command that is about to be carried out."""
        self.progress.note(happened)
        self._pace.note(happened)
        match happened:
            case RowFailed(job_id=job_id):
                self._failed[job_id] = happened
                self._errors_written = False
            case TaskDone(task=Task(kind=TaskKind.FINISH, job_id=job_id)):
                if (record := read_video_record(self._store, self._run.run_id, job_id)) is not None:
                    self._videos[job_id] = published_video(record)
            case Inspected(row=row) if row.video is not None:
                self._videos[row.job_id] = row.video
        for observer in self._observers:
            observer(happened, self.progress)
        self.write_if_due()

    def write_if_due(self) -> None:
        """Say that the run is alive, if it is time to: a step of a large model may take minutes."""
        begun = self._system.clock()
        if self._due is None or begun >= self._due:
            self._write_progress("rendering")
            if not self._errors_written:
                self._write_errors()
            now = self._system.clock()
            self._due = now + min(LONGEST_INTERVAL_S, max(self._interval_s, (now - begun) / SHARE))

    def stop(self) -> None:
        """The driver stops early: say so, lest somebody waits for it."""
        with suppress(MagiRayError):  # the error that stopped the run matters more
            self._store = with_patience(self._store, SHUTDOWN_PATIENCE_S)
            self._write_progress("stopped")
            if not self._errors_written:
                self._write_errors()

    def close(self, state: RunState) -> RunResult:
        """The run has ended: write ``progress.json``, ``results.parquet`` and ``errors.parquet``. With rows that were
        left out it is not done, but failed."""
        if state is RunState.DONE and self._run.record.problems:
            state = RunState.FAILED
        self._write_progress(state)
        self._write_errors()
        self._store.put(keys.run_results(self._run.run_id), _parquet(self._results(state)))
        videos = self.progress.videos.values()
        return RunResult(
            run_id=self._run.run_id,
            state=state,
            published=tuple(video.job_id for video in videos if video.phase is Phase.DONE),
            failed=tuple(self._failed.values()),
            stages_rendered=sum(video.rendered_stages for video in videos),
            stages_reused=sum(video.reused_stages for video in videos),
            already_published=self._already,
        )

    def _write_errors(self) -> None:
        failures: list[dict[str, Any]] = [
            {
                "job_id": failed.job_id,
                "class": failed.failure,
                "message": failed.message,
                "task": failed.kind,
                "index": failed.index,
                "stage": failed.stage,
                "attempts": failed.attempts,
                "log": failed.log,
                "row": self._run.plans[failed.job_id].row,
            }
            for failed in self._failed.values()
        ]
        failures += [
            {
                "job_id": problem.job_id,
                "class": FailureClass.INPUT,
                "message": explain([problem]),
                "attempts": 0,
                "row": problem.row,
                "column": problem.column,
            }
            for problem in self._run.record.problems
        ]
        self._store.put(keys.run_errors(self._run.run_id), _parquet(pa.Table.from_pylist(failures, schema=_ERRORS)))
        self._errors_written = True

    def _write_progress(self, state: str) -> None:
        self.progress.times, speeds = self._pace.times(self.progress), self._pace.speeds()
        if self._before is not None:
            # A driver that had nothing to denoise says nothing of how fast it goes.
            speeds = speeds or [*self._before.speeds]
            if state != "rendering" and not self._pace.begun:
                self.progress.times = self._before.progress.times
        content = self.progress.as_json() | {
            "state": state, "running": state == "rendering", "updated_unix": round(self._system.unix_time(), 3),
            "encoder": self._encoder, "speeds": [speed.model_dump() for speed in speeds],
        }  # fmt: skip
        self._store.put(keys.run_progress(self._run.run_id), json.dumps(content).encode())

    def _results(self, state: RunState) -> pa.Table:
        """One line for each row: what became of it, and the row's own prompts, tags and unknown columns unchanged.

        A row that is neither done nor failed has the state of the run: paused, cancelled, broken.
        """
        table = pa.Table.from_pylist([self._result(row, state) for row in self._run.manifest.rows], schema=_RESULTS)
        written, unknown = self._run.manifest.lines, self._run.manifest.unknown
        for name in ("prompt", "schedule", "tags"):
            if name in written.column_names:
                table = table.append_column(name, written.column(name))
        for name in unknown.column_names:
            # A user's column that has the name of one of ours gets another name.
            free = name
            while free in table.column_names or (free != name and free in unknown.column_names):
                free += "_"
            table = table.append_column(free, unknown.column(name))
        return table

    def _result(self, row: Row, state: RunState) -> dict[str, Any]:
        progress, plan = self.progress.videos[row.job_id], self._run.plans[row.job_id]
        done = progress.phase is Phase.DONE
        video = self._videos.get(row.job_id) if done else None
        ended = done or progress.phase is Phase.FAILED
        return {
            "job_id": row.job_id,
            "status": str(progress.phase if ended else state),
            "video": object_uri(self._store, keys.video(self._run.run_id, row.job_id)) if done else None,
            "frames": plan.timeline.num_frames,
            "fps": row.fps,
            "width": row.width,
            "height": row.height,
            "seed": row.seed,
            "duration_s": plan.timeline.num_frames / row.fps,
            "stages": progress.stages,
            "stages_reused": progress.reused_stages,
            "error": progress.message or None,
            **({} if video is None else asdict(video)),
        }


@dataclass(frozen=True, kw_only=True)
class ReportedProgress:
    """What a driver last reported of its run: how far it was, and its state then, a RunState or "stopped".

    encoder: as for ``RunReports``, None if it did not say.  speeds: what it measured.
    """

    progress: RunProgress
    state: str
    encoder: str | None = None
    speeds: tuple[Speed, ...] = ()


def read_progress(store: Store, run_id: str) -> ReportedProgress | None:
    """None when the run never was rendered, or the report cannot be read."""
    try:
        content = json_object(store.get(keys.run_progress(run_id)))
        if content["run_id"] != run_id:
            return None
        # Before there were states, a driver only said whether it was running.
        state = content.get("state", "rendering" if content["running"] else "stopped")
        return ReportedProgress(
            progress=RunProgress.from_json(content),
            state=str(state),
            encoder=content.get("encoder"),
            speeds=tuple(Speed.model_validate(speed) for speed in content.get("speeds", ())),
        )
    except (ObjectMissing, ObjectDamaged, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_failures(store: Store, run_id: str, jobs: Collection[str]) -> dict[str, RowFailed]:
    """The rows that failed, by job_id, as far as they were reported. jobs: of the run; others are not its rows. Those
    left out at submission are in the run's record."""
    try:
        data = pa.BufferReader(store.get(keys.run_errors(run_id)))
        # Not `pq.read_table`: its threads may outlive Python, which then aborts (one exit in 30 on a busy machine).
        table = pq.ParquetFile(data, page_checksum_verification=True).read(use_threads=False)
        return {
            line["job_id"]: RowFailed(
                job_id=line["job_id"],
                kind=TaskKind(line["task"]),
                index=int(line["index"]),
                stage=line.get("stage"),
                failure=FailureClass(line["class"]),
                message=str(line["message"]),
                attempts=int(line["attempts"]),
                log=line.get("log") or "",
            )
            for line in table.to_pylist()
            if line["task"] is not None and line["job_id"] in jobs
        }
    except (ObjectMissing, OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return {}  # derived: without it, or with another table in its place, the rows are tried again


def failed_for_its_medium(failed: RowFailed, plan: RowPlan) -> bool:
    """Whether the row may have failed for its image or clip, which submitting the manifest again gives anew."""
    tasks = TaskKind.EMBED, TaskKind.FINISH
    return plan.media is not None and failed.failure is FailureClass.INPUT and failed.kind in tasks


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()
