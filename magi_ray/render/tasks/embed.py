"""Embed: captions to text embeddings, an image or clip to the latent that a video begins with. No torch here.

Both are stored by content: rows with the same caption or the same clip share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from magi_ray.events import StageCommitted, StepDone
from magi_ray.render.artifacts.commits import commit
from magi_ray.render.plans import identity
from magi_ray.render.plans.row_plan import RowPlan, prefix_pre_image
from magi_ray.storage.keys import CommitKind
from magi_ray.storage.records import verified_commit
from magi_ray.storage.store import Store
from magi_ray.system import System


class EmbedNetworks(Protocol):
    """What an Embedder computes with."""

    def embed_caption(self, plan: RowPlan, caption: str) -> bytes:
        """The payload of the caption's "text" commit. Raises WeightsError, NumericError."""
        ...

    def encode_prefix(self, plan: RowPlan) -> bytes:
        """The payload of the "prefix" commit. Raises MediaError, WeightsError, NumericError, StoreError."""
        ...


class Embedder:
    """The embed task."""

    def __init__(self, store: Store, networks: EmbedNetworks, *, system: System = System()) -> None:
        self._store, self._networks, self._system = store, networks, system

    def carry_out(self, plan: RowPlan, index: int = 0) -> Iterator[StepDone | StageCommitted]:
        """Compute and commit those of ``plan``'s captions and prefix that the store lacks. Yields nothing.

        Raises MediaError, WeightsError, NumericError, StoreError.
        """
        for key, caption in sorted(set(zip(plan.caption_digests, plan.captions, strict=True))):
            pre_image = identity.text_pre_image(caption, plan.settings, plan.digests)
            self._compute_missing("text", key, pre_image, partial(self._networks.embed_caption, plan, caption))
        media, prefix_key = plan.media, plan.prefix_digest
        if media is not None and prefix_key is not None:
            pre_image = prefix_pre_image(media, plan.settings, plan.digests)
            self._compute_missing("prefix", prefix_key, pre_image, partial(self._networks.encode_prefix, plan))
        yield from ()

    def _compute_missing(
        self, kind: CommitKind, key: str, pre_image: Mapping[str, Any], compute: Callable[[], bytes]
    ) -> None:
        if verified_commit(self._store, kind, key) is None:
            begun = self._system.clock()
            payload = compute()
            seconds = self._system.clock() - begun
            commit(self._store, kind, pre_image, {kind: payload}, seconds=seconds, system=self._system)
