"""In what the plans of two videos differ, in words. No store, no tensors.

The pre-images are compared that identities are hashes of, so nothing is named that changes no pixel, and nothing that
changes one goes unnamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from magi_ray.render.plans import identity
from magi_ray.render.plans.row_plan import Media, RowPlan
from magi_ray.settings import AS_THE_RUN, ChunkControl

SHOWN = 48  # characters of a prompt; of longer ones, those around the first that differs

# What people call a field of a pre-image; all others go by their own names.
_NAMES = {
    "format": "format of identities",
    "weights": "weights of the DiT",
    "vae": "weights of the VAE",
    "text_encoder": "weights of T5",
    "special_token_table": "file of the special tokens",
    "noise.law": "noise",
    "noise.seed": "seed",
    "max_length": "model.caption_max_length",
    "dtype": "text.dtype",
    "encoder.binary": "encoder",
    "first_frame": "frames of the clip in front",
}


def stages_shared(a: RowPlan, b: RowPlan) -> int:
    """How many stages from the first on are the same."""
    pairs = enumerate(zip(a.stage_keys, b.stage_keys, strict=False))
    shorter = min(len(a.stage_keys), len(b.stage_keys))
    return next((stage for stage, (one, other) in pairs if one != other), shorter)


def stage_changes(before: RowPlan, after: RowPlan, stage: int) -> list[str]:
    """Why ``stage``, the first that differs, and those behind it are others than ``before``: a sentence each."""
    told: list[str] = []
    if stage < min(len(before.stage_keys), len(after.stage_keys)):
        skip = {"kind", "stage", "previous", "entering", "prefix"}  # its place in the chain, and what follows below
        told += _told(before.pre_image(stage), after.pre_image(stage), skip=skip)
    if before.prefix_digest != after.prefix_digest:
        told += _prefix_changes(before, after)
    told += _told(_text_image(before), _text_image(after), skip={"kind", "caption"})
    told += _chunk_changes(before, after, stage)
    return list(dict.fromkeys(told))


def segment_changes(before: RowPlan, after: RowPlan, encoders: tuple[str, str]) -> list[str]:
    """Why segments of the same chunks are encoded anew. ``encoders``: the identity of ffmpeg then and now."""
    images = [
        identity.segment_pre_image(
            "", 0, plan.settings, plan.digests, encoder, first_frame=plan.timeline.included_frames
        )
        for plan, encoder in zip((before, after), encoders, strict=True)
    ]
    return _told(*images, skip={"kind", "chunk", "dropped_frames"})


def _prefix_changes(before: RowPlan, after: RowPlan) -> list[str]:
    old, new = before.media, after.media
    if old is None or new is None or old.kind != new.kind:
        return [f"began with {_beginning(old)}, now with {_beginning(new)}"]
    if old.sha256 != new.sha256:
        return [f"{old.kind}: sha256 {_value(old.sha256)} → {_value(new.sha256)}"]
    images = [identity.prefix_pre_image(old.kind, old.sha256, plan.settings, plan.digests) for plan in (before, after)]
    return _told(*images, skip={"kind", "media", "left_over"})


def _beginning(media: Media | None) -> str:
    return "text alone" if media is None else f"the {media.kind} of sha256 {_value(media.sha256)}"


def _text_image(plan: RowPlan) -> dict[str, Any]:
    """What embeddings depend on beside their captions, under the names of the settings."""
    image = {"dtype": "float32"} | identity.text_pre_image("", plan.settings, plan.digests)
    numeric = image.pop("numeric")
    return image | {"t5_device": numeric["device"], "numeric": {"cpu_threads": numeric["cpu_threads"]}}


def _chunk_changes(before: RowPlan, after: RowPlan, stage: int) -> Iterator[str]:
    """What the chunks that enter from ``stage`` on bring, and how many there are."""
    lengths = before.timeline.num_chunks, after.timeline.num_chunks
    chunks = range(stage, min(lengths))
    for where, old, new in _spans(chunks, before.captions, after.captions):
        yield f"prompt of {where}: {_quoted(old, new)}"
    for name in ChunkControl.model_fields:
        for where, old, new in _spans(chunks, _own(before, name), _own(after, name)):
            yield f"{name} of {where}: {old} → {new}"
    for chunk in chunks:
        takes = [sum(first <= chunk for first in plan.takes) for plan in (before, after)]
        if takes[0] != takes[1]:
            # What was rendered first is take 1.
            yield f"take {takes[1] + 1} from chunk {chunk} on was asked"
            break
    if lengths[0] != lengths[1]:
        knows = " (the last chunks of a video know how much is left)" if after.settings.special_tokens.duration else ""
        yield f"{'longer' if lengths[0] < lengths[1] else 'shorter'}: {lengths[0]} → {lengths[1]} chunks{knows}"


def _own(plan: RowPlan, name: str) -> list[str]:
    """What each chunk does otherwise than its run, for one field of ChunkControl."""
    values = [getattr(plan.controls.get(chunk, AS_THE_RUN), name) for chunk in range(plan.timeline.num_chunks)]
    return ["as the run" if value is None else str(list(value)) for value in values]


def _spans(chunks: range, before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Neighbouring chunks that differ alike: which they are, the value before, the value after."""
    for (old, new), group in groupby(chunks, key=lambda chunk: (before[chunk], after[chunk])):
        first, *others = group
        if old != new:
            yield f"chunks {first} to {others[-1]}" if others else f"chunk {first}", old, new


def _told(before: Mapping[str, Any], after: Mapping[str, Any], *, skip: set[str]) -> list[str]:
    """A sentence for each value that differs."""
    return [
        f"{_NAMES.get(name, name.removeprefix('sampling.'))} {_value(old, name)} → {_value(new, name)}"
        for name, old, new in _differing({k: before[k] for k in before if k not in skip},
                                         {k: after[k] for k in after if k not in skip})
    ]  # fmt: skip


def _differing(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, value before and value after of all that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _differing(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif before != after:
        yield name, before, after


def _value(value: Any, name: str = "") -> str:
    if name == "size":
        height, width = value
        return f"{width}×{height}"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:8]}…"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _quoted(old: str, new: str) -> str:
    """Two prompts in quotation marks; long ones shortened alike, so that the first difference can be seen."""
    start = 0
    if max(len(old), len(new)) > SHOWN:
        pairs = enumerate(zip(old, new, strict=False))
        differs = next((at for at, (a, b) in pairs if a != b), min(len(old), len(new)))
        start = max(0, differs - SHOWN // 3)
        start = old.rfind(" ", 0, start) + 1
    pieces = [
        f"{'…' * (start > 0)}{text[start : start + SHOWN]}{'…' * (len(text) > start + SHOWN)}" for text in (old, new)
    ]
    return f'"{pieces[0]}" → "{pieces[1]}"'
