"""How far the chunks in flight are: each is one stage ahead of the next (spec §5)."""

from __future__ import annotations

from magi_ray.timeline import Timeline


def forwards_per_stage(*, num_steps: int, window_size: int) -> int:
    """Steps between two chunks becoming clean. ``num_steps`` is a multiple of ``window_size`` (settings check it)."""
    return num_steps // window_size


def stages_done(timeline: Timeline, stage: int) -> range:
    """The numbers of stages that the chunks of ``stage`` have behind them when it begins, newest chunk first."""
    window = timeline.window(stage)
    return range(stage - window[-1], stage - window[0] + 1)


def chunks_under_way(timeline: Timeline, stage: int) -> range:
    """Chunks that are neither noise nor clean before ``stage`` begins: what a committed state holds."""
    return range(max(0, stage - timeline.window_size + 1), min(timeline.num_chunks, stage))
