"""The commits of a video: captions, prefix, stages and segments, under the keys of its plan. No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magi_ray.errors import ObjectMissing
from magi_ray.render.artifacts.provenance import provenance
from magi_ray.render.plans import identity
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage.keys import CommitKind
from magi_ray.storage.records import Commit, digest, new_write_id, read_commit, verified_commit, write_commit
from magi_ray.storage.store import Store
from magi_ray.system import System


def commit(
    store: Store,
    kind: CommitKind,
    pre_image: Mapping[str, Any],
    payloads: Mapping[str, bytes | Path],
    *,
    seconds: float,
    system: System = System(),
    **about: str,
) -> Commit:
    """Store a result under the digest of its pre-image: first the payloads, then the commit.

    payloads: bytes, or the path of a file, by role.  seconds: how long it took to compute.  about: as for
    ``provenance``.
    Returns the commit that counts: an earlier whole one, if there is one. Raises StoreError.
    """
    key, write_id, made_by = digest(pre_image), new_write_id(), provenance(seconds=seconds, system=system, **about)
    return write_commit(
        store, kind=kind, key=key, payloads=payloads, pre_image=pre_image, provenance=made_by, write_id=write_id
    )


def committed(store: Store, kind: CommitKind, key: str) -> Commit:
    """The commit under ``key``. Raises ObjectMissing, and other kinds of StoreError."""
    found = read_commit(store, kind, key)
    if found is None:
        raise ObjectMissing(f"There is no {kind} {key[:12]}… in {store.uri}.", remedy="The next resume makes it again.")
    return found


def embedded(store: Store, plan: RowPlan) -> bool:
    """Whether the store holds the embeddings and the prefix that denoising ``plan`` needs. Reads all of them."""
    texts = all(verified_commit(store, "text", key) for key in sorted(set(plan.caption_digests)))
    return texts and (plan.prefix_digest is None or verified_commit(store, "prefix", plan.prefix_digest) is not None)


def chunk_commit(store: Store, plan: RowPlan, chunk: int) -> Commit:
    """The commit of the stage that completed ``chunk``. Raises ObjectMissing."""
    return committed(store, "stage", plan.stage_keys[plan.timeline.finishing_stage(chunk)])


def segment_pre_image(store: Store, plan: RowPlan, chunk: int, encoder: str) -> dict[str, Any]:
    """What ``chunk``'s segment depends on; its digest is the segment's key. Raises ObjectMissing without the chunk.

    encoder: ``media.encoder.encoder_identity``.
    """
    sha256 = chunk_commit(store, plan, chunk).payloads["chunk"].sha256
    timeline = plan.timeline
    return identity.segment_pre_image(
        sha256,
        plan.settings,
        plan.digests,
        encoder,
        dropped_frames=timeline.dropped_frames if chunk == 0 else 0,
        trimmed_frames=timeline.trimmed_frames if chunk == timeline.num_chunks - 1 else 0,
        first_frame=timeline.first_frame(chunk),
    )
