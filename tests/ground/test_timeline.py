"""Arithmetic of chunks, windows and frames (spec §1, §4, §5)."""

from __future__ import annotations

import pytest

from magi_ray.timeline import FRAMES_PER_CHUNK, Timeline, chunks_for_frames, frames_for_seconds

SHAPES = [(n, w) for n in (1, 2, 3, 5, 9) for w in (1, 2, 4, 5)]


def test_a_window_opens_slides_and_closes() -> None:
    timeline = Timeline(num_chunks=5, window_size=3)

    assert timeline.num_stages == 7
    assert [list(timeline.window(stage)) for stage in range(7)] == [
        [0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4], [4],
    ]  # fmt: skip
    assert [timeline.entering(stage) for stage in range(7)] == [0, 1, 2, 3, 4, None, None]
    assert [timeline.finished(stage) for stage in range(7)] == [None, None, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(("num_chunks", "window_size"), SHAPES)
def test_every_chunk_is_in_flight_for_exactly_one_window(num_chunks: int, window_size: int) -> None:
    timeline = Timeline(num_chunks=num_chunks, window_size=window_size)
    stages = range(timeline.num_stages)

    for chunk in range(num_chunks):
        mine = [stage for stage in stages if chunk in timeline.window(stage)]
        assert mine == list(range(chunk, chunk + window_size))
        assert timeline.entering(mine[0]) == chunk
        assert timeline.finishing_stage(chunk) == mine[-1]
        assert timeline.finished(mine[-1]) == chunk
    assert all(len(timeline.window(stage)) >= 1 for stage in stages)


@pytest.mark.parametrize(
    ("prefix", "offset", "in_first", "dropped"),
    [(0, 0, 0, 0), (1, 0, 1, 0), (2, 0, 2, 8), (5, 0, 5, 20), (6, 1, 0, 0), (7, 1, 1, 4), (8, 1, 2, 8), (13, 2, 1, 4)],
)
def test_a_prefix_is_whole_chunks_and_the_beginning_of_the_first(
    prefix: int, offset: int, in_first: int, dropped: int
) -> None:
    timeline = Timeline(num_chunks=3, window_size=4, prefix_latents=prefix)

    assert (timeline.offset, timeline.prefix_latents_in_first_chunk, timeline.dropped_frames) == (
        offset,
        in_first,
        dropped,
    )
    assert timeline.num_frames == 3 * FRAMES_PER_CHUNK - dropped


@pytest.mark.parametrize("prefix", [0, 1, 5, 8, 13])
def test_the_frames_of_the_chunks_follow_each_other_and_fill_the_video(prefix: int) -> None:
    timeline = Timeline(num_chunks=4, window_size=2, prefix_latents=prefix)
    frame = 0
    for chunk in range(4):
        assert timeline.first_frame(chunk) == frame
        frame += timeline.chunk_frames(chunk)
    assert frame == timeline.num_frames


@pytest.mark.parametrize("prefix", [2, 5, 6, 8, 13])
def test_a_video_that_includes_its_prefix_is_longer_by_the_prefix_s_frames(prefix: int) -> None:
    without = Timeline(num_chunks=4, window_size=2, prefix_latents=prefix)
    included = Timeline(num_chunks=4, window_size=2, prefix_latents=prefix, include_prefix=True)

    assert included.num_frames - without.num_frames == included.included_frames == 4 * prefix
    for chunk in range(4):
        assert included.first_frame(chunk) - without.first_frame(chunk) == 4 * prefix
        assert included.chunk_frames(chunk) == without.chunk_frames(chunk)


@pytest.mark.parametrize("prefix", [0, 1])
def test_one_latent_frame_is_in_its_chunk_already_and_is_not_included_once_more(prefix: int) -> None:
    one, other = (Timeline(num_chunks=2, window_size=2, prefix_latents=prefix, include_prefix=i) for i in (True, False))
    assert (one.num_frames, one.first_frame(0)) == (other.num_frames, 0)


def test_the_duration_token_counts_what_remains_up_to_eight() -> None:
    timeline = Timeline(num_chunks=10, window_size=4)

    assert [timeline.duration_index(chunk) for chunk in range(10)] == [8, 8, 8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("seconds", "fps", "prefix", "chunks"),
    [
        (0.001, 24, 0, 1), (1, 24, 0, 1), (1.001, 24, 0, 2), (2, 24, 0, 2), (0.1 + 0.2, 80, 0, 1), (1, 25, 0, 2),
        (1, 24, 1, 1), (1, 24, 8, 2), (2 / 3, 24, 8, 1), (3600, 24, 0, 3600),
    ],
)  # fmt: skip
def test_seconds_are_the_fewest_chunks_that_last_as_long(seconds: float, fps: int, prefix: int, chunks: int) -> None:
    assert chunks_for_frames(frames_for_seconds(seconds, fps), prefix) == chunks


@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 6, 8])
@pytest.mark.parametrize("frames", [1, 4, 5, 23, 24, 25, 47, 48, 49, 1000])
def test_one_chunk_fewer_would_be_too_short_and_what_is_too_long_can_be_left_out(frames: int, prefix: int) -> None:
    chunks = chunks_for_frames(frames, prefix)

    assert Timeline(num_chunks=chunks, window_size=1, prefix_latents=prefix).num_frames >= frames
    if chunks > 1:
        assert Timeline(num_chunks=chunks - 1, window_size=1, prefix_latents=prefix).num_frames < frames
    for include in (False, True):
        whole, exact = (
            Timeline(num_chunks=chunks, window_size=1, prefix_latents=prefix, include_prefix=include, new_frames=new)
            for new in (None, frames)
        )
        shown = [exact.chunk_frames(chunk) for chunk in range(chunks)]
        assert exact.num_frames == exact.included_frames + frames == exact.included_frames + sum(shown)
        assert shown[:-1] == [whole.chunk_frames(chunk) for chunk in range(chunks - 1)]
        assert 1 <= shown[-1] == whole.chunk_frames(chunks - 1) - exact.trimmed_frames
        assert exact.first_frame(chunks - 1) == whole.first_frame(chunks - 1) == exact.num_frames - shown[-1]


@pytest.mark.parametrize(("chunks", "window"), [(1, 1), (1, 4), (3, 4), (9, 4), (5, 2)])
def test_the_stages_that_chunks_have_behind_them_are_those_of_the_windows(chunks: int, window: int) -> None:
    timeline = Timeline(num_chunks=chunks, window_size=window)
    behind = 0
    for stage in range(timeline.num_stages):
        assert timeline.chunk_stages(stage) == behind
        behind += len(timeline.window(stage))
    assert timeline.chunk_stages(timeline.num_stages) == behind == chunks * window
