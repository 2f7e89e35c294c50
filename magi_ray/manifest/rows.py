"""A manifest without problems, as values: captions, rows, the defaults of rows, the manifest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import pyarrow as pa

from magi_ray.errors import Problem
from magi_ray.manifest.parquet import encode, unknown_columns
from magi_ray.settings import AS_THE_RUN, ChunkControl, Frozen, PrefixSettings, RuntimeConfig, Settings
from magi_ray.timeline import FRAMES_PER_CHUNK, FRAMES_PER_LATENT, LATENTS_PER_CHUNK, frames_for_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """``prompt`` and ``control`` hold from chunk ``start_chunk`` (from 0) until the next caption begins."""

    start_chunk: int
    prompt: str
    control: ChunkControl = AS_THE_RUN


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One valid row, with the run's defaults filled in.

    number: from 1.  captions: at least one, the first at chunk 0, start_chunk strictly rising.
    image, video: as written, at most one of them; prefix_location: its absolute path or s3:// URI.
    prefix: the run's settings, with the row's own values.
    seconds (> 0), num_chunks (≥ 1): exactly one is set.  width, height: pixels, multiples of 16.  fps: 1…120.
    seed: 0…2^63−1.  num_steps: fits the run's window and KV ranges.  priority: higher first.
    extra: the columns that magi-ray does not know, for the results.
    """

    number: int
    job_id: str
    captions: tuple[Caption, ...]
    image: str | None
    video: str | None
    prefix_location: str | None
    prefix: PrefixSettings
    seconds: float | None
    num_chunks: int | None
    width: int
    height: int
    fps: int
    seed: int
    num_steps: int
    priority: int
    tags: dict[str, str]
    extra: dict[str, Any]

    @property
    def mode(self) -> Literal["t2v", "i2v", "v2v"]:
        """What the video starts from: text only, an image, a video."""
        return "i2v" if self.image is not None else "v2v" if self.video is not None else "t2v"

    @property
    def frames(self) -> int:
        """Frames of new video that are asked for."""
        if self.num_chunks is not None:
            return self.num_chunks * FRAMES_PER_CHUNK
        assert self.seconds is not None
        return frames_for_seconds(self.seconds, self.fps)


class Defaults(Frozen):
    """What a row takes where its column is null or absent, and the ``runtime`` its num_steps must fit."""

    width: int
    height: int
    fps: int
    seed: int
    num_steps: int
    num_chunks: int
    runtime: RuntimeConfig
    prefix: PrefixSettings

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The run's defaults. num_frames is rounded up to whole chunks; frames of a prefix do not count."""
        runtime = settings.runtime
        num_chunks = max(1, math.ceil(runtime.num_frames // FRAMES_PER_LATENT / LATENTS_PER_CHUNK))
        return cls(
            width=runtime.video_size_w, height=runtime.video_size_h, fps=runtime.fps, seed=runtime.seed,
            num_steps=runtime.num_steps, num_chunks=num_chunks, runtime=runtime, prefix=settings.prefix,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest. Where problems are allowed for, rows with problems are left out.

    rows: those without problems.  unfit: the others, as far as they can be read; their media can still be looked at.
    problems: what the others were left out for, in row order. One of row 0 is of the whole table: no row is left then.
    digest: sha256 (hex) over the rows as written, without the run's defaults, in order: job_id, captions (a prompt is a
    schedule of one) and every other value that is not null, unknown columns included. The file's bytes and the order of
    its columns do not count. Where images and clips lie does not count either; what they show is hashed with the run.
    Rows that break a rule count as they were written.
    table: the whole table with its own types, so that unknown columns stay unchanged; row n is its line n.
    places: where each row begins in a text file ("rows.csv:7"), or in which part of a folder; empty for others.
    notes: what is allowed but probably not meant, a sentence each.
    """

    rows: tuple[Row, ...]
    unfit: tuple[Row, ...]
    problems: tuple[Problem, ...]
    digest: str
    table: pa.Table
    notes: tuple[str, ...]
    places: tuple[str, ...] = ()

    def without(self, problems: Sequence[Problem]) -> Self:
        """This manifest with ``problems`` too, and without the rows that have them."""
        bad = {problem.row for problem in problems}
        return replace(
            self,
            rows=() if 0 in bad else tuple(row for row in self.rows if row.number not in bad),
            problems=tuple(sorted((*self.problems, *problems), key=lambda problem: problem.row)),
        )

    @property
    def unknown(self) -> pa.Table:
        """The columns that magi-ray does not know, with their types; a line for each of ``rows``."""
        return self.lines.select(unknown_columns(self.table))

    @property
    def lines(self) -> pa.Table:
        """The lines of the table that ``rows`` were made of."""
        if len(self.rows) == self.table.num_rows:
            return self.table
        return self.table.take([row.number - 1 for row in self.rows])

    def parquet(self) -> bytes:
        """The bytes of the Parquet file that a run keeps."""
        return encode(self.table)


def table_for_show(manifest: Manifest) -> list[dict[str, Any]]:
    """The rows as JSON values with the defaults filled in, for people and for ``--json``. Unknown columns come last."""
    return [
        {
            "row": row.number,
            "job_id": row.job_id,
            "mode": row.mode,
            "captions": {str(caption.start_chunk): caption.prompt for caption in row.captions},
            "controls": {
                str(caption.start_chunk): caption.control.model_dump(mode="json", exclude_none=True)
                for caption in row.captions
                if caption.control != AS_THE_RUN
            },
            "from": row.image if row.image is not None else row.video,
            "length": _length(row),
            "seconds": row.seconds,
            "num_chunks": row.num_chunks,
            "size": f"{row.width}×{row.height}",
            "width": row.width,
            "height": row.height,
            "fps": row.fps,
            "seed": row.seed,
            "num_steps": row.num_steps,
            "priority": row.priority,
            "tags": row.tags,
            "extra": json.loads(json.dumps(row.extra, default=plain)),
        }
        for row in manifest.rows
    ]


def _length(row: Row) -> str:
    if row.seconds is not None:
        return f"{row.seconds:g} s"
    return f"{row.num_chunks} chunk{'s' * (row.num_chunks != 1)}"


def plain(value: Any) -> str:
    """Text for values of unknown columns that JSON cannot hold: bytes, dates, decimals."""
    return value.hex() if isinstance(value, bytes) else str(value)
