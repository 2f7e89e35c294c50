"""What a video takes of the store, before it is rendered and as it lies there afterwards."""

from __future__ import annotations

from pathlib import Path

from runs import MakeRun

from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving.local import render_locally
from magi_ray.render.plans.space import Space, whole_space
from magi_ray.render.upkeep.forecast import forecast
from magi_ray.settings import Settings, override
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

CLIP = Path(__file__).parents[3] / "manifests" / "quickstart-clip.mp4"
CHANGE = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 2, "prompt": "storm"}]
ROWS = [
    {"job_id": "text", "num_chunks": 3, "schedule": CHANGE},
    {"job_id": "same", "num_chunks": 2, "prompt": "sea", "seed": 9},
    {"job_id": "clip", "num_chunks": 1, "prompt": "waves", "video": str(CLIP)},
]


def test_the_estimate_is_what_the_store_then_takes(make_run: MakeRun, settings: Settings) -> None:
    wide = override(settings, {"runtime": {"video_size_h": 48, "video_size_w": 64}})
    store, encoder = MemoryStore(), encoder_identity(find_ffmpeg())
    run = make_run(store, ROWS, settings=wide)
    before = {entry.key for entry in store.entries("")}
    rows = forecast(store, run, encoder)
    told = sum((row.space_left for row in rows), Space())
    # Without what rows share: the caption of "same".
    whole = sum((whole_space(plan) for plan in run.plans.values()), Space())
    assert told.latents == whole.latents
    assert 0 < whole.other - told.other < 10_000

    render_locally(store, run)
    written = {entry.key: entry.size for entry in store.entries("") if entry.key not in before}
    roles = ("state-", "chunk-", "prefix-")
    latents = {key: size for key, size in written.items() if key.rpartition("/")[2].startswith(roles)}
    headers = sum(size for size in latents.values()) - told.latents
    assert 0 < headers <= 400 * len(latents)
    folders = ("stages/", "segments/", "texts/", "prefixes/", keys.videos(run.run_id))
    taken = sum(size for key, size in written.items() if key.startswith(folders))
    assert 0.8 * taken < told.total < 1.3 * taken
    assert [row.space_left for row in forecast(store, run, encoder)] == [Space()] * 3
