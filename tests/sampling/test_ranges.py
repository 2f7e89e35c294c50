from __future__ import annotations

import pytest

from magi_ray.sampling.ranges import KVRanges, cache_depth, clean_chunks_needed
from magi_ray.timeline import LATENTS_PER_CHUNK, Timeline

PUBLISHED = KVRanges(noise2clean=(5, 4, 3, 2), clean=1, num_steps=16)


def timeline(num_chunks: int, window: int, prefix_chunks: int = 0) -> Timeline:
    return Timeline(num_chunks=num_chunks, window_size=window, prefix_latents=prefix_chunks * LATENTS_PER_CHUNK)


@pytest.mark.parametrize(("step", "first"), [(0, 6), (3, 6), (4, 7), (8, 8), (11, 8), (12, 9), (15, 9)])
def test_a_chunk_sees_fewer_chunks_in_each_quarter_of_its_steps(step: int, first: int) -> None:
    assert PUBLISHED.in_flight(10, step) == (first, 11)


def test_a_range_ends_at_the_start_of_the_video() -> None:
    assert PUBLISHED.in_flight(2, 0) == (0, 3)


@pytest.mark.parametrize(
    ("noise2clean", "clean", "of_a_clean_chunk", "of_a_prefix_chunk"),
    [
        ((5, 4, 3, 2), 1, (12, 13), (12, 13)),
        ((5, 4, 3, 2), 3, (10, 13), (10, 13)),
        ((5, 4, 3, 2), -1, (11, 13), (11, 13)),
        ((), 1, (0, 13), (12, 13)),
        ((), -1, (0, 13), (5, 13)),
    ],
)
def test_what_clean_chunks_see(
    noise2clean: tuple[int, ...], clean: int, of_a_clean_chunk: tuple[int, int], of_a_prefix_chunk: tuple[int, int]
) -> None:
    ranges = KVRanges(noise2clean=noise2clean, clean=clean, num_steps=16)
    assert ranges.clean_chunk(12) == of_a_clean_chunk
    assert ranges.prefix_chunk(12) == of_a_prefix_chunk


@pytest.mark.parametrize(
    ("window", "prefix_chunks", "depth"),
    [(4, 0, 1), (4, 1, 1), (4, 2, 2), (4, 4, 4), (4, 9, 4), (2, 0, 3), (1, 0, 4), (1, 2, 4)],
)
def test_the_cache_is_as_deep_as_ranges_and_prefix_need(window: int, prefix_chunks: int, depth: int) -> None:
    assert cache_depth(timeline(40, window, prefix_chunks), PUBLISHED) == depth


def test_the_cache_does_not_grow_with_the_video_unless_all_of_history_is_seen() -> None:
    for window in (1, 2, 4):
        assert cache_depth(timeline(10_000, window), PUBLISHED) == cache_depth(timeline(20, window), PUBLISHED)
    history = KVRanges(noise2clean=(), clean=1, num_steps=16)
    assert cache_depth(timeline(30, 4, prefix_chunks=2), history) == 32


def test_a_cut_makes_no_cache_deeper_and_a_far_look_back_only_as_deep_as_it_is_far() -> None:
    def with_own(own: dict[int, tuple[int, ...]]) -> KVRanges:
        return KVRanges(noise2clean=(5, 4, 3, 2), clean=1, num_steps=16, own=own)

    assert cache_depth(timeline(40, 4), with_own({7: (1, 4, 3, 2), 20: (5, 4, 3, 1)})) == 1
    for num_chunks in (40, 10_000):
        # Chunk 20 in its last quarter is the oldest in flight, and sees 9 before it.
        assert cache_depth(timeline(num_chunks, 4), with_own({20: (1, 1, 1, 10)})) == 9


def test_a_resume_before_a_far_look_back_needs_what_it_will_see() -> None:
    ranges = KVRanges(noise2clean=(5, 4, 3, 2), clean=1, num_steps=16, own={20: (12, 1, 1, 1)})
    assert list(clean_chunks_needed(timeline(40, 4), ranges, 15)) == [9, 10, 11]
    assert list(clean_chunks_needed(timeline(40, 4), ranges, 21)) == [17]


def test_a_resume_with_published_settings_needs_only_the_chunk_that_just_became_clean() -> None:
    needed = [list(clean_chunks_needed(timeline(6, 4), PUBLISHED, stage)) for stage in range(9)]
    assert needed == [[], [], [], [], [0], [1], [2], [3], [4]]


def test_a_resume_with_window_1_needs_four_clean_chunks() -> None:
    assert list(clean_chunks_needed(timeline(20, 1), PUBLISHED, 10)) == [6, 7, 8, 9]


def test_a_resume_needs_every_clean_chunk_when_their_keys_depend_on_each_other() -> None:
    chained = KVRanges(noise2clean=(5, 4, 3, 2), clean=2, num_steps=16)
    assert list(clean_chunks_needed(timeline(20, 4), chained, 10)) == [0, 1, 2, 3, 4, 5, 6]
