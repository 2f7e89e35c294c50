"""What is rendered: runs with real plans, and object contents computed from the plan alone, so that each can be
checked."""

from __future__ import annotations

import hashlib
from functools import cache, cached_property
from pathlib import Path
from random import Random

from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.artifacts.commits import segment_pre_image
from magi_ray.render.plans.identity import Digests
from magi_ray.render.plans.row_plan import Media, RowPlan, plan_rows
from magi_ray.render.runs.record import Run, RunRecord
from magi_ray.settings import override, preset
from magi_ray.storage.records import digest
from magi_ray.storage.store import Store

ENCODER = "an encoder"
IMAGE = b"an image"
NUM_RUNS = 32


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"|".join(parts)).hexdigest().encode()


@cache
def run_of(number: int) -> Run:
    """One of NUM_RUNS runs of one to four rows; some rows share captions, some begin from an image."""
    random = Random(number)
    window, forwards = random.choice([(1, 2), (2, 1), (2, 3), (3, 2), (4, 1)])
    runtime = {
        "window_size": window,
        "num_steps": window * forwards,
        "noise2clean_kvrange": [2] if window % 2 or forwards % 2 else [2, 1],
    }
    settings = override(preset("magi-tiny", weights=Path("/weights")), {"runtime": runtime}, source="the simulation")
    rows, media = [], {}
    for row in range(random.randint(1, 4)):
        job_id = f"row{row}"
        schedule = [{"start_chunk": 0, "prompt": random.choice(["a boat", "a hill"])}]
        chunks = random.randint(1, 5)
        if chunks > 2:
            schedule.append({"start_chunk": 2, "prompt": random.choice(["a storm", "rain"])})
        rows.append(
            {"job_id": job_id, "schedule": schedule, "num_chunks": chunks, "seed": 100 * number + row}
            | {"priority": random.randint(0, 1)}
        )
        if random.random() < 0.3:
            media[job_id] = Media(kind="image", sha256=hashlib.sha256(IMAGE).hexdigest(), latents=1)
    manifest = manifest_of(rows, Defaults.of(settings), base=Path("/"))
    digests = Digests(dit="d", vae="v", t5="t", special_tokens="s")
    record = RunRecord(
        run_id=f"run-{number}",
        name="simulated",
        created_unix=0.0,
        magi_ray="0",
        manifest_digest=manifest.digest,
        manifest_sha256=hashlib.sha256(manifest.parquet()).hexdigest(),
        settings=settings,
        digests=digests,
        media=media,
    )
    return Run(record=record, manifest=manifest, plans=plan_rows(manifest.rows, settings, digests, media, {}))


class Contents:
    """What every object of a video must hold. A stage is made from the state before it and the caption of the chunk
    that enters."""

    def __init__(self, plan: RowPlan) -> None:
        self._plan = plan

    @staticmethod
    def text(key: str) -> bytes:
        return sha(b"text", key.encode())

    def prefix(self) -> bytes:
        assert self._plan.prefix_digest is not None
        return sha(b"prefix", self._plan.prefix_digest.encode())

    @staticmethod
    def next_state(plan: RowPlan, stage: int, before: bytes, caption: bytes) -> bytes:
        return sha(b"state", plan.stage_keys[stage].encode(), before, caption)

    @staticmethod
    def chunk(state: bytes) -> bytes:
        return sha(b"chunk", state)

    @staticmethod
    def segment(chunk: bytes) -> bytes:
        return sha(b"segment", chunk)

    @cached_property
    def states(self) -> list[bytes]:
        """After each stage."""
        found: list[bytes] = []
        before = self.prefix() if self._plan.prefix_digest else b""
        for stage in range(self._plan.timeline.num_stages):
            entering = self._plan.timeline.entering(stage)
            caption = b"" if entering is None else self.text(self._plan.caption_digests[entering])
            before = self.next_state(self._plan, stage, before, caption)
            found.append(before)
        return found

    @property
    def chunks(self) -> list[bytes]:
        timeline = self._plan.timeline
        return [self.chunk(self.states[timeline.finishing_stage(chunk)]) for chunk in range(timeline.num_chunks)]

    @property
    def video(self) -> bytes:
        return b"".join(self.segment(chunk) for chunk in self.chunks)


@cache
def contents_of(run_number: int, job_id: str) -> Contents:
    return Contents(run_of(run_number).plans[job_id])


def segment_key(store: Store, plan: RowPlan, chunk: int) -> str:
    return digest(segment_pre_image(store, plan, chunk, ENCODER))
