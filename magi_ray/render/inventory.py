"""What the store already holds of a run's videos: the answer to "what is left to do?"."""

from __future__ import annotations

from dataclasses import replace

from magi_ray.render.durable import embedded, segment_pre_image
from magi_ray.render.finish import published
from magi_ray.render.plan import RowPlan
from magi_ray.render.scheduler import Row
from magi_ray.storage.records import digest, read_commit, verified_commit
from magi_ray.storage.store import Store


def stages_done(store: Store, plan: RowPlan) -> int:
    """How many stages from the first on are committed. The last of them is read whole and checked, since denoising
    goes on from it; a damaged one counts as absent, and with it everything after."""
    done = 0
    while done < len(plan.stage_keys) and read_commit(store, "stage", plan.stage_keys[done]) is not None:
        done += 1
    while done and verified_commit(store, "stage", plan.stage_keys[done - 1]) is None:
        done -= 1
    return done


def take_stock(store: Store, run_id: str, plan: RowPlan, encoder: str) -> Row:
    """The row as the scheduler needs it. Of a row that is not published every segment is read whole: a damaged one is
    made again, as are damaged captions and prefixes."""
    timeline = plan.timeline
    row = Row(
        job_id=plan.job_id, priority=plan.priority, num_stages=timeline.num_stages, num_chunks=timeline.num_chunks
    )
    if published(store, run_id, plan) is not None:
        return replace(row, stages_done=timeline.num_stages, published=True)
    done = stages_done(store, plan)
    segments = set()
    for chunk in range(max(0, done - timeline.window_size + 1)):
        if verified_commit(store, "segment", digest(segment_pre_image(store, plan, chunk, encoder))) is not None:
            segments.add(chunk)
        elif verified_commit(store, "stage", plan.stage_keys[timeline.finishing_stage(chunk)]) is None:
            # Its latent is needed once more and is damaged: go on from there.
            done = timeline.finishing_stage(chunk)
            break
    return replace(
        row,
        embedded=done == timeline.num_stages or embedded(store, plan),
        stages_done=done,
        segments_done=frozenset(segments),
    )
