"""`magi-ray plan`: what a submission would do, why, and what it costs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from magi_ray.cli import cli
from magi_ray.manifest import write_manifest
from magi_ray.render.upkeep.reencoding import Reencoding

SMALL = """
preset = "magi-tiny"
[runtime]
video_size_h = 32
video_size_w = 32
num_steps = 4
[encoder]
preset = "ultrafast"
"""
ROWS: list[dict[str, Any]] = [
    {"job_id": "one", "prompt": "sea", "num_chunks": 2},
    {"job_id": "two", "prompt": "hills", "num_chunks": 1},
]
JOB = ("m.parquet", "--job", "small.toml", "--store", "my store")


@pytest.fixture
def here(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, but for small.toml and m.parquet; and a cache beside it."""
    folder, cache = tmp_path / "here", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    (cache / "magi-tiny").symlink_to(tiny_weights)
    monkeypatch.setenv("MAGI_RAY_CACHE", str(cache))
    monkeypatch.chdir(folder)
    (folder / "small.toml").write_text(SMALL)
    write_manifest(ROWS, folder / "m.parquet")
    return folder


def run(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0, result.stderr
    return result


def told(*words: str) -> dict[str, Any]:
    """The last line of stdout, as --json prints it."""
    content: dict[str, Any] = json.loads(run(*words, "--json").stdout.splitlines()[-1])
    return content


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_against_a_store_that_is_not_there_renders_everything_and_writes_nothing(here: Path) -> None:
    before = tree(here)
    result = run("plan", *JOB)
    assert tree(here) == before
    assert not (here / "my store").exists()
    lines = [re.split(r"  +", line) for line in result.stdout.splitlines()]
    new = "new: no video of that job_id was rendered before"
    assert lines == [
        ["job", "what", "why", "frames", "stages left", "forwards left"],
        ["one", "render", new, "48", "5", "5"],
        ["two", "render", new, "24", "4", "4"],
    ]
    *_, sums, following = result.stderr.splitlines()
    assert re.fullmatch(r"Run m-[0-9a-f]{10}: 9 stages to render, 9 forwards\. Nothing was written\.", sums)
    assert shlex.split(following) == ["next:", "magi-ray", "submit", *JOB]


def test_a_dry_run_of_submit_says_the_same(here: Path) -> None:
    planned, dry = run("plan", *JOB), run("submit", *JOB, "--local", "--dry-run")
    assert planned.stdout == dry.stdout
    assert dry.stderr.splitlines()[-1] == f"{planned.stderr.splitlines()[-1]} --local"
    differing = {"next_command": "", "store_bytes_free": 0}  # others use this disk too
    assert told("plan", *JOB) | differing == told("submit", *JOB, "--dry-run") | differing


def test_the_time_is_told_once_a_speed_is_known(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("plan", *JOB)["left_s"] is None
    monkeypatch.setattr("magi_ray.render.upkeep.forecast.seconds_per_chunk", lambda *_: 40.0)
    assert told("plan", *JOB)["left_s"] == 120.0
    sums = "9 forwards, about 2 min as fast as earlier runs on this kind of device. Nothing was written."
    assert sums in run("plan", *JOB).stderr


def test_what_another_ffmpeg_encodes_again_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("plan", *JOB)["other_ffmpeg"] is None
    found = Reencoding(before="ffmpeg 3.4, x264 152", here="ffmpeg 7, x264 165", chunks=3)
    monkeypatch.setattr("magi_ray.render.upkeep.reencoding.reencoding", lambda *_: found)
    assert told("plan", *JOB)["other_ffmpeg"] == asdict(found)
    assert f"note: {found}" in run("plan", *JOB).stderr


def test_what_submit_then_does_is_what_was_planned(here: Path) -> None:
    for prompt, what, reason in (
        ("sea", "render", "new: no video of that job_id was rendered before"),
        ("waves", "resume at stage 2", 'prompt of chunk 1: "sea" → "waves"'),
    ):
        schedule = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 1, "prompt": prompt}]
        write_manifest([{"job_id": "one", "schedule": schedule, "num_chunks": 2}, ROWS[1]], here / "m.parquet")
        planned = told("plan", *JOB)
        one, two = planned["videos"]
        assert (one["what"], one["reasons"]) == (what, [reason])
        assert two["what"] == ("render" if prompt == "sea" else "reuse")
        assert planned["stages_left"] == one["stages_left"] + two["stages_left"]
        done = told(*shlex.split(planned["next_command"])[1:], "--local")
        assert done["stages_rendered"] == planned["stages_left"]
        assert {video["what"] for video in told("plan", *JOB)["videos"]} == {"reuse"}


def test_what_is_taken_from_a_clip_is_shown_and_a_clip_that_cannot_be_read_hides_no_row(here: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "manifests" / "quickstart-clip.mp4", here / "clip.mp4")
    (here / "letter.mp4").write_text("not a clip, but a letter")
    on = {"job_id": "on", "prompt": "sea", "num_chunks": 1, "video": "clip.mp4"}
    slow = on | {"job_id": "slow", "fps": 12, "prefix_from": "start", "prefix_frames": 10}
    write_manifest([on, slow, ROWS[0]], here / "m.parquet")
    ends, begins = "frames 16–47 of 48, ends at 2.00 s", "frames 0–7 of 24, ends at 0.67 s"
    for words in (("plan", *JOB), ("manifest", "show", "m.parquet")):
        output = run(*words).stdout
        assert ends in output
        assert begins in output
    for words, name in ((("plan", *JOB), "videos"), (("manifest", "show", "m.parquet"), "rows")):
        clips = [row["clip"] for row in told(*words)[name]]
        assert clips[0] == {"first": 16, "last": 47, "of": 48, "begins_s": pytest.approx(2 / 3), "ends_s": 2.0}
        assert clips[1] == {"first": 0, "last": 7, "of": 24, "begins_s": 0.0, "ends_s": pytest.approx(2 / 3)}
        assert clips[2] is None
    write_manifest([on, on | {"job_id": "odd", "video": "letter.mp4"}], here / "m.parquet")
    assert [row["clip"] is None for row in told("manifest", "show", "m.parquet")["rows"]] == [False, True]
