"""Makes a golden run: a small store as some version of magi-ray left it, which all later versions must resume.

    python tests/golden_runs/make.py tests/golden_runs/v2

A golden run is made once, by the version whose formats it keeps, and never again: `test_golden_runs.py` resumes it
with whatever the code is by then. Make another one, under the next number, when a format or an identity changes.

v0  format 1 of runs and videos: records without digests, no takes (made by commit 8dc936d, with this script)
v1  format 2: sealed records, a take, epochs and leases
v2  format 2: a clip with sound is continued: known by its file, from its start, for whole chunks, without its sound
v3  format 3: a clip known by its pixels, from its end, to the frame, with its sound

It holds one run of two rows: "done" is published; "mid" was killed in mid-chain. In v0 and v1 "done" begins from an
image and "mid" from text; in v2 and v3 both begin from a clip.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from magi_ray.manifest import Defaults, manifest_of
from magi_ray.media.encoder import find_ffmpeg
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import open_run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.settings import override, preset
from magi_ray.storage.local import LocalStore

CLIP: dict[str, Any] = {"video": "clip.mp4", "include_prefix": True}
ROWS: list[dict[str, Any]] = [
    {"job_id": "done", "prompt": "hills at dusk", "num_chunks": 1, **CLIP},
    {"job_id": "mid", "num_chunks": 3, "seed": 7, **CLIP,
     "schedule": [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 2, "prompt": "storm", "kv_range": [1, 2]}]},
]  # fmt: skip
KILLED_AT_STAGE = 4  # of "mid": its first chunk is clean, two are in flight


class Killed(BaseException):
    pass


def write_clip(path: Path) -> None:
    """Three seconds of a test picture with a tone."""
    picture, tone = "testsrc2=size=48x32:rate=24:duration=3", "sine=frequency=440:duration=3"
    inputs = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", tone]
    command = [*inputs, "-b:a", "32k", "-fflags", "+bitexact", str(path)]
    subprocess.run([find_ffmpeg(), "-loglevel", "error", *command], check=True)


def make(folder: Path) -> None:
    store = LocalStore((folder / "store").absolute())
    small = {"runtime": {"video_size_h": 32, "video_size_w": 32, "num_steps": 8}, "encoder": {"preset": "ultrafast"}}
    settings = override(preset("magi-tiny"), small)
    with tempfile.TemporaryDirectory() as base:
        write_clip(Path(base) / "clip.mp4")
        manifest = manifest_of(ROWS, Defaults.of(settings), base=Path(base))
        run, files = prepare(manifest, name="golden.parquet", settings=settings)
        create(store, run, files)
    if importlib.util.find_spec("magi_ray.render.plans.takes"):
        from magi_ray.render.plans.takes import add_take

        add_take(store, run.run_id, "mid", 1, num_chunks=3)
        run = open_run(store, run.run_id)

    def kill(progress: Any) -> None:
        if progress.videos["mid"].stages_done == KILLED_AT_STAGE:
            raise Killed

    try:
        render_locally(store, run, observers=[lambda _, progress: kill(progress)])
    except Killed:
        time.sleep(2)  # a commit may be under way
    for name in (".tmp", ".locks"):
        shutil.rmtree(store.root / name, ignore_errors=True)
    expected = {
        "run_id": run.run_id,
        "stage_keys": {job_id: plan.stage_keys for job_id, plan in run.plans.items()},
        "committed": sorted(key.split("/")[2] for key in store.list("stages/") if key.endswith("commit.json")),
        "frames": {job_id: plan.timeline.num_frames for job_id, plan in run.plans.items()},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
