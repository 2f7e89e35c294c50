"""Time grids, intervals and windows equal the reference's, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from magi_ray.sampling.schedule import intervals, time_grid
from magi_ray.sampling.window import stages_done
from magi_ray.timeline import LATENTS_PER_CHUNK, Timeline


@pytest.fixture
def schedules(parity_dir: Path) -> dict[str, Any]:
    path = parity_dir / "schedules.json"
    if not path.is_file():
        pytest.skip(f"{parity_dir} has no schedules.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


# Other curves and another shift than every published config uses: nothing can ask for them.
NOT_OFFERED = {"t_16_square", "t_16_piecewise", "t_16_identity", "t_16_shift5"}


def test_time_grids_equal_the_reference_to_the_last_bit(schedules: dict[str, Any]) -> None:
    names = {name for name in schedules if name.startswith("t_")} - NOT_OFFERED
    for name in names:
        _, steps, *mode = name.split("_")
        found = time_grid(int(steps), shortcut_mode=mode[0]) if mode else time_grid(int(steps))
        assert found.tolist() == schedules[name], name
    assert names


def test_intervals_equal_the_reference(schedules: dict[str, Any]) -> None:
    names = [name for name in schedules if name.startswith("interval_")]
    for name in names:
        _, steps, *mode = name.split("_")
        found = intervals(int(steps), shortcut_mode=mode[0]) if mode else intervals(int(steps))
        assert list(found) == schedules[name], name
    assert names


def test_windows_equal_the_reference(schedules: dict[str, Any]) -> None:
    for expected in schedules["sequences"]:
        offset = expected["offset"]
        timeline = Timeline(
            num_chunks=expected["chunk_num"] - offset,
            window_size=expected["window"],
            prefix_latents=offset * LATENTS_PER_CHUNK,
        )
        stages = range(timeline.num_stages)
        windows = [timeline.window(stage) for stage in stages]
        done = [stages_done(timeline, stage) for stage in stages]
        assert [offset + w.start for w in windows] == expected["clip_start"]
        assert [offset + w.stop for w in windows] == expected["clip_end"]
        assert [d.start for d in done] == expected["t_start"]
        assert [d.stop for d in done] == expected["t_end"]
    assert schedules["sequences"]
