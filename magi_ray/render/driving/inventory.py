"""What the store already holds of a run's videos: the answer to "what is left to do?"."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache

from magi_ray.events import RowInventory
from magi_ray.render.artifacts.commits import embedded, segment_pre_image
from magi_ray.render.artifacts.videos import published, published_video, video_sizes
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.sampling.ranges import KVRanges, clean_chunks_needed
from magi_ray.storage import keys
from magi_ray.storage.records import digest, read_commit, verified_commit
from magi_ray.storage.retrying import RetryingStore
from magi_ray.storage.store import Store
from magi_ray.system import System

AT_ONCE = 16


def stages_done(store: Store, plan: RowPlan) -> int:
    """The number of leading stages after which denoising can go on: all committed, and intact as far as it must read
    them (the last one's window, and the clean chunks it looks back to). A damaged one counts as absent, and with it
    everything after."""
    done = 0
    while done < len(plan.stage_keys) and read_commit(store, "stage", plan.stage_keys[done]) is not None:
        done += 1
    return _resumable(plan, done, _intact(store, plan))


def stages_committed(store: Store, plan: RowPlan, *, system: System = System()) -> int:
    """How many stages of ``plan`` have a commit; none is read."""

    def is_there(key: str) -> bool:
        return store.exists(keys.commit("stage", key))

    return sum(system.map(is_there, plan.stage_keys, at_once=_at_once(store)))


def _at_once(store: Store) -> int:
    # A bucket, the only store that is wrapped so, answers many as fast as one; a folder does not.
    return AT_ONCE if isinstance(store, RetryingStore) else 1


def take_inventory_of_run(
    store: Store,
    run: Run,
    encoder: str | None,
    *,
    reread: Collection[str] = (),
    meanwhile: Callable[[], None] = lambda: None,
    system: System = System(),
) -> list[RowInventory]:
    """``take_inventory`` of every row, in the manifest's order.

    reread: job_ids of rows of which every object is verified.  meanwhile: called after each row; what it raises ends
    this.
    """
    sizes = video_sizes(store, run.run_id)

    def look(plan: RowPlan) -> RowInventory:
        return take_inventory(store, run.run_id, plan, encoder, sizes=sizes, reread=plan.job_id in reread)

    rows = []
    for row in system.map(look, run.plans.values(), at_once=_at_once(store)):
        rows.append(row)
        meanwhile()
    return rows


def take_inventory(
    store: Store,
    run_id: str,
    plan: RowPlan,
    encoder: str | None,
    *,
    sizes: Mapping[str, int] | None = None,
    reread: bool = False,
) -> RowInventory:
    """The row as the scheduler needs it: what is damaged counts as absent, so that it is made again.

    Of a published row only its record and the size of its mp4 are checked; of another one everything that is still
    needed is read and verified. ``reread``: verify every object of the row, whether it is published or not.
    encoder: whose segments count; None: no segments are looked up, and none is said to be there.
    sizes: ``videos.video_sizes``, if the caller has them.
    """
    timeline, row = plan.timeline, untouched(plan)
    found = published(store, run_id, plan, sizes=sizes, reread=reread)
    if found is not None and not reread:
        return replace(row, stages_done=timeline.num_stages, published=True, video=published_video(found))
    intact = _intact(store, plan)
    done = stages_done(store, plan)
    if reread:
        done = next((stage for stage in range(done) if not intact(stage)), done)
    segments = set()
    for chunk in range(_clean(plan, done)):
        if encoder is None:
            break
        if verified_commit(store, "segment", digest(segment_pre_image(store, plan, chunk, encoder))) is not None:
            segments.add(chunk)
        elif not intact(timeline.finishing_stage(chunk)):
            # Its latent is needed again and is damaged: go on from the stage that finishes it.
            done = timeline.finishing_stage(chunk)
            break
    ready = (done == timeline.num_stages and not reread) or embedded(store, plan)
    if not ready:
        # Captions are only made for stages to come, so the last stage is done again.
        done = min(done, timeline.num_stages - 1)
    done = _resumable(plan, done, intact)
    segments &= set(range(_clean(plan, done)))
    return replace(
        row,
        embedded=ready,
        stages_done=done,
        segments_done=frozenset(segments),
        published=found is not None and len(segments) == timeline.num_chunks,
        video=None if found is None else published_video(found),
    )


def untouched(plan: RowPlan) -> RowInventory:
    """The row with nothing of it in the store."""
    timeline = plan.timeline
    return RowInventory(
        job_id=plan.job_id, priority=plan.priority, num_stages=timeline.num_stages, num_chunks=timeline.num_chunks
    )


def _intact(store: Store, plan: RowPlan) -> Callable[[int], bool]:
    """Tells whether a stage is committed and intact; each is read once."""
    return cache(lambda stage: verified_commit(store, "stage", plan.stage_keys[stage]) is not None)


def _clean(plan: RowPlan, done: int) -> int:
    """How many chunks are clean once ``done`` stages are."""
    return max(0, done - plan.timeline.window_size + 1)


def _resumable(plan: RowPlan, done: int, intact: Callable[[int], bool]) -> int:
    """The largest number of stages up to ``done`` after which denoising can go on."""
    timeline = plan.timeline
    ranges = KVRanges.of(plan.settings.runtime, plan.controls, offset=timeline.offset)
    while done:
        if not intact(done - 1):
            done -= 1
            continue
        needed = clean_chunks_needed(timeline, ranges, done) if done < timeline.num_stages else range(0)
        damaged = [stage for stage in map(timeline.finishing_stage, needed) if not intact(stage)]
        if not damaged:
            break
        done = damaged[0]
    return done
