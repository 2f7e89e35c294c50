"""Decode: the clean latent of one chunk to one encoded segment. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from magi_ray.events import StageCommitted, StepDone
from magi_ray.render.artifacts.commits import commit, segment_pre_image
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage.records import digest, verified_commit
from magi_ray.storage.store import Store
from magi_ray.system import System, temporary_folder

MakeSegment = Callable[[RowPlan, int, Path], None]
"""(plan, chunk, out): decodes the stored latent of ``chunk`` and encodes its frames to the file ``out``.
Raises StoreError, NumericError, OutputError, WorkerLost."""


class Decoder:
    """The decode task. ``encoder``: ``media.encoder.encoder_identity`` of the run's ffmpeg."""

    def __init__(
        self, store: Store, make_segment: MakeSegment, *, encoder: str, run_id: str = "", system: System = System()
    ) -> None:
        self._store, self._make_segment, self._encoder, self._system = store, make_segment, encoder, system
        self._run_id = run_id

    def carry_out(self, plan: RowPlan, index: int) -> Iterator[StepDone | StageCommitted]:
        """Make and commit the segment of chunk ``index``, unless the store holds it. Yields nothing.

        Raises StoreError (ObjectMissing: the chunk is not there), NumericError, OutputError, WorkerLost.
        """
        pre_image = segment_pre_image(self._store, plan, index, self._encoder)
        if verified_commit(self._store, "segment", digest(pre_image)) is None:
            begun = self._system.clock()
            with temporary_folder() as folder:
                path = folder / "segment.mp4"
                self._make_segment(plan, index, path)
                seconds = self._system.clock() - begun
                about = {"run_id": self._run_id, "job_id": plan.job_id}
                payloads = {"segment": path}
                commit(self._store, "segment", pre_image, payloads, seconds=seconds, system=self._system, **about)
        yield from ()
