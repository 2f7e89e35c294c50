"""A manifest rendered by a background process, as `magi-ray submit --no-wait` does, and followed from Python."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from magi_ray.api.loading import settings_of
from magi_ray.api.model import Model
from magi_ray.errors import InputError, MagiRayError, magi_ray_command

if TYPE_CHECKING:
    from magi_ray.drivers.driver_monitor import Driver
    from magi_ray.drivers.process import DriverProcess
    from magi_ray.drivers.run_status import RunStatus
    from magi_ray.manifest import Manifest
    from magi_ray.render.runs.record import Run
    from magi_ray.settings import Settings
    from magi_ray.storage.store import Store

REFRESH_S = 0.5
# As `magi-ray cancel` promises.
CANCELLED_WITHIN_S = 15.0


def submit(
    table: object,
    model: str | Path | Model = "magi-tiny",
    *,
    store: str | Path = "magi-ray-store",
    name: str = "",
    weights: str | Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    settings: Mapping[str, Any] | None = None,
    local: bool = False,
    max_failed_rows: int | None = None,
) -> SubmittedRun:
    """Render every row of a table in a background process, which outlives this one. What exists already is not rendered
    again; a run that was paused, cancelled or killed goes on.

    table: a manifest: a path as for `magi-ray submit`, rows as dicts, or a table of pyarrow, pandas, polars or duckdb.
    model: as ``load`` takes it, with weights, device and settings; or a Model, whose settings are used.
    store: a folder or s3://bucket/prefix.  name: of the manifest, and so of the run; default: the path's.
    local: without Ray.  max_failed_rows: stop when more have failed.
    Raises ManifestError with every problem of every row, SettingsError, WeightsError, MediaError, StoreError; and what
    ended the process before it began.
    """
    from magi_ray.drivers.driver_monitor import find_driver
    from magi_ray.render.driving import requests
    from magi_ray.render.runs.record import read_run, with_takes
    from magi_ray.render.runs.submission import create, prepare
    from magi_ray.storage.opening import open_store
    from magi_ray.storage.probe import check_store

    if isinstance(model, Model):
        chosen = model.settings
    else:
        chosen = settings_of(model, weights=weights, device=device, settings=settings)
    manifest, called = _manifest(table, chosen, name)
    opened = open_store(str(Path(store).expanduser()) if str(store).startswith("~") else str(store))
    run, files = prepare(manifest, name=called, settings=chosen)
    for note in run.manifest.notes:
        logging.getLogger("magi_ray").warning(note)
    check_store(opened)
    options = ["--local"] if local else []
    options += [] if max_failed_rows is None else ["--max-failed-rows", str(max_failed_rows)]
    if not create(opened, run, files):
        run = with_takes(opened, run)
        if weights is not None and read_run(opened, run.run_id)[0].settings.weights != chosen.weights:
            options += ["--weights", str(Path(weights).expanduser().absolute())]  # they have moved since
    submitted = SubmittedRun(opened, run)
    if find_driver(opened, run.run_id) is None and not submitted.finished():
        requests.clear(opened, run.run_id)
        submitted.start(options)
    return submitted


class SubmittedRun:
    """A run, whoever renders it.  id: for `magi-ray watch`, `resume` and so on.  store: its address."""

    def __init__(self, store: Store, run: Run) -> None:
        self._store, self._run = store, run
        self._process: DriverProcess | None = None
        self.id, self.store = run.run_id, store.uri

    def __repr__(self) -> str:
        return f"<run {self.id} in {self.store}>"

    def status(self) -> RunStatus:
        """How far it is: ``state`` in a word, ``progress`` of each video, and the ``driver`` that renders it, if any.

        Raises StoreError.
        """
        from magi_ray.drivers.run_status import run_status

        return run_status(self._store, self._run, self._driver())

    def wait(self, timeout: float | None = None) -> RunStatus:
        """Until nobody renders it any more; then its status. Rows may have failed: see ``status().progress``.

        timeout: seconds; None: for as long as it takes.  Raises TimeoutError; the error that ended the process, if it
        was started here; StoreError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._at_rest():
            left = REFRESH_S if deadline is None else min(REFRESH_S, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"Run {self.id} is still rendered after {timeout:g} s; wait goes on waiting.")
            if self._process is None:
                time.sleep(left)
            else:
                self._process.ended(within_s=left)
        if self._process is not None:
            process, self._process = self._process, None
            process.result()
        return self.status()

    def videos(self) -> dict[str, str]:
        """Where the videos are that are done, by job_id: a path, or an s3:// address. Raises StoreError."""
        from magi_ray.render.artifacts.videos import published
        from magi_ray.storage import keys

        root = self.store.rstrip("/")
        done = [job_id for job_id, plan in self._run.plans.items() if published(self._store, self.id, plan)]
        return {job_id: f"{root}/{keys.video(self.id, job_id)}" for job_id in done}

    def finished(self) -> bool:
        """Whether all videos are done. Raises StoreError."""
        return len(self.videos()) == len(self._run.plans)

    def cancel(self) -> None:
        """Stop now; what was committed is kept, and ``submit`` goes on with it. Raises MagiRayError if whoever renders
        it has not ended in time; StoreError."""
        from magi_ray.render.driving import requests

        if self._at_rest() and self.finished():
            return
        requests.request(self._store, self.id, "cancel")
        deadline = time.monotonic() + CANCELLED_WITHIN_S
        while not self._at_rest():
            if time.monotonic() > deadline:
                raise MagiRayError(
                    f"Asked {self._driver()} to cancel run {self.id}, but it has not ended.",
                    remedy="This ends its processes if they run on this machine.",
                    next_command=self._command("cancel"),
                )
            time.sleep(0.1)

    def start(self, options: Sequence[str]) -> None:
        """Start a process that renders it. options: of `magi-ray drive`.  Raises what ended it before it began."""
        from magi_ray.drivers.process import DriverProcess

        resume = self._command("resume")
        self._process = DriverProcess(self._store, self.store, self.id, options, resume=resume)
        self._process.wait_until_begun()

    def _at_rest(self) -> bool:
        return self._driver() is None and (self._process is None or self._process.ended())

    def _driver(self) -> Driver | None:
        from magi_ray.drivers.driver_monitor import find_driver

        return find_driver(self._store, self.id)

    def _command(self, verb: str) -> str:
        return magi_ray_command(verb, self.id, "--store", self.store)


def _manifest(table: object, settings: Settings, name: str) -> tuple[Manifest, str]:
    """The manifest in ``table``, and its name. Raises ManifestError, InputError."""
    from magi_ray.manifest import Defaults, manifest_of, manifest_of_table, read_manifest

    defaults, called = Defaults.of(settings), name or "rows"
    if isinstance(table, str | Path):
        path = Path(table).expanduser()
        return read_manifest(path, defaults), name or str(path)
    if isinstance(table, list | tuple) and all(isinstance(row, Mapping) for row in table):
        return manifest_of(table, defaults, base=Path.cwd(), name=called), called
    if hasattr(table, "__arrow_c_stream__"):
        import pyarrow as pa

        return manifest_of_table(pa.table(table), defaults, base=Path.cwd(), name=called), called
    raise InputError(
        f"{type(table).__name__} is not a table.",
        remedy="Give a path, a list of dicts, or a table of pyarrow, pandas, polars (collected) or duckdb.",
    )
